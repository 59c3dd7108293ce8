"""What a measurement depends on besides its config: machine, driver, libraries, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mlakit
from mlakit.bench.gpu_state import driver_version
from mlakit.hardware import DeviceInfo


def describe_environment(info: DeviceInfo) -> dict[str, Any]:
    """Plain JSON values: the device and everything installed that a time can depend on. No host name and no path."""
    return {
        "device": {
            "kind": info.kind,
            "name": info.name,
            "uuid": info.uuid,
            "capability": list(info.capability) if info.capability else None,
            "units": info.units,
            "cache_bytes": info.cache_bytes,
            "memory_bytes": info.memory_bytes,
        },
        "driver": driver_version() if info.is_cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "mlakit": mlakit.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that mlakit runs from, with "+dirty" if it has changes; None outside a checkout.

    MLAKIT_COMMIT says it where the source was copied with no history or with an older one.
    """
    if given := os.environ.get("MLAKIT_COMMIT"):
        return given
    folder = Path(mlakit.__file__).parent
    try:
        tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        head = _git(folder, "rev-parse", "--short=12", "HEAD") if tracked else None
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".") if head else None
    except OSError:
        head = changes = None
    return f"{head}+dirty" if changes else head


def _git(folder: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
