"""`mlakit bench --executor ray`: the rows of a run spread over the GPUs of a Ray cluster, one worker process a GPU.

Rows that are compared with one another stay on one GPU. A lost worker's rows are run again elsewhere, none doubled.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.process import DeviceError
from mlakit.bench.results import Record
from mlakit.bench.runner import Device, Listener, new_session
from mlakit.distributed.ray_comparisons import Comparisons
from mlakit.distributed.ray_connection import Connection
from mlakit.distributed.ray_crew import Crew, Member

# How long the run waits for the second worker once the first is there; whoever comes later joins then.
_GATHER_SECONDS = 30.0
_POLL_SECONDS = 1.0


class RayExecutor(contextlib.AbstractContextManager["RayExecutor"]):
    """A cluster to measure on. Use it as a context: its workers live as long, and a cluster of this machine alone too.

    `address` as `Connection` takes it.
    """

    name: Literal["ray"] = "ray"

    def __init__(self, address: str | None = None) -> None:
        self._address = address
        self._crew: Crew | None = None
        self._open = contextlib.ExitStack()

    def __exit__(self, *_: object) -> None:
        """End the workers, and the cluster if it was started for them."""
        self._open.close()

    def probe(self, device: str, dtypes: Mapping[str, Iterable[str]], listener: Listener) -> Device:
        """Connect, and start the workers; returns the device that the run is on, as the first of them found it.

        `device` is "cuda", "cpu" or "auto": the GPUs if any node that is alive has one. `dtypes` as for `runner.probe`.

        Raises:
            ValueError: no such device to be had, or what `Connection` raises.
            DeviceError: no worker came up, or what `Connection` raises.
        """
        if device not in ("auto", "cpu", "cuda", "cuda:0"):
            raise ValueError(
                f"with --executor ray the device is cuda, cpu or auto, got {device!r}: Ray gives out the GPUs"
            )
        listener.stage("connecting to Ray")
        connection = self._open.enter_context(contextlib.closing(Connection(self._address)))
        crew = Crew(connection, _kind(device, connection), dtypes, listener.note)
        self._crew = self._open.enter_context(contextlib.closing(crew))
        crew.recruit()
        until = None
        while any(m.device is None for m in crew.members) and (until is None or time.monotonic() < until):
            listener.stage(f"{len(crew.ready())} of {len(crew.members)} workers have measured their device's limits")
            for _ in crew.wait(_POLL_SECONDS):
                until = until or time.monotonic() + _GATHER_SECONDS
            crew.recruit()
        if not crew.ready():
            raise DeviceError("no worker of the Ray cluster came up: " + "; ".join(dict.fromkeys(crew.reasons)))
        crew.agree()
        first = crew.ready()[0].device
        assert first is not None
        return first

    def describe(self, device: Device) -> str:
        """The devices of the run in a few words."""
        assert self._crew is not None, "probe comes first"
        ready, connection = self._crew.ready(), self._crew.connection
        nodes = len({m.node.id for m in ready})
        where = "this machine" if connection.started_here else f"the Ray cluster at {connection.address}"
        spread = f"{nodes} nodes of {where}" if nodes > 1 else where
        return f"{len(ready)}x {device.environment['device']['name']} ({device.name}), {spread}"

    def run(
        self,
        plan: Sequence[BenchmarkConfig],
        device: Device,
        record: Record,
        save: Callable[[Record], None],
        listener: Listener,
    ) -> "RayRun":
        """The run of a plan on the workers that `probe` found, and on those that join them."""
        assert self._crew is not None, "probe comes first"
        return RayRun(plan, device, record, save, listener, self._crew)


_WORDS = {"cuda": "GPU", "cpu": "CPU"}


def _kind(device: str, connection: Connection) -> str:
    """What is asked for, "cuda" or "cpu", or else what the cluster has."""
    nodes = connection.nodes()
    if device == "auto":
        device = "cuda" if any(node.gpus for node in nodes) else "cpu"
    kind = device.removesuffix(":0")
    if not any(node.gpus if kind == "cuda" else node.cpus for node in nodes):
        where = "this machine" if connection.started_here else f"the Ray cluster at {connection.address}"
        raise ValueError(f"device {device}: {where} has no {_WORDS[kind]} that Ray could give out")
    return kind


@dataclass
class RayRun:
    """As `runner.Run`, on every worker of a crew at once."""

    plan: Sequence[BenchmarkConfig]
    device: Device
    record: Record
    save: Callable[[Record], None]
    listener: Listener
    crew: Crew
    _sessions: dict[Member, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._comparisons = Comparisons(self.plan, self.record, self.crew.alive())
        self._command = self.record.sessions[-1].command
        for member in self.crew.ready():
            if member.device is self.device:  # whoever made the record has put it there
                self._sessions[member] = len(self.record.sessions) - 1

    def missing(self) -> list[BenchmarkConfig]:
        """Planned rows that the record does not hold, or that are from another GPU than the rest of their comparison
        will be.
        """
        return self._comparisons.missing()

    def execute(self) -> Record:
        """Measure what is missing. On KeyboardInterrupt the record is complete up to the last finished row.

        Raises:
            DeviceError: no worker is left, or the cluster's head does not answer.
        """
        while missing := self.missing():
            self.crew.recruit()
            self._give_out(len(missing))
            if all(m.pending is None for m in self.crew.members):
                raise DeviceError(
                    f"no worker of the Ray cluster is left, with {len(missing)} of {len(self.plan)} rows to do; what "
                    "was measured is kept, --resume goes on" + "".join(f"; {reason}" for reason in self.crew.reasons)
                )
            for member, config, outcome in self.crew.wait(_POLL_SECONDS):
                if config is None:
                    continue
                if isinstance(outcome, str):
                    row = self._comparisons.lost(config, member.place, outcome)
                    if row is None:
                        continue
                    row.session = self._session(member)
                else:
                    assert outcome is not None
                    row = outcome
                    row.session = self._session(member)
                    self._comparisons.put(row, member.place)
                self.save(self.record)
                self.listener.finished(row)
        self.record.complete = True
        self.save(self.record)
        return self.record

    def _give_out(self, expected: int) -> None:
        for member in self.crew.idle():
            config = self._comparisons.take(member.gpu, self.crew.alive())
            if config is not None:
                self.listener.started(config)
                self.crew.measure(member, config)
        more = len(self.missing()) - expected
        if more > 0:
            self.listener.more(more, "their comparison is measured on another GPU now")
        at_work = sum(m.config is not None for m in self.crew.members)
        self.listener.stage(f"one of {at_work} rows at work" if at_work > 1 else "at work")

    def _session(self, member: Member) -> int:
        """The number of the record's session that holds a worker's environment and ceilings."""
        if member not in self._sessions:
            assert member.device is not None
            self.record.sessions.append(new_session(member.device, self._command))
            self._sessions[member] = len(self.record.sessions) - 1
        return self._sessions[member]
