"""The rows of the study `parallel`: a table, CSV, and what the numbers say. No torch here."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlakit.bench.grouping import grouped
from mlakit.bench.units import percent, seconds

PARTS = ("attention", "merge", "communication", "rest")


@dataclass(frozen=True)
class Plan:
    """How heads and keys are divided: `tp` groups of ranks with different heads, `cp` ranks in each with different
    keys. With `gather` the ranks of a group have weights of different heads too, and gather queries; with `own` each
    wants results for its own heads.
    """

    strategy: str
    tp: int
    cp: int
    gather: bool = True
    own: bool = True

    @property
    def ranks(self) -> int:
        """How many take part."""
        return self.tp * self.cp

    @property
    def title(self) -> str:
        """Strategy and mesh: "both 2x2"."""
        return self.strategy if self.strategy == "one" else f"{self.strategy} {self.tp}x{self.cp}"


def plans_of(strategy: str, ranks: int, context_ranks: Sequence[int] = ()) -> list[Plan]:
    """A strategy on so many ranks, `both` with each of the context groups' sizes that divide them; none where it is
    another one there.
    """
    if strategy == "one":
        return [Plan("one", 1, 1)]
    if ranks == 1:
        return []
    if strategy == "tp":
        return [Plan("tp", ranks, 1)]
    if strategy == "cp":
        return [Plan("cp", 1, ranks, gather=False, own=False)]
    if strategy == "cp-own":
        return [Plan("cp-own", 1, ranks, gather=False)]
    contexts = [count for count in context_ranks if ranks % count == 0] or [ranks]
    return [Plan("both", ranks // context, context) for context in contexts if context > 1]


@dataclass
class Row:
    """One batch under one plan: seconds, or in `reason` why there are none.

    `median` and the rest are of the slowest rank of each sample (of one rank alone: of the fastest), `by_rank` each
    rank's own median. `parts` holds
    seconds of what was timed alone, "rest" what the whole takes beside them (below 0 where parts overlap, or are slower
    alone). `floor` is the least time of what travels, by the bandwidth measured in the same run, and `sent` its bytes
    by collective. With `predicted` the row was computed from parts, and no such ranks took part.
    """

    scope: str
    batch: str
    plan: Plan
    mode: str
    predicted: bool = False
    reason: str = ""
    wrong: bool = False
    median: float | None = None
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    ci95: tuple[float, float] | None = None
    samples: int | None = None
    by_rank: tuple[float, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    floor: float | None = None
    error: float | None = None
    error_allowed: float | None = None
    gpus: list[dict[str, Any] | None] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "ranks": self.plan.ranks}


def same_job(row: Row) -> tuple[Any, ...]:
    """Rows with the same of it may be compared."""
    return row.scope, row.batch, row.mode


def groups(rows: Sequence[Row], key: Callable[[Row], Any] = same_job) -> list[list[Row]]:
    """Rows with the same key together, in order of first appearance."""
    return grouped(rows, key)


def header() -> str:
    """The head of the table."""
    return (
        f"{'scope':9} {'batch':14} {'strategy':10} {'time':>8} {'attention':>9} {'merge':>8} {'comm.':>8} {'rest':>8} "
        f"{'floor':>8} {'x one':>6}"
    )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line a row; "x one" is how many times the speed of one rank."""
    one = baseline(rows)
    for row in rows:
        start = f"{row.scope:9} {row.batch:14} {row.plan.title:10}"
        if row.median is None:
            yield f"{start} {row.reason}"
            continue
        cells = " ".join(
            f"{_signed(row.parts[name]) if name in row.parts else '-':>{width}}"
            for name, width in zip(PARTS, (9, 8, 8, 8), strict=True)
        )
        floor = seconds(row.floor) if row.floor else "-"
        over = f"{one / row.median:.2f}x" if one else "-"
        yield f"{start} {seconds(row.median):>8} {cells} {floor:>8} {over:>6}{' predicted' if row.predicted else ''}"


def _signed(value: float) -> str:
    return f"-{seconds(-value)}" if value < 0 else seconds(value)


def baseline(rows: Sequence[Row]) -> float | None:
    """The time of the fastest rank alone."""
    return next((row.median for row in rows if row.plan.strategy == "one" and row.median), None)


def csv_text(rows: Sequence[Row]) -> str:
    """A line a row, seconds and bytes."""
    lines = []
    for row in rows:
        flat = row.as_json()
        plan, parts, sent, states = (flat.pop(name) for name in ("plan", "parts", "sent", "gpus"))
        low, high = flat.pop("ci95") or (None, None)
        each = flat.pop("by_rank")
        lines.append(
            {
                **plan, **flat, "ci95_low": low, "ci95_high": high, "by_rank": " ".join(map(str, each)),
                **{name: parts.get(name) for name in PARTS}, "bytes_sent": sum(sent.values()),
                "sm_clocks": " ".join(str((state or {}).get("sm_clock") or "-") for state in states),
            }
        )  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in line.items()} for line in lines)
    return text.getvalue()


def findings(rows: Sequence[Row]) -> list[str]:
    """What the numbers say."""
    found: list[str] = []
    for job in groups(rows):
        timed = [row for row in job if row.median]
        measured = sorted((row for row in timed if not row.predicted), key=lambda row: row.median or 0.0)
        name = f"{job[0].scope}, {job[0].batch}"
        if len(measured) > 1:
            found.append(f"{name}: {_order(measured)}")
        found += [f"{name}: {line}" for line in map(_communication, measured) if line]
        found += [f"{name}: {line}" for line in _predictions(timed)]
    for row in rows:
        if row.median is None:
            found.append(f"{row.scope}, {row.batch}: no time for {row.plan.title}: {row.reason}")
    return found


def _order(measured: Sequence[Row]) -> str:
    best = measured[0]
    one = baseline(measured)
    tied = [row.plan.title for row in measured[1:] if row.ci95 and best.ci95 and row.ci95[0] <= best.ci95[1]]
    text = f"{best.plan.title} is the fastest, {seconds(best.median or 0)}"
    if one and best.plan.strategy != "one":
        text += f", {one / (best.median or 1):.2f}x one rank on {best.plan.ranks}"
    if tied:
        text += f"; not to be told apart from {' and '.join(tied)}"
    others = [row for row in measured[1:] if row.plan.title not in tied]
    if others:
        text += "; " + ", ".join(
            f"{row.plan.title} {(row.median or 0) / (best.median or 1):.2f}x its time" for row in others
        )
    return text


def _communication(row: Row) -> str:
    spent = row.parts.get("communication")
    if not spent or not row.floor or not row.median:
        return ""
    return (
        f"{row.plan.title} communicates for {seconds(spent)}, {percent(spent / row.median)} of its time, "
        f"{spent / row.floor:.1f}x the floor by bytes"
    )


def _predictions(rows: Sequence[Row]) -> Iterator[str]:
    """Predicted rows, and beside those that were measured too how far the prediction is off."""
    one = baseline([row for row in rows if not row.predicted])
    for row in rows:
        if not row.predicted or not row.median:
            continue
        true = next((other.median for other in rows if other.plan == row.plan and not other.predicted), None)
        text = f"prediction, not measured: {row.plan.title} on {row.plan.ranks} ranks {seconds(row.median)}"
        if one:
            text += f", {one / row.median:.2f}x one rank"
        if true:
            side = "above" if row.median > true else "below"
            text = (
                f"a prediction made the same way for {row.plan.title}, which was measured, is {seconds(row.median)}: "
                f"{percent(abs(row.median / true - 1))} {side} the {seconds(true)} measured"
            )
        yield text
