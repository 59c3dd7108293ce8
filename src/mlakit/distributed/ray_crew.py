"""The workers of a cluster: one a GPU, started where there are GPUs, missed when they are gone."""

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlakit
from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.process import DeviceError
from mlakit.bench.results import BenchmarkResult, Place
from mlakit.bench.runner import Device
from mlakit.distributed.ray_connection import Connection, Node
from mlakit.distributed.ray_worker import RowWorker

# Until a GPU is free, Python is up on its node, torch imported and the ceilings measured.
_START_SECONDS = 300.0
# What a worker may take beyond a row's own limit until it says so: it kills the backend's process itself.
_GRACE_SECONDS = 60.0
_STOP_SECONDS = 5.0
_LOOK_SECONDS = 5.0
_NOT_STARTED = f"none started within {_START_SECONDS:g} s; other work may hold it (ray status)"
_MOST_FAILURES = 3
_SOFTWARE = ("driver", "cuda", "torch", "triton", "commit", "python")
_BESIDE = "beside"  # the group of a worker's methods that run while it measures


class LostWorkerError(RuntimeError):
    """A worker, its node, or the way to it is gone."""


@dataclass(eq=False)
class Member:
    """A worker: where it is, what it waits for, and once it has answered which device it holds."""

    node: Node
    actor: Any
    pending: Any  # Ray's reference to the answer that is awaited; None while it is idle
    deadline: float
    device: Device | None = None
    config: BenchmarkConfig | None = None

    @property
    def place(self) -> Place:
        """Where its rows are measured."""
        uuid = self.device.environment["device"].get("uuid") if self.device else None
        return Place(node=self.node.name, gpu=uuid)

    @property
    def gpu(self) -> str:
        """What tells its device from the others'."""
        return self.place.gpu or self.place.node


@dataclass
class Crew:
    """Every worker there is on the nodes of a connection. `kind` is "cuda" or "cpu", `dtypes` those to measure ceilings
    for, `note` takes a line for the user.
    """

    connection: Connection
    kind: str
    dtypes: Mapping[str, Iterable[str]]
    note: Callable[[str], None]
    model: str | None = None  # the device's name that all have, once it is decided
    members: list[Member] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # why nodes are not used
    _failures: Counter[str] = field(default_factory=Counter)
    _absent: dict[str, str] = field(default_factory=dict)  # GPU of a lost worker -> its node
    _looked: float = float("-inf")

    def ready(self) -> list[Member]:
        """Workers that hold a device."""
        return [m for m in self.members if m.device is not None]

    def idle(self) -> list[Member]:
        """Those that could take a row."""
        return [m for m in self.ready() if m.pending is None]

    def alive(self) -> set[str]:
        """GPUs that have a worker, or whose node just starts another one in the place of the one that was lost."""
        starting = {m.node.id for m in self.members if m.device is None}
        return {m.gpu for m in self.ready()} | {gpu for gpu, node in self._absent.items() if node in starting}

    def recruit(self) -> None:
        """Start a worker for each GPU that has none, on nodes old and new; look every few seconds.

        Raises:
            DeviceError: the cluster's head does not answer.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        nodes = self.connection.nodes()
        for member in [m for m in self.members if m.pending is None and m.node.id not in {n.id for n in nodes}]:
            self._drop(member, "its node is gone")
        for node in nodes:
            if self._failures[node.id] < _MOST_FAILURES:
                have = sum(m.node.id == node.id for m in self.members)
                for _ in range(self.places(node) - have):
                    self.members.append(self._start(node))

    def places(self, node: Node) -> int:
        """How many workers a node has room for: one a GPU, and one for its CPU, all of it."""
        return node.gpus if self.kind == "cuda" else min(node.cpus, 1)

    def measure(self, member: Member, config: BenchmarkConfig) -> None:
        """Give a row to an idle worker."""
        member.config = config
        member.pending = member.actor.measure.remote(config.model_dump(mode="json"))
        member.deadline = time.monotonic() + config.timeout + _GRACE_SECONDS

    def wait(self, seconds: float) -> Iterator[tuple[Member, BenchmarkConfig | None, BenchmarkResult | str | None]]:
        """What happened within `seconds`, or as soon as anything does: a worker is ready (None, None), a row is done,
        or, with the reason, a worker is lost with the row it had.
        """
        by_reference = {m.pending: m for m in self.members if m.pending is not None}
        if not by_reference:
            time.sleep(seconds)
            return
        ray = self.connection.ray
        done, _ = ray.wait(list(by_reference), timeout=seconds)
        late = [m.pending for m in by_reference.values() if time.monotonic() > m.deadline and m.pending not in done]
        for reference in (*done, *late):
            member, config = by_reference[reference], by_reference[reference].config
            try:
                if reference in late:
                    raise LostWorkerError("it does not answer" if member.device else _NOT_STARTED)
                answer = ray.get(reference)
            except (ray.exceptions.RayError, LostWorkerError) as error:
                reason = _explain(error, ray)
                if self._drop(member, reason, for_good=not isinstance(error, ray.exceptions.RayActorError)):
                    yield member, config, reason
                continue
            member.pending = member.config = None
            if config is not None:
                yield member, config, BenchmarkResult.model_validate(answer)
            elif self._welcome(member, Device(**answer)):
                yield member, None, None

    def agree(self) -> None:
        """Keep the workers on the device that most of them have: times on different devices do not compare."""
        names = Counter(m.device.environment["device"]["name"] for m in self.ready() if m.device)
        self.model = max(sorted(names), key=lambda name: names[name])
        for member in self.ready():
            self._fits(member)
        if len(names) > 1:
            have = ", ".join(f"{count}x {name}" for name, count in sorted(names.items()))
            self.note(f"the cluster's devices differ ({have}); only {self.model} is used, as times would not compare")
        for name in _SOFTWARE:
            versions = {str(m.device.environment[name]): m.node.name for m in self.ready() if m.device}
            if len(versions) > 1:
                have = ", ".join(f"{version} on {node}" for version, node in sorted(versions.items()))
                self.note(f"the cluster's nodes differ in {name}: {have}; the record says which row is from which")

    def close(self) -> None:
        """End every worker, and what it has at work."""
        self._end(self.members)
        self.members.clear()

    def _start(self, node: Node) -> Member:
        ray = self.connection.ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = (
            ray.remote(concurrency_groups={_BESIDE: 1})(RowWorker)
            .options(
                num_gpus=1 if self.kind == "cuda" else 0,
                num_cpus=min(node.cpus, 1) if self.kind == "cuda" else node.cpus,
                max_restarts=0,  # a worker that comes back without its ceilings is none
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote(os.getcwd())
        )
        dtypes = {kind: sorted(names) for kind, names in self.dtypes.items()}
        device = "cuda:0" if self.kind == "cuda" else "cpu"  # Ray shows a worker its own GPU only
        pending = actor.probe.remote(mlakit.__version__, device, dtypes)
        return Member(node, actor, pending, time.monotonic() + _START_SECONDS)

    def _welcome(self, member: Member, device: Device) -> bool:
        """Take a worker that has found its device, unless it is another model than the run is on."""
        where = {"node": member.node.name, "gpu": device.environment["device"].get("uuid")}
        member.device = replace(device, environment={**device.environment, "place": where})
        self._absent.pop(member.gpu, None)
        return self.model is None or self._fits(member)

    def _fits(self, member: Member) -> bool:
        assert member.device is not None
        name = member.device.environment["device"]["name"]
        if name == self.model:
            return True
        self.members.remove(member)
        self._end([member])
        self._failures[member.node.id] = _MOST_FAILURES
        return False

    def _drop(self, member: Member, reason: str, *, for_good: bool = False) -> bool:
        """Let go of a worker that is lost. True if it held a device, or a row."""
        held = member.device is not None
        if held:
            self._absent[member.gpu] = member.node.id
            self.note(f"the worker on {_where(member)} is lost: {reason}")
        else:
            self._failures[member.node.id] += _MOST_FAILURES if for_good else 1
            if self._failures[member.node.id] >= _MOST_FAILURES:
                self.reasons.append(f"node {member.node.name} gets no (further) worker: {reason}")
                self.note(self.reasons[-1])
        self._looked = float("-inf")  # there may be a GPU without a worker now
        self.members.remove(member)
        self._kill(member)  # one that is cut off must not go on with its row
        return held

    def _end(self, members: Iterable[Member]) -> None:
        """End workers that still answer: they end their processes and clean up first."""
        members = list(members)
        stops = [m.actor.stop.options(concurrency_group=_BESIDE).remote() for m in members if m.device is not None]
        if stops:
            self.connection.ray.wait(stops, num_returns=len(stops), timeout=_STOP_SECONDS)
        for member in members:
            self._kill(member)

    def _kill(self, member: Member) -> None:
        with contextlib.suppress(self.connection.ray.exceptions.RayError):
            self.connection.ray.kill(member.actor)


def _where(member: Member) -> str:
    return f"node {member.place.node}" + (f", {member.place.gpu}" if member.place.gpu else "")


def _explain(error: Exception, ray: Any) -> str:
    """One line, without Ray's traceback of the worker."""
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "it does not answer"
    cause = getattr(error, "cause", None)
    if isinstance(cause, ValueError | DeviceError):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (raised[-1] if raised else lines[0]).removesuffix(".")
