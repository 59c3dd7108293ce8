"""The query of a decode step on Hopper, in one kernel: normalized, projected up, rotated and absorbed.

A program is a head. Its 192 rows of `wq_b` meet the low-rank query; the 64 of them with rope are turned and done, the
other 128 stay in shared memory and meet the head's up-projection of keys. Weights stream through one ring of buffers
from the first to the last, and as they do not depend on the kernel before, loading them begins before that one is done.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlakit.hopper_counters import barrier
from mlakit.hopper_descriptors import descriptor_of_rows
from mlakit.hopper_linear import let_next_kernel_begin, store_columns, wait_for_kernel_before
from mlakit.triton_launch import Launches

NOPE, ROPE, RANK = 128, 64, 512  # what the kernel is written for: DeepSeek's dimensions
BLOCK_K = 128  # columns of a step: rows of 256 bytes. With 64 the kernel took 31.9 us, and 28.2 with 128
_STAGES = 3
LEAST_RANK = BLOCK_K * (_STAGES - 1) + 1


@gluon.jit
def _load_step(
    x_desc, w_desc, w_rope_desc, x_s, w_s, r_s, full, slot, row, step, wanted, NOPE: gl.constexpr, BYTES: gl.constexpr,
    BK: gl.constexpr,
):  # fmt: skip
    bar = full.index(slot)
    mbarrier.expect(bar, BYTES, pred=wanted)
    tma.async_copy_global_to_shared(w_desc, [row, step * BK], bar, w_s.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(w_rope_desc, [row + NOPE, step * BK], bar, r_s.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(x_desc, [0, step * BK], bar, x_s.index(slot), pred=wanted)


@gluon.jit
def _load_up(up_desc, w_s, full, slot, row, piece, wanted, NOPE: gl.constexpr, BK: gl.constexpr):
    mbarrier.expect(full.index(slot), NOPE * BK * 2, pred=wanted)
    tma.async_copy_global_to_shared(up_desc, [row, piece * BK], full.index(slot), w_s.index(slot), pred=wanted)


@gluon.jit
def _absorb(w_s, q_s, full, step, BK: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, PRODUCT: gl.constexpr):
    """Columns of the up-projection, as rows, times the query; not waited for."""
    slot = step % STAGES
    mbarrier.wait(full.index(slot), step // STAGES & 1)
    zeros = gl.zeros([BK, BM], gl.float32, PRODUCT)
    return warpgroup_mma(w_s.index(slot).permute((1, 0)), q_s, zeros, use_acc=False, is_async=True)


@gluon.jit
def _turn(
    r, cos_ptr, sin_ptr, positions_ptr, rows, q_len, stride_angle, BM: gl.constexpr, ROPE: gl.constexpr,
    HAS_POSITIONS: gl.constexpr,
):  # fmt: skip
    """Rope of r [ROPE, BM], whose columns are tokens: rows 2i and 2i + 1 are a pair. r is rounded already."""
    wide: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    pairs = gl.permute(gl.reshape(gl.convert_layout(r, wide), [ROPE // 2, 2, BM]), (0, 2, 1))
    first, second = gl.split(pairs)
    half: gl.constexpr = first.type.layout
    m = gl.arange(0, BM, gl.SliceLayout(0, half))
    i = gl.arange(0, ROPE // 2, gl.SliceLayout(1, half))
    if HAS_POSITIONS:
        position = gl.load(positions_ptr + m, mask=m < rows, other=0).to(gl.int64)
    else:
        position = (m % q_len).to(gl.int64)
    at = (position * stride_angle)[None, :] + (2 * i)[:, None]  # cosines and sines of a complex table lie in turns
    live = (m < rows)[None, :] & (i >= 0)[:, None]
    cos = gl.load(cos_ptr + at, mask=live, other=0.0)
    sin = gl.load(sin_ptr + at, mask=live, other=0.0)
    dtype: gl.constexpr = first.dtype
    first, second = first.to(gl.float32), second.to(gl.float32)
    turned = gl.join((first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype))
    return gl.reshape(gl.permute(turned, (0, 2, 1)), [ROPE, BM])


@gluon.jit(do_not_specialize=["rows", "heads", "width", "q_len"])
def _query_kernel(
    x_desc, w_desc, w_rope_desc, up_desc, gain_ptr, cos_ptr, sin_ptr, positions_ptr, out_ptr, rows, heads, width,
    q_len, eps, up_rows, stride_angle, stride_om, stride_oh, BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    NOPE: gl.constexpr, ROPE: gl.constexpr, RANK: gl.constexpr, HAS_POSITIONS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = x_desc.dtype
    BYTES: gl.constexpr = (NOPE + ROPE + BM) * BK * 2
    UPS: gl.constexpr = RANK // BK
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * BM, 16, rank=2)
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    w_s = gl.allocate_shared_memory(DTYPE, [STAGES, NOPE, BK], matrix)
    r_s = gl.allocate_shared_memory(DTYPE, [STAGES, ROPE, BK], matrix)
    x_s = gl.allocate_shared_memory(DTYPE, [STAGES, BM, BK], matrix)
    q_s = gl.allocate_shared_memory(DTYPE, [NOPE, BM], narrow)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()
    head = gl.program_id(0)
    row = head * (NOPE + ROPE)
    steps = gl.cdiv(width, BK)
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), BYTES)
        tma.async_copy_global_to_shared(w_desc, [row, i * BK], full.index(i), w_s.index(i))
        tma.async_copy_global_to_shared(w_rope_desc, [row + NOPE, i * BK], full.index(i), r_s.index(i))
    let_next_kernel_begin()
    wait_for_kernel_before()
    for i in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(x_desc, [0, i * BK], full.index(i), x_s.index(i))

    # RMSNorm on the way: x times its weight is what the products see, and the root mean square divides their sums.
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    col = gl.arange(0, BK, gl.SliceLayout(0, plain))
    squares = gl.zeros([BM, BK], gl.float32, plain)
    next_gain = gl.load(gain_ptr + col, mask=col < width, other=0.0)
    q = gl.zeros([NOPE, BM], gl.float32, product)
    r = gl.zeros([ROPE, BM], gl.float32, product)
    for step in range(steps):
        slot = step % STAGES
        gain = next_gain.to(gl.float32)
        next_col = (step + 1) * BK + col
        next_gain = gl.load(gain_ptr + next_col, mask=next_col < width, other=0.0)
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        x = x_s.index(slot).load(plain).to(gl.float32)
        squares += x * x
        x_s.index(slot).store((x * gain[None, :]).to(DTYPE))
        fence_async_shared()
        barrier()
        q = warpgroup_mma(w_s.index(slot), x_s.index(slot).permute((1, 0)), q, is_async=True)
        r = warpgroup_mma(r_s.index(slot), x_s.index(slot).permute((1, 0)), r, is_async=True)
        q, r = warpgroup_mma_wait(0, [q, r])
        barrier()
        more = step + STAGES
        _load_step(x_desc, w_desc, w_rope_desc, x_s, w_s, r_s, full, slot, row, more, more < steps, NOPE, BYTES, BK)
        wanted = (more >= steps) & (more < steps + UPS)
        _load_up(up_desc, w_s, full, slot, head * up_rows, more - steps, wanted, NOPE, BK)
    inverse = gl.rsqrt(gl.sum(squares, 1) / width + eps)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(0, product))
    q_s.store((q * inverse[None, :]).to(DTYPE))
    fence_async_shared()
    barrier()

    # The absorbed query: each product is one of BK columns of the latent, two are under way at once.
    out_head = out_ptr + head * stride_oh
    for piece in gl.static_range(0, UPS, 2):
        o0 = _absorb(w_s, q_s, full, steps + piece, BK, BM, STAGES, product)
        o1 = _absorb(w_s, q_s, full, steps + piece + 1, BK, BM, STAGES, product)
        if piece == 0:  # while they run
            r = (r * inverse[None, :]).to(DTYPE)
            turned = _turn(r, cos_ptr, sin_ptr, positions_ptr, rows, q_len, stride_angle, BM, ROPE, HAS_POSITIONS)
            store_columns(turned, out_head, RANK, rows, RANK + ROPE, stride_om)
        o0, o1 = warpgroup_mma_wait(0, [o0, o1])
        barrier()
        for i in gl.static_range(2):
            if piece + i + STAGES < UPS:
                slot = (steps + piece + i + STAGES) % STAGES
                _load_up(up_desc, w_s, full, slot, head * up_rows, piece + i + STAGES, head >= 0, NOPE, BK)
        store_columns(o0, out_head, piece * BK, rows, RANK, stride_om)
        store_columns(o1, out_head, (piece + 1) * BK, rows, RANK, stride_om)


_LAUNCHES = Launches(_query_kernel)


def launch_query(
    x: torch.Tensor,
    gain: torch.Tensor,
    wq_b: torch.Tensor,
    up_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    out: torch.Tensor,
    *,
    q_len: int,
    eps: float,
) -> None:
    """Queries as the cache's latents want them, from what `wq_a` made of the new tokens.

    Must follow a kernel on the stream that nothing in the weights depends on: they are read before it is done.

    Args:
        x: [tokens, q_lora_rank], bfloat16 or float16, up to 32 tokens; q_lora_rank at least LEAST_RANK.
        gain: [q_lora_rank], the norm's weight.
        wq_b: [heads * 192, q_lora_rank].
        up_k: [heads, 128, 512], a view of `wkv_b`.
        cos: [any, 32] float32, every other number of a complex table.
        sin: as cos.
        positions: [tokens], each token's row of cos and sin; None: token i takes row i modulo q_len.
        out: [tokens, heads, 576].
        q_len: tokens of a request.
        eps: of the norm.
    """
    tokens, rank = x.shape
    heads = out.shape[1]
    block_m = 16 if tokens <= 16 else 32
    up_rows = up_k.stride(0) // up_k.stride(1)
    flat = up_k.as_strided(((heads - 1) * up_rows + NOPE, RANK), (RANK, 1))
    tensors = (
        descriptor_of_rows(x, block_m, BLOCK_K),
        descriptor_of_rows(wq_b, NOPE, BLOCK_K),
        descriptor_of_rows(wq_b, ROPE, BLOCK_K),
        descriptor_of_rows(flat, NOPE, BLOCK_K),
        gain,
        cos,
        sin,
        cos if positions is None else positions,
        out,
    )
    key = (
        x.shape, x.stride(), x.dtype, wq_b.shape, up_k.stride(), cos.stride(0), out.stride(), q_len, eps,
        None if positions is None else positions.dtype,
    )  # fmt: skip
    if x.is_cuda and _LAUNCHES.again(key, x.device, tensors):
        return
    numbers = (tokens, heads, rank, q_len, eps, up_rows, cos.stride(0), out.stride(0), out.stride(1))
    constants = {
        "BM": block_m,
        "BK": BLOCK_K,
        "STAGES": _STAGES,
        "NOPE": NOPE,
        "ROPE": ROPE,
        "RANK": RANK,
        "HAS_POSITIONS": positions is not None,
        "num_warps": 4,
    }
    _LAUNCHES.first(key, x.device, (heads, 1, 1), tensors, numbers, constants, launch_pdl=True)
