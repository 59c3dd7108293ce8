"""Which rows are still to be measured, and on which GPU: rows that are compared with one another stay on one, as a
ratio of times from two GPUs is no ratio. No Ray and no torch here.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import BenchmarkResult, Place, Record

# A row whose worker was lost this often is taken for the cause: it may be what eats its nodes' memory.
MOST_ATTEMPTS = 3


@dataclass
class _Comparison:
    """Configs of one job. `home` is the GPU that all their times are, or will be, from."""

    configs: list[BenchmarkConfig] = field(default_factory=list)
    home: str | None = None


class Comparisons:
    """The plan's rows by comparison, and the record that they go to.

    `gpus` are those of the cluster now. A comparison of which the record holds times stays on the GPU they are from, or
    is measured anew as a whole if that one is not among them; until a new row arrives the record keeps the old one.
    """

    def __init__(self, plan: Sequence[BenchmarkConfig], record: Record, gpus: Collection[str]) -> None:
        self.record = record
        self._order = {config.key: index for index, config in enumerate(plan)}
        self._rows = {row.config.key: row for row in record.rows}
        self._at_work: set[str] = set()
        self._losses: Counter[str] = Counter()
        groups: dict[tuple[object, ...], _Comparison] = {}
        for config in plan:
            groups.setdefault(config.comparison, _Comparison()).configs.append(config)
        self._groups = list(groups.values())
        for group in self._groups:
            homes = Counter(home for config in group.configs if (home := self._measured_on(config)) in gpus)
            group.home = max(homes, key=lambda home: homes[home], default=None)
        if record.rows:
            self._conclude()

    def missing(self) -> list[BenchmarkConfig]:
        """Rows that are not in the record, or whose comparison is on another GPU than their time is from."""
        return [config for group in self._groups for config in self._missing(group)]

    def take(self, gpu: str, alive: Collection[str]) -> BenchmarkConfig | None:
        """The next row for a GPU, or None. `alive` are the GPUs that work, or that may come back."""
        for wanted in (self._at_home, self._homeless, self._stranded):
            for group in wanted(gpu, alive):
                group.home = gpu
                config = next(iter(self._idle(group)))
                self._at_work.add(config.key)
                return config
        return None

    def put(self, row: BenchmarkResult, place: Place) -> None:
        """Keep a row, in the place of one with the same config; rows are in the plan's order, whichever was first."""
        key = row.config.key
        row.place = place.model_copy(update={"attempt": self._losses[key] + 1})
        self._at_work.discard(key)
        self._rows[key] = row
        known = list(self._rows.values())
        self.record.rows[:] = sorted(known, key=lambda r: self._order.get(r.config.key, len(self._order)))
        self._conclude()

    def lost(self, config: BenchmarkConfig, place: Place, reason: str) -> BenchmarkResult | None:
        """The worker that measured a row is gone. The row goes to another; or, the third time, is put as crashed and
        returned.
        """
        self._at_work.discard(config.key)
        self._losses[config.key] += 1
        if self._losses[config.key] < MOST_ATTEMPTS:
            return None
        error = f"its worker was lost {MOST_ATTEMPTS} times, the last time on node {place.node}: {reason}"
        row = BenchmarkResult(config=config, status="crashed", error=error)
        self._losses[config.key] -= 1  # `put` counts the attempt that it is
        self.put(row, place)
        return row

    def _conclude(self) -> None:
        self.record.one_gpu_a_comparison = one_gpu_a_comparison(self.record.rows)
        self.record.complete = not self.missing()

    def _measured_on(self, config: BenchmarkConfig) -> str | None:
        """The GPU that a row's time is from; None if it has none."""
        row = self._rows.get(config.key)
        return None if row is None or row.timing is None else device_of(row)

    def _missing(self, group: _Comparison) -> Iterator[BenchmarkConfig]:
        for config in group.configs:
            if config.key not in self._rows or self._measured_on(config) not in (None, group.home):
                yield config

    def _idle(self, group: _Comparison) -> Iterator[BenchmarkConfig]:
        return (config for config in self._missing(group) if config.key not in self._at_work)

    def _at_home(self, gpu: str, alive: Collection[str]) -> Iterator[_Comparison]:
        return (group for group in self._groups if group.home == gpu and any(self._idle(group)))

    def _homeless(self, gpu: str, alive: Collection[str]) -> Iterator[_Comparison]:
        return (group for group in self._groups if group.home is None and any(self._idle(group)))

    def _stranded(self, gpu: str, alive: Collection[str]) -> Iterator[_Comparison]:
        return (group for group in self._groups if group.home not in alive and any(self._idle(group)))


def device_of(row: BenchmarkResult) -> str:
    """What tells a row's device from every other of the cluster: the GPU's UUID, else the node. Empty for a row of the
    local executor.
    """
    return "" if row.place is None else row.place.gpu or row.place.node


def one_gpu_a_comparison(rows: Sequence[BenchmarkResult]) -> bool:
    """True if no two times that are compared with one another are from different GPUs."""
    homes: dict[tuple[object, ...], set[str]] = {}
    for row in rows:
        if row.timing is not None:
            homes.setdefault(row.config.comparison, set()).add(device_of(row))
    return all(len(found) == 1 for found in homes.values())
