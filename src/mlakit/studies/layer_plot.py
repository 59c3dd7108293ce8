"""Lines by sequence length and implementation, as the studies of the layer plot them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, told apart with any colour vision; the markers tell it in grey.
STYLES = {
    "naive": ("#0072B2", "o"),
    "absorb": ("#E69F00", "s"),
    "naive+flash": ("#D55E00", "D"),
    "fused": ("#009E73", "^"),
}


@dataclass(frozen=True)
class Panel:
    """One plot: `value` of the rows' `implementation` by `seq_len`."""

    title: str
    rows: Sequence[Any]
    value: Callable[[Any], float | None]
    unit: str


def plot_panels(panels: Sequence[Sequence[Panel]], title: str, path: Path) -> bool:
    """Write a PNG with a line of panels for each list of them.

    Returns:
        False, and no file, if no row has a value.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not any(panel.value(row) for line in panels for panel in line for row in panel.rows):
        return False
    across = max(len(line) for line in panels)
    figure = Figure(figsize=(1 + 3.6 * across, 1.2 + 2.9 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), across, squeeze=False)
    handles: dict[str, Any] = {}
    for line, row_of_axes in zip(panels, axes, strict=True):
        for axis, panel in zip(row_of_axes, line, strict=False):
            rows, value = panel.rows, panel.value
            for implementation, (colour, marker) in STYLES.items():
                drawn = sorted((r.seq_len, v) for r in rows if r.implementation == implementation and (v := value(r)))
                if drawn:
                    x, y = zip(*drawn, strict=True)
                    style = {"color": colour, "marker": marker, "markersize": 4}
                    (handles[implementation],) = axis.plot(x, y, label=implementation, **style)
            axis.set_title(panel.title, fontsize=9)
            axis.set_xscale("log", base=2)
            ticks = _apart(sorted({row.seq_len for row in rows}))
            axis.set_xticks(ticks, [str(n) for n in ticks])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel("tokens", fontsize=8)
            axis.set_ylabel(panel.unit, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        for axis in row_of_axes[len(line) :]:
            axis.set_visible(False)
    names = [name for name in STYLES if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")
    return True


def _apart(tokens: Sequence[int]) -> list[int]:
    """Those far enough from one another on a log scale for their labels, the largest among them."""
    kept: list[int] = []
    for n in reversed(tokens):
        if not kept or n * 1.3 <= kept[-1] or tokens[-1] < 1.3 * tokens[0]:
            kept.append(n)
    return kept[::-1]
