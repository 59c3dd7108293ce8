"""What the study `num-splits` prints: a line a backend and batch, and what auto costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console

from mlakit.bench.results import STATUS_WORDS, BenchmarkResult, faster
from mlakit.bench.units import percent, seconds
from mlakit.studies.fitted_table import Column, print_fitted


@dataclass
class Choice:
    """One backend on one batch: the row of `auto`, and the rows of given numbers of pieces.

    `confirmation` holds auto and the best number, measured again on other data; None where they could not be told
    apart.
    """

    backend: str
    parameter: str
    spec: str
    auto: BenchmarkResult
    given: dict[int, BenchmarkResult] = field(default_factory=dict)
    confirmation: tuple[BenchmarkResult, BenchmarkResult] | None = None

    @property
    def best(self) -> int | None:
        """The fastest number of pieces; None if nothing was timed beside auto."""
        timed = {n: row.timing.median for n, row in self.given.items() if row.timing}
        return min(timed, key=timed.__getitem__) if timed and self.auto.timing else None

    @property
    def is_tie(self) -> bool:
        """Whether auto cannot be told from the best, or is itself the fastest, in any of the two measurements."""
        pairs = [(self.auto, self.given[self.best])] if self.best is not None else []
        pairs += [self.confirmation] if self.confirmation else []
        return any(one.timing and two.timing and faster(two.timing, one.timing) <= 0 for one, two in pairs)

    @property
    def cost(self) -> float | None:
        """By which part auto is slower than the best (below 0: faster), as confirmed where it was measured again."""
        if self.best is None:
            return None
        auto, best = self.confirmation or (self.auto, self.given[self.best])
        return auto.timing.median / best.timing.median - 1 if auto.timing and best.timing else None

    @property
    def other_kernel(self) -> str | None:
        """What the best number of pieces ran, where that is another kernel than auto's."""
        if self.best is None:
            return None
        kernel = self.given[self.best].kernels
        return ", ".join(kernel.values()) if kernel != self.auto.kernels and "splits" not in str(kernel) else None


_COLUMNS = (
    Column("backend", right=False),
    Column("batch", right=False),
    Column("auto"),
    Column("best", 1),
    Column("pieces"),
    Column("auto costs"),
    Column("of limit", 3),
    Column("measured", 2),
)


def print_choices(console: Console, choices: Sequence[Choice], title: str) -> None:
    """One line a backend and batch."""
    print_fitted(console, title, _COLUMNS, [_line(choice) for choice in choices], sections=True)


def _line(choice: Choice) -> list[str]:
    auto = choice.auto
    best = choice.given[choice.best] if choice.best is not None else None
    fastest = auto if best is None or choice.is_tie else best
    return [
        choice.backend,
        auto.config.batch_title,
        seconds(auto.timing.median) if auto.timing else STATUS_WORDS[auto.status],
        seconds(best.timing.median) if best is not None and best.timing else "",
        str(choice.best or ""),
        _cost(choice),
        percent(fastest.fraction_of_limit) if fastest.fraction_of_limit is not None else "",
        " ".join(map(str, choice.given)),
    ]


def _cost(choice: Choice) -> str:
    if choice.cost is None:
        return ""
    return "nothing (tie)" if choice.is_tie else percent(choice.cost)


def findings(choices: Sequence[Choice]) -> list[str]:
    """The conclusions, a line a backend; all of them follow from the rows."""
    lines = []
    for backend in dict.fromkeys(choice.backend for choice in choices):
        mine = [choice for choice in choices if choice.backend == backend and choice.cost is not None]
        if not mine:
            first = next(choice.auto for choice in choices if choice.backend == backend)
            lines.append(f"{backend}: nothing to compare: {STATUS_WORDS[first.status]}: {first.error}")
            continue
        name = mine[0].parameter
        lost = [(choice.cost or 0.0, choice) for choice in mine if not choice.is_tie]
        if not lost:
            lines.append(
                f"{backend}: leave {name} at auto; it is as fast as the best number on all {len(mine)} batches"
            )
            continue
        worst, where = max(lost, key=lambda item: item[0])
        costs = [0.0 if choice.is_tie else choice.cost or 0.0 for choice in mine]
        lines.append(
            f"{backend}: auto costs at most {percent(worst)} ({where.spec}, where {name} {where.best} is best), "
            f"{percent(median(costs))} in the median; it is as fast as the best on {len(mine) - len(lost)} of "
            f"{len(mine)} batches"
        )
        better = ", ".join(f"{choice.spec}: {choice.best} ({percent(cost)})" for cost, choice in lost)
        lines.append(f"  where a number is faster than auto: {better}")
        kernels = {choice.other_kernel for choice in mine if not choice.is_tie} - {None}
        if kernels:
            lines.append(f"  with a number it runs another kernel than auto: {'; '.join(sorted(map(str, kernels)))}")
    return lines
