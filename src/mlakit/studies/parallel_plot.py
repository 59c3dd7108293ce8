"""A plot of the study `parallel`: what each plan's time is made of."""

from collections.abc import Sequence
from pathlib import Path

from mlakit.report import style
from mlakit.studies.parallel_report import PARTS, Row

_COLOURS = {"attention": style.colour(0), "merge": style.colour(2), "communication": style.colour(3), "rest": "#999999"}
_WIDTH = 8.0


def plot(rows: Sequence[Row], device: str, path: Path) -> bool:
    """Write stacked bars of a batch's plans, hatched where they are predictions.

    Returns:
        False, and no file, if no row has a time.
    """
    drawn = [row for row in rows if row.median]
    if not drawn:
        return False
    from matplotlib.patches import Patch

    unit, factor = style.time_unit([row.median or 0.0 for row in drawn])
    figure = style.new_figure(_WIDTH, 1.4 + 0.4 * len(drawn), f"{rows[0].scope}, {rows[0].batch}, on {device}")
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
    style.tidy(axes, grid="x")
    shown = [name for name in PARTS if any(row.parts.get(name, 0.0) > 0 for row in drawn)]
    style.legend(figure, {name: Patch(color=_COLOURS[name]) for name in shown}, _WIDTH)
    style.save(figure, path)
    return True
