"""What the study `k-concat` prints: tables, and conclusions that follow from the numbers. No torch here."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlakit.bench.columns import PIPE_WIDTH
from mlakit.bench.units import factors, three
from mlakit.studies.line_table import LineTable
from mlakit.studies.method_rows import MethodRow

_MIB = 2**20
_LARGE_BATCH = 512  # from here on it is prefill


@dataclass
class StudyRow(MethodRow):
    """All methods on one batch."""

    dtype: str
    batch: int
    element_bytes: int
    heads: int
    nope: int
    rope: int
    copy_bytes_per_s: float | None

    def speedup(self, method: str, over: str = "cat") -> float | None:
        """How many times faster `method` is than `over`."""
        mine, other = self.mean(method), self.mean(over)
        return other / mine if mine and other else None

    @property
    def moved_bytes(self) -> int:
        """Least traffic: each input read once, the output written once."""
        read = self.heads * self.nope + self.rope
        written = self.heads * (self.nope + self.rope)
        return self.batch * (read + written) * self.element_bytes

    @property
    def output_bytes(self) -> int:
        """Size of the result."""
        return self.batch * self.heads * (self.nope + self.rope) * self.element_bytes

    @property
    def expanded_bytes(self) -> int:
        """Size of k_pe repeated for every head: the intermediate that torch.cat is said to make."""
        return self.batch * self.heads * self.rope * self.element_bytes

    def rate(self, method: str) -> float | None:
        """Bytes a second of the least traffic."""
        mean = self.mean(method)
        return self.moved_bytes / mean if mean else None

    def fraction_of_copy(self, method: str) -> float | None:
        """The rate over that of a plain copy on this device."""
        rate = self.rate(method)
        return rate / self.copy_bytes_per_s if rate and self.copy_bytes_per_s else None

    def as_json(self) -> dict[str, Any]:
        """Plain values, derived ones included."""
        derived = {"moved_bytes": self.moved_bytes, "output_bytes": self.output_bytes}
        methods = {
            name: {**asdict(result), "bytes_per_s": self.rate(name), "fraction_of_copy": self.fraction_of_copy(name)}
            for name, result in self.methods.items()
        }
        return {**asdict(self), **derived, "methods": methods}


_COLUMNS = (
    ("Batch Size", 11, 0),
    ("cat (ms)", 10, 0),
    ("direct (ms)", 12, 0),
    ("Speedup", 8, 1),
    ("Reduction", 9, 3),
)
_KERNEL = (("mlakit (ms)", 12, 0), ("Over cat", 8, 2), ("TB/s", 5, 4), ("Of copy", 7, 5))


def table(with_triton: bool, width: int = PIPE_WIDTH) -> LineTable:
    """A dtype's table, with the kernel's columns if it ran, as wide as there is room."""
    return LineTable((*_COLUMNS, *_KERNEL) if with_triton else _COLUMNS, width, least_rule=70)


def banner(dtype: str, heads: int, nope: int, rope: int) -> Iterator[str]:
    """What stands above a dtype's table."""
    yield "=" * 80
    yield "Benchmark: torch.cat vs direct copy for MLA k_nope/k_pe concatenation"
    yield "=" * 80
    yield f"Tensor shapes: k_nope=[B, {heads}, {nope}], k_pe=[B, 1, {rope}]"
    yield f"dtype: {dtype}"
    yield ""


def cells(row: StudyRow) -> list[str]:
    """A line's cells, the kernel's included; a method without a time says why."""
    speedup = row.speedup("direct_copy")
    over, rate, fraction = row.speedup("triton"), row.rate("triton"), row.fraction_of_copy("triton")
    return [
        str(row.batch),
        _time(row, "cat"),
        _time(row, "direct_copy"),
        f"{speedup:.2f}x" if speedup else "-",
        f"{(1 - 1 / speedup) * 100:.1f}%" if speedup else "-",
        _time(row, "triton"),
        f"{over:.2f}x" if over else "-",
        f"{rate / 1e12:.2f}" if rate else "-",
        f"{fraction:.2f}" if fraction else "-",
    ]


def _time(row: StudyRow, method: str) -> str:
    result = row.methods.get(method)
    if result is None or result.mean is None:
        return (result.reason if result else "") or "-"
    return f"{result.mean * 1e3:.4f}"


def summary(rows: Sequence[StudyRow]) -> Iterator[str]:
    """Least, largest and mean speedup of direct copy, and of the kernel if it ran, over torch.cat."""
    titles = {"direct_copy": "Speedup summary:", "triton": "Speedup of mlakit's kernel over torch.cat:"}
    for method, title in titles.items():
        speedups = [s for row in rows if (s := row.speedup(method))]
        if speedups:
            yield ""
            yield title
            yield f"  Min:  {min(speedups):.2f}x"
            yield f"  Max:  {max(speedups):.2f}x"
            yield f"  Mean: {sum(speedups) / len(speedups):.2f}x"


def memory_table(rows: Sequence[StudyRow]) -> Iterator[str]:
    """Peak memory of a call on top of its inputs, beside the size of the result and of k_pe repeated for every head."""
    names = [name for name in ("cat", "direct_copy", "triton") if any(name in row.methods for row in rows)]
    titles = {"cat": "cat", "direct_copy": "direct", "triton": "mlakit"}
    yield ""
    yield "Peak memory of a call beyond its inputs (MiB, measured):"
    heads = [f"{'Batch Size':>11}", *(f"{titles[name]:>9}" for name in names), f"{'result':>9}", "k_pe for every head"]
    yield " | ".join(heads)
    for row in rows:
        peaks = [row.methods[name].peak_mib for name in names]
        cells = [f"{row.batch:>11}", *(f"{three(peak) if peak is not None else '-':>9}" for peak in peaks)]
        yield " | ".join([*cells, f"{three(row.output_bytes / _MIB):>9}", f"{three(row.expanded_bytes / _MIB):>19}"])


def conclusion(rows: Sequence[StudyRow]) -> Iterator[str]:
    """What the numbers say; nothing if no batch has both times."""
    timed = [(row, s) for row in rows if (s := row.speedup("direct_copy"))]
    if not timed:
        return
    yield ""
    yield "Conclusion:"
    lost = [row.batch for row, s in timed if s <= 1]
    won = [row.batch for row, s in timed if s > 1]
    from_here = [batch for batch in won if batch > max(lost, default=0)]
    if not won:
        yield "  - Direct copy was not faster than torch.cat at any batch size"
    elif from_here:
        yield f"  - Direct copy becomes beneficial at batch size >= {from_here[0]}"
    if lost and won:
        slower = ", ".join(f"{row.batch} ({s:.2f}x)" for row, s in timed if s <= 1)
        yield f"  - Direct copy is not faster at batch size {slower}"
    large = [s for row, s in timed if row.batch >= _LARGE_BATCH]
    if large:
        average = sum(large) / len(large)
        yield f"  - For batch sizes >= {_LARGE_BATCH}: avg speedup = {average:.2f}x"
        verdict = "direct copy is effective there" if average > 1 else "direct copy does not pay there"
        yield f"  - MLA prefill typically uses large batches: {verdict}"
    yield from _about_kernel(rows)
    yield from _about_memory(rows)


def _about_kernel(rows: Sequence[StudyRow]) -> Iterator[str]:
    over_best = [
        (row, min(s, row.speedup("triton", "direct_copy") or s)) for row in rows if (s := row.speedup("triton"))
    ]
    if not over_best:
        return
    slower = [f"{row.batch} ({s:.2f}x)" for row, s in over_best if s < 1]
    if slower:
        yield f"  - mlakit's kernel is slower than the better of the two at batch size {', '.join(slower)}"
    else:
        yield f"  - mlakit's kernel is {factors([s for _, s in over_best])} faster than the better of the two"
    last = over_best[-1][0]
    fractions = {name: f for name in ("cat", "direct_copy", "triton") if (f := last.fraction_of_copy(name))}
    words = {"cat": "torch.cat", "direct_copy": "direct copy", "triton": "mlakit's kernel"}
    reached = ", ".join(f"{words[name]} {fraction:.2f}" for name, fraction in fractions.items())
    yield f"  - Of the speed of a plain copy, at batch size {last.batch}: {reached}"


def _about_memory(rows: Sequence[StudyRow]) -> Iterator[str]:
    for row in reversed(rows):
        peak = row.methods["cat"].peak_mib if "cat" in row.methods else None
        if peak is None:
            continue
        extra = max(peak - row.output_bytes / _MIB, 0.0)
        expanded = row.expanded_bytes / _MIB
        made = "that intermediate is made" if extra > expanded / 2 else "no such intermediate is made"
        yield (
            f"  - At batch size {row.batch} torch.cat took {three(extra)} MiB beyond its result; "
            f"k_pe repeated for every head would be {three(expanded)} MiB: {made}"
        )
        return
