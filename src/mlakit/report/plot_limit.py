"""How near backends come to what the device can do: bars of the fraction of the limit, job by job."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from mlakit.report import style
from mlakit.report.grid import TableOptions, fractions_of_limit
from mlakit.report.load import LoadedRecord

_DRAWN = "mlakit"  # the key in the file's metadata under which the digest of what it shows is kept
_FORM = 3  # raise it when the drawing changes, so that files drawn before are stale

_WIDTH = 9.0  # inches


def draw_limits(records: Sequence[LoadedRecord], options: TableOptions, title: str) -> bytes:
    """A PNG of the jobs and columns that `options` name, in percent of the limit.

    Raises:
        ValueError: see `markdown_report`; or no row has a limit.
    """
    shown = fractions_of_limit(records, options)
    labels = list(dict.fromkeys(label for series in shown.values() for label in series))
    figure = style.new_figure(_WIDTH, 3.8, f"{title}; {records[0].sessions[-1].device}, higher is better")
    axes = figure.add_subplot()
    width = 0.82 / len(shown)
    for index, (name, series) in enumerate(shown.items()):
        places = [x - 0.41 + width * (index + 0.5) for x, label in enumerate(labels) if label in series]
        heights = [100 * series[label] for label in labels if label in series]
        bars = axes.bar(places, heights, width * 0.92, color=style.colour(index), label=name)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=style.SMALL, padding=1)
    axes.set_ylim(0, 100)
    axes.set_ylabel("% of what the device can do")
    axes.set_xticks(range(len(labels)), [label.replace(" ", "\n") for label in labels])
    style.tidy(axes, grid="y")
    handles, names = axes.get_legend_handles_labels()
    style.legend(figure, dict(zip(names, handles, strict=True)), _WIDTH)
    buffer = io.BytesIO()
    metadata = {"Software": None, "Title": title, _DRAWN: _digest(records, options, title)}
    figure.savefig(buffer, format="png", dpi=style.DPI, metadata=metadata)
    return buffer.getvalue()


def is_current(path: Path, records: Sequence[LoadedRecord], options: TableOptions, title: str) -> bool:
    """Whether the file is there and shows what `draw_limits` would draw now."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            found = image.info.get(_DRAWN)
    except (FileNotFoundError, UnidentifiedImageError):
        return False
    return bool(found == _digest(records, options, title))


def _digest(records: Sequence[LoadedRecord], options: TableOptions, title: str) -> str:
    """Of what is drawn: equal digests are the same picture, whichever matplotlib draws it."""
    content = [_FORM, title, records[0].sessions[-1].device, fractions_of_limit(records, options)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
