"""Two revisions measured in turn, a few samples of each a round, so that what slows the machine down slows both."""

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.process import DeviceError, Worker, WorkerDiedError, WorkerRefusedError, WorkerTimeoutError
from mlakit.bench.progress import Progress
from mlakit.bench.results import STATUS_WORDS, BenchmarkResult, GpuState, Record, TimingRow
from mlakit.bench.runner import Device, new_session
from mlakit.report.compare_ratio import Ratio, median_interval, ratio_of_rounds

ROUNDS = 12
OWN_SOURCE: Path | None = None  # where the checkout's side imports mlakit from: None is where this one is from
# Of a round, for each side: enough samples for a median that a stray one does not move. More of them within a round
# would not make the interval narrower, which is made of rounds; and on a CPU each costs a flush of the cache.
_ROUND_SECONDS = 0.05
_FEWEST_SAMPLES, _MOST_SAMPLES = 5, 40
_PROBE_TIMEOUT = 300.0


class Side:
    """One revision, with a worker process of its own; use it as a context.

    `source` is the folder that mlakit is imported from (None: this one's), `commit` what it must turn out to be.
    """

    def __init__(self, name: str, source: Path | None, commit: str | None = None) -> None:
        self.name = name
        self._source = source
        self._commit = commit
        self._worker: Worker | None = None
        self._device = Device("", {}, {})
        self._scratch = tempfile.TemporaryDirectory(prefix="mlakit-")

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()
        self._scratch.cleanup()

    def probe(
        self, device: str, dtypes: Iterable[str] | Mapping[str, Iterable[str]], stage: Callable[[str], None]
    ) -> str:
        """Find the device and measure its ceilings, as `bench.runner.probe`; returns its name ("cpu", "cuda:0").

        Raises:
            DeviceError: it does not work with this revision.
        """
        wanted = {k: sorted(v) for k, v in dtypes.items()} if isinstance(dtypes, Mapping) else sorted(set(dtypes))
        request = {"command": "probe", "device": device, "dtypes": wanted}
        try:
            found = self._ask(request, _PROBE_TIMEOUT, lambda name: stage(f"{self.name}: {name}"))
        except (WorkerDiedError, WorkerTimeoutError) as error:
            raise DeviceError(f"device {device} does not work with {self.name}; its process {error}") from error
        ran = found["environment"].get("commit")
        if self._commit and ran and not ran.startswith(self._commit):
            raise RuntimeError(f"{self.name} is {self._commit}, and its process ran {ran}")
        self._device = Device(found["device"], found["environment"], found["ceilings"])
        return self._device.name

    def new_record(self, command: Sequence[str], planned: int) -> Record:
        """An empty record of this side on the device that was found."""
        return Record(name=self.name, planned=planned, sessions=[new_session(self._device, command)])

    def row(self, config: BenchmarkConfig, stage: Callable[[str], None]) -> BenchmarkResult:
        """Measure a row; whatever goes wrong is its status."""
        # Without what is as it comes: another revision may not know all of our settings.
        wanted = config.model_dump(mode="json", exclude_defaults=True)
        request = {
            "command": "row",
            "config": wanted,
            "ceilings": self._device.ceilings[config.dtype],
            "scratch": self._scratch.name,
        }
        try:
            row = self._ask(request, config.timeout, lambda name: stage(f"{self.name}: {name}"))["row"]
        except WorkerTimeoutError as error:
            return BenchmarkResult(config=config, status="timeout", error=f"{error} (--timeout)")
        except WorkerDiedError as error:
            return BenchmarkResult(config=config, status="crashed", error=str(error))
        except WorkerRefusedError as error:
            return BenchmarkResult(config=config, status="error", error=f"{self.name} refuses the row: {error}")
        theirs = row.pop("config")
        ours = config.model_dump(mode="json")
        for name in ours.keys() & theirs.keys():
            if ours[name] != theirs[name]:
                reason = f"{self.name} measures something else: {name} {theirs[name]!r}, not {ours[name]!r}"
                return BenchmarkResult(config=config, status="unsupported", error=reason)
        return BenchmarkResult(config=config, **{k: v for k, v in row.items() if k in BenchmarkResult.model_fields})

    def _ask(self, request: dict[str, Any], timeout: float, stage: Callable[[str], None]) -> dict[str, Any]:
        if self._worker is None or not self._worker.alive:
            self._worker = Worker(self._source)
        return self._worker.request(request, timeout=timeout, on_stage=stage)


@dataclass
class Rounds:
    """A plan measured on both sides. `records` are A's and B's; `ratios` those of the rounds, by the config's key."""

    sides: tuple[Side, Side]
    records: tuple[Record, Record]
    plan: Sequence[BenchmarkConfig]
    rounds: int = ROUNDS
    ratios: dict[str, Ratio] = field(default_factory=dict)

    def rows(self, progress: Progress) -> Iterator[BenchmarkConfig]:
        """Measure row after row; yields each when the records hold it.

        On KeyboardInterrupt the records hold the rows that both sides have finished.
        """
        progress.expect(len(self.plan))
        for config in self.plan:
            progress.started(config)
            found = self._row(config, progress.stage)
            for record, row in zip(self.records, found, strict=True):
                record.rows.append(row.model_copy(update={"config": config}))  # a round's has its own repeats
                record.complete = len(record.rows) == len(self.plan)
            yield config
            progress.done(f"{config.title} on {config.batch_title}: {self._outcome(config, found)}")

    def _outcome(self, config: BenchmarkConfig, found: tuple[BenchmarkResult, BenchmarkResult]) -> str:
        ratio = self.ratios.get(config.key)
        if ratio is not None:
            return f"{ratio.value:.3f} times as long, {ratio.low:.3f} to {ratio.high:.3f}"
        return " and ".join(f"{STATUS_WORDS[row.status]} in {name}" for name, row in zip("AB", found, strict=True))

    def _row(self, config: BenchmarkConfig, stage: Callable[[str], None]) -> tuple[BenchmarkResult, BenchmarkResult]:
        # The first call checks the results, compiles what there is to compile, and says how many samples a round takes.
        once = config.model_copy(update={"repeats": config.repeats or 1})
        first, second = (side.row(once, stage) for side in self.sides)
        if first.timing is None or second.timing is None:
            return first, second
        slower = max(first.timing.median, second.timing.median)
        samples = min(max(_ROUND_SECONDS / slower, _FEWEST_SAMPLES), _MOST_SAMPLES)
        repeats = config.repeats or -(-round(samples) // config.num_layers)
        again = config.model_copy(update={"repeats": repeats, "check": False})
        taken: tuple[list[BenchmarkResult], list[BenchmarkResult]] = ([], [])
        for turn in range(self.rounds):
            # Every other round the other way round: a drift that lasts is as much against one side as the other.
            for index in (0, 1) if turn % 2 == 0 else (1, 0):
                row = self.sides[index].row(again, partial(_in_round, stage, f"round {turn + 1} of {self.rounds}"))
                if row.timing is None:
                    return (row, second) if index == 0 else (first, row)
                taken[index].append(row)
        before, after = ([row.timing.samples for row in rows if row.timing] for rows in taken)
        self.ratios[config.key] = ratio_of_rounds(before, after)
        return _merged(first, taken[0]), _merged(second, taken[1])


def _in_round(stage: Callable[[str], None], turn: str, name: str) -> None:
    stage(f"{turn}, {name}")


def _merged(checked: BenchmarkResult, rounds: Sequence[BenchmarkResult]) -> BenchmarkResult:
    """The checked row with the samples of all rounds for its own."""
    samples = [sample for row in rounds if row.timing for sample in row.timing.samples]
    twenty, *_, eighty = statistics.quantiles(samples, n=5, method="inclusive")
    hosts = [row.timing.host for row in rounds if row.timing and row.timing.host is not None]
    timing = TimingRow(
        median=statistics.median(samples),
        mean=statistics.fmean(samples),
        std=statistics.stdev(samples),
        min=min(samples),
        max=max(samples),
        p20=twenty,
        p80=eighty,
        ci95=median_interval(samples),
        host=statistics.median(hosts) if hosts else None,
        samples=samples,
    )
    states = [row.gpu for row in rounds if row.gpu]
    return checked.model_copy(update={"timing": timing, "gpu": _state(states) if states else checked.gpu})


def _state(states: Sequence[GpuState]) -> GpuState:
    """Median clocks, highest power and temperature, all reasons, as `GpuState` has them for one row."""

    def known(name: str) -> list[Any]:
        return sorted(value for state in states if (value := getattr(state, name)) is not None)

    def median(name: str) -> Any:
        values = known(name)
        return values[len(values) // 2] if values else None

    return GpuState(
        sm_clock=median("sm_clock"),
        memory_clock=median("memory_clock"),
        power=max(known("power"), default=None),
        temperature=max(known("temperature"), default=None),
        throttle_reasons=sorted({reason for state in states for reason in state.throttle_reasons}),
    )
