"""`apply_rope`: validate, choose an implementation, run it."""

from collections.abc import Hashable

import torch

from mlakit.dispatch import check_device, check_dtype, check_last_dim_contiguous, check_shape, choose_triton, unobserved
from mlakit.rope import ops
from mlakit.rope.reference import apply_rope_reference

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LAYOUTS = ("interleaved", "half")


def apply_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    layout: str = "interleaved",
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Turn pairs of elements of queries or keys by angles that depend on the token (RoPE).

    A pair (a, b) becomes (a cos - b sin, b cos + a sin).

    Args:
        x: [T, H, D], or [B, T, H, D] whose requests are at the same positions unless `positions` tells them apart; D
            even; bfloat16, float16, float32 or float64. Stride 1 in the last dimension, any in the others: the rope
            part of queries of 192, `q[..., 128:]`, will do as it is. A single shared key is H = 1.
        cos: [T, D / 2], a row a token, or [max_positions, D / 2] if `positions` is given; floating, any strides (the
            real part of a complex table of frequencies will do).
        sin: as cos.
        positions: [T] or [B, T] as x's leading dimensions, any strides, int64 or int32: rows of cos and sin, each less
            than max_positions; None takes row i for token i.
        layout: "interleaved" turns elements 2i and 2i + 1 (DeepSeek's inference code), "half" turns i and i + D / 2
            (GPT-NeoX, Hugging Face). The result is laid out as x is.
        out: of x's shape and dtype, stride 1 in the last dimension: x itself (rotation in place), or memory that has
            none in common with the inputs (the last columns of a wider buffer, say). No gradient flows through it.
        impl: "triton" or "reference"; None takes the first that can run.

    Returns:
        Of x's shape and dtype, contiguous unless `out` is given. Computed in float32 (float64 if x is) and rounded
        once. Differentiable with respect to x if `out` is None; no gradient flows to cos and sin.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or option, or `out` given while a gradient is asked for.
        RuntimeError: the named `impl` cannot run here.

    Source: RoFormer (arXiv:2104.09864), section 3.4.2; DeepSeek-V2 (arXiv:2405.04434), section 2.1.3.
    """
    key = None
    if getattr(x, "is_cuda", False) and not torch.compiler.is_compiling():
        # Checking all of it takes the host longer than the kernel takes the GPU: what was found right once is.
        tensors = (x, cos, sin, cos if positions is None else positions, x if out is None else out)
        key = (
            tuple([(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]),
            positions is None,
            out is None,
            layout,
        )
        if key in _CHECKED and impl in (None, "triton") and unobserved(x, cos, sin, tensors[4]):
            if out is None:
                return ops.run_apply_rope(x, cos, sin, positions, layout, False, key)
            ops.run_apply_rope_out(x, cos, sin, positions, layout, out, key)
            return out
    _check(x, cos, sin, positions, layout, out)
    cos, sin = (t.detach() if t.requires_grad else t for t in (cos, sin))
    reason = "it takes no torch.float64" if x.dtype == torch.float64 else None
    if choose_triton("apply_rope", impl, x, reason) == "reference":
        return apply_rope_reference(x, cos, sin, positions=positions, layout=layout, out=out)
    if key is not None:
        if len(_CHECKED) >= _MOST_CHECKED:
            _CHECKED.clear()
        _CHECKED.add(key)
    if out is None:
        return (ops.run_apply_rope if unobserved(x, cos, sin) else ops.apply_rope)(
            x, cos, sin, positions, layout, False
        )
    if out is x:
        in_place = ops.run_apply_rope_ if unobserved(x, cos, sin) else ops.apply_rope_
        in_place(x, cos, sin, positions, layout)
    else:
        into = ops.run_apply_rope_out if unobserved(x, cos, sin, out) else ops.apply_rope_out
        into(x, cos, sin, positions, layout, out)
    return out


_CHECKED: set[Hashable] = set()
_MOST_CHECKED = 4096  # a program that never repeats a shape must not grow for ever


def _check(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    layout: str,
    out: torch.Tensor | None,
) -> None:
    check_dtype("x", x, *_FLOATS)
    if x.ndim not in (3, 4):
        raise ValueError(f"x must have shape [T, H, D] or [B, T, H, D], got {list(x.shape)}")
    check_last_dim_contiguous("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension, as rope turns pairs; got {x.shape[-1]}")
    check_shape("cos", cos, (x.shape[-3] if positions is None else "max_positions", x.shape[-1] // 2))
    check_dtype("cos", cos, *_FLOATS)
    check_device("cos", cos, x.device)
    check_shape("sin", sin, tuple(cos.shape))
    check_dtype("sin", sin, cos.dtype)
    check_device("sin", sin, x.device)
    if positions is not None:
        check_shape("positions", positions, tuple(x.shape[:-2]))
        check_dtype("positions", positions, torch.int64, torch.int32)
        check_device("positions", positions, x.device)
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
    if out is not None:
        check_shape("out", out, tuple(x.shape))
        check_dtype("out", out, x.dtype)
        check_device("out", out, x.device)
        check_last_dim_contiguous("out", out)
        if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
            raise ValueError("out= is not differentiable: expected tensors that require no gradient, got one that does")
