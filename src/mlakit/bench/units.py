"""Numbers as people read them: three significant digits and a unit."""

import math
from collections.abc import Collection


def seconds(value: float) -> str:
    """2.31e-05 is "23.1 µs"."""
    if not math.isfinite(value):
        return f"{value} s"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (float("inf"), 1.0, "s")):
        if value < limit * 0.9995:
            return f"{three(value * factor)} {unit}"
    raise AssertionError("unreachable: the last limit is infinite")


def rate(value: float, unit: str) -> str:
    """4.26e12 with "B/s" is "4.26 TB/s"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:
            return f"{three(value / factor)} {prefix}{unit}"
    return f"{three(value)} {unit}"


def three(value: float) -> str:
    """Three significant digits, without an exponent from 0.001 up."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    digits = 2 - math.floor(math.log10(abs(float(f"{value:.3g}"))))
    return f"{value:.{max(digits, 0)}f}" if digits <= 5 else f"{value:.2e}"


def percent(fraction: float) -> str:
    """0.453 is "45%", 0.0453 is "4.5%", 0.0023 is "0.23%"."""
    value = fraction * 100
    digits = 0 if abs(value) >= 9.95 else 1 if abs(value) >= 0.995 else 2
    return f"{value:.{digits}f}%"


def factors(values: Collection[float]) -> str:
    """The range of several: [1.448, 2.1] is "1.45x to 2.10x", and what reads the same is told once."""
    return " to ".join(dict.fromkeys(f"{value:.2f}x" for value in (min(values), max(values))))


def duration(value: float) -> str:
    """Whole seconds as m:ss or h:mm:ss."""
    minutes, secs = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
