"""How many threads PyTorch should have on a CPU that other processes may be using."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

_CALLS = 15


@contextmanager
def steady_threads(seconds: Callable[[int], float] | None = None) -> Iterator[int]:
    """Let PyTorch use all its threads, or one if they hold each other up; yields their number.

    The threads of an operation wait for the last of them. Where another process holds one of the cores, that one comes
    to run at the end of a time slice: a copy of 0.1 ms then takes 12 to 24 ms (measured on two cores, one of them
    busy), whatever its size, and nothing of what is timed shows. One thread takes the core that is free.

    Args:
        seconds: the median time of a small operation with so many threads; None measures it.
    """
    import torch

    before = torch.get_num_threads()
    measure = seconds or _seconds
    count = before if before == 1 or measure(before) <= 2 * measure(1) else 1
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def _seconds(threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    source = torch.zeros(2**20)
    found = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        source.clone()
        found.append(time.perf_counter() - start)
    return median(found[3:])
