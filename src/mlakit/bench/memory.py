"""How much memory there is, and how much a call takes."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_MB = 2**20
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def available_bytes(device: torch.device) -> int:
    """Memory that a new allocation can have: free on a GPU, available on a CPU (where the system tells; else
    unlimited).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**63


def measure_peak(call: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """Peak memory while one call runs, in MiB.

    `memory_allocated_mb` is the peak with the workload, `memory_temporary_mb` what the call took on top of what was
    there before, `memory_reserved_mb` what the allocator held. On a CPU the peak of the resident set is what is read,
    and nothing is reserved.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        reserved: float | None = torch.cuda.memory_reserved(device) / _MB
    else:
        before, peak = _cpu_peak(call)
        reserved = None
    return {
        "memory_allocated_mb": peak / _MB,
        "memory_temporary_mb": max(peak - before, 0) / _MB,
        "memory_reserved_mb": reserved,
    }


def _cpu_peak(call: Callable[[], object]) -> tuple[int, int]:
    if not _STATUS.exists():
        import resource

        call()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, the one system that comes here
        return peak, peak
    gc.collect()
    # Memory that earlier calls freed stays in the resident set unless malloc gives it back; it would hide this call's
    # own.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR_REFS.write_text("5")  # resets the peak to the present
    before = _status("VmRSS")
    call()
    return before, _status("VmHWM")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")
