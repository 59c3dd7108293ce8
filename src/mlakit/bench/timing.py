"""Timing one job so that the number can be believed; docs/method.md says why each step is there."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mlakit.hardware import device_info

# Without `repeats`, samples are taken until this much time went into the timed calls themselves, within these counts.
_BUDGET_SECONDS = 0.5
_FEWEST_SAMPLES = {"cuda": 20, "cpu": 5}
_MOST_SAMPLES = 1000
_BOOTSTRAP_RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """Samples of one job, in seconds, and what follows from them.

    `host` is the median time that the calling thread spends in a call on a GPU (None on a CPU): a caller without CUDA
    graphs whose host time is above the median cannot keep the GPU busy with these calls alone.
    """

    samples: tuple[float, ...]
    host: float | None = None

    @property
    def median(self) -> float:
        """The figure to quote: half the calls were faster."""
        return float(np.median(self.samples))

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return float(np.mean(self.samples))

    @property
    def std(self) -> float:
        """Standard deviation of the samples (0 for a single one)."""
        return float(np.std(self.samples, ddof=1)) if len(self.samples) > 1 else 0.0

    @property
    def min(self) -> float:
        """Fastest call."""
        return min(self.samples)

    @property
    def max(self) -> float:
        """Slowest call."""
        return max(self.samples)

    @property
    def p20(self) -> float:
        """20th percentile."""
        return float(np.percentile(self.samples, 20))

    @property
    def p80(self) -> float:
        """80th percentile."""
        return float(np.percentile(self.samples, 80))

    @property
    def ci95(self) -> tuple[float, float]:
        """95% bootstrap interval of the median. Deterministic: the resamples are drawn from a fixed seed."""
        data = np.asarray(self.samples)
        picks = np.random.default_rng(0).integers(0, data.size, (_BOOTSTRAP_RESAMPLES, data.size))
        low, high = np.percentile(np.median(data[picks], axis=1), [2.5, 97.5])
        return float(low), float(high)


class _Clock(Protocol):
    @property
    def host(self) -> float | None: ...

    def sample(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Run each call once, in order, and return the seconds each took."""
        ...


def time_calls(
    calls: Sequence[Callable[[], object]],
    device: torch.device | str,
    *,
    l2: str = "cold",
    repeats: int | None = None,
    warmup: int = 3,
    cuda_graph: bool = False,
    budget: float = _BUDGET_SECONDS,
) -> Timing:
    """Time a job whose calls differ only in the buffers they work on (one cache a layer, say); a sample is one call.

    Args:
        calls: taken in turn. Each does the whole job as a caller would: every kernel, the combine included.
        device: where they run: CUDA events around each sample on a GPU, a monotonic clock on a CPU.
        l2: "cold": the L2 of a GPU, or the last-level cache of a CPU, is flushed before each sample. "hot": the same
            call has just run.
        repeats: passes over all calls; None takes as many samples as fit in `budget`, at least 20 on a GPU and 5 on a
            CPU.
        warmup: untimed calls first, in turn; each call runs at least once if it is more than their number.
        cuda_graph: capture each call in a CUDA graph and time its replay.
        budget: seconds of timed work when `repeats` is None.

    Raises:
        ValueError: no calls, an unknown `l2`, `repeats` below 1, `warmup` below 0, or CUDA graphs on a CPU.
    """
    device = torch.device(device)
    if not calls:
        raise ValueError("time_calls needs at least one call, got none")
    if l2 not in ("cold", "hot"):
        raise ValueError(f"l2 must be 'cold' or 'hot', got {l2!r}")
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    if cuda_graph:
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, got {device}")
        calls = [capture(call).replay for call in calls]
    for i in range(warmup):
        calls[i % len(calls)]()

    clock: _Clock = _CudaClock(device, l2, calls) if device.type == "cuda" else _CpuClock(device, l2)
    if repeats is not None:
        return Timing(tuple(clock.sample(list(calls) * repeats)), clock.host)
    pilot = clock.sample([calls[i % len(calls)] for i in range(3)])
    fewest = _FEWEST_SAMPLES[device.type]
    wanted = int(budget / max(float(np.median(pilot)), 1e-9))
    count = min(max(wanted, fewest), _MOST_SAMPLES)
    return Timing(tuple(clock.sample([calls[i % len(calls)] for i in range(count)])), clock.host)


def capture(call: Callable[[], object], *, error_mode: str = "global") -> torch.cuda.CUDAGraph:
    """Capture one call in a CUDA graph, after a warm-up on a side stream as PyTorch asks for.

    With the error mode "thread_local" other threads may speak to the GPU meanwhile.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=error_mode):
        call()
    return graph


class _CudaClock:
    """Events around each call, with the GPU kept busy until the host has enqueued all of it.

    Without that, a call that takes the host longer to launch than the GPU to run is measured as the host's launch time,
    and how much of it depends on how long the flush before happens to take. benchmarks/h200/timing.py holds this clock
    against a profiler and others.
    """

    def __init__(self, device: torch.device, l2: str, calls: Sequence[Callable[[], object]]) -> None:
        self._flush = _flush_buffer(device) if l2 == "cold" else None
        self.host = _host_seconds(calls)
        # Three times the host's share, as it is busier with recording events besides; the GPU's clock is at most about
        # 2 GHz.
        self._head_start = int((3 * self.host + 20e-6) * 2e9)

    def sample(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(len(calls))
        ]
        torch.cuda.synchronize()
        for call, (start, end) in zip(calls, events, strict=True):
            if self._flush is not None:
                self._flush.zero_()
            else:
                call()
            torch.cuda._sleep(self._head_start)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]


def _host_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time until a call returns while the GPU is idle, so that no full launch queue holds the host up."""
    seconds = []
    for i in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        calls[i % len(calls)]()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


class _CpuClock:
    host = None

    def __init__(self, device: torch.device, l2: str) -> None:
        self._flush = _flush_buffer(device) if l2 == "cold" else None

    def sample(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        seconds = []
        for call in calls:
            if self._flush is not None:
                self._flush.add_(1)
            else:
                call()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds


def _flush_buffer(device: torch.device) -> torch.Tensor:
    # Twice the cache at least: writing just its size leaves part of the old lines in place under any but true LRU
    # replacement.
    size = max(2 * device_info(device).cache_bytes, 2**28 if device.type == "cuda" else 0)
    return torch.zeros(size // 4, dtype=torch.int32, device=device)
