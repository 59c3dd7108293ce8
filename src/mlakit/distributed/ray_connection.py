"""Reaching a Ray cluster, or starting one on this machine, and leaving it as it was. Ray is imported here and nowhere
before.
"""

import contextlib
import fcntl
import importlib
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlakit.bench.process import DeviceError

_REACH_SECONDS = 5.0
# The least that Ray takes; nothing larger than a row travels.
_OBJECT_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True)
class Node:
    """A machine of the cluster that is alive, named as `ray list nodes` names it."""

    id: str
    name: str
    cpus: int
    gpus: int


class Connection:
    """A connection to a cluster; `close` ends it, and the cluster too if it was started for it.

    `address`: "auto" for the one that runs on this machine or that RAY_ADDRESS names, host:port for one elsewhere,
    "local" for one of this machine alone, started for the occasion; None takes "auto" if there is one, else "local".

    Raises:
        ValueError: Ray is not installed, or the address cannot be meant.
        DeviceError: no cluster answers there, or it does not take us (another version of Ray or Python).
    """

    def __init__(self, address: str | None = None) -> None:
        self.ray = load_ray()
        self._folder: Folder | None = None
        self._joined = bool(self.ray.is_initialized())  # whoever initialized Ray shuts it down
        if not self._joined:
            self._connect(address)
        self.address = str(self.ray.get_runtime_context().gcs_address)
        self.started_here = self._folder is not None

    def nodes(self) -> list[Node]:
        """The machines that are alive now.

        Raises:
            DeviceError: the cluster's head does not answer.
        """
        # Asked of a head that is gone, Ray waits for a minute and then ends our process.
        if (reason := _unreachable(self.address)) is not None:
            raise DeviceError(f"the head of the Ray cluster at {self.address} does not answer any more: {reason}")
        found = []
        for node in self.ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                name = node.get("NodeName") or node["NodeManagerAddress"]
                found.append(Node(node["NodeID"], name, int(has.get("CPU", 0)), int(has.get("GPU", 0))))
        return sorted(found, key=lambda node: (node.name, node.id))

    def close(self) -> None:
        """Leave the cluster; end it if it was started here."""
        if not self._joined:
            self.ray.shutdown()
        if self._folder is not None:
            self._folder.remove()

    def _connect(self, address: str | None) -> None:
        _check(address)
        if address in (None, "auto"):
            try:
                # "auto" looks at RAY_ADDRESS first; what is named there has to answer, as what is named here.
                self._join(os.environ.get("RAY_ADDRESS") or "auto")
                return
            except ConnectionError as error:
                if address == "auto":
                    raise DeviceError(
                        "no Ray cluster runs on this machine: start one (ray start --head), name one (--ray-address "
                        "HOST:PORT), or leave --ray-address out for one of this machine alone"
                    ) from error
        elif address is not None and address != "local":
            self._join(address)
            return
        # A short path, as a Unix socket's holds 107 characters, and of our own, as /tmp/ray may be another user's.
        self._folder = Folder("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
        try:
            self._init(address="local", object_store_memory=_OBJECT_STORE_BYTES, _temp_dir=self._folder.path)
        except BaseException:
            self._folder.remove()
            raise

    def _join(self, address: str) -> None:
        if address != "auto" and (reason := _unreachable(address)) is not None:
            raise DeviceError(f"no Ray cluster answers at {address}: {reason}")
        self._init(address=address)

    def _init(self, **arguments: Any) -> None:
        try:
            self.ray.init(include_dashboard=None if "_temp_dir" not in arguments else False, **_QUIET, **arguments)
        except ConnectionError:
            raise
        except Exception as error:  # Ray raises whatever its processes did, and bare Exception where they were slow
            raise DeviceError(f"Ray cannot be used: {' '.join(str(error).split())}") from error


class Folder:
    """A temporary folder for a cluster of this machine alone. Those that killed processes left behind go first."""

    def __init__(self, parent: str) -> None:
        for left in Path(parent).glob(f"{_PREFIX}*/{_LOCK}"):
            with contextlib.suppress(OSError), left.open() as lock:  # another user's, or gone meanwhile
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left.parent, ignore_errors=True)
        self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
        # Held until this process ends, however it does. It gets its name when it is held: who finds the name and can
        # take the lock has found a folder that nobody needs.
        new = Path(self.path, f"{_LOCK}.new")
        self._lock = new.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        new.rename(new.with_name(_LOCK))

    def remove(self) -> None:
        """Remove it with all that Ray put there."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


_PREFIX, _LOCK = "mlakit-ray-", "in-use"
_QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}


def load_ray() -> Any:
    """The module.

    Raises:
        ValueError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray announces a change of its own for workers that ask for no GPU. Ours on a CPU hide none and need none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray = importlib.import_module("ray")
        worker = importlib.import_module("ray._private.worker")
    except ImportError as error:
        raise ValueError(f"--executor ray needs Ray: pip install 'mlakit[distributed]' ({error})") from error
    # What a dying node says Ray prints on our standard output, where the table goes, whatever log_to_driver is (2.60).
    vars(worker)["print_to_stdstream"] = lambda *_, **__: None
    return ray


def _check(address: str | None) -> None:
    if address is None or address in ("auto", "local"):
        return
    if address.startswith("ray://"):
        raise ValueError(
            f"--ray-address {address}: Ray Client is not supported; run mlakit on a machine of the cluster, or with "
            "`ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--ray-address must be auto, local or HOST:PORT, got {address!r}")


def _unreachable(address: str) -> str | None:
    """Why nothing answers at host:port; None if something does. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with contextlib.closing(socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS)):
            return None
    except (OSError, ValueError) as error:
        return str(error)
