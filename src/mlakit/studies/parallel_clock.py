"""Timing what several ranks do together: all begin at once, and the slowest counts."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from mlakit.bench.gpu_state import GpuMonitor
from mlakit.bench.timing import Timing, capture
from mlakit.distributed.group import Ranks
from mlakit.hardware import device_info

_BUDGET_SECONDS = 0.5
_FEWEST, _MOST, _MOST_OF_A_PART = 20, 300, 100
_FEWEST_CPU = 5
_WARM_UP = 3
# A GPU that did something heavier just before, such as a float64 product, is slowed down for a while by its power
# limit: beside what is timed first, 465 and 473 µs a GPU, an H200 had samples of up to 567.
_WARM_UP_SECONDS = 0.3


@dataclass(frozen=True)
class Spread:
    """Times of one call, in seconds: of every sample the slowest rank's (where each works alone: those of the fastest),
    and each rank's own median.
    """

    timing: Timing
    by_rank: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return self.timing.median


class Clock:
    """Times calls that all ranks make. Use it in a `with` block: captured graphs are given up at its end."""

    def __init__(self, here: Ranks, mode: str, l2: str, repeats: int | None) -> None:
        self._here, self._mode, self._repeats = here, mode, repeats
        info = device_info(here.device)
        self._flush: torch.Tensor | None = None
        if l2 == "cold":
            size = max(2 * info.cache_bytes, 2**28 if info.is_cuda else 0)
            self._flush = torch.zeros(size // 4, dtype=torch.int32, device=here.device)
        self._token = torch.zeros(1, device=here.device)
        self._barrier = barrier_group(here) if info.is_cuda else None
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __enter__(self) -> "Clock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give up the graphs: NCCL waits for those that hold its collectives before it lets go of a communicator."""
        if self._graphs:
            torch.cuda.synchronize(self._here.device)
            for graph in self._graphs:
                graph.reset()
            self._graphs.clear()

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """What to time: the replay of a graph, or the call itself."""
        if self._mode != "graph":
            return call
        graph = capture(call, error_mode="thread_local")  # NCCL's threads speak to the GPU meanwhile
        self._graphs.append(graph)
        return graph.replay

    def time(self, call: Callable[[], object], *, together: bool = True, part: bool = False) -> Spread:
        """Time a call as it is (see `capture`). Every rank must come here with its own.

        Not `together`, each rank does the whole job by itself: what one rank takes is then what the fastest takes, not
        the slower of two by chance. A `part` of what was just timed gets fewer samples, and finds the GPU warm.
        """
        for _ in range(_WARM_UP):
            call()
        is_cuda = self._here.device.type == "cuda"
        sample = self._sample_gpu if is_cuda else self._sample_cpu
        pilot = max(max(samples) for samples in _every_rank(sample(call, 3), self._here))
        if is_cuda and not part:
            for _ in range(min(int(_WARM_UP_SECONDS / pilot), 10 * _MOST)):
                call()
        fewest = _FEWEST if is_cuda else _FEWEST_CPU
        most = _MOST_OF_A_PART if part else _MOST
        count = self._repeats or min(max(fewest, int(_BUDGET_SECONDS / max(pilot, 1e-9))), most)
        ranks = _every_rank(sample(call, count), self._here)
        medians = tuple(Timing(tuple(samples)).median for samples in ranks)
        if together:
            counted = [max(samples) for samples in zip(*ranks, strict=True)]
        else:
            counted = ranks[medians.index(min(medians))]
        return Spread(Timing(tuple(counted)), medians)

    def _sample_gpu(self, call: Callable[[], object], count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        head_start = int((3 * self._host_seconds(call) + 200e-6) * 2e9)
        for start, end in events:
            if self._flush is not None:
                self._flush.zero_()
            else:
                call()
            # The GPU waits until the host has enqueued the rest, then for the other ranks' GPUs.
            torch.cuda._sleep(head_start)
            dist.all_reduce(self._token, group=self._barrier)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self._here.device)
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def _host_seconds(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize(self._here.device)
        start = time.perf_counter()
        call()
        spent = time.perf_counter() - start
        torch.cuda.synchronize(self._here.device)
        return min(spent, 0.01)

    def _sample_cpu(self, call: Callable[[], object], count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            if self._flush is not None:
                self._flush.add_(1)
            else:
                call()
            dist.barrier()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds


class Monitor:
    """Clocks, power and throttling of every rank's GPU while the block runs; `states` on every rank afterwards."""

    def __init__(self, here: Ranks) -> None:
        self._here = here
        self._own = GpuMonitor(device_info(here.device))
        self.states: list[dict[str, Any] | None] = []

    def __enter__(self) -> "Monitor":
        self._own.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own.__exit__(kind, error, trace)
        if kind is None:
            state = self._own.state
            self.states = everyone(None if state is None else state.model_dump(), self._here)


@cache
def barrier_group(here: Ranks) -> dist.ProcessGroup | None:
    """All ranks, with a communicator that no graph holds: barriers are launched while graphs run."""
    return dist.new_group() if here.size > 1 else None


def everyone(value: Any, here: Ranks) -> list[Any]:
    """Every rank's value, on every rank; anything that JSON has."""
    if here.size == 1:
        return [value]
    text = json.dumps(value).encode()
    sizes = torch.zeros(here.size, dtype=torch.int64, device=here.device)
    sizes[here.rank] = len(text)
    dist.all_reduce(sizes)
    lengths = sizes.tolist()
    table = torch.zeros(here.size, max(lengths), dtype=torch.int32, device=here.device)
    table[here.rank, : len(text)] = torch.tensor(list(text), dtype=torch.int32, device=here.device)
    dist.all_reduce(table)
    rows = table.cpu().tolist()
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


def _every_rank(samples: Sequence[float], here: Ranks) -> list[list[float]]:
    table = torch.zeros(here.size, len(samples), dtype=torch.float64, device=here.device)
    table[here.rank] = torch.tensor(samples, dtype=torch.float64, device=here.device)
    if here.size > 1:
        dist.all_reduce(table)
    return table.tolist()


def timing_fields(spread: Spread) -> dict[str, Any]:
    """Of a row: seconds, over all samples the slowest rank's."""
    timing = spread.timing
    return {
        "median": timing.median, "mean": timing.mean, "std": timing.std, "min": timing.min, "max": timing.max,
        "ci95": timing.ci95, "samples": len(timing.samples), "by_rank": spread.by_rank,
    }  # fmt: skip


def agreed(reason: str, here: Ranks) -> str:
    """The first rank's reason why it cannot go on, on every rank; "" if all can."""
    return next((word for word in everyone(reason, here) if word), "")


def describe(here: Ranks) -> list[dict[str, Any]]:
    """Every rank's device, for the record."""
    info = device_info(here.device)
    return everyone({k: v for k, v in asdict(info).items() if k != "uuid"}, here)
