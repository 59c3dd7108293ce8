"""Clocks, power, temperature and throttle reasons of a GPU, from NVML, while a row is timed."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from mlakit.bench.results import GpuState
from mlakit.hardware import DeviceInfo

_T = TypeVar("_T")
_PERIOD_SECONDS = 0.05

# NVML's clock event reasons that slow a GPU down; idle and application settings are not among them.
_THROTTLE_REASONS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


class GpuMonitor:
    """Samples a GPU in the background while its `with` block runs: median clocks, highest power and temperature, all
    throttle reasons.

    On a CPU, and where NVML is missing or refuses, `state` is None or has None in its fields: a measurement does not
    fail for want of it.
    """

    def __init__(self, info: DeviceInfo) -> None:
        self.state: GpuState | None = None
        self._info = info
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "GpuMonitor":
        handle = _handle(self._info) if self._info.is_cuda else None
        if handle is not None:
            self._thread = threading.Thread(target=self._watch, args=(handle,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()

    def _watch(self, handle: Any) -> None:
        seen = [read_state(handle)]
        while not self._stop.wait(_PERIOD_SECONDS):
            seen.append(read_state(handle))
        seen.append(read_state(handle))
        self.state = GpuState(
            sm_clock=_median([s.sm_clock for s in seen]),
            memory_clock=_median([s.memory_clock for s in seen]),
            power=max((s.power for s in seen if s.power is not None), default=None),
            temperature=max((s.temperature for s in seen if s.temperature is not None), default=None),
            throttle_reasons=sorted({reason for s in seen for reason in s.throttle_reasons}),
        )


def _median(values: list[int | None]) -> int | None:
    known = sorted(v for v in values if v is not None)
    return known[len(known) // 2] if known else None


def _handle(info: DeviceInfo) -> Any:
    import pynvml

    def find() -> Any:
        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES renumbers CUDA's devices and not NVML's; the UUID is the same in both.
        if info.uuid is not None:
            return pynvml.nvmlDeviceGetHandleByUUID(info.uuid)
        return pynvml.nvmlDeviceGetHandleByIndex(info.index)

    return _ask(find)


def read_state(handle: Any) -> GpuState:
    """The GPU's state at this moment."""
    import pynvml

    milliwatts = _ask(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    bits = _ask(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0
    return GpuState(
        sm_clock=_ask(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        memory_clock=_ask(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        power=milliwatts / 1000 if milliwatts is not None else None,
        temperature=_ask(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        throttle_reasons=[word for bit, word in _THROTTLE_REASONS.items() if bits & bit],
    )


def _ask(question: Callable[[], _T]) -> _T | None:
    """NVML's answer, or None: a virtual machine's NVML refuses some questions."""
    import pynvml

    try:
        return question()
    except pynvml.NVMLError:
        return None


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None without one."""
    import pynvml

    def ask() -> str:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())

    return _ask(ask)
