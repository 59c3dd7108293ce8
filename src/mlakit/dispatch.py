"""Choosing an implementation, and refusing one in words: shared by every operation's `api.py`."""

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mlakit.hardware import capability


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


def which_impl(operation: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Name the implementation that `operation(*args, **options)` would run, without running it.

    Examples:
        >>> which_impl(mlakit.mla_decode, q, cache, block_table, seq_lens, softmax_scale=192**-0.5)
        'hopper'

    Args:
        operation: `mla_decode`, `mla_prefill`, `mla_sparse_prefill`, `mla_sparse_decode` or `paged_attention`.
        *args: what it would be called with.
        **options: likewise.

    Raises:
        ValueError: an operation that does not choose, or whatever the call itself would refuse.
        RuntimeError: the implementation asked for cannot run these inputs.
    """
    if operation not in _choosers:
        known = ", ".join(sorted(found.__name__ for found in _choosers))
        raise ValueError(f"which_impl: {getattr(operation, '__name__', operation)} is none of {known}")
    return _choosers[operation](*args, **options)


def chooses(operation: Callable[..., Any]) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register what `which_impl` asks about an operation: a function of the same arguments that gives the name."""

    def register(chooser: Callable[..., str]) -> Callable[..., str]:
        _choosers[operation] = chooser
        return chooser

    return register


_choosers: dict[Callable[..., Any], Callable[..., str]] = {}


def choose_triton(
    operation: str, impl: str | None, tensor: torch.Tensor, reason: str | None = None, others: tuple[str, ...] = ()
) -> str:
    """`choose` among "triton" and plain PyTorch, for an operation on `tensor`'s device.

    Args:
        operation: the public function's name, for messages.
        impl: what the caller asked for; None takes the kernel on a GPU, and the first of `others` on a CPU, which has
            the kernel only under Triton's interpreter: that is for tests.
        tensor: any of the inputs.
        reason: why the kernel cannot run these inputs, None if it can; what the device lacks is found here.
        others: implementations that run anywhere; ("reference",) if none are given.

    Raises:
        ValueError, RuntimeError: as `choose`.
    """
    if reason is None:
        reason = why_not_triton(str(tensor.device))
    if reason is None and (impl == "triton" or (impl is None and tensor.is_cuda)):
        return "triton"
    candidates = dict.fromkeys(others or ("reference",))
    kernel = {"triton": reason}
    return choose(operation, impl, {**kernel, **candidates} if tensor.is_cuda else {**candidates, **kernel})


def why_not_triton(device: str) -> str | None:
    """Why a Triton kernel cannot run on a device, None if it can."""
    if not device.startswith("cuda"):
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"it needs an NVIDIA GPU (or TRITON_INTERPRET=1), got tensors on {device}"
    if device not in _reasons:
        found = capability(device)
        if importlib.util.find_spec("triton") is None:
            _reasons[device] = "triton is not installed"
        elif found is None or found < (8, 0):
            _reasons[device] = f"it needs compute capability 8.0 or more, got {found}"
        else:
            _reasons[device] = None
    return _reasons[device]


_reasons: dict[str, str | None] = {}

# torch.compile need not look into what a device is. This is all that torch.compiler.assume_constant_result does, but
# that one imports torch._dynamo, and with it triton, on the spot.
why_not_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def misplaced_row(cache: torch.Tensor) -> str | None:
    """Why kernels cannot read or write the rows of a float8 cache, or None: their float32 scales lie at multiples of 4
    bytes. To be asked inside of operators: torch.compile does not look at where a tensor begins.
    """
    if cache.dtype == torch.uint8 and (cache.stride(0) % 4 or cache.stride(1) % 4 or cache.storage_offset() % 4):
        return f"rows of the float8 cache must start at multiples of 4 bytes, got strides {list(cache.stride())}"
    return None


def unobserved(*tensors: torch.Tensor) -> bool:
    """Does nobody look at what is done with these tensors: no gradient, no tracing, no mode, no subclass?

    Then a kernel may be launched on them without passing PyTorch's dispatcher, which costs the host 15 us a call where
    an operator has an autograd formula (and a kernel may take 5 us).
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _peek_functorch() is not None:
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:  # noqa: SIM110 - a generator costs as much as all of this
        if type(tensor) not in _PLAIN or (grad and tensor.requires_grad):
            return False
    return True


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_peek_functorch = torch._C._functorch.peek_interpreter_stack


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Require a shape; a string in `expected` names a dimension that may have any size.

    Raises:
        ValueError: naming the tensor, the expected and the actual shape; or what is there in its place.
    """
    try:
        actual = tensor.shape
    except AttributeError:
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}") from None
    fits = len(actual) == len(expected)
    for want, got in zip(expected, actual, strict=False):  # no generator: this runs several times a call
        fits = fits and (isinstance(want, str) or want == got)
    if not fits:
        raise ValueError(f"{name} must have shape [{', '.join(map(str, expected))}], got {list(actual)}")


def check_dtype(name: str, tensor: torch.Tensor, *expected: torch.dtype) -> None:
    """Require one of the given dtypes.

    Raises:
        ValueError: naming the tensor, the expected and the actual dtype.
    """
    try:
        actual = tensor.dtype
    except AttributeError:
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}") from None
    if actual not in expected:
        got = actual if isinstance(tensor, torch.Tensor) else type(tensor).__name__  # NumPy's arrays have one too
        raise ValueError(f"{name} must be {' or '.join(map(str, expected))}, got {got}")


def check_scale(softmax_scale: float) -> None:
    """Require a factor for scores that leaves their order as it is.

    Raises:
        ValueError: it is not above zero, or not finite.
    """
    if not (softmax_scale > 0 and math.isfinite(softmax_scale)):
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")


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
