# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""New tokens into the paged cache: normalized, rotated and written by one kernel, a program a token."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mlakit.cache.layout import GROUP
from mlakit.triton_e4m3 import block_scale, divide, fp32_to_e4m3, has_e4m3
from mlakit.triton_launch import Launches


@dataclass(frozen=True)
class AppendConfig:
    """Warps of a token's program."""

    num_warps: int = 1


@triton.jit
def _append_latent_kernel(
    kv_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    cache_ptr,
    slots_ptr,
    positions_ptr,
    eps,
    page_size,
    stride_kv,
    stride_cp,
    stride_cd,
    stride_sp,
    stride_sd,
    stride_page,
    stride_token,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FP8: tl.constexpr,
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        dtype = kv_ptr.dtype.element_ty
        kv_ptr += token * stride_kv
        row_ptr = cache_ptr + (slot // page_size) * stride_page + (slot % page_size) * stride_token

        # The latent as [groups, 128], so that a group's largest magnitude is a reduction along a row.
        group = tl.arange(0, GROUPS)
        offs = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        live = offs < RANK
        x = tl.load(kv_ptr + offs, mask=live, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offs, mask=live, other=0.0).to(tl.float32)
        mean_square = tl.sum(tl.sum(x * x, axis=1), axis=0) / RANK
        latent = (x * tl.rsqrt(mean_square + eps) * weight).to(dtype)

        # Element i of the rope part is turned with its partner, by the angle that the two share.
        i = tl.arange(0, BLOCK_ROPE)
        live_rope = i < ROPE
        if INTERLEAVED:
            partner = i ^ 1
            angle = i // 2
            is_first = i % 2 == 0
        else:
            partner = tl.where(i < ROPE // 2, i + ROPE // 2, i - ROPE // 2)
            angle = i % (ROPE // 2)
            is_first = i < ROPE // 2
        position = token
        if HAS_POSITIONS:
            position = tl.load(positions_ptr + token).to(tl.int64)
        mine = tl.load(kv_ptr + RANK + i, mask=live_rope, other=0.0).to(tl.float32)
        others = tl.load(kv_ptr + RANK + partner, mask=live_rope, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + position * stride_cp + angle * stride_cd, mask=live_rope, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + position * stride_sp + angle * stride_sd, mask=live_rope, other=0.0).to(tl.float32)
        k_pe = (mine * cos + tl.where(is_first, -others, others) * sin).to(dtype)

        if FP8:
            rounded = latent.to(tl.float32)
            scale = block_scale(tl.max(tl.abs(rounded), axis=1), UE8M0)
            codes = fp32_to_e4m3(divide(rounded, scale[:, None], tl.div_rn(1.0, scale)[:, None]), NATIVE)
            scales_ptr = (row_ptr + RANK).to(tl.pointer_type(tl.float32), bitcast=True)
            rope_ptr = (row_ptr + RANK + 4 * (RANK // GROUP)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
            tl.store(row_ptr + offs, codes, mask=live)
            tl.store(scales_ptr + group, scale, mask=group < RANK // GROUP)
            tl.store(rope_ptr + i, k_pe.to(tl.bfloat16), mask=live_rope)
        else:
            tl.store(row_ptr + offs, latent, mask=live)
            tl.store(row_ptr + RANK + i, k_pe, mask=live_rope)


_LAUNCHES = Launches(_append_latent_kernel)


def launch_append(
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    eps: float,
    interleaved: bool,
    ue8m0: bool,
    config: AppendConfig | None = None,
) -> None:
    """Write kv's tokens to their slots of `cache`; shapes and dtypes are the caller's promise."""
    tensors = (
        kv, norm_weight, cos, sin, cache, slot_mapping, slot_mapping if positions is None else positions
    )  # fmt: skip
    key = (
        tuple([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]),
        positions is None,
        eps,
        interleaved,
        ue8m0,
        config,
    )
    if kv.is_cuda and _LAUNCHES.again(key, kv.device, tensors):
        return
    tokens, width = kv.shape
    rank = norm_weight.shape[0]
    rope = width - rank
    if tokens == 0:
        return
    config = config or AppendConfig()
    _LAUNCHES.first(
        key,
        kv.device,
        (tokens, 1, 1),
        tensors,
        (
            eps,
            cache.shape[1],
            kv.stride(0),
            cos.stride(0),
            cos.stride(1),
            sin.stride(0),
            sin.stride(1),
            cache.stride(0),
            cache.stride(1),
        ),
        {
            "RANK": rank,
            "ROPE": rope,
            "GROUP": GROUP,
            "GROUPS": triton.next_power_of_2(triton.cdiv(rank, GROUP)),
            "BLOCK_ROPE": triton.next_power_of_2(rope),
            "HAS_POSITIONS": positions is not None,
            "INTERLEAVED": interleaved,
            "FP8": cache.dtype == torch.uint8,
            "UE8M0": ue8m0,
            "NATIVE": has_e4m3(cache.device),
        },
        num_warps=config.num_warps,
    )
