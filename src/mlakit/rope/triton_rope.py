# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""The rotation at the speed of a copy: a program turns some heads of one token, or of several if they have few.

4096 tokens of 128 heads of 64, on an H200: 37.0 us from dense to dense, where copying the same takes 36.1; 42.8 us from
the last columns of rows of 192 into those of rows of 576, which PyTorch copies in 84.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mlakit.hardware import device_info
from mlakit.triton_launch import Launches


@dataclass(frozen=True)
class RopeConfig:
    """Tokens and heads of a program, and its warps."""

    block_tokens: int
    block_heads: int
    num_warps: int


@triton.jit
def _apply_rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    out_ptr,
    tokens,
    seq_len,
    heads,
    head_blocks,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_cp,
    stride_cd,
    stride_sp,
    stride_sd,
    stride_pb,
    stride_pt,
    stride_ob,
    stride_ot,
    stride_oh,
    HALF_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_t = (pid // head_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    offs_h = ((pid % head_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[None, :, None]
    live_t = offs_t < tokens
    request = (offs_t // seq_len).to(tl.int64)
    index = (offs_t % seq_len).to(tl.int64)
    position = index
    if HAS_POSITIONS:
        found = tl.load(positions_ptr + request * stride_pb + index * stride_pt, mask=live_t, other=0)
        position = found.to(tl.int64)

    angle = tl.arange(0, BLOCK_HALF)
    live_angle = live_t[:, None] & (angle[None, :] < HALF_DIM)
    cos_ptrs = cos_ptr + position[:, None] * stride_cp + angle[None, :] * stride_cd
    sin_ptrs = sin_ptr + position[:, None] * stride_sp + angle[None, :] * stride_sd
    cos = tl.load(cos_ptrs, mask=live_angle, other=0.0).to(tl.float32)[:, None, :]
    sin = tl.load(sin_ptrs, mask=live_angle, other=0.0).to(tl.float32)[:, None, :]
    if INVERSE:
        sin = -sin

    x_rows = x_ptr + (request * stride_xb + index * stride_xt)[:, None, None] + offs_h * stride_xh
    out_rows = out_ptr + (request * stride_ob + index * stride_ot)[:, None, None] + offs_h * stride_oh
    live_row = live_t[:, None, None] & (offs_h < heads)
    dtype = x_ptr.dtype.element_ty
    # All of a program's elements are read before one of them is written: `out` may be x.
    if INTERLEAVED:
        # Whole rows, in wide accesses; both elements of a pair are in the same thread.
        offs_d = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        live = live_row & (offs_d < 2 * HALF_DIM)
        x = tl.load(x_rows + offs_d, mask=live, other=0.0)
        first, second = tl.split(tl.reshape(x, (BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF, 2)))
        first, second = first.to(tl.float32), second.to(tl.float32)
        turned = tl.join((first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype))
        tl.store(out_rows + offs_d, tl.reshape(turned, (BLOCK_TOKENS, BLOCK_HEADS, 2 * BLOCK_HALF)), mask=live)
    else:
        offs_d = angle[None, None, :]
        live = live_row & (offs_d < HALF_DIM)
        first = tl.load(x_rows + offs_d, mask=live, other=0.0).to(tl.float32)
        second = tl.load(x_rows + HALF_DIM + offs_d, mask=live, other=0.0).to(tl.float32)
        tl.store(out_rows + offs_d, (first * cos - second * sin).to(dtype), mask=live)
        tl.store(out_rows + HALF_DIM + offs_d, (second * cos + first * sin).to(dtype), mask=live)


_LAUNCHES = Launches(_apply_rope_kernel)


def rope_config(tokens: int, heads: int, dim: int, units: int) -> RopeConfig:
    """The launch for `tokens` x `heads` rows of `dim` elements on a device of `units` multiprocessors."""
    # Some 1024 elements of one token a program, 16 bytes a thread: 4.9 us for 32 tokens of 128 heads on an H200, where
    # 4096 elements took 5.5. With plenty of programs 32 bytes a thread: 42.3 us for 4096 tokens (43.3 with 16, and 84
    # with 256 elements a program). Several tokens only where they have too few heads to fill a warp.
    width = triton.next_power_of_2(max(dim, 2))
    block_heads = min(max(1024 // width, 1), triton.next_power_of_2(max(heads, 1)))
    block_tokens = max(256 // (block_heads * width), 1)
    size = block_tokens * block_heads * width
    each = 512 if tokens * heads * width > 2**14 * units else 256  # elements a warp
    num_warps = min(max(size // each, 1), 4)
    return RopeConfig(block_tokens, block_heads, num_warps)


def launch_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    out: torch.Tensor,
    *,
    layout: str,
    inverse: bool = False,
    config: RopeConfig | None = None,
    key: Hashable = None,
) -> None:
    """Turn x [T, H, D] or [B, T, H, D] into `out`; shapes and dtypes are the caller's promise.

    `key` determines all but the addresses, for a caller that has it at hand.
    """
    tensors = (x, cos, sin, cos if positions is None else positions, out)
    if key is None:
        shapes = tuple([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors])
        key = (shapes, positions is None, layout, inverse, config)
    if x.is_cuda and _LAUNCHES.again(key, x.device, tensors):
        return
    if out.numel() == 0:
        return
    seq_len, heads, dim = x.shape[-3:]
    tokens = x.numel() // (heads * dim)
    config = config or rope_config(tokens, heads, dim, device_info(x.device).units)
    head_blocks = triton.cdiv(heads, config.block_heads)

    def outer(tensor: torch.Tensor, inner_dims: int) -> tuple[int, int]:
        """Strides over requests and tokens."""
        lead = tensor.ndim - inner_dims
        return (tensor.stride(0) if lead == 2 else 0, tensor.stride(lead - 1))

    _LAUNCHES.first(
        key,
        x.device,
        (triton.cdiv(tokens, config.block_tokens) * head_blocks, 1, 1),
        tensors,
        (
            tokens,
            seq_len,
            heads,
            head_blocks,
            *outer(x, 2),
            x.stride(-2),
            *cos.stride(),
            *sin.stride(),
            *((0, 0) if positions is None else outer(positions, 0)),
            *outer(out, 2),
            out.stride(-2),
        ),
        {
            "HALF_DIM": dim // 2,
            "BLOCK_HALF": triton.next_power_of_2(dim // 2),
            "BLOCK_TOKENS": config.block_tokens,
            "BLOCK_HEADS": config.block_heads,
            "HAS_POSITIONS": positions is not None,
            "INTERLEAVED": layout == "interleaved",
            "INVERSE": inverse,
        },
        num_warps=config.num_warps,
    )
