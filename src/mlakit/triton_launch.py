"""Launching a kernel again at a small part of what Triton's own launch costs the host.

Triton binds, inspects and hashes every argument of every call: with thirty of them that takes the host longer than a
small kernel takes the GPU. What it finds out depends on the numbers, and on whether each address is a multiple of 16;
where both are known to be the same, the kernel that was compiled then can be launched as it is.
"""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch

LOG2E = 1.4426950408889634  # GPUs have a power of two: launchers multiply the softmax scale by it

_MOST_REMEMBERED = 4096
Found = TypeVar("Found")


class Remembered(dict[Hashable, Found]):
    """What was found out for shapes, strides, options and device: to work it out again takes the host longer than a
    small kernel takes the GPU. A program that never repeats a shape does not grow for ever.
    """

    def __setitem__(self, key: Hashable, found: Found) -> None:
        if len(self) >= _MOST_REMEMBERED:
            self.clear()
        super().__setitem__(key, found)


class Launches:
    """What was launched of one kernel, by the caller's key.

    The kernel's parameters are tensors first, then numbers, then constants. A key must determine everything but the
    tensors' addresses: the numbers, the constants, the options, the grid and the dtypes.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: Remembered[tuple[Any, tuple[Any, ...]]] = Remembered()

    def again(self, key: Hashable, device: torch.device, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Launch as the first time, if there was one with tensors on `device` that were aligned in the same way."""
        found = self._known.get((key, _alignment(tensors), device.index))
        if found is None:
            return False
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                found[0](*tensors, *found[1])
        else:
            found[0](*tensors, *found[1])
        return True

    def first(
        self,
        key: Hashable,
        device: torch.device,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple[int | float, ...],
        constants: Mapping[str, Any],
        **options: Any,
    ) -> None:
        """Launch the kernel by Triton, and remember how. Interpreted kernels are not remembered."""
        if device.type != "cuda":
            self._kernel[grid](*tensors, *numbers, **constants, **options)
            return
        with torch.cuda.device(device):
            compiled = self._kernel[grid](*tensors, *numbers, **constants, **options)
            rest = self._kernel.arg_names[len(tensors) + len(numbers) :]
            fixed = (*numbers, *(constants[name] for name in rest))
            self._known[key, _alignment(tensors), device.index] = compiled[grid], fixed


def _alignment(tensors: tuple[torch.Tensor, ...]) -> int:
    """How far each address is from a multiple of 16, in one number."""
    found = 0
    for tensor in tensors:
        found = found << 4 | tensor.data_ptr() & 15
    return found
