"""Products of few rows with a large weight on Hopper, at the speed of the memory that the weight lies in.

A warpgroup's matrix instruction has 64 rows: those of the weight are taken for them, out^T = w x^T, and the few rows of
x are columns of the product, none of them padded beyond 16 or 32. Programs share the weight's tiles out evenly, a tile
in parts where need be; who finishes a tile last adds up its parts, always in the same order.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlakit.hardware import device_info
from mlakit.hopper_counters import barrier, counters
from mlakit.hopper_descriptors import descriptor_of_rows
from mlakit.triton_launch import Launches

MOST_ROWS = 32


@dataclass(frozen=True)
class LinearConfig:
    """How a product is launched.

    Attributes:
        block_n: rows of the weight in a tile.
        block_k: columns of a step. In rows of 128 bytes wo took 81 us, of 256 62 and of 512 61. For float8 always
            256, two blocks of its scales.
        stages: steps that are under way at once.
        programs: among which the tiles are shared out.
    """

    block_n: int
    block_k: int
    stages: int
    programs: int


@gluon.jit
def wait_for_kernel_before():
    """Wait until the kernel before this one on the stream is done, where this one may begin earlier (`overlap`)."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, $1;", "=r,r", [0], gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_kernel_begin():
    """A kernel launched with `overlap` after this one may begin where there is room, and load what it can."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, $1;", "=r,r", [0], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _is_last(counter_ptr, count):
    """True in the program that is the last of `count` to get here; what the others have written can then be read."""
    barrier()
    before = gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    barrier()
    return (before & 65535) == count - 1


@gluon.jit
def _load_w(
    w0_desc, w1_desc, w_s, full, unit, slot, wanted, tiles0, steps, w_step, BN: gl.constexpr, BK: gl.constexpr,
    BYTES: gl.constexpr, TWO: gl.constexpr, HEAD_TILES: gl.constexpr,
):  # fmt: skip
    tile = unit // steps
    col = unit % steps * BK
    bar = full.index(slot)
    mbarrier.expect(bar, BYTES, pred=wanted)
    if TWO:
        first = tile < tiles0
        tma.async_copy_global_to_shared(w0_desc, [tile * BN, col], bar, w_s.index(slot), pred=wanted & first)
        row1 = (tile - tiles0) * BN
        tma.async_copy_global_to_shared(w1_desc, [row1, col], bar, w_s.index(slot), pred=wanted & (tile >= tiles0))
    else:
        row = tile // HEAD_TILES * w_step + tile % HEAD_TILES * BN
        tma.async_copy_global_to_shared(w0_desc, [row, col], bar, w_s.index(slot), pred=wanted)


@gluon.jit
def _load_x(x_desc, x_s, full, unit, slot, wanted, steps, x_step, BK: gl.constexpr, HEAD_TILES: gl.constexpr):
    col = unit % steps * BK + unit // steps // HEAD_TILES * x_step
    tma.async_copy_global_to_shared(x_desc, [0, col], full.index(slot), x_s.index(slot), pred=wanted)


@gluon.jit
def store_columns(acc, out_ptr, first, rows, columns, stride_om):
    """Write acc [BN, BM], a column a row of x, to columns `first` and on of out [rows, columns]."""
    wide: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    value = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), wide)
    n = first + gl.arange(0, acc.shape[0], gl.SliceLayout(1, wide))
    m = gl.arange(0, acc.shape[1], gl.SliceLayout(0, wide))
    gl.store(out_ptr + m[None, :] * stride_om + n[:, None], value, mask=(m < rows)[None, :] & (n < columns)[:, None])


@gluon.jit
def _store(
    acc, out0_ptr, out1_ptr, tile, tiles0, rows, n0, n1, stride_o0, stride_o1, BN: gl.constexpr, TWO: gl.constexpr
):  # fmt: skip
    if TWO:
        if tile < tiles0:
            store_columns(acc, out0_ptr, tile * BN, rows, n0, stride_o0)
        else:
            store_columns(acc, out1_ptr, (tile - tiles0) * BN, rows, n1, stride_o1)
    else:
        store_columns(acc, out0_ptr, tile * BN, rows, n0, stride_o0)


@gluon.jit
def _add_parts(
    partial_ptr, low, high, first, units, programs, BN: gl.constexpr, BM: gl.constexpr, PARTS: gl.constexpr,
    PRODUCT: gl.constexpr,
):  # fmt: skip
    """A tile's parts, those of programs `low` to `high`. All loads are under way at once: one after the other they took
    1.7 us each.
    """
    layout: gl.constexpr = gl.BlockedLayout([PARTS, 1, 4], [1, 4, 8], [1, 4, 1], [2, 1, 0])
    part = low + gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    n = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    m = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    program = gl.minimum(part, high)
    place = 2 * program + gl.where(program * units // programs < first, 1, 0)
    at = (place * (BN * BM))[:, None, None] + (n * BM)[None, :, None] + m[None, None, :]
    some = gl.load(partial_ptr + at, cache_modifier=".cg")
    return gl.convert_layout(gl.sum(gl.where((part <= high)[:, None, None], some, 0.0), 0), PRODUCT)


@gluon.jit
def _scales(
    x_scale_ptrs, scales0_ptr, scales1_ptr, unit, tiles0, steps, blocks, BN: gl.constexpr, TWO: gl.constexpr
):  # fmt: skip
    """The scales of a unit's two blocks of 128 columns, x's times w's."""
    tile = unit // steps
    block = unit % steps * 2
    ptr = scales0_ptr + tile * BN // 128 * blocks
    if TWO:
        ptr = gl.where(tile < tiles0, ptr, scales1_ptr + (tile - tiles0) * BN // 128 * blocks)
    second = gl.minimum(block + 1, blocks - 1)  # of a last step that has but one, the products are zeros
    return gl.load(x_scale_ptrs + block) * gl.load(ptr + block), gl.load(x_scale_ptrs + second) * gl.load(ptr + second)


@gluon.jit
def _multiply_block(w, x, FIRST: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, PRODUCT: gl.constexpr):
    some_w, some_x = w.slice(FIRST, 128, 1), x.slice(FIRST, 128, 1)
    zeros = gl.zeros([BN, BM], gl.float32, PRODUCT)
    return warpgroup_mma(some_w, some_x.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit(do_not_specialize=["rows", "n0", "n1", "tiles0", "tiles", "steps", "blocks", "w_step", "x_step"])
def _linear_kernel(
    x_desc, w0_desc, w1_desc, x_scales_ptr, scales0_ptr, scales1_ptr, out0_ptr, out1_ptr, partial_ptr, counter_ptr,
    rows, n0, n1, tiles0, tiles, steps, blocks, w_step, x_step, stride_o0, stride_o1, BN: gl.constexpr,
    BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, TWO: gl.constexpr, HEAD_TILES: gl.constexpr,
    PARTS: gl.constexpr, OVERLAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = x_desc.dtype
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    BYTES: gl.constexpr = (BN + BM) * BK * BITS // 8
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, BITS, rank=2)
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 256 // BITS])
    w_s = gl.allocate_shared_memory(DTYPE, [STAGES, BN, BK], matrix)
    x_s = gl.allocate_shared_memory(DTYPE, [STAGES, BM, BK], matrix)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    units = tiles * steps
    begin = program * units // programs
    end = (program + 1) * units // programs
    for i in gl.static_range(STAGES):
        unit = begin + i
        _load_w(w0_desc, w1_desc, w_s, full, unit, i, unit < end, tiles0, steps, w_step, BN, BK, BYTES, TWO, HEAD_TILES)
    let_next_kernel_begin()
    if OVERLAP:
        wait_for_kernel_before()
    for i in gl.static_range(STAGES):
        _load_x(x_desc, x_s, full, begin + i, i, begin + i < end, steps, x_step, BK, HEAD_TILES)
    m = gl.arange(0, BM, gl.SliceLayout(0, product))
    n = gl.arange(0, BN, gl.SliceLayout(1, product))
    if BITS == 8:
        x_scale_ptrs = x_scales_ptr + gl.minimum(m, rows - 1) * blocks
        next0, next1 = _scales(x_scale_ptrs, scales0_ptr, scales1_ptr, begin, tiles0, steps, blocks, BN, TWO)
    at = begin
    while at < end:
        tile = at // steps
        first = tile * steps
        stop = gl.minimum(first + steps, end)
        acc = gl.zeros([BN, BM], gl.float32, product)
        for unit in range(at, stop):
            slot = (unit - begin) % STAGES
            if BITS == 8:
                scale0, scale1 = next0, next1
                after = gl.minimum(unit + 1, end - 1)
                next0, next1 = _scales(x_scale_ptrs, scales0_ptr, scales1_ptr, after, tiles0, steps, blocks, BN, TWO)
            mbarrier.wait(full.index(slot), (unit - begin) // STAGES & 1)
            if BITS == 8:
                # Sums of 128 products, as long as the scales hold, then into the sum of float32.
                sum0 = _multiply_block(w_s.index(slot), x_s.index(slot), 0, BN, BM, product)
                sum1 = _multiply_block(w_s.index(slot), x_s.index(slot), 128, BN, BM, product)
                sum0, sum1 = warpgroup_mma_wait(0, [sum0, sum1])
            else:
                acc = warpgroup_mma(w_s.index(slot), x_s.index(slot).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(0, [acc])
            barrier()
            more = unit + STAGES
            _load_w(
                w0_desc, w1_desc, w_s, full, more, slot, more < end, tiles0, steps, w_step, BN, BK, BYTES, TWO,
                HEAD_TILES,
            )  # fmt: skip
            _load_x(x_desc, x_s, full, more, slot, more < end, steps, x_step, BK, HEAD_TILES)
            if BITS == 8:
                acc += sum0 * scale0[None, :]
                acc += sum1 * scale1[None, :]
        if (stop == first + steps) & (at == first):
            _store(acc, out0_ptr, out1_ptr, tile, tiles0, rows, n0, n1, stride_o0, stride_o1, BN, TWO)
        elif PARTS > 1:
            place = 2 * program + gl.where(at == begin, 0, 1)
            gl.store(partial_ptr + place * (BN * BM) + (n[:, None] * BM + m[None, :]), acc)
            # Unit u belongs to program ((u + 1) * programs - 1) // units.
            low = ((first + 1) * programs - 1) // units
            high = ((first + steps) * programs - 1) // units
            if _is_last(counter_ptr + tile, high - low + 1):
                gl.store(counter_ptr + tile, 0)
                acc = _add_parts(partial_ptr, low, high, first, units, programs, BN, BM, PARTS, product)
                _store(acc, out0_ptr, out1_ptr, tile, tiles0, rows, n0, n1, stride_o0, stride_o1, BN, TWO)
        at = stop


_LAUNCHES = Launches(_linear_kernel)


# A head in two halves, two programs a multiprocessor, and all of a program's loads under way at once: a step of decode
# took 194.6 us, 195.9 with one program a head and steps of 64 columns, 198.3 with steps of 128.
BY_HEAD = LinearConfig(64, 256, 2, 0)


@lru_cache(1024)
def linear_config(n: int, k: int, bits: int, units: int) -> LinearConfig:
    """The launch for weights of n rows in all, and k columns, on a device of so many multiprocessors."""
    # A program adds up to 8 parts of a tile in its registers, of tiles of 128 rows up to 4.
    tiles = -(-n // 64)
    if bits == 8 and tiles >= units // 2:
        return LinearConfig(128, 256, 4, units)
    if bits == 8:
        return LinearConfig(64, 256, 7, min(units, 7 * tiles))
    if 0.8 * units <= tiles <= units:  # no tile in parts: a step 193.6 us, 198.1 with its tiles shared out among all
        return LinearConfig(64, 256, 4, tiles)
    return LinearConfig(64, 128, 8, min(units, 7 * tiles))


def launch_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor] = (),
    *,
    overlap: bool = False,
    config: LinearConfig | None = None,
) -> None:
    """Multiply x with the transpose of one or two weights, in one kernel.

    Args:
        x: [rows, k], bfloat16, float16 or float8_e4m3fn, up to MOST_ROWS rows, which begin at multiples of 16 bytes.
        weights: one or two [n, k] of x's dtype, whose rows begin so too.
        outs: as many [rows, n], stride 1 in the last dimension.
        scales: for float8: x's [rows, ceil(k / 128)], contiguous, and each weight's [ceil(n / 128), ceil(k / 128)].
        overlap: begin before the kernel before this one on the stream is done, and read weights meanwhile: neither
            that one nor one that it overlaps with may write to them.
        config: None takes `linear_config`'s.
    """
    columns = (weights[0].shape[0], weights[1].shape[0] if len(weights) == 2 else 0)
    if config is None:
        units = device_info(x.device).units
        config = linear_config(sum(columns), x.shape[1], x.element_size() * 8, units)
    _launch(x, weights, outs, scales, _work(columns, x.shape[1], config), overlap)


def launch_by_head(
    x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, *, overlap: bool = False, config: LinearConfig | None = None
) -> None:
    """Each head of x [rows, heads, k] times its own weight, w [heads, 128, k], into out [rows, heads, 128].

    x's rows and out's are contiguous; w's heads lie any whole number of its rows apart; k is a multiple of 256.
    `overlap` as `launch_linear`'s.
    """
    rows, heads, k = x.shape
    n, step = w.shape[1], w.stride(0) // w.stride(1)
    if config is None:
        config = BY_HEAD
    flat = w.as_strided(((heads - 1) * step + n, k), (w.stride(1), 1))
    head_tiles = n // config.block_n
    tiles = heads * head_tiles
    work = _Work(config, (heads * n, 0), tiles, tiles, k // config.block_k, 0, step, k, tiles, 1, head_tiles)
    _launch(x.view(rows, heads * k), (flat,), (out.view(rows, heads * n),), (), work, overlap)


@dataclass(frozen=True)
class _Work:
    """What a launch does, beside how: numbers of the kernel's arguments, and into how many parts a tile is cut."""

    config: LinearConfig
    columns: tuple[int, int]
    tiles0: int
    tiles: int
    steps: int
    blocks: int
    w_step: int
    x_step: int
    programs: int
    parts: int
    head_tiles: int = 1


@lru_cache(1024)
def _work(columns: tuple[int, int], k: int, config: LinearConfig) -> _Work:
    tiles0, tiles1 = (-(-n // config.block_n) for n in columns)
    tiles, steps = tiles0 + tiles1, -(-k // config.block_k)
    units = tiles * steps
    programs = min(config.programs, units)
    parts = max(
        ((first + steps) * programs - 1) // units - ((first + 1) * programs - 1) // units + 1
        for first in range(0, units, steps)
    )
    return _Work(config, columns, tiles0, tiles, steps, -(-k // 128), config.block_n, 0, programs, parts)


def _launch(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    work: _Work,
    overlap: bool,
) -> None:
    config, device, out = work.config, x.device, outs[0]
    rows = x.shape[0]
    assert rows <= MOST_ROWS
    block_m = 16 if rows <= 16 else MOST_ROWS
    partial = counter = out  # never touched if no tile is in parts
    if work.parts > 1:
        partial = torch.empty(2 * work.programs * config.block_n * block_m, dtype=torch.float32, device=device)
        counter = counters(device, work.tiles)
    loads = [descriptor_of_rows(w, config.block_n, config.block_k) for w in weights]
    x_scales, *w_scales = scales or (out, out)
    tensors = (
        descriptor_of_rows(x, block_m, config.block_k), loads[0], loads[-1], x_scales, w_scales[0], w_scales[-1],
        out, outs[-1], partial, counter,
    )  # fmt: skip
    strides = (out.stride(0), outs[-1].stride(0))
    key = (work, x.shape, x.dtype, out.dtype, strides, overlap)
    if x.is_cuda and _LAUNCHES.again(key, device, tensors):
        return
    numbers = (
        rows,
        *work.columns,
        work.tiles0,
        work.tiles,
        work.steps,
        work.blocks,
        work.w_step,
        work.x_step,
        *strides,
    )
    constants = {
        "BN": config.block_n,
        "BM": block_m,
        "BK": config.block_k,
        "STAGES": config.stages,
        "TWO": len(outs) == 2,
        "HEAD_TILES": work.head_tiles,
        "PARTS": triton.next_power_of_2(work.parts),
        "OVERLAP": overlap,
        "num_warps": 4,
    }
    _LAUNCHES.first(key, device, (work.programs, 1, 1), tensors, numbers, constants, launch_pdl=overlap)
