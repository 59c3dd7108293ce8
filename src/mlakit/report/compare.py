"""Two records side by side: rows paired by what was measured, each with a ratio that says how sure it is."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlakit.report.compare_conditions import differences, origins
from mlakit.report.compare_ratio import Ratio, Times, Verdict, ratio
from mlakit.report.load import LoadedRecord, Measurement

SAME_WITHIN = 0.02
# What a row that had a time may have become without anyone's code getting worse.
_NOT_HERE = ("unavailable", "unsupported", "no time")

Outcome = Literal[Verdict, "LOST", "GAINED", "NO TIME"]
OUTCOMES: tuple[Outcome, ...] = ("SLOWER", "LOST", "FASTER", "SAME", "UNSURE", "GAINED", "NO TIME")


@dataclass(frozen=True)
class Pair:
    """The same thing measured twice: `before` in A, `after` in B. `ratio` is None where a side has no time."""

    before: Measurement
    after: Measurement
    ratio: Ratio | None
    outcome: Outcome

    def is_regression(self, limit: float) -> bool:
        """B takes longer by more than `limit` (0.05: 5%), by all of the interval; or it fails where A had a time."""
        if self.ratio is None:
            return self.outcome == "LOST" and self.after.status not in _NOT_HERE
        return self.ratio.is_above(limit)


@dataclass(frozen=True)
class Comparison:
    """All pairs, what only one side has, and why the two might not be comparable (`warnings`)."""

    a: LoadedRecord
    b: LoadedRecord
    margin: float
    pairs: tuple[Pair, ...]
    only_a: tuple[Measurement, ...]
    only_b: tuple[Measurement, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    counts: Counter[Outcome] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", Counter(pair.outcome for pair in self.pairs))

    def regressions(self, limit: float) -> list[Pair]:
        """Pairs of which the interval says that B takes longer by more than `limit`, or that B fails at."""
        return [pair for pair in self.pairs if pair.is_regression(limit)]


def compare_records(
    a: LoadedRecord, b: LoadedRecord, *, margin: float = SAME_WITHIN, ratios: Sequence[Ratio | None] | None = None
) -> Comparison:
    """Pair the rows of two records. Differences below `margin` (0.02: 2%) count as none.

    `ratios` are those of records that were measured in turn, row by row.

    Raises:
        ValueError: no row of one is in the other.
    """
    after = _by_identity(b.rows)
    before = _by_identity(a.rows)
    known = ratios or [None] * len(before)
    pairs = [
        _pair(row, after[key], margin, found)
        for (key, row), found in zip(before.items(), known, strict=True)
        if key in after
    ]
    if not pairs:
        raise ValueError(
            f"nothing to compare: no row of {a.path} measured what a row of {b.path} did "
            f"({_what(a.rows)}; {_what(b.rows)})"
        )
    return Comparison(
        a,
        b,
        margin,
        tuple(pairs),
        tuple(row for key, row in before.items() if key not in after),
        tuple(row for key, row in after.items() if key not in before),
        tuple(differences(a, b, [(pair.before, pair.after) for pair in pairs], in_turn=ratios is not None)),
        tuple(origins([pair.ratio for pair in pairs if pair.ratio])),
    )


def _by_identity(rows: Iterable[Measurement]) -> dict[tuple[str, int], Measurement]:
    """Rows by what they measured; the same thing measured several times is told apart by its turn."""
    found: dict[tuple[str, int], Measurement] = {}
    turns: Counter[str] = Counter()
    for row in rows:
        found[row.identity, turns[row.identity]] = row
        turns[row.identity] += 1
    return found


def _what(rows: Sequence[Measurement]) -> str:
    jobs = [f"{row.operation} {row.job} by {row.backend}" for row in rows]
    return f"{jobs[0]}" + (f" and {len(jobs) - 1} more" if len(jobs) > 1 else "") if jobs else "no rows"


def _pair(before: Measurement, after: Measurement, margin: float, known: Ratio | None) -> Pair:
    if before.seconds and after.seconds:
        sides = (Times(row.seconds or 0.0, row.samples, row.interval) for row in (before, after))
        found = known or ratio(*sides)
        return Pair(before, after, found, found.verdict(margin))
    return Pair(before, after, None, "LOST" if before.seconds else "GAINED" if after.seconds else "NO TIME")


def label_of(row: Measurement, others: Sequence[Measurement]) -> str:
    """The job as the record calls it, and what else tells it from other rows of the same job and backend."""
    alike = [o for o in others if (o.operation, o.job, o.backend) == (row.operation, row.job, row.backend)]
    told = []
    for values in (lambda r: {"model": r.model, **r.sizes}, lambda r: dict(r.settings)):
        for name, value in values(row).items():
            if any(values(other).get(name) != value for other in alike):
                told.append(f"{name} {value}")
    return ", ".join([row.job, *told])
