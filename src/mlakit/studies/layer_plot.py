"""Lines by sequence length and implementation, as the studies of the layer plot them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlakit.report import style

# In this order, so that an implementation looks the same whichever others are there.
_NAMES = ("naive", "absorb", "fused", "naive+flash")


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
    if not any(panel.value(row) for line in panels for panel in line for row in panel.rows):
        return False
    across = max(len(line) for line in panels)
    width = 1 + 3.6 * across
    figure = style.new_figure(width, 1.2 + 2.9 * len(panels), title)
    axes = figure.subplots(len(panels), across, squeeze=False)
    handles: dict[str, Any] = {}
    for line, row_of_axes in zip(panels, axes, strict=True):
        for axis, panel in zip(row_of_axes, line, strict=False):
            for index, implementation in enumerate(_NAMES):
                drawn = sorted(
                    (r.seq_len, v) for r in panel.rows if r.implementation == implementation and (v := panel.value(r))
                )
                if drawn:
                    look = {"color": style.colour(index), "marker": style.marker(index), "markersize": 4}
                    (handles[implementation],) = axis.plot(*zip(*drawn, strict=True), **look)
            axis.set(title=panel.title, xlabel="tokens", ylabel=panel.unit)
            style.doubling_axis(axis, {row.seq_len for row in panel.rows})
            style.log_axis(axis.yaxis, [panel.value(row) or 0 for row in panel.rows])
            style.tidy(axis)
        for axis in row_of_axes[len(line) :]:
            axis.set_visible(False)
    style.legend(figure, {name: handles[name] for name in _NAMES if name in handles}, width)
    style.save(figure, path)
    return True
