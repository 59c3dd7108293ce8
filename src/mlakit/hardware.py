"""What a device is: names, capability, sizes. What it can do is measured, in `bench/limits.py`."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class DeviceInfo:
    """A device as the code sees it; `capability` is None for a CPU. Sizes in bytes."""

    kind: str  # "cuda" or "cpu"
    index: int
    name: str
    capability: tuple[int, int] | None
    units: int  # streaming multiprocessors, or cores usable by this process
    cache_bytes: int  # L2 of a GPU, last-level cache of a CPU
    memory_bytes: int
    uuid: str | None = None

    @property
    def is_cuda(self) -> bool:
        """True for an NVIDIA GPU."""
        return self.kind == "cuda"


_override: DeviceInfo | None = None


def device_info(device: torch.device | str) -> DeviceInfo:
    """What is known of a device.

    Raises:
        ValueError: the device is not there, or of a kind that mlakit does not run on.
    """
    if _override is not None:
        return _override
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_info(device.index or 0)
    if device.type == "cpu":
        return _cpu_info()
    raise ValueError(f"device must be cuda or cpu, got {device}")


def capability(device: torch.device | str) -> tuple[int, int] | None:
    """Compute capability, (9, 0) on Hopper; None on a CPU."""
    return device_info(device).capability


# torch.compile need not look into how a device is asked. This is all that torch.compiler.assume_constant_result does,
# but that one imports torch._dynamo, and with it triton, on the spot.
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def shared_limit(capability: tuple[int, int]) -> int:
    """Most shared memory that one program (thread block) may use, in bytes; an unknown chip is taken for a consumer's,
    which have the least (CUDA C++ Programming Guide, table of technical specifications by compute capability).
    """
    if capability in ((8, 0), (8, 7)):
        return 163 * 1024
    if capability[0] in (9, 10, 11):
        return 227 * 1024
    return 99 * 1024


@contextmanager
def pretend(info: DeviceInfo) -> Iterator[None]:
    """Let every device look like `info`: for compiling kernels for a GPU that is not there."""
    global _override
    before, _override = _override, info
    try:
        yield
    finally:
        _override = before


@lru_cache
def _cuda_info(index: int) -> DeviceInfo:
    if not torch.cuda.is_available():
        raise ValueError(f"no device cuda:{index}: PyTorch {torch.__version__} sees no GPU here")
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"no device cuda:{index}: PyTorch sees {count} GPU{'s' if count > 1 else ''} here")
    props = torch.cuda.get_device_properties(index)
    uuid = getattr(props, "uuid", None)
    return DeviceInfo(
        kind="cuda",
        index=index,
        name=props.name,
        capability=(props.major, props.minor),
        units=props.multi_processor_count,
        cache_bytes=props.L2_cache_size,
        memory_bytes=props.total_memory,
        uuid=f"GPU-{uuid}" if uuid is not None else None,
    )


@lru_cache
def _cpu_info() -> DeviceInfo:
    return DeviceInfo(
        kind="cpu",
        index=0,
        name=_cpu_name(),
        capability=None,
        units=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cache_bytes=_last_level_cache(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _last_level_cache() -> int:
    sizes = [0]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes) or 32 * 2**20  # where the system does not tell: as much as most desktop CPUs have
