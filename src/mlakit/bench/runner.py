"""Runs a plan: a worker process a backend, results kept as they come, on a resume only what is missing. No torch."""

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlakit.backends import registry
from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.process import DeviceError, Worker, WorkerDiedError, WorkerRefusedError, WorkerTimeoutError
from mlakit.bench.results import BenchmarkResult, Record, Session

# Starting Python, importing torch, opening a GPU and measuring its ceilings: slow on a busy machine, and no row's
# fault.
_PROBE_TIMEOUT = 300.0


@dataclass(frozen=True)
class Device:
    """A device that is really there, as a worker found it."""

    name: str  # "cpu" or "cuda:0": what "auto" came to
    environment: dict[str, Any]
    ceilings: dict[str, dict[str, Any]]  # by dtype


class Listener:
    """What a run tells whoever shows its progress. The default shows nothing."""

    def stage(self, name: str) -> None:
        """The row at hand, or the probe, entered another stage."""

    def started(self, config: BenchmarkConfig) -> None:
        """A row begins."""

    def finished(self, row: BenchmarkResult) -> None:
        """A row is done and in the record."""

    def note(self, line: str) -> None:
        """Something happened that the user should know of."""

    def more(self, rows: int, reason: str) -> None:
        """So many rows more have to be measured than there were to begin with."""


def probe(device: str, dtypes: Iterable[str] | Mapping[str, Iterable[str]], listener: Listener | None = None) -> Device:
    """Find the device and measure its ceilings for each dtype, in a process of its own.

    `dtypes` may depend on the kind of device that is found: {"cpu": [...], "cuda": [...]}.

    Raises:
        ValueError: there is no such device.
        DeviceError: it does not work: the process died, or did not answer in five minutes.
    """
    listener = listener or Listener()
    wanted = {k: sorted(v) for k, v in dtypes.items()} if isinstance(dtypes, Mapping) else sorted(set(dtypes))
    request = {"command": "probe", "device": device, "dtypes": wanted}
    answer = _ask(request, listener)
    return Device(answer["device"], answer["environment"], answer["ceilings"])


def list_backends(device: str) -> tuple[str, list[dict[str, Any]]]:
    """The device's name, and for each backend that can be loaded: name, kind, hardware, parameters with what they may
    be, and version or reason.

    Raises:
        ValueError: there is no such device.
        DeviceError: it does not work, as for `probe`.
    """
    found = _ask({"command": "backends", "device": device, "names": registry.names()}, Listener())
    return found["device"], found["rows"]


def _ask(request: dict[str, Any], listener: Listener) -> dict[str, Any]:
    """The answer of a process of its own about a device."""
    try:
        with Worker() as worker:
            return worker.request(request, timeout=_PROBE_TIMEOUT, on_stage=listener.stage)
    except (WorkerDiedError, WorkerTimeoutError) as error:
        raise DeviceError(f"device {request['device']} does not work; the process that tried it: {error}") from error


@dataclass
class Run:
    """A plan, where its record goes, and what is already in it.

    `record` may hold rows from an earlier sitting; those are not run again. It is saved after every row, through
    `save`, so that whatever ends the run leaves all that was measured.
    """

    plan: Sequence[BenchmarkConfig]
    device: Device
    record: Record
    save: Callable[[Record], None] = lambda record: None
    listener: Listener = field(default_factory=Listener)

    def missing(self) -> list[BenchmarkConfig]:
        """Planned rows that the record does not hold yet."""
        have = {row.config.key for row in self.record.rows}
        return [config for config in self.plan if config.key not in have]

    def execute(self) -> Record:
        """Measure what is missing. On KeyboardInterrupt the record is complete up to the last finished row."""
        with Meter(self.device, self.record, self._save, self.listener) as meter:
            for config in self.missing():
                meter.row(config)
        self._save(self.record)
        return self.record

    def _save(self, record: Record) -> None:
        record.complete = not self.missing()
        self.save(record)


class Meter:
    """Measures rows as they are asked for and keeps them in a record, for a run whose next row depends on the last.

    Use it as a context: a worker process a backend lives as long as it does. `save` is called after every row.
    """

    def __init__(
        self,
        device: Device,
        record: Record,
        save: Callable[[Record], None] = lambda record: None,
        listener: Listener | None = None,
    ) -> None:
        self.device = device
        self.record = record
        self._save = save
        self._listener = listener or Listener()
        self._workers: dict[str, Worker] = {}
        self._have = {row.config.key: row for row in record.rows}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Meter":
        self._scratch = tempfile.TemporaryDirectory(prefix="mlakit-")
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        if self._scratch is not None:
            self._scratch.cleanup()

    def row(self, config: BenchmarkConfig) -> BenchmarkResult:
        """The record's row of this config, measured now if there is none."""
        if (known := self._have.get(config.key)) is not None:
            return known
        self._listener.started(config)
        row = self._measure(config)
        row.session = len(self.record.sessions) - 1
        self.record.rows.append(row)
        self._have[config.key] = row
        self._save(self.record)
        self._listener.finished(row)
        return row

    def _measure(self, config: BenchmarkConfig) -> BenchmarkResult:
        assert self._scratch is not None, "a Meter is a context"
        worker = self._workers.get(config.backend)
        if worker is None or not worker.alive:
            worker = self._workers[config.backend] = Worker()
        request = {
            "command": "row",
            "config": config.model_dump(mode="json"),
            "ceilings": self.device.ceilings[config.dtype],
            "scratch": self._scratch.name,
        }
        started = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            answer = worker.request(request, timeout=config.timeout, on_stage=self._listener.stage)
        except WorkerTimeoutError as error:
            return BenchmarkResult(config=config, status="timeout", error=f"{error} (--timeout)", started=started)
        except WorkerDiedError as error:
            return BenchmarkResult(config=config, status="crashed", error=str(error), started=started)
        except WorkerRefusedError as error:
            return BenchmarkResult(config=config, status="error", error=str(error), started=started)
        return BenchmarkResult.model_validate(answer["row"])


def new_session(device: Device, command: Sequence[str] | None = None) -> Session:
    """A session that starts now, on this device."""
    return Session(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=list(sys.argv if command is None else command),
        environment=device.environment,
        ceilings=device.ceilings,
    )


def run_mla_benchmark(backend: str, config: BenchmarkConfig, **overrides: Any) -> BenchmarkResult:
    """Measure one backend on one batch, in a worker process, and return the row.

    `backend` and `overrides` replace what `config` says; an override that is none of its fields is one of the backend's
    parameters (`num_kv_splits=4`). A row that came to nothing has `success` False and `error` set; no exception is
    raised for it.

    Raises:
        ValueError: an override that cannot be meant, or no such device.
        DeviceError: the device does not work.
    """
    fields = {k: v for k, v in overrides.items() if k in BenchmarkConfig.model_fields}
    parameters = {k: v for k, v in overrides.items() if k not in BenchmarkConfig.model_fields}
    content = {**config.model_dump(), **fields, "backend": backend}
    content["parameters"] = {**content["parameters"], **parameters}
    dtype = BenchmarkConfig(**content).dtype
    device = probe(content["device"], [dtype])
    final = BenchmarkConfig(**{**content, "device": device.name})
    record = Record(name="run_mla_benchmark", planned=1, sessions=[new_session(device)])
    return Run([final], device, record).execute().rows[-1]
