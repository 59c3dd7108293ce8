"""The plot of the study `k-concat`: time and bandwidth by batch size."""

from collections.abc import Sequence
from pathlib import Path

from mlakit.report import style
from mlakit.studies.k_concat_report import StudyRow

_TITLES = {"cat": "torch.cat", "direct_copy": "direct copy", "triton": "mlakit"}
_WIDTH = 10.0


def plot(rows: Sequence[StudyRow], device: str, path: Path) -> None:
    """Write a PNG: a row of panels for each dtype, mean time on the left, bytes a second (with the copy ceiling) on the
    right.
    """
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure = style.new_figure(_WIDTH, 1 + 3.4 * len(dtypes), f"MLA keys from k_nope and k_pe on {device}")
    panels = figure.subplots(len(dtypes), 2, squeeze=False)
    handles = {}
    for (left, right), dtype in zip(panels, dtypes, strict=True):
        mine = [row for row in rows if row.dtype == dtype]
        for index, (method, title) in enumerate(_TITLES.items()):
            timed = [row for row in mine if row.mean(method)]
            if not timed:
                continue
            batches = [row.batch for row in timed]
            look = {"color": style.colour(index), "marker": style.marker(index)}
            (handles[title],) = left.plot(batches, [(row.mean(method) or 0) * 1e3 for row in timed], **look)
            right.plot(batches, [(row.rate(method) or 0) / 1e12 for row in timed], **look)
        ceiling = next((row.copy_bytes_per_s for row in mine if row.copy_bytes_per_s), None)
        if ceiling:
            handles["plain copy (measured)"] = right.axhline(ceiling / 1e12, **style.LIMIT)
        left.set(title=f"{dtype}: time", ylabel="ms (log scale)")
        style.log_axis(left.yaxis, [(row.mean(method) or 0) for row in mine for method in _TITLES])
        right.set(title=f"{dtype}: bytes read and written", ylabel="TB/s", ylim=(0, None))
        for panel in (left, right):
            panel.set_xlabel("batch size (tokens)")
            style.doubling_axis(panel, [row.batch for row in mine])
            style.tidy(panel)
    style.legend(figure, handles, _WIDTH)
    style.save(figure, path)
