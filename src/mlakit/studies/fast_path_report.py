"""What the study `fast-path` prints: the table, and a conclusion that follows from the numbers. No torch here."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mlakit.bench.columns import PIPE_WIDTH
from mlakit.bench.units import factors, three
from mlakit.studies.line_table import LineTable


@dataclass
class Variant:
    """One way to compute at one length: median milliseconds, or in `reason` why there are none.

    `temporary_mib` is the peak on top of weights, inputs and cache; `relative` the difference from float64.
    """

    ms: float | None = None
    ci95_ms: tuple[float, float] | None = None
    host_ms: float | None = None
    temporary_mib: float | None = None
    relative: float | None = None
    reason: str = ""
    wrong: bool = False


@dataclass
class Row:
    """All variants at one length. Beyond `threshold` tokens optimized takes the standard path too."""

    seq_len: int
    batch: int
    threshold: int
    variants: dict[str, Variant] = field(default_factory=dict)

    @property
    def is_short(self) -> bool:
        """Whether the short path runs."""
        return self.seq_len <= self.threshold

    def ms(self, name: str) -> float | None:
        """Median milliseconds of a variant, None if it has no time."""
        return self.variants[name].ms if name in self.variants else None

    def speedup(self, name: str = "optimized") -> float | None:
        """How many times faster than the original a variant is."""
        mine, original = self.ms(name), self.ms("original")
        return original / mine if mine and original else None

    def memory_reduction(self, name: str = "optimized") -> float | None:
        """By which part of the original's temporary memory a variant takes less: 0.2 is 20%."""
        mine, original = (self.variants.get(n) for n in (name, "original"))
        if mine is None or original is None or mine.temporary_mib is None or not original.temporary_mib:
            return None
        return 1 - mine.temporary_mib / original.temporary_mib

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Row":
        """What `as_json` made of a row."""
        names = [field.name for field in fields(Variant)]
        variants = {name: Variant(**{n: variant[n] for n in names}) for name, variant in found["variants"].items()}
        for variant in variants.values():
            variant.ci95_ms = variant.ci95_ms and (variant.ci95_ms[0], variant.ci95_ms[1])
        return cls(found["seq_len"], found["batch"], found["threshold"], variants)

    def as_json(self) -> dict[str, Any]:
        """Plain values, derived ones included."""
        derived = {
            name: {"speedup": self.speedup(name), "memory_reduction": self.memory_reduction(name)}
            for name in self.variants
        }
        plain = asdict(self)
        plain["variants"] = {name: {**plain["variants"][name], **derived[name]} for name in self.variants}
        return plain


_COLUMNS = (
    ("Sequence Length", 15, 0),
    ("Batch Size", 10, 3),
    ("Original (ms)", 13, 0),
    ("Optimized (ms)", 14, 0),
    ("Speedup", 8, 1),
    ("Memory Reduction", 16, 4),
    ("Fused (ms)", 13, 2),
    ("Fused Speedup", 13, 5),
)


def table(width: int = PIPE_WIDTH) -> LineTable:
    """The table, as wide as there is room."""
    return LineTable(_COLUMNS, width)


def cells(row: Row) -> list[str]:
    """A line's cells; a variant without a time says why."""
    return [
        str(row.seq_len),
        str(row.batch),
        _time(row, "original"),
        _time(row, "optimized"),
        _factor(row.speedup()),
        _percent(row.memory_reduction()),
        _time(row, "fused"),
        _factor(row.speedup("fused")),
    ]


def _time(row: Row, name: str) -> str:
    variant = row.variants.get(name)
    if variant is None:
        return "-"
    return f"{variant.ms:.4f}" if variant.ms is not None else variant.reason.partition(" (")[0] or "-"


def _factor(value: float | None) -> str:
    return f"{value:.2f}x" if value else "-"


def _percent(value: float | None) -> str:
    return f"{value * 100:.1f}%" if value is not None else "-"


def conclusion(rows: Sequence[Row], *, ours: bool = True) -> Iterator[str]:
    """What the numbers say; `ours`: the original is the same layer by its standard path."""
    yield ""
    yield "Conclusion:"
    timed = [(row, s) for row in rows if (s := row.speedup())]
    short = [(row, s) for row, s in timed if row.is_short]
    if not timed:
        yield "  - Original and optimized were nowhere both measured"
    if short:
        faster = [row.seq_len for row, _ in short if _apart(row) > 0]
        slower = [f"{row.seq_len} tokens ({s:.2f}x)" for row, s in short if _apart(row) < 0]
        if len(faster) == len(short):
            yield f"  - The short path is faster at every length it takes: {factors([s for _, s in short])}"
        elif faster:
            yield f"  - The short path is faster at {', '.join(map(str, faster))} tokens"
        elif slower:
            yield "  - The short path is faster at no length measured"
        else:
            yield "  - The short path's times cannot be told from the standard path's at any length measured"
        if slower:
            yield f"  - The short path is slower at {', '.join(slower)}"
        saved = [(row.seq_len, r) for row, _ in short if (r := row.memory_reduction()) is not None]
        if saved:
            listed = ", ".join(f"{n} tokens {_percent(r)}" for n, r in saved)
            yield f"  - Reduction of temporary memory: {listed}"
    for row, s in timed:
        if not row.is_short:
            who = "both take" if ours else "optimized takes"
            odd = ", and still their times differ: something else does" if ours and _apart(row) else ""
            yield f"  - Beyond {row.threshold} tokens {who} the standard path: {row.seq_len} tokens {s:.2f}x{odd}"
    fused = [(row, s) for row in rows if (s := row.speedup("fused"))]
    if fused:
        least = [r for row, _ in fused if (r := row.memory_reduction("fused")) is not None]
        memory = f", {_percent(min(least))} to {_percent(max(least))} less temporary memory" if least else ""
        yield f"  - The fused layer: {factors([s for _, s in fused])} over the original{memory}"
    errors: dict[str, float] = {}
    for row in rows:
        for name, variant in row.variants.items():
            if variant.relative is not None:
                errors[name] = max(errors.get(name, 0.0), variant.relative)
    if errors:
        listed = ", ".join(f"{name} {three(error)}" for name, error in errors.items())
        yield f"  - Largest relative difference from float64: {listed}"
    for row in rows:
        for name, variant in row.variants.items():
            if variant.reason:
                yield f"  - {row.seq_len} tokens, {name}: {variant.reason}"


def _apart(row: Row) -> int:
    """1 if optimized is faster than the original, -1 if slower, 0 if their intervals overlap."""
    mine, original = row.variants["optimized"].ci95_ms, row.variants["original"].ci95_ms
    if mine is None or original is None:
        return 0
    return 1 if mine[1] < original[0] else -1 if mine[0] > original[1] else 0


def csv_text(rows: Sequence[Row]) -> str:
    """A line a length."""
    text = io.StringIO()
    lines = []
    for row in rows:
        line: dict[str, Any] = {"seq_len": row.seq_len, "batch": row.batch}
        for name, variant in row.variants.items():
            line |= {
                f"{name}_ms": variant.ms,
                f"{name}_temporary_mib": variant.temporary_mib,
                f"{name}_relative": variant.relative,
                f"{name}_speedup": row.speedup(name),
                f"{name}_memory_reduction": row.memory_reduction(name),
                f"{name}_reason": variant.reason,
            }
        lines.append(line)
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in line.items()} for line in lines)
    return text.getvalue()
