"""What the study `sparse-prefill` prints: the demonstration's lines and tables, and findings that follow from the
numbers. No torch here.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlakit.bench.units import factors
from mlakit.studies.method_rows import MethodRow
from mlakit.studies.sparse_prefill_options import MHA_D_QK, MHA_D_V

NAIVE, SPARSE, FLASH_MLA = "naive", "sparse", "flash_mla"
DENSE, DENSE_MHA, DENSE_MQA = "dense", "dense_mha", "dense_mqa"
METHODS = (NAIVE, DENSE, DENSE_MHA, DENSE_MQA, SPARSE, FLASH_MLA)
LABELS = {
    NAIVE: "Naive PyTorch (Sparse):",
    DENSE: "Dense MLA Prefill (MHA):",
    DENSE_MHA: "Dense, MHA mode 192/128:",
    DENSE_MQA: "Dense, MQA mode 576/512:",
    SPARSE: "Sparse MLA (DSA/MQA):",
    FLASH_MLA: "FlashMLA (DSA/MQA):",
}
WORDS = {
    NAIVE: "naive PyTorch",
    DENSE: "the dense MHA 576/512",
    DENSE_MHA: "dense in MHA mode 192/128",
    DENSE_MQA: "dense in MQA mode 576/512",
    SPARSE: "sparse",
    FLASH_MLA: "FlashMLA",
}
WRONG = "wrong result"


@dataclass
class Row(MethodRow):
    """All implementations on one configuration."""

    s_q: int
    s_kv: int
    topk: int
    heads: int
    d_qk: int
    d_v: int
    naive_chunk: int = 0  # queries at a time

    def speedup(self, over: str, of: str = SPARSE) -> float | None:
        """How many times faster `of` is than `over`."""
        mine, other = self.mean(of), self.mean(over)
        return other / mine if mine and other else None

    @property
    def density(self) -> float:
        """Keys attended to over keys there are; the notebook prints it as sparsity."""
        return self.topk / self.s_kv

    @property
    def dense_flops(self) -> float:
        """Every query with every key, 576/512."""
        return 2.0 * self.heads * self.s_q * self.s_kv * (self.d_qk + self.d_v)

    @property
    def sparse_flops(self) -> float:
        """Every query with `topk` keys."""
        return 2.0 * self.heads * self.s_q * self.topk * (self.d_qk + self.d_v)

    def flops(self, method: str) -> float:
        """Operations that an implementation's result takes."""
        if method == DENSE_MHA:
            return 2.0 * self.heads * self.s_q * self.s_kv * (MHA_D_QK + MHA_D_V)
        return self.dense_flops if method in (DENSE, DENSE_MQA) else self.sparse_flops

    def tflops(self, method: str) -> float | None:
        """TFLOP/s of an implementation."""
        mean = self.mean(method)
        return self.flops(method) / mean / 1e12 if mean else None

    def as_json(self) -> dict[str, Any]:
        """Plain values, derived ones included."""
        methods = {
            name: {**asdict(result), "flops": self.flops(name), "tflop_per_s": self.tflops(name)}
            for name, result in self.methods.items()
        }
        return {**asdict(self), "dense_flops": self.dense_flops, "sparse_flops": self.sparse_flops, "methods": methods}


def header(row: Row) -> Iterator[str]:
    """The lines above a configuration's results."""
    yield ""
    yield "=" * 70
    yield f"Testing: s_q={row.s_q}, s_kv={row.s_kv}, topk={row.topk}"
    yield f"Sparsity: {row.density * 100:.2f}% of tokens attended"
    yield f"Architecture: {row.heads} query heads, 1 kv heads (MQA)"


def method_line(row: Row, method: str) -> str:
    """An implementation's time, or why it has none."""
    result = row.methods[method]
    label = f"{LABELS[method]:24} "
    if result.mean is None:
        return f"{label} {result.reason.upper() if result.reason == WRONG else result.reason or '-'}"
    line = f"{label}{result.mean * 1e3:8.2f} ms"
    if method == NAIVE and row.naive_chunk < row.s_q:
        line += f"  ({row.naive_chunk} queries at a time, to fit the memory)"
    return line


def footer(row: Row) -> Iterator[str]:
    """Speed-ups of our sparse kernel, and what it computes a second."""
    over = {
        NAIVE: "Speedup vs Naive:", DENSE: "Speedup vs Dense:", DENSE_MHA: "Speedup vs MHA mode:",
        DENSE_MQA: "Speedup vs MQA mode:", FLASH_MLA: "Speedup vs FlashMLA:",
    }  # fmt: skip
    for method, words in over.items():
        if factor := row.speedup(method):
            yield f"  → {words:22} {factor:.2f}x"
    if rate := row.tflops(SPARSE):
        yield f"  → {'Throughput (Sparse):':22} {_rate(rate)} TFLOPs"


def _rate(tflops: float) -> str:
    return f"{tflops:.2f}" if tflops >= 1 else f"{tflops:.3g}"  # a CPU's would be 0.00


def table_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The summary table, cell by cell; what is no part of the demonstration has a column only if it has a time."""
    ran = [name for name in METHODS if name in (NAIVE, DENSE, SPARSE) or any(row.mean(name) for row in rows)]
    table = []
    for row in rows:
        cells = {"s_q": str(row.s_q), "s_kv": str(row.s_kv), "topk": str(row.topk)}
        cells["sparsity_%"] = f"{row.density * 100:.2f}%"
        for method in ran:
            mean = row.mean(method)
            cells[f"{method}_ms"] = "" if mean is None else f"{mean * 1e3:.6g}"
        table.append(cells)
    return table


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """The table of all configurations, and average speed-ups."""
    yield ""
    yield "=" * 80
    yield "PERFORMANCE SUMMARY"
    yield "=" * 80
    table = table_rows(rows)
    names = list(table[0])
    widths = {name: max(len(name), *(len(cells[name] or "-") for cells in table)) for name in names}
    yield "  ".join(f"{name:>{widths[name]}}" for name in names)
    for cells in table:
        yield "  ".join(f"{cells[name] or '-':>{widths[name]}}" for name in names)
    yield ""
    over = {NAIVE: "Naive PyTorch", DENSE: "Dense MLA", DENSE_MHA: "MHA mode 192/128", DENSE_MQA: "MQA mode 576/512"}
    for method, words in {**over, FLASH_MLA: "FlashMLA"}.items():
        factors = [s for row in rows if (s := row.speedup(method))]
        if factors:
            yield f"{f'Average speedup vs {words}:':36} {sum(factors) / len(factors):.2f}x"


def complexity(rows: Sequence[Row]) -> Iterator[str]:
    """Operations dense and sparse, what they promise, and what was achieved."""
    yield ""
    yield "=" * 80
    yield "COMPUTATIONAL COMPLEXITY ANALYSIS"
    yield "=" * 80
    for row in rows:
        yield ""
        yield f"Config: s_q={row.s_q}, s_kv={row.s_kv}, topk={row.topk}"
        yield f"   Dense FLOPs (MHA):       {row.dense_flops / 1e9:>10.2f} GFLOPs"
        yield f"   Sparse FLOPs (MQA):      {row.sparse_flops / 1e9:>10.2f} GFLOPs"
        yield f"   Theoretical speedup:     {row.dense_flops / row.sparse_flops:>10.2f}x"
        yield f"   Computation reduction:   {row.density:>10.1%} (only {row.topk}/{row.s_kv} tokens)"
        if measured := row.speedup(DENSE):
            yield f"   Measured speedup:        {measured:>10.2f}x"
        for method, words in {SPARSE: "Sparse", DENSE: "Dense", FLASH_MLA: "FlashMLA"}.items():
            if rate := row.tflops(method):
                yield f"   {f'{words} throughput:':24} {_rate(rate):>10} TFLOPs/s"
    yield ""
    yield "=" * 80


def findings(rows: Sequence[Row]) -> Iterator[str]:
    """What the numbers say, and nothing else; no line if the sparse kernel was not timed."""
    timed = [row for row in rows if row.mean(SPARSE)]
    if not timed:
        return
    yield ""
    yield "Findings:"
    for method in (NAIVE, DENSE, DENSE_MQA, DENSE_MHA, FLASH_MLA):
        yield from _finding(timed, method)
    yield from _growth(timed)
    rates = [rate for row in timed if (rate := row.tflops(SPARSE))]
    yield f"  - Sparse attention ran at {min(rates):.3g} to {max(rates):.3g} TFLOP/s"
    yield from _memory(timed[-1])


def _finding(rows: Sequence[Row], method: str) -> Iterator[str]:
    found = {row: s for row in map(_Key, rows) if (s := row.row.speedup(method))}
    if not found:
        return
    lost = [key.row for key, s in found.items() if s <= 1]
    high = max(found.values())
    name = WORDS[method]
    if not lost:
        yield f"  - Sparse is {factors(found.values())} as fast as {name}"
    else:
        where = ", ".join(f"s_kv={row.s_kv} ({row.speedup(method):.2f}x)" for row in lost)
        won = f"; elsewhere up to {high:.2f}x" if high > 1 else ""
        yield f"  - Sparse is not faster than {name} at {where}{won}"


class _Key:
    """A row as a key: by identity, as rows can change."""

    def __init__(self, row: Row) -> None:
        self.row = row


def _growth(rows: Sequence[Row]) -> Iterator[str]:
    same = [row for row in rows if (row.s_q, row.topk) == (rows[-1].s_q, rows[-1].topk) and row.speedup(DENSE)]
    if len(same) < 2:
        return
    first, last = min(same, key=lambda row: row.s_kv), max(same, key=lambda row: row.s_kv)
    longer = last.s_kv / first.s_kv
    grown = (last.speedup(DENSE) or 0) / (first.speedup(DENSE) or 1)
    slower = (last.mean(SPARSE) or 0) / (first.mean(SPARSE) or 1)
    yield (
        f"  - With {longer:.3g}x the keys ({first.s_kv} to {last.s_kv}) the speed-up over {WORDS[DENSE]} grows "
        f"{grown:.2f}x and sparse takes {slower:.2f}x the time"
    )
    promised = last.dense_flops / last.sparse_flops
    yield (
        f"  - At s_kv={last.s_kv} the operations promise {promised:.1f}x over {WORDS[DENSE]}; measured is "
        f"{last.speedup(DENSE) or 0:.1f}x"
    )


def _memory(row: Row) -> Iterator[str]:
    latent = 2 * row.s_kv * row.d_qk / 2**20
    literal = 2 * row.s_kv * row.heads * (row.d_qk + row.d_v) / 2**20
    expanded = 2 * row.s_kv * row.heads * (MHA_D_QK + MHA_D_V) / 2**20
    yield (
        f"  - Keys and values of {row.s_kv} tokens take {latent:.3g} MiB shared by all heads (MQA), {expanded:.4g} MiB "
        f"in MHA mode 192/128, {literal:.4g} MiB in MHA 576/512"
    )


def csv_text(rows: Sequence[Row]) -> str:
    """The summary table as CSV."""
    table = table_rows(rows)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()
