"""Choosing an implementation, and refusing one in words: shared by every operation's `api.py`."""

from collections.abc import Mapping

import torch


def choose(operation: str, impl: str | None, candidates: Mapping[str, str | None]) -> str:
    """Name the implementation to run.

    Args:
        operation: the public function's name, for messages.
        impl: what the caller asked for; None takes the first candidate that can run.
        candidates: implementations, fastest first; the value says why one cannot run these inputs here, or is None if
            it can.

    Raises:
        ValueError: `impl` is no implementation's name.
        RuntimeError: `impl` was named and cannot run, or none can; the message holds the reasons. There is no silent
            fallback.
    """
    if impl is None:
        for name, reason in candidates.items():
            if reason is None:
                return name
        reasons = "; ".join(f"{name}: {reason}" for name, reason in candidates.items())
        raise RuntimeError(f"{operation}: no implementation can run these inputs ({reasons})")
    if impl not in candidates:
        raise ValueError(f"{operation}: unknown impl {impl!r}; expected one of {', '.join(candidates)}")
    if (reason := candidates[impl]) is not None:
        raise RuntimeError(f"{operation}: impl={impl!r} cannot run: {reason}")
    return impl


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Require a shape; a string in `expected` names a dimension that may have any size.

    Raises:
        ValueError: naming the tensor, the expected and the actual shape.
    """
    actual = tuple(tensor.shape)
    fits = len(actual) == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, actual, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape [{', '.join(map(str, expected))}], got {list(actual)}")


def check_dtype(name: str, tensor: torch.Tensor, *expected: torch.dtype) -> None:
    """Require one of the given dtypes.

    Raises:
        ValueError: naming the tensor, the expected and the actual dtype.
    """
    if tensor.dtype not in expected:
        raise ValueError(f"{name} must be {' or '.join(map(str, expected))}, got {tensor.dtype}")


def check_device(name: str, tensor: torch.Tensor, expected: torch.device) -> None:
    """Require a device.

    Raises:
        ValueError: naming the tensor, the expected and the actual device.
    """
    if tensor.device != expected:
        raise ValueError(f"{name} must be on {expected} like the first argument, got {tensor.device}")


def check_last_dim_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Require unit stride in the last dimension.

    Raises:
        ValueError: naming the tensor and its strides.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, got strides {list(tensor.stride())}")
