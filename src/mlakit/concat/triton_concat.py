"""One kernel that writes the keys of MHA mode at the speed of a copy."""

# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mlakit.hardware import device_info
from mlakit.triton_launch import Launches

_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
_VECTOR_BYTES = 16


@dataclass(frozen=True)
class ConcatConfig:
    """Heads a program writes, and its warps. `streaming` marks the stores as not needed soon (st.global.cs), and
    `evict_first` the heads' own parts that are read.
    """

    block_heads: int
    num_warps: int
    streaming: bool
    evict_first: bool = False


@triton.jit
def _concat_k_kernel(
    k_nope_ptr,
    k_pe_ptr,
    out_ptr,
    heads,
    head_blocks,
    seq_len,
    stride_nb,
    stride_ns,
    stride_nh,
    stride_nd,
    stride_pb,
    stride_ps,
    stride_pd,
    stride_ob,
    stride_os,
    stride_oh,
    stride_od,
    WORD: tl.constexpr,
    WORDS_PER_UNIT: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    STORE_CACHE: tl.constexpr,
    LOAD_EVICTION: tl.constexpr,
):
    # Elements are moved as integers of up to 8 bytes, whatever they mean. Strides over tokens and heads come in units
    # of up to 16 bytes and are multiplied up here: so the compiler sees that every row starts where a 16-byte access
    # may.
    k_nope_ptr = k_nope_ptr.to(tl.pointer_type(WORD), bitcast=True)
    k_pe_ptr = k_pe_ptr.to(tl.pointer_type(WORD), bitcast=True)
    out_ptr = out_ptr.to(tl.pointer_type(WORD), bitcast=True)
    pid = tl.program_id(0)
    token = pid // head_blocks
    request = (token // seq_len).to(tl.int64)
    position = (token % seq_len).to(tl.int64)
    offs_h = ((pid % head_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_NOPE)
    offs_r = tl.arange(0, BLOCK_ROPE)
    row = offs_h[:, None] < heads

    k_nope_ptr += (request * stride_nb + position * stride_ns) * WORDS_PER_UNIT
    out_ptr += (request * stride_ob + position * stride_os) * WORDS_PER_UNIT
    out_rows = out_ptr + offs_h[:, None] * stride_oh * WORDS_PER_UNIT
    nope_ptrs = k_nope_ptr + offs_h[:, None] * stride_nh * WORDS_PER_UNIT + offs_n[None, :] * stride_nd
    nope = tl.load(nope_ptrs, mask=row & (offs_n[None, :] < NOPE), eviction_policy=LOAD_EVICTION)
    if ROPE > 0:
        k_pe_ptr += (request * stride_pb + position * stride_ps) * WORDS_PER_UNIT
        rope_ptrs = k_pe_ptr + offs_r * stride_pd
        rope = tl.load(rope_ptrs, mask=offs_r < ROPE)
    tl.store(
        out_rows + offs_n[None, :] * stride_od,
        nope,
        mask=row & (offs_n[None, :] < NOPE),
        cache_modifier=STORE_CACHE,
    )
    if ROPE > 0:
        tl.store(
            out_rows + (NOPE + offs_r[None, :]) * stride_od,
            tl.broadcast_to(rope[None, :], (BLOCK_HEADS, BLOCK_ROPE)),
            mask=row & (offs_r[None, :] < ROPE),
            cache_modifier=STORE_CACHE,
        )


_LAUNCHES = Launches(_concat_k_kernel)


_MANY_KEYS = 2**19


def concat_config(tokens: int, heads: int, key_bytes: int, units: int) -> ConcatConfig:
    """The launch for `tokens` x `heads` keys of `key_bytes` on a device of `units` multiprocessors."""
    if tokens * heads >= _MANY_KEYS:
        # One warp on about 1.5 KiB, and no store hint: 1284 us for 65536 tokens in bf16 on an H200 (0.99 of a copy),
        # where 32 heads in 4 warps with streaming stores took 1378.
        return ConcatConfig(block_heads=8 if key_bytes <= 192 else 4, num_warps=1, streaming=False)
    # Few keys: larger programs, but enough of them for every multiprocessor (14.1 us for 512 tokens, where 32 heads in
    # 4 warps took 15.7).
    block_heads = 64
    while block_heads > 8 and tokens * triton.cdiv(heads, block_heads) < units:
        block_heads //= 2
    return ConcatConfig(block_heads=block_heads, num_warps=max(block_heads // 32, 1), streaming=True)


def launch_concat(
    k_nope: torch.Tensor, k_pe: torch.Tensor, out: torch.Tensor, config: ConcatConfig | None = None
) -> None:
    """Write [k_nope, k_pe of every head] to `out`; shapes and dtypes are the caller's promise."""
    key = (k_nope.shape, k_nope.stride(), k_pe.shape, k_pe.stride(), out.stride(), k_nope.dtype, config)
    device = k_nope.device
    if k_nope.is_cuda and _LAUNCHES.again(key, device, (k_nope, k_pe, out)):
        return
    if k_nope.element_size() == 1:
        # Triton refuses pointers to e4m3 below compute capability 8.9, even to move them. (The launcher, which is what
        # runs from the second call on, takes the address of a tensor of any dtype.)
        k_nope, k_pe, out = k_nope.view(torch.uint8), k_pe.view(torch.uint8), out.view(torch.uint8)
    if k_nope.ndim == 3:  # a sequence of one token for each
        k_nope, k_pe, out = k_nope.unsqueeze(1), k_pe.unsqueeze(1), out.unsqueeze(1)
    requests, seq_len, heads, nope = k_nope.shape
    tokens, rope = requests * seq_len, k_pe.shape[-1]
    size = k_nope.element_size()
    if out.numel() == 0:
        return
    if config is None:
        config = concat_config(tokens, heads, (nope + rope) * size, device_info(k_nope.device).units)
    strides = (
        (*k_nope.stride()[:3], k_nope.stride(3) if nope > 1 else 1),
        (*k_pe.stride()[:2], 0, k_pe.stride(3) if rope > 1 else 1),
        out.stride(),
    )
    if nope > 0 and all(stride[3] == 1 for stride in strides):
        # The largest access that every row's start allows.
        starts = [tensor.data_ptr() for tensor in (k_nope, k_pe, out)]
        apart = [size * stride for each in strides for stride in each[:3]]
        unit = math.gcd(_VECTOR_BYTES, nope * size, rope * size, *starts, *apart)
    else:
        unit = size
    word = min(unit, 8)
    (nb, ns, nh, nd), (pb, ps, _, pd), (ob, os, oh, od) = strides
    per_unit = unit // size  # elements
    head_blocks = triton.cdiv(heads, config.block_heads)
    _LAUNCHES.first(
        key,
        device,
        (tokens * head_blocks, 1, 1),
        (k_nope, k_pe, out),
        (
            heads,
            head_blocks,
            seq_len,
            nb // per_unit,
            ns // per_unit,
            nh // per_unit,
            nd,
            pb // per_unit,
            ps // per_unit,
            pd,
            ob // per_unit,
            os // per_unit,
            oh // per_unit,
            od,
        ),
        {
            "WORD": _WORDS[word],
            "WORDS_PER_UNIT": unit // word,
            "NOPE": nope * size // word,
            "ROPE": rope * size // word,
            "BLOCK_NOPE": triton.next_power_of_2(max(nope * size // word, 1)),
            "BLOCK_ROPE": triton.next_power_of_2(max(rope * size // word, 1)),
            "BLOCK_HEADS": config.block_heads,
            "STORE_CACHE": ".cs" if config.streaming else "",
            "LOAD_EVICTION": "evict_first" if config.evict_first else "",
        },
        num_warps=config.num_warps,
    )
