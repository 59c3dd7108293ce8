"""`merge_states`: checks its inputs, picks an implementation, and says why one cannot run."""

from collections.abc import Sequence

import torch

from mlakit.dispatch import (
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
    choose_triton,
    unobserved,
)
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
    if isinstance(outs, torch.Tensor) and isinstance(lses, torch.Tensor):
        _check_stacked(outs, lses)
        if choose_triton("merge_states", impl, outs, _why_not([outs], [lses])) == "reference":
            return merge_states_reference(outs, lses)
        from mlakit.merge import ops

        return (ops.run_stacked if unobserved(outs, lses) else ops.merge_stacked)(outs, lses)

    outs_list = _as_list("outs", outs, 4)
    lses_list = _as_list("lses", lses, 3)
    _check(outs_list, lses_list)
    if choose_triton("merge_states", impl, outs_list[0], _why_not(outs_list, lses_list)) == "reference":
        return merge_states_reference(outs, lses)

    from mlakit.merge import ops

    if len(outs_list) > ops.MAX_SEPARATE:
        return merge_states(torch.stack(outs_list), torch.stack(lses_list), impl="triton")
    merge = ops.run_separate if unobserved(*outs_list, *lses_list) else ops.merge_separate
    return merge(outs_list, lses_list)


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


def _check_stacked(outs: torch.Tensor, lses: torch.Tensor) -> None:
    """The same as `_check` without taking every state out, which costs more than all of the checks."""
    check_shape("outs", outs, ("states", "tokens", "num_heads", "dim"))
    if min(outs.shape[0], outs.shape[2], outs.shape[3]) < 1:
        raise ValueError(f"outs must hold at least one state, head and dim, got {list(outs.shape)}")
    check_dtype("outs", outs, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    check_last_dim_contiguous("outs", outs)
    check_shape("lses", lses, tuple(outs.shape[:3]))
    check_dtype("lses", lses, torch.float32, torch.float64)
    check_device("lses", lses, outs.device)


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


def _why_not(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> str | None:
    if torch.float64 in (outs[0].dtype, *(lse.dtype for lse in lses)):
        return "it computes in float32, got float64"
    return None
