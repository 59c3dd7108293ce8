"""Compile an operation's kernels for a GPU that is not there, by running its real launcher.

Triton's wheel carries ptxas and cuobjdump, so registers, spills and instructions can be read on any Linux machine. A
launcher that runs inside `offline(90)` chooses its configuration as it would on that GPU; every kernel it launches is
compiled and recorded, none is run.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mlakit.hardware import DeviceInfo, pretend

# What launch configurations depend on. The chips most often met of each capability: A100, H200, B200.
_CHIPS = {
    80: DeviceInfo("cuda", 0, "NVIDIA A100", (8, 0), 108, 40 * 2**20, 80 * 2**30),
    90: DeviceInfo("cuda", 0, "NVIDIA H200", (9, 0), 132, 60 * 2**20, 141 * 2**30),
    100: DeviceInfo("cuda", 0, "NVIDIA B200", (10, 0), 148, 126 * 2**20, 180 * 2**30),
}
TARGETS = tuple(_CHIPS)


@dataclass(frozen=True)
class CompiledKernel:
    """One compiled kernel: its resources, and the SASS for whoever wants to look closer."""

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @property
    def spills(self) -> int:
        """Local loads and stores in the SASS."""
        # They go to the stack, so that without one there is nothing to look for: disassembling takes a CPU second.
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass)) if self.stack_bytes else 0

    @property
    def sass(self) -> str:
        """The instructions; where PTX says as much, it costs nothing."""
        return _cuobjdump("--dump-sass", self.cubin)


class _OfflineDriver:
    """Stands in for a CUDA driver: enough to compile, and nothing launches."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # compiled kernels are cached by device: one "device" a target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def offline(capability: int) -> Iterator[list[CompiledKernel]]:
    """Compile for compute capability 80, 90 or 100 instead of launching; yields the list the kernels are added to.

    Tensors stay on the CPU and their contents are not touched.

    Raises:
        ValueError: another capability.
        RuntimeError: TRITON_INTERPRET is set, so that there is no compiler to ask.
    """
    if capability not in _CHIPS:
        raise ValueError(f"capability must be one of {', '.join(map(str, _CHIPS))}, got {capability}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    compiled: list[CompiledKernel] = []
    original = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_inspect(kernel))
        return kernel

    active = driver._active  # its public reset would look for a GPU
    driver.set_active(_OfflineDriver(capability))
    JITFunction.run = compile_only
    try:
        with pretend(_CHIPS[capability]):
            yield compiled
    finally:
        JITFunction.run = original
        driver._active = active


def _inspect(kernel: Any) -> CompiledKernel:
    cubin = kernel.asm["cubin"]
    usage = _cuobjdump("--dump-resource-usage", cubin)
    found = re.search(r"\bREG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of {kernel.metadata.name}'s registers and stack: {usage!r}")
    return CompiledKernel(
        name=kernel.metadata.name,
        registers=int(found[1]),
        shared_bytes=kernel.metadata.shared,
        stack_bytes=int(found[2]),
        ptx=kernel.asm["ptx"],
        cubin=cubin,
    )


@lru_cache(maxsize=64)  # tests compile the same kernel more than once, and ask for its SASS more than once
def _cuobjdump(what: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout
