"""What `mlakit recommend` concludes and prints: a setting for each workload, with its measured margin."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console

from mlakit.bench.results import STATUS_WORDS, BenchmarkResult, faster
from mlakit.bench.units import percent, seconds
from mlakit.studies.fitted_table import Column, print_fitted


@dataclass(frozen=True)
class Setting:
    """A backend with what was set of it; without anything it runs as it comes."""

    backend: str
    parameters: tuple[tuple[str, int | str], ...] = ()
    threshold: int | None = None

    @property
    def is_default(self) -> bool:
        """Whether nothing was set."""
        return not self.parameters and self.threshold is None

    @property
    def changes(self) -> str:
        """What was set, in words; empty if nothing was."""
        given = [f"{name} {value}" for name, value in self.parameters]
        return ", ".join(
            [*given, *([f"reorder_batch_threshold {self.threshold}"] if self.threshold is not None else [])]
        )

    def __str__(self) -> str:
        return f"{self.backend} ({self.changes})" if self.changes else self.backend


@dataclass
class Advice:
    """One workload: the rows of each setting, one a round."""

    spec: str
    title: str
    scope: str
    found: dict[Setting, list[BenchmarkResult]] = field(default_factory=dict)

    def time(self, setting: Setting) -> float | None:
        """Median over the rounds, in seconds; None if any of them failed."""
        times = [row.timing.median for row in self.found[setting] if row.timing]
        return median(times) if len(times) == len(self.found[setting]) else None

    @property
    def ranking(self) -> list[Setting]:
        """Settings with a time, fastest first; of those measured in as many rounds as any, where some were again."""
        most = max((len(rows) for rows in self.found.values()), default=0)
        timed = [s for s, rows in self.found.items() if len(rows) == most and self.time(s) is not None]
        return sorted(timed, key=lambda s: (self.time(s) or 0.0, not s.is_default))

    def close(self, factor: float, most: int) -> list[Setting]:
        """Settings within `factor` of the best, the best of each backend and its default before others."""
        ranked = self.ranking
        if not ranked:
            return []
        limit = factor * (self.time(ranked[0]) or 0.0)
        near = [s for s in ranked if (self.time(s) or 0.0) <= limit]
        first = [next(s for s in near if s.backend == name) for name in dict.fromkeys(s.backend for s in near)]
        plain = [s for s in near if s.is_default]
        chosen = list(dict.fromkeys([near[0], *first, *plain]))[:most]
        return [*chosen]

    def ties(self, one: Setting, other: Setting) -> bool:
        """Whether `one` is not faster than `other` in each round, beyond the noise."""
        pairs = zip(self.found[one], self.found[other], strict=True)
        return not all(a.timing and b.timing and faster(a.timing, b.timing) > 0 for a, b in pairs)

    @property
    def winner(self) -> Setting | None:
        """The fastest setting, or its backend's default where that ties with it; None if nothing ran."""
        if not self.ranking:
            return None
        best = self.ranking[0]
        plain = next((s for s in self.ranking if s.backend == best.backend and s.is_default), None)
        return plain if plain is not None and self.ties(best, plain) else best

    @property
    def tied(self) -> list[Setting]:
        """Settings of other backends that the fastest does not beat, one a backend."""
        if not self.ranking or self.winner is None:
            return []
        best, names = self.ranking[0], {self.winner.backend}
        found = []
        for setting in self.ranking:
            if setting.backend not in names and self.ties(best, setting):
                names.add(setting.backend)
                found.append(setting)
        return found

    @property
    def runner_up(self) -> Setting | None:
        """The fastest setting of another backend that does not tie; None if there is none."""
        if self.winner is None:
            return None
        out = {self.winner.backend, *(setting.backend for setting in self.tied)}
        timed = [s for s, rows in self.found.items() if s.backend not in out and rows[0].timing]
        return min(timed, key=self.first_time, default=None)

    def first_time(self, setting: Setting) -> float:
        """Median of the first round, which every setting has; infinite if it failed."""
        timing = self.found[setting][0].timing
        return timing.median if timing else float("inf")

    def margin(self) -> float | None:
        """By which part the runner-up is slower than the winner, both in as many rounds."""
        winner, other = self.winner, self.runner_up
        if winner is None or other is None:
            return None
        if len(self.found[winner]) == len(self.found[other]):
            return (self.time(other) or 0.0) / (self.time(winner) or 1.0) - 1
        return self.first_time(other) / self.first_time(winner) - 1

    def unavailable(self) -> dict[str, str]:
        """Backends that cannot run on this device at all, and why."""
        rows = {s.backend: rows[0] for s, rows in self.found.items() if s.is_default}
        return {name: row.error or "" for name, row in rows.items() if row.status == "unavailable"}

    def refused(self) -> dict[str, str]:
        """Backends that cannot run this workload, or failed at it, and why."""
        rows = {s.backend: rows[0] for s, rows in self.found.items() if s.is_default}
        return {
            name: f"{STATUS_WORDS[row.status]}: {row.error}"
            for name, row in rows.items()
            if not row.success and row.status != "unavailable"
        }

    def behind(self, backend: str) -> float | None:
        """By which part a backend as it comes is slower than the fastest; None if it has no time."""
        plain = Setting(backend)
        if plain not in self.found or self.winner is None or not self.found[plain][0].timing:
            return None
        return max(0.0, self.first_time(plain) / min(map(self.first_time, self.found)) - 1)


_COLUMNS = (
    Column("batch", right=False),
    Column("use", right=False),
    Column("settings", 2, right=False),
    Column("time"),
    Column("of limit", 4),
    Column("faster by", 1),
    Column("than", 3, right=False),
    Column("scope", 5, right=False),
)


def print_advice(console: Console, advice: Sequence[Advice], title: str) -> None:
    """One line a workload; `findings` has every name in full."""
    print_fitted(console, title, _COLUMNS, [_line(each) for each in advice])


def _line(each: Advice) -> list[str]:
    winner, other, margin = each.winner, each.runner_up, each.margin()
    if winner is None:
        return [each.title, "nothing ran", *[""] * (len(_COLUMNS) - 3), each.scope]
    tied = [setting.backend for setting in each.tied]
    fraction = each.found[winner][0].fraction_of_limit
    return [
        each.title,
        " or ".join([winner.backend, *tied]) + (" (tie)" if tied else ""),
        winner.changes or "as it comes",
        seconds(each.time(winner) or 0.0),
        percent(fraction) if fraction is not None else "",
        percent(margin) if margin is not None else "",
        other.backend if other is not None else "",
        each.scope,
    ]


def findings(advice: Sequence[Advice]) -> list[str]:
    """The advice in words, a line a workload, and one backend for all of them."""
    lines = []
    for each in advice:
        winner = each.winner
        if winner is None:
            lines.append(f"{each.title}: nothing ran")
        else:
            tied = each.tied
            names = " or ".join(map(str, [winner, *tied]))
            said = f"{each.title}: {names}, {seconds(each.time(winner) or 0.0)}"
            if tied:
                said += "; a tie: no telling them apart in each of the rounds"
            if (margin := each.margin()) is not None:
                said += f"; {percent(margin)} faster than {each.runner_up}"
            gain = each.behind(winner.backend)
            if not winner.is_default and gain:
                said += f"; {percent(gain)} faster than {winner.backend} as it comes"
            lines.append(said)
        lines += [f"  {name}: {reason}" for name, reason in each.refused().items()]
    whole = _one_for_all(advice)
    return [*lines, whole] if whole else lines


def _one_for_all(advice: Sequence[Advice]) -> str:
    """The backend that, as it comes, is least behind anywhere."""
    ran = [each for each in advice if each.winner is not None]
    if len(ran) < 2:
        return ""
    backends = dict.fromkeys(s.backend for each in ran for s in each.found)
    losses = {}
    for backend in backends:
        behind = [each.behind(backend) for each in ran]
        if all(loss is not None for loss in behind):
            losses[backend] = max((loss or 0.0, each.title) for loss, each in zip(behind, ran, strict=True))
    if not losses:
        return "no backend ran all workloads"
    name = min(losses, key=lambda backend: losses[backend][0])
    loss, where = losses[name]
    if loss == 0:
        return f"one backend for all: {name}, as it comes the fastest on each of the {len(ran)} workloads"
    return f"one backend for all: {name}, as it comes at most {percent(loss)} behind the fastest ({where})"
