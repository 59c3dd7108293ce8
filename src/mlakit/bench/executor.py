"""Where the rows of a run are measured: on this machine, one after the other, or wherever an executor has workers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import Record
from mlakit.bench.runner import Device, Listener, Run, probe


class AnyRun(Protocol):
    """A plan on its way into a record, as `runner.Run` is."""

    def missing(self) -> list[BenchmarkConfig]:
        """Rows still to be measured."""
        ...

    def execute(self) -> Record:
        """Measure them; on KeyboardInterrupt the record is complete up to the last finished row."""
        ...


class Executor(AbstractContextManager[Any], Protocol):
    """Use it as a context: what it started ends with it."""

    name: Literal["local", "ray"]

    def probe(self, device: str, dtypes: Mapping[str, Iterable[str]], listener: Listener) -> Device:
        """The device to plan for, with its ceilings; as `runner.probe`."""
        ...

    def describe(self, device: Device) -> str:
        """The device or devices in a few words."""
        ...

    def run(
        self,
        plan: Sequence[BenchmarkConfig],
        device: Device,
        record: Record,
        save: Callable[[Record], None],
        listener: Listener,
    ) -> AnyRun:
        """The run of a plan, after `probe`."""
        ...


class LocalExecutor(AbstractContextManager["LocalExecutor"]):
    """Rows one after the other on a device of this machine."""

    name: Literal["local"] = "local"

    def __exit__(self, *_: object) -> None:
        """Nothing outlives a run."""

    def probe(self, device: str, dtypes: Mapping[str, Iterable[str]], listener: Listener) -> Device:
        """See `runner.probe`."""
        return probe(device, dtypes, listener)

    def describe(self, device: Device) -> str:
        """Name and PyTorch's name: "NVIDIA H200 (cuda:0)"."""
        return f"{device.environment['device']['name']} ({device.name})"

    def run(
        self,
        plan: Sequence[BenchmarkConfig],
        device: Device,
        record: Record,
        save: Callable[[Record], None],
        listener: Listener,
    ) -> Run:
        """See `runner.Run`."""
        return Run(plan, device, record, save, listener)
