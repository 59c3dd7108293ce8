"""How every PNG of mlakit's looks: colours, markers, axes. matplotlib is imported when a figure is drawn."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart with any colour vision; shapes and hatches tell it in grey. Its black is for
# limits, and its yellow comes last, as it is faint on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
HATCHES = ("", "//", "..", "\\\\", "xx")
MARKERS = ("o", "s", "^", "D", "v", "P", "<", "X", ">", "p", "h")
LIMIT: dict[str, Any] = {"color": "#000000", "linestyle": ":", "linewidth": 1.4}
DPI = 150
TITLE, LABEL, SMALL = 10, 9, 8


def colour(index: int) -> str:
    """Of the series with this number; further series begin again, with other markers."""
    return COLOURS[index % len(COLOURS)]


def hatch(index: int) -> str:
    """Of the bars of the series with this number."""
    return HATCHES[index % len(HATCHES)]


def marker(index: int) -> str:
    """Of the series with this number. The cycles of markers and colours have no common divisor, so that 77 series
    look different.
    """
    return MARKERS[index % len(MARKERS)]


def new_figure(width: float, height: float, title: str) -> Any:
    """A figure of so many inches. Its title is cut off where it would not fit."""
    # The object interface: pyplot would keep the figure, and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    most = int(width * 13)  # characters of this size in an inch, a few fewer than there are
    lines = [line if len(line) <= most else f"{line[: most - 1]}…" for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize=TITLE, x=0.01, ha="left")
    return figure


def tidy(axes: Any, *, grid: str = "both") -> None:
    """A light grid behind what is drawn, small labels, no frame on top and at the right."""
    axes.grid(axis=grid, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    axes.title.set_fontsize(LABEL)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_fontsize(LABEL)


def log_axis(axis: Any, values: Iterable[float] = ()) -> None:
    """A log scale whose ticks are plain numbers: 1, 2, 5, 10; powers of ten alone if `values` span three or more."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    known = [value for value in values if value > 0]
    wide = bool(known) and max(known) > 1e3 * min(known)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def doubling_axis(axes: Any, values: Iterable[int]) -> None:
    """The x axis of sizes that double: log scale, ticks at the values themselves where they are not too near."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    ticks: list[int] = []
    known = sorted(set(values))
    for value in reversed(known):
        if not ticks or value * 1.3 <= ticks[-1] or known[-1] < 1.3 * known[0]:
            ticks.append(value)
    axes.set_xticks(ticks[::-1], [_short(value) for value in ticks[::-1]])
    if len(ticks) > 6:
        axes.tick_params(axis="x", rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())


def _short(value: int) -> str:
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)


def time_unit(seconds: Sequence[float]) -> tuple[str, float]:
    """The unit for these times, and what to multiply seconds with: that of the largest."""
    slowest = max(seconds, default=0.0)
    return ("s", 1.0) if slowest >= 10 else ("ms", 1e3) if slowest >= 1e-2 else ("µs", 1e6)


def legend(figure: Any, handles: dict[str, Any], width: float) -> None:
    """Below everything, in as many columns as fit into so many inches."""
    if handles:
        longest = max(map(len, handles))
        columns = max(1, min(len(handles), int(width * 13 / (longest + 8))))
        place = "outside lower center"
        figure.legend(list(handles.values()), list(handles), loc=place, ncols=columns, frameon=False, fontsize=SMALL)


def save(figure: Any, path: Path) -> None:
    """Write a PNG, whatever the file is called; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)
