"""The plot of the study `num-splits`: time over auto's by number of pieces, a line a batch."""

from collections.abc import Sequence
from pathlib import Path

from mlakit.report import style
from mlakit.studies.num_splits_report import Choice

_LARGEST_RATIO = 4.0


def plot(choices: Sequence[Choice], title: str, path: Path) -> None:
    """Write a PNG: a panel a backend."""
    from matplotlib import colormaps

    backends = list(dict.fromkeys(choice.backend for choice in choices))
    specs = list(dict.fromkeys(choice.spec for choice in choices))
    figure = style.new_figure(1.5 + 4.4 * len(backends), 4.6, f"below 1 the number is faster than auto; {title}")
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
            look = {"marker": style.marker(index), "markersize": 4, "color": colour}
            panel.plot(*zip(*drawn, strict=True), label=choice.auto.config.batch_title, **look)
        panel.axhline(1, color="#000000", linewidth=1)
        panel.set(xlabel="pieces", title=backend)
        style.doubling_axis(panel, {n for choice in choices for n in choice.given})
        style.tidy(panel)
        panel.legend(frameon=False, fontsize=style.SMALL)
    panels[0].set_ylim(0, min(panels[0].get_ylim()[1], _LARGEST_RATIO))
    panels[0].set_ylabel(f"time / auto's (cut off at {_LARGEST_RATIO:g})")
    style.save(figure, path)
