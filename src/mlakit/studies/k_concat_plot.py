"""The plot of the study `k-concat`: time and bandwidth by batch size."""

from collections.abc import Sequence
from pathlib import Path

from mlakit.studies.k_concat_report import StudyRow

_TITLES = {"cat": "torch.cat", "direct_copy": "direct copy", "triton": "mlakit"}
# Okabe and Ito's palette, told apart with any colour vision; the markers tell it in grey.
_STYLES = {"cat": ("#0072B2", "o"), "direct_copy": ("#E69F00", "s"), "triton": ("#009E73", "^")}


def plot(rows: Sequence[StudyRow], device: str, path: Path) -> None:
    """Write a PNG: a row of panels for each dtype, mean time on the left, bytes a second (with the copy ceiling) on the
    right.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure = Figure(figsize=(10, 1 + 3.4 * len(dtypes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(dtypes), 2, squeeze=False)
    for (left, right), dtype in zip(panels, dtypes, strict=True):
        mine = [row for row in rows if row.dtype == dtype]
        for method, (colour, marker) in _STYLES.items():
            timed = [row for row in mine if row.mean(method)]
            if not timed:
                continue
            batches = [row.batch for row in timed]
            style = {"color": colour, "marker": marker, "label": _TITLES[method]}
            left.plot(batches, [(row.mean(method) or 0) * 1e3 for row in timed], **style)
            right.plot(batches, [(row.rate(method) or 0) / 1e12 for row in timed], **style)
        ceiling = next((row.copy_bytes_per_s for row in mine if row.copy_bytes_per_s), None)
        if ceiling:
            right.axhline(ceiling / 1e12, color="#000000", linestyle=":", label="plain copy (measured)")
        left.set(title=f"{dtype}: time", ylabel="ms (log scale)", yscale="log")
        right.set(title=f"{dtype}: bytes read and written", ylabel="TB/s", ylim=(0, None))
        for panel in (left, right):
            panel.set(xlabel="batch size (tokens)", xscale="log")
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3)
            panel.legend(frameon=False)
    figure.suptitle(f"MLA keys from k_nope and k_pe on {device}")
    figure.savefig(path, dpi=150, format="png")
