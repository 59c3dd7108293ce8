"""Waiting for a worker process; what comes of one that dies or refuses is in test_runner.py."""

import queue
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest

from mlakit.bench import process
from mlakit.bench.process import Worker, WorkerTimeoutError


class _Silent:
    """Events that never come, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def put(self, event: object) -> None:
        """The listener's, when the process is closed."""

    def get(self, timeout: float) -> None:
        self.waits.append(timeout)
        self.now += timeout
        raise queue.Empty


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker() as found:
        yield found


@pytest.mark.parametrize("timeout", [0.25, 1.0, 3.5])
def test_patience_is_as_long_as_asked_for_and_in_pieces(worker, monkeypatch, timeout):
    """A signal is only heeded between two of them."""
    silent = _Silent()
    monkeypatch.setattr(worker, "_events", silent)
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: silent.now))
    with pytest.raises(WorkerTimeoutError, match=f"no result within {timeout:g} s, while starting"):
        worker.request({"command": "probe", "device": "cpu", "dtypes": []}, timeout=timeout)
    assert sum(silent.waits) == timeout
    assert max(silent.waits) <= 1.0
    assert all(later <= earlier for earlier, later in pairwise(silent.waits))
    assert not worker.alive
