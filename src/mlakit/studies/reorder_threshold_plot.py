"""The plot of the study `reorder-threshold`: decode's time over prefill's by q_len, a line a batch size."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlakit.bench.crossover import Curve
from mlakit.report import style


def plot(curves: Sequence[Curve], thresholds: Mapping[str, int], title: str, path: Path) -> None:
    """Write a PNG: a panel a backend, with the recommended threshold."""
    from matplotlib import colormaps

    backends = list(dict.fromkeys(curve.backend for curve in curves))
    sizes = sorted({curve.batch_size for curve in curves})
    colour = {size: colormaps["viridis"](0.9 * i / max(len(sizes) - 1, 1)) for i, size in enumerate(sizes)}
    figure = style.new_figure(1.5 + 5.2 * len(backends), 4.6, f"below 1 decode is faster; {title}")
    panels = figure.subplots(1, len(backends), squeeze=False, sharey=True)[0]
    for panel, backend in zip(panels, backends, strict=True):
        for curve in (curve for curve in curves if curve.backend == backend):
            drawn = [(point.q_len, point.ratio) for point in curve.points if point.ratio is not None]
            marker = style.marker(sizes.index(curve.batch_size))
            look = {"marker": marker, "markersize": 4, "color": colour[curve.batch_size]}
            panel.plot(*zip(*drawn, strict=True), label=f"batch {curve.batch_size}", **look) if drawn else None
        panel.axhline(1, color="#000000", linewidth=1)
        if (threshold := thresholds.get(backend)) is not None and threshold > 0:
            panel.axvline(threshold, color=style.colour(3), linestyle=":", label=f"recommended: {threshold}")
        panel.set(xlabel="new tokens a request (q_len)", title=backend)
        style.doubling_axis(panel, {point.q_len for curve in curves for point in curve.points})
        style.log_axis(panel.yaxis)
        style.tidy(panel)
        panel.legend(frameon=False, fontsize=style.SMALL)
    panels[0].set_ylabel("time of decode pipeline / prefill pipeline")
    style.save(figure, path)
