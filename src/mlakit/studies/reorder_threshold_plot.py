"""The plot of the study `reorder-threshold`: decode's time over prefill's by q_len, a line a batch size."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlakit.bench.crossover import Curve

_MARKERS = "os^Dv<>Ph"


def plot(curves: Sequence[Curve], thresholds: Mapping[str, int], title: str, path: Path) -> None:
    """Write a PNG: a panel a backend, with the recommended threshold."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    backends = list(dict.fromkeys(curve.backend for curve in curves))
    sizes = sorted({curve.batch_size for curve in curves})
    colour = {size: colormaps["viridis"](0.9 * i / max(len(sizes) - 1, 1)) for i, size in enumerate(sizes)}
    figure = Figure(figsize=(1.5 + 5.2 * len(backends), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(backends), squeeze=False, sharey=True)[0]
    for panel, backend in zip(panels, backends, strict=True):
        for curve in (curve for curve in curves if curve.backend == backend):
            drawn = [(point.q_len, point.ratio) for point in curve.points if point.ratio is not None]
            marker = _MARKERS[sizes.index(curve.batch_size) % len(_MARKERS)]
            style = {"marker": marker, "markersize": 4, "color": colour[curve.batch_size]}
            panel.plot(*zip(*drawn, strict=True), label=f"batch {curve.batch_size}", **style) if drawn else None
        panel.axhline(1, color="#000000", linewidth=1)
        if (threshold := thresholds.get(backend)) is not None and threshold > 0:
            panel.axvline(threshold, color="#D55E00", linestyle=":", label=f"recommended: {threshold}")
        panel.set(xlabel="new tokens a request (q_len)", xscale="log", yscale="log", title=backend)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("time of decode pipeline / prefill pipeline")
    figure.suptitle(f"below 1 decode is faster; {title}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
