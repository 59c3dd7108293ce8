"""The plot of the study `sparse-prefill`: latency by configuration, and speed-up by length."""

from collections.abc import Sequence
from pathlib import Path

from mlakit.report import style
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
# In this order, so that a method looks the same whichever others ran.
_ORDER = (DENSE, SPARSE, FLASH_MLA, NAIVE, DENSE_MQA, DENSE_MHA)
_WIDTH = 14.0


def plot(rows: Sequence[Row], device: str, path: Path) -> None:
    """Write a PNG of two panels: latency bars on a log scale, and how many times faster sparse is than each of the
    dense ones against the number of keys, with the line of no speed-up.
    """
    figure = style.new_figure(_WIDTH, 5.4, f"Sparse MLA prefill on {device}")
    left, right = figure.subplots(1, 2)
    ran = [method for method in METHODS if any(row.mean(method) for row in rows)]
    width = 0.85 / max(len(ran), 1)
    handles = {}
    for i, method in enumerate(ran):
        at = [x + (i - (len(ran) - 1) / 2) * width for x, row in enumerate(rows) if row.mean(method)]
        index = _ORDER.index(method)
        heights = [(row.mean(method) or 0) * 1e3 for row in rows if row.mean(method)]
        look = {"color": style.colour(index), "hatch": style.hatch(index), "edgecolor": "white", "linewidth": 0.3}
        handles[_TITLES[method]] = left.bar(at, heights, width, label=_TITLES[method], **look)
    left.set_xticks(range(len(rows)), [f"s_kv={row.s_kv}\ntopk={row.topk}" for row in rows])
    left.set(title="Attention latency", xlabel="configuration", ylabel="ms (log scale)")
    style.log_axis(left.yaxis, [1e3 * (row.mean(method) or 0) for row in rows for method in ran])
    style.tidy(left, grid="y")

    for method in (DENSE, DENSE_MHA, DENSE_MQA):
        points = sorted((row.s_kv, s) for row in rows if (s := row.speedup(method)))
        if points:
            index = _ORDER.index(method)
            look = {"color": style.colour(index), "marker": style.marker(index)}
            (handles[f"over {_TITLES[method]}"],) = right.plot(*zip(*points, strict=True), **look)
    handles["no speed-up (1x)"] = right.axhline(1, color="#000000", linestyle="--", linewidth=1.2)
    right.set(title="Speed-up of sparse attention", xlabel="keys (s_kv)", ylabel="times as fast as dense (log scale)")
    style.doubling_axis(right, [row.s_kv for row in rows])
    style.log_axis(right.yaxis)
    style.tidy(right)
    style.legend(figure, handles, _WIDTH)
    style.save(figure, path)
