"""Joining the other ranks, and leaving when one of them is lost: with a word, and not after half an hour."""

import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

_TOLD = "told to end (SIGTERM), as another rank's launcher does when that one is gone"
LOST = 4  # exit code of a rank that ends because another one is gone
TIMEOUT = 60.0
_ENDING = threading.RLock()
# What PyTorch raises as a plain RuntimeError when a collective fails; gloo's errors name its own files.
_OF_COLLECTIVES = ("gloo", "NCCL", "Connection closed by peer")
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank: its number.
        size: how many there are.
        device: its GPU, or the CPU.
    """

    rank: int
    size: int
    device: torch.device


class LostRankError(RuntimeError):
    """A collective failed: another rank is gone, or was not heard of in time."""


@contextmanager
def process_group(device: str = "auto", *, timeout: float = TIMEOUT, graphs_alone: bool = False) -> Iterator[Ranks]:
    """Join the process group that the environment speaks of, as `torchrun` sets it: NCCL between GPUs, gloo between
    CPUs. Started by hand, a process is a group of one.

    While the block runs, a rank that dies or stops ends all others within `timeout` seconds: each writes one line to
    standard error and exits with code 4, also one that waits for the GPU, and one whose launcher ends it by SIGTERM.

    Args:
        device: "cuda", "cpu", or "auto", GPUs where there are any.
        timeout: seconds without a sign of life from a rank, and the longest that a collective may take.
        graphs_alone: a promise for every communicator of this process: while a CUDA graph that holds collectives of it
            runs, no other such graph does that is not ordered behind it, and none of its collectives is launched
            outside of a graph. NCCL then need not order the two, which costs every collective of a graph but the first
            2 to 3 µs (`NCCL_GRAPH_MIXING_SUPPORT=0`, which stays set; what the environment says goes first).

    Raises:
        ValueError: the environment names half a group, or there is no GPU for this rank.
        LostRankError: a collective failed.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    alone = "RANK" in missing and "WORLD_SIZE" in missing
    if missing and not alone:
        raise ValueError(f"torchrun sets {', '.join(_VARIABLES)}; without {', '.join(missing)} nobody can be found")
    rank, size = (0, 1) if alone else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    place = _device(device, int(os.environ.get("LOCAL_RANK", rank)))
    patience = timedelta(seconds=timeout)
    if graphs_alone:
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")  # before the first communicator
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        rank=rank,
        world_size=size,
        store=dist.HashStore() if alone else None,
        timeout=patience,
        device_id=place if place.type == "cuda" else None,
    )
    watch: Watch | None = None
    if not alone:
        # A connection of its own: a store serves one request at a time, and another thread's may wait for long.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = PrefixStore("mlakit/alive", dist.TCPStore(host, port, is_master=False, timeout=patience))
        watch = Watch(store, rank, size, timeout)
        watch.start()
    try:
        with nullcontext() if watch is None else watch.hears_signals():
            yield Ranks(rank, size, place)
        dist.barrier()
    except dist.DistError as error:
        raise LostRankError(_first_line(error)) from error
    except RuntimeError as error:
        if any(word in str(error) for word in _OF_COLLECTIVES):
            raise LostRankError(_first_line(error)) from error
        raise
    finally:
        if watch is not None:
            watch.stop()
        if alone or sys.exc_info()[0] is None:  # else others may wait, and this would wait for them
            dist.destroy_process_group()


class Watch(threading.Thread):
    """Tells the other ranks that this one lives, and ends this one when another does not.

    A thread and no handler of errors, as a rank that waits for a GPU whose peer is gone gets no error.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        super().__init__(name="mlakit-watch", daemon=True)
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._stopped = threading.Event()
        # Bytes arrive here when a signal does, also while the main thread waits in C where no handler of Python's runs.
        self._signals, self._signalled = os.pipe()
        for end in (self._signals, self._signalled):
            os.set_blocking(end, False)

    @contextmanager
    def hears_signals(self) -> Iterator[None]:
        """End with a word on SIGTERM, which is how torchrun ends ranks that another one has left."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handler = signal.signal(signal.SIGTERM, lambda *_: self._end(_TOLD))
        before = signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            signal.signal(signal.SIGTERM, handler)

    def run(self) -> None:
        """Beat, and listen."""
        period = min(1.0, self._timeout / 5)
        heard: dict[int, tuple[bytes, float]] = {}
        beat = 0
        due = time.monotonic()
        while not self._stopped.is_set():
            if select.select([self._signals], [], [], max(due - time.monotonic(), 0))[0]:
                if signal.SIGTERM in os.read(self._signals, 64):
                    self._end(_TOLD)
                continue
            due += period
            beat += 1
            try:
                self._store.set(str(self._rank), str(beat))
                for peer in range(self._size):
                    if peer == self._rank:
                        continue
                    word = self._store.get(str(peer)) if self._store.check([str(peer)]) else b""
                    now = time.monotonic()
                    if word == b"done" or peer not in heard or heard[peer][0] != word:
                        heard[peer] = word, now
                    elif now - heard[peer][1] > self._timeout - 2 * period:
                        self._end(f"rank {peer} has not been heard of for {now - heard[peer][1]:.0f} s")
            except RuntimeError as error:
                if not self._stopped.is_set():
                    self._end(f"the ranks' meeting point is gone ({_first_line(error)})")

    def stop(self) -> None:
        """Leave without being missed."""
        self._stopped.set()
        os.write(self._signalled, b"\0")  # wakes the thread
        with suppress(RuntimeError):  # the store is gone before us, and we need it no more
            self._store.set(str(self._rank), "done")
        self.join(self._timeout)
        if not self.is_alive():
            os.close(self._signals)
            os.close(self._signalled)

    def _end(self, reason: str) -> NoReturn:
        end_rank(self._rank, reason)


def end_rank(rank: int, reason: str) -> NoReturn:
    """End this process at once with a line on standard error: it may wait for what never comes."""
    _ENDING.acquire(timeout=1.0)  # never released: who comes second, a signal's handler or its watch, says nothing more
    sys.stdout.flush()
    os.write(2, f"mlakit: rank {rank}: {reason}; ending\n".encode())
    os._exit(LOST)


def _device(kind: str, local_rank: int) -> torch.device:
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ValueError(f"device must be cuda, cpu or auto (each rank takes a GPU of its own), got {kind!r}")
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise ValueError(f"local rank {local_rank} has no GPU of its own: PyTorch sees {found} here")
    return torch.device("cuda", local_rank)


def _first_line(error: BaseException) -> str:
    """What happened, without where in PyTorch's sources and without advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return re.sub(r"^\[[^]]*\]\s*", "", lines[0]).partition(". ")[0]
