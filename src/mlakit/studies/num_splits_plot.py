"""The plot of the study `num-splits`: time over auto's by number of pieces, a line a batch."""

from collections.abc import Sequence
from pathlib import Path

from mlakit.studies.num_splits_report import Choice

_MARKERS = "os^Dv<>Ph"
_LARGEST_RATIO = 4.0


def plot(choices: Sequence[Choice], title: str, path: Path) -> None:
    """Write a PNG: a panel a backend."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    backends = list(dict.fromkeys(choice.backend for choice in choices))
    specs = list(dict.fromkeys(choice.spec for choice in choices))
    figure = Figure(figsize=(1.5 + 4.4 * len(backends), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(backends), squeeze=False, sharey=True)[0]
    for panel, backend in zip(panels, backends, strict=True):
        for choice in (choice for choice in choices if choice.backend == backend):
            auto = choice.auto.timing
            drawn = [
                (n, row.timing.median / auto.median)
                for n, row in choice.given.items()
                if auto is not None and row.timing is not None
            ]
            if not drawn:
                continue
            index = specs.index(choice.spec)
            colour = colormaps["viridis"](0.9 * index / max(len(specs) - 1, 1))
            style = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 4, "color": colour}
            panel.plot(*zip(*drawn, strict=True), label=choice.auto.config.batch_title, **style)
        panel.axhline(1, color="#000000", linewidth=1)
        panel.set(xlabel="pieces", title=backend)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, min(high, _LARGEST_RATIO))
    panels[0].set_ylabel(f"time / auto's (cut off at {_LARGEST_RATIO:g})")
    figure.suptitle(f"below 1 the number is faster than auto; {title}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
