"""Starting the ranks of one machine, where no `torchrun` did it."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

import torch.distributed as dist

from mlakit.distributed.group import LOST, LostRankError, end_rank


def under_torchrun() -> bool:
    """Whether this process is one of several ranks already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_rank(target: Callable[..., int], *args: Any) -> int:
    """Call `target(*args)` in a rank. One that loses another ends with a line and code 4; bad input is code 2."""
    rank = int(os.environ.get("RANK", 0))
    try:
        return target(*args)
    except LostRankError as error:
        end_rank(rank, f"another rank is gone ({error})")
    except ValueError as error:
        if rank == 0:
            print(f"mlakit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def launch(target: Callable[..., int], ranks: int, *args: Any, timeout: float) -> int:
    """Run `target(*args)` in `ranks` processes whose environment is as `torchrun` would set it, and wait for them.

    Ranks that live when one has failed get `timeout` seconds to end by themselves, and say why.

    Returns:
        0 if all ranks returned that, else the code of the first that failed by itself; 4 for one ended by a signal.
    """
    # The children import torch once together: a server that has it forks them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([target.__module__])
    with _ctrl_c_is_ours():
        forkserver.ensure_running()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [context.Process(target=_child, args=(rank, ranks, store.port, target, args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        return _wait(processes, timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


@contextmanager
def _ctrl_c_is_ours() -> Iterator[None]:
    """A process that begins in here ignores a terminal's Ctrl-C: ended in the midst of importing torch, it would say so
    in a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where signals cannot be set, none is handled either
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def say_to(path: str | os.PathLike[str]) -> None:
    """Turn this process's standard error to a file: a rank's is that of the server that forked it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    os.close(handle)


def _wait(processes: Sequence[BaseProcess], timeout: float) -> int:
    code, deadline = 0, None
    waiting = dict(enumerate(processes))
    while waiting and (deadline is None or time.monotonic() < deadline):
        multiprocessing.connection.wait([process.sentinel for process in waiting.values()], timeout=0.2)
        for rank, process in list(waiting.items()):
            found = process.exitcode
            if found is None:
                continue
            del waiting[rank]
            if found < 0:
                name = signal.Signals(-found).name
                print(f"mlakit: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
            if found and code in (0, LOST):
                code = found if found > 0 else LOST
            if found and deadline is None:
                deadline = time.monotonic() + timeout
    for rank in waiting:
        print(f"mlakit: rank {rank} did not end by itself within {timeout:g} s", file=sys.stderr, flush=True)
    return code


def _child(rank: int, ranks: int, port: int, target: Callable[..., int], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent keeps the meeting point, not rank 0
        TORCHELASTIC_RESTART_COUNT="0",
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to handle, which ends this process
    sys.exit(run_rank(target, *args))
