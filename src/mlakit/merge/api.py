"""`merge_states`: checks its inputs, picks an implementation, and says why one cannot run."""

import importlib.util
import os
from collections.abc import Sequence

import torch

from mlakit.dispatch import check_device, check_dtype, check_last_dim_contiguous, check_shape, choose
from mlakit.hardware import capability
from mlakit.merge.reference import merge_states_reference


def merge_states(
    outs: torch.Tensor | Sequence[torch.Tensor],
    lses: torch.Tensor | Sequence[torch.Tensor],
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention results over disjoint sets of keys into the result over their union; differentiable.

    Args:
        outs: [states, tokens, num_heads, dim], or a sequence of at least one [tokens, num_heads, dim]; bfloat16,
            float16 or float32. Any strides but the last, which is 1. Up to eight tensors of a sequence are read where
            they lie; more are stacked first.
        lses: [states, tokens, num_heads] or a sequence of [tokens, num_heads], float32, natural log. -inf marks a
            state that saw no key: what its `out` holds there is not used.
        impl: "triton" or "reference"; None picks the fastest that can run.

    Returns:
        out [tokens, num_heads, dim] in outs' dtype, and lse [tokens, num_heads]: the softmax-weighted mean of the outs
        and the log-sum-exp of the lses. Zeros and -inf where no state saw a key. Computed in float32.

    Raises:
        ValueError: a shape, dtype, device or stride is not as above, or `impl` is unknown.
        RuntimeError: the implementation asked for cannot run these inputs, with the reason.

    Source: the online softmax of FlashAttention (arXiv:2205.14135), section 3.1, with its states kept apart.
    """
    outs_list = _as_list("outs", outs, 4)
    lses_list = _as_list("lses", lses, 3)
    _check(outs_list, lses_list)
    first = outs_list[0]
    reason = _why_not_triton(outs_list, lses_list)
    candidates = {"triton": reason, "reference": None}
    if not first.is_cuda:  # interpreted kernels are for tests, not for users
        candidates = {"reference": None, "triton": reason}
    if choose("merge_states", impl, candidates) == "reference":
        return merge_states_reference(outs, lses)

    from mlakit.merge import ops

    if isinstance(outs, torch.Tensor) or len(outs_list) > ops.MAX_SEPARATE:
        stacked = outs if isinstance(outs, torch.Tensor) else torch.stack(outs_list)
        logs = lses if isinstance(lses, torch.Tensor) else torch.stack(lses_list)
        return ops.merge_stacked(stacked, logs)
    return ops.merge_separate(outs_list, lses_list)


def _as_list(name: str, states: torch.Tensor | Sequence[torch.Tensor], dims: int) -> list[torch.Tensor]:
    if isinstance(states, torch.Tensor):
        if states.dim() != dims:
            raise ValueError(
                f"{name} must have {dims} dimensions or be a sequence of tensors, got {list(states.shape)}"
            )
        found = list(states.unbind(0))
    else:
        found = list(states)
    if not found:
        raise ValueError(f"{name} must hold at least one state, got none")
    return found


def _check(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> None:
    if len(outs) != len(lses):
        raise ValueError(f"lses must hold as many states as outs, {len(outs)}, got {len(lses)}")
    first = outs[0]
    check_shape("outs[0]", first, ("tokens", "num_heads", "dim"))
    check_dtype("outs[0]", first, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if first.shape[1] < 1 or first.shape[2] < 1:
        raise ValueError(f"num_heads and dim must be at least 1, got outs[0] {list(first.shape)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_shape(f"outs[{i}]", out, tuple(first.shape))
        check_dtype(f"outs[{i}]", out, first.dtype)
        check_device(f"outs[{i}]", out, first.device)
        check_last_dim_contiguous(f"outs[{i}]", out)
        check_shape(f"lses[{i}]", lse, tuple(first.shape[:2]))
        check_dtype(f"lses[{i}]", lse, torch.float32, torch.float64)
        check_device(f"lses[{i}]", lse, first.device)


def _why_not_triton(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> str | None:
    if torch.float64 in (outs[0].dtype, *(lse.dtype for lse in lses)):
        return "it computes in float32, got float64"
    return _device_reason(str(outs[0].device))


def _device_reason(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not device.startswith("cuda"):
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"it needs a CUDA device (or TRITON_INTERPRET=1), got {device}"
    found = capability(device)
    return None if found is not None and found >= (8, 0) else f"it needs compute capability 8.0 or more, got {found}"


# torch.compile need not look into what a device is. This is all that torch.compiler.assume_constant_result does, but
# that one imports torch._dynamo, and with it triton, on the spot.
_device_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
