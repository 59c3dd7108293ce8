"""What the study `correctness` shows: differences as tables, rows as CSV, a verdict. No torch here."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from mlakit.bench.units import three

FLOAT64 = "float64"
PHASES = ("prefill", "decode")


class Difference(Protocol):
    """See `layer_difference.Difference`."""

    @property
    def max_abs(self) -> float: ...
    @property
    def mean_abs(self) -> float: ...
    @property
    def relative(self) -> float: ...
    @property
    def worst_token(self) -> float: ...
    @property
    def cosine(self) -> float: ...

    def agrees(self, tolerance: float) -> bool: ...
    def as_json(self) -> dict[str, float | None]: ...


@dataclass
class Run:
    """One implementation at one size: latencies in ms (median) and MiB, or in `reason` why there are none."""

    implementation: str
    batch: int
    seq_len: int
    dtype: str
    reason: str = ""
    prefill_ms: float | None = None
    decode_ms: float | None = None
    prefill_temporary_mib: float | None = None
    decode_temporary_mib: float | None = None
    cache_mib: float | None = None

    @property
    def memory_mib(self) -> float | None:
        """Cache and temporaries of a prefill."""
        return None if self.prefill_temporary_mib is None else self.prefill_temporary_mib + (self.cache_mib or 0.0)


@dataclass
class Pair:
    """`first` compared with `second` (an implementation, or float64) in a phase of a size."""

    first: str
    second: str
    phase: str
    batch: int
    seq_len: int
    difference: Difference
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the two are the same up to rounding."""
        return self.difference.agrees(self.tolerance)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        names = ("first", "second", "phase", "batch", "seq_len")
        return {**{n: getattr(self, n) for n in names}, **self.difference.as_json(), "agrees": self.agrees}


def size_table(runs: Sequence[Run], pairs: Sequence[Pair], decode_steps: int) -> Iterator[str]:
    """The differences at one size, prefill beside decode, and what the implementations took."""
    first = runs[0]
    yield f"batch {first.batch}, {first.seq_len} tokens, then {decode_steps} decode steps"
    columns = f"{'max abs':>9} {'mean abs':>9} {'relative':>9} {'worst tok':>9} {'cosine':>9}"
    yield f"  {'':25}  {'prefill: ' + columns}   {'decode: ' + columns}"
    by_pair: dict[tuple[str, str], dict[str, Pair]] = {}
    for pair in pairs:
        by_pair.setdefault((pair.first, pair.second), {})[pair.phase] = pair
    for (one, other), phases in by_pair.items():
        name = f"{one} / {other}"
        cells = "   ".join(f"{'':{len(phase) + 2}}{_cells(phases.get(phase))}" for phase in PHASES)
        bad = [phase for phase in PHASES if phase in phases and not phases[phase].agrees]
        yield f"  {name:25}  {cells}{'  DISAGREE in ' + ' and '.join(bad) if bad else ''}".rstrip()
    for run in runs:
        if run.reason:
            yield f"  {run.implementation:25}  {run.reason}"
    timed = [run for run in runs if run.prefill_ms is not None]
    if timed:
        yield "  ms (prefill, decode step): " + ", ".join(
            f"{run.implementation} {three(run.prefill_ms or 0)}, {three(run.decode_ms or 0)}" for run in timed
        )


def _cells(pair: Pair | None) -> str:
    if pair is None:
        return f"{'-':>9}" * 5
    d = pair.difference
    return f"{d.max_abs:>9.2e} {d.mean_abs:>9.2e} {d.relative:>9.5f} {d.worst_token:>9.5f} {d.cosine:>9.6f}"


def verdict(pairs: Sequence[Pair], tolerance: float) -> Iterator[str]:
    """What the differences say."""
    if not pairs:
        yield "Nothing could be compared."
        return
    wrong = [pair for pair in pairs if not pair.agrees]
    sizes = len({(pair.batch, pair.seq_len) for pair in pairs})
    if not wrong:
        yield f"All {len(pairs)} comparisons at {sizes} sizes agree within {tolerance:g}."
    else:
        yield f"{len(wrong)} of {len(pairs)} comparisons disagree by more than {tolerance:g}:"
        for pair in wrong[:20]:
            d = pair.difference
            yield (
                f"  {pair.first} / {pair.second}, {pair.phase}, batch {pair.batch}, {pair.seq_len} tokens: "
                f"off by {d.relative:.3g}, the worst token by {d.worst_token:.3g}"
            )
        if len(wrong) > 20:
            yield f"  and {len(wrong) - 20} more"
    exact: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.second == FLOAT64:
            exact.setdefault(pair.first, []).append(pair.difference.relative)
    if exact:
        listed = ", ".join(f"{name} {max(found):.4f}" for name, found in sorted(exact.items(), key=lambda i: max(i[1])))
        yield f"Largest relative difference from float64: {listed}"
    between = [pair for pair in pairs if pair.second != FLOAT64]
    if between:
        far = max(between, key=lambda pair: pair.difference.relative)
        yield f"Furthest apart: {far.first} and {far.second}, {far.difference.relative:.4f} ({far.phase})"


def runs_csv(runs: Sequence[Run], pairs: Sequence[Pair]) -> str:
    """A line an implementation and size: latency, memory, differences from float64."""
    lines = []
    for run in runs:
        line: dict[str, Any] = asdict(run)
        for pair in pairs:
            if (pair.first, pair.second, pair.batch, pair.seq_len) == (
                run.implementation, FLOAT64, run.batch, run.seq_len,
            ):  # fmt: skip
                line |= {f"{pair.phase}_{name}": value for name, value in pair.difference.as_json().items()}
                line[f"{pair.phase}_agrees"] = pair.agrees
        lines.append(line)
    return _csv(lines)


def pairs_csv(pairs: Sequence[Pair]) -> str:
    """A line a pair, phase and size."""
    return _csv([pair.as_json() for pair in pairs])


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in line.items()} for line in lines)
    return text.getvalue()
