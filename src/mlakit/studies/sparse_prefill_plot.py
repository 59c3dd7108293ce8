"""The plot of the study `sparse-prefill`: latency by configuration, and speed-up by length."""

from collections.abc import Sequence
from pathlib import Path

from mlakit.studies.sparse_prefill_report import (
    DENSE,
    DENSE_MHA,
    DENSE_MQA,
    FLASH_MLA,
    METHODS,
    NAIVE,
    SPARSE,
    Row,
)

_TITLES = {
    NAIVE: "naive PyTorch",
    DENSE: "dense, MHA 576/512",
    DENSE_MHA: "dense, MHA mode 192/128",
    DENSE_MQA: "dense, MQA mode 576/512",
    SPARSE: "sparse (mlakit)",
    FLASH_MLA: "sparse (FlashMLA)",
}
# Okabe and Ito's palette, told apart with any colour vision; hatches and markers tell it in grey.
_STYLES = {
    NAIVE: ("#D55E00", "", "D"), DENSE: ("#0072B2", "//", "o"), DENSE_MHA: ("#56B4E9", "\\\\", "s"),
    DENSE_MQA: ("#CC79A7", "xx", "v"), SPARSE: ("#009E73", "", "^"), FLASH_MLA: ("#E69F00", "..", "P"),
}  # fmt: skip


def plot(rows: Sequence[Row], device: str, path: Path) -> None:
    """Write a PNG of two panels: latency bars on a log scale, and how many times faster sparse is than each of the
    dense ones against the number of keys, with the line of no speed-up.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ran = [method for method in METHODS if any(row.mean(method) for row in rows)]
    width = 0.85 / max(len(ran), 1)
    for i, method in enumerate(ran):
        at = [x + (i - (len(ran) - 1) / 2) * width for x, row in enumerate(rows) if row.mean(method)]
        colour, hatch, _ = _STYLES[method]
        heights = [(row.mean(method) or 0) * 1e3 for row in rows if row.mean(method)]
        left.bar(at, heights, width, label=_TITLES[method], color=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
    left.set_xticks(range(len(rows)), [f"s_kv={row.s_kv}\ntopk={row.topk}" for row in rows], fontsize=8)
    left.set(title="Attention latency", xlabel="configuration", ylabel="ms (log scale)")
    left.set_yscale("log")
    left.grid(axis="y", alpha=0.3)
    if ran:
        left.legend(frameon=False, fontsize=8)

    for method in (DENSE, DENSE_MHA, DENSE_MQA):
        points = sorted((row.s_kv, s) for row in rows if (s := row.speedup(method)))
        if points:
            colour, _, marker = _STYLES[method]
            right.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"over {_TITLES[method]}")
    right.axhline(1, color="#000000", linestyle="--", linewidth=1.2, label="no speed-up (1x)")
    right.set(title="Speed-up of sparse attention", xlabel="keys (s_kv)", ylabel="times as fast as dense (log scale)")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Sparse MLA prefill on {device}")
    figure.savefig(path, dpi=150, format="png")
