"""Why the times of two records might not be comparable, and what their intervals do not know."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from mlakit.bench.units import percent, rate
from mlakit.report.compare_ratio import Basis, Ratio
from mlakit.report.load import LoadedRecord, Measurement, Session

# Clocks and ceilings of one device differ by less from run to run; beyond it times differ with them.
_CLOCKS_WITHIN = 0.02
_CEILINGS_WITHIN = 0.05

Rows = tuple[Measurement, Measurement]


def differences(a: LoadedRecord, b: LoadedRecord, pairs: Sequence[Rows], *, in_turn: bool = False) -> Iterator[str]:
    """A line for whatever else than the code differs between the two sides of paired rows, and slows one down.

    Of sides that were measured `in_turn`, the ceilings and clocks say nothing: each was seen at another moment, and
    what changed from one to the other changed for both.
    """
    sides = ([(a, before) for before, _ in pairs], [(b, after) for _, after in pairs])
    sessions = [list({id(s): s for s in (record.session(row) for record, row in side)}.values()) for side in sides]
    for what, get in _ENVIRONMENT:
        mine, other = ({str(value) for s in side if (value := get(s)) is not None} for side in sessions)
        if mine and other and mine != other:
            yield f"the {what} differs: {_list(mine)} in A, {_list(other)} in B"
    yield from _versions(sessions, pairs)
    if not in_turn:
        yield from _ceilings(sessions)
        yield from _clocks(pairs)
    for name, side in zip("AB", sides, strict=True):
        reasons = sorted(set(chain.from_iterable(row.throttled for _, row in side)))
        if reasons:
            count = sum(bool(row.throttled) for _, row in side)
            yield f"the GPU was slowed down in {count} of {len(side)} rows of {name}: {', '.join(reasons)}"
    for name, record in (("A", a), ("B", b)):
        if not record.complete and not in_turn:
            yield f"{name} is not complete: its run was interrupted"


def origins(ratios: Sequence[Ratio]) -> Iterator[str]:
    """Where the ratios' intervals come from, and what they cannot know."""
    bases = Counter(ratio.basis for ratio in ratios)
    words: tuple[tuple[Basis, str], ...] = (
        ("rounds", "medians of rounds that measured both sides in turn, with intervals between rounds' own ratios"),
        ("intervals", "bootstrapped from the recorded medians and their 95% intervals, as a record has no samples"),
        ("medians", "without an interval, as a record has medians alone"),
    )
    for basis, what in words:
        if bases[basis]:
            yield f"{bases[basis]} of {len(ratios)} ratios are {what}"
    if any(ratio.basis != "rounds" for ratio in ratios):
        yield (
            "intervals hold the noise within each run, not drift from one run to the other; "
            "mlakit compare --worktree REV measures both sides in turn"
        )


def _environment(*path: str) -> Callable[[Session], Any]:
    def get(session: Session) -> Any:
        value: Any = session.environment
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    return get


_ENVIRONMENT = (
    ("device", _environment("device", "name")),
    ("driver", _environment("driver")),
    ("version of CUDA", _environment("cuda")),
    ("version of torch", _environment("torch")),
    ("version of triton", _environment("triton")),
    ("version of Python", _environment("python")),
    ("operating system", _environment("system")),
    ("number of CPU threads", _environment("threads")),
)


def _versions(sessions: Sequence[Sequence[Session]], pairs: Sequence[Rows]) -> Iterator[str]:
    mine, other = ({k: v for s in side for k, v in s.peers.items()} for side in sessions)
    for name in sorted(mine.keys() & other.keys()):
        if mine[name] != other[name]:
            yield f"the version of {name} differs: {mine[name]} in A, {other[name]} in B"
    differing = {
        (before.backend, before.version, after.version)
        for before, after in pairs
        if before.version and after.version and before.version != after.version
    }
    for backend, before, after in sorted(differing):
        yield f"the version of {backend} differs: {before} in A, {after} in B"


def _ceilings(sessions: Sequence[Sequence[Session]]) -> Iterator[str]:
    """What the device itself did in each run: a plain copy and a matrix product know nothing of anyone's kernels."""
    mine, other = ({k: v for s in side for k, v in s.ceilings.items()} for side in sessions)
    for dtype in sorted(mine.keys() & other.keys()):
        for what, unit, before, after in (
            ("copy", "B/s", mine[dtype].copy_bytes_per_s, other[dtype].copy_bytes_per_s),
            (f"{dtype} matrix product", "FLOP/s", mine[dtype].flops_per_s, other[dtype].flops_per_s),
        ):
            if before and abs(after / before - 1) > _CEILINGS_WITHIN:
                yield (
                    f"the device was not as fast: its own {what} reached {rate(before, unit)} in A, "
                    f"{rate(after, unit)} in B ({percent(abs(after / before - 1))} apart)"
                )


def _clocks(pairs: Sequence[Rows]) -> Iterator[str]:
    apart = [
        (before.clock_mhz, after.clock_mhz)
        for before, after in pairs
        if before.clock_mhz and after.clock_mhz and abs(after.clock_mhz / before.clock_mhz - 1) > _CLOCKS_WITHIN
    ]
    if apart:
        before, after = max(apart, key=lambda both: abs(both[1] / both[0] - 1))
        yield f"the GPU's clock differs in {len(apart)} of {len(pairs)} rows, at most {before} MHz in A, {after} in B"


def _list(values: Iterable[str]) -> str:
    return " and ".join(sorted(values))
