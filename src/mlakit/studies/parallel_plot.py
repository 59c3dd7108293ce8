"""A plot of the study `parallel`: what each plan's time is made of."""

from collections.abc import Sequence
from pathlib import Path

from mlakit.studies.parallel_report import PARTS, Row

_COLOURS = {"attention": "#0072B2", "merge": "#009E73", "communication": "#D55E00", "rest": "#999999"}


def plot(rows: Sequence[Row], device: str, path: Path) -> bool:
    """Write stacked bars of a batch's plans, hatched where they are predictions.

    Returns:
        False, and no file, if no row has a time.
    """
    drawn = [row for row in rows if row.median]
    if not drawn:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    slowest = max(row.median or 0.0 for row in drawn)
    unit, factor = ("ms", 1e3) if slowest >= 1e-2 else ("µs", 1e6)
    figure = Figure(figsize=(8, 1.4 + 0.4 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(drawn):
        begin = 0.0
        for name in PARTS:
            width = max(row.parts.get(name, 0.0), 0.0) * factor
            hatch = "//" if row.predicted else None
            axes.barh(place, width, left=begin, color=_COLOURS[name], edgecolor="white", hatch=hatch)
            begin += width
        if not row.predicted:
            total = (row.median or 0.0) * factor
            axes.plot([total, total], [place - 0.42, place + 0.42], color="black", linewidth=1.6)
    titles = [f"{row.plan.title}{', predicted' if row.predicted else ''}" for row in drawn]
    axes.set_yticks(range(len(drawn)), titles)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit}; black: the whole as measured, bars: its parts alone")
    axes.set_title(f"{rows[0].scope}, {rows[0].batch}, on {device}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    shown = [name for name in PARTS if any(row.parts.get(name, 0.0) > 0 for row in drawn)]
    handles = [Patch(color=_COLOURS[name], label=name) for name in shown]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=len(shown), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return True
