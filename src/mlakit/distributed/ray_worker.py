"""What runs on the cluster: an actor that holds one GPU and measures rows on it. It imports no torch itself: a backend
gets a process of its own there too.
"""

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import mlakit
from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import Record
from mlakit.bench.runner import Meter, new_session, probe


class RowWorker:
    """Measures rows, one at a time, on the GPU that Ray gave it alone, or on its node's CPU.

    What goes in and out is plain JSON values. Ray runs `stop` beside a row at work, and everything else in turn.
    """

    def __init__(self, folder: str) -> None:
        """`folder` is where the command runs: backends of the user's are looked for there, if the node has it."""
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._meter: Meter | None = None
        self._lock = threading.Lock()

    def probe(self, version: str, device: str, dtypes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """The device as `Device` has it, with its ceilings measured here and now. `version` is the command's mlakit.

        Raises:
            ValueError: this node has another mlakit, or PyTorch sees no such device here.
            DeviceError: the device does not work.
        """
        if version != mlakit.__version__:
            raise ValueError(f"it has mlakit {mlakit.__version__}, and the command is of {version}")
        found = probe(device, dtypes)
        record = Record(name="worker", planned=0, sessions=[new_session(found, [])])
        with self._lock:
            self._meter = Meter(found, record).__enter__()
        return asdict(found)

    def measure(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Measure one row; its failure is its outcome."""
        assert self._meter is not None, "probe comes first"
        return self._meter.row(BenchmarkConfig(**config)).model_dump(mode="json")

    def stop(self) -> None:
        """End what is at work and clean up: Ray's own way to end an actor does neither."""
        with self._lock:
            if self._meter is not None:
                self._meter.__exit__()
                self._meter = None
