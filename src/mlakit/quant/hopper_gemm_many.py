"""`fp8_gemm` of many rows on Hopper, in Gluon: a producer warp, and warpgroups that scale what they multiply.

The tensor cores keep about 14 bits of a sum of e4m3 products (DeepSeek-V3 report, 3.3.2), so the product of each 128
columns of K is scaled into a sum of float32. A warpgroup has 64 or twice 64 rows of a tile; while it scales one
product, the tensor cores are at another warpgroup's, and whatever else it has to do it does while they are at its own.
docs/kernels-quant.md tells what bounds it and what else was tried.
"""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _place(index, tiles_m, tiles_n, group):
    """Row and column of a tile. Tiles that run side by side lie in `group` rows, so that they share what they read."""
    in_group = group * tiles_n
    first = index // in_group * group
    rows = gl.minimum(tiles_m - first, group)
    within = index % in_group
    return first + within % rows, within // rows


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage behind `stage`, and the phase of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _produce(
    a_desc, b_desc, a0_s, a1_s, a2_s, b_s, full, empty, tiles_m, tiles_n, blocks, group, WARPGROUPS: gl.constexpr,
    ROWS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = WARPGROUPS * ROWS
    index = gl.program_id(0)
    stage = 0
    phase = 1
    while index < tiles_m * tiles_n:
        m, n = _place(index, tiles_m, tiles_n, group)
        for k in range(blocks):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (BM + BN) * 128)
            tma.async_copy_global_to_shared(a_desc, [m * BM, k * 128], bar, a0_s.index(stage))
            tma.async_copy_global_to_shared(a_desc, [m * BM + ROWS, k * 128], bar, a1_s.index(stage))
            if WARPGROUPS == 3:
                tma.async_copy_global_to_shared(a_desc, [m * BM + 2 * ROWS, k * 128], bar, a2_s.index(stage))
            tma.async_copy_global_to_shared(b_desc, [n * BN, k * 128], bar, b_s.index(stage))
            stage, phase = _next(stage, phase, STAGES)
        index += gl.num_programs(0)
    # Each warpgroup begins one product more than there are, of what was here before.
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _multiply(a, b, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Begin a product."""
    zeros = gl.zeros([64, BN], gl.float32, LAYOUT)
    return warpgroup_mma(a, b.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _multiply_after(a, b, before, never):
    """Begin a product in the registers of the one before, when that has been read.

    It would add to that one if `never` held, which is not known when this is compiled. Else ptxas begins the product
    before the last one is scaled, in registers of its own.
    """
    return warpgroup_mma(a, b.permute((1, 0)), before, use_acc=never, is_async=True)


@gluon.jit
def _settle(acc, rows):
    """Keep what computes acc in front of this place, by an end of a basic block: a loop that is never repeated.

    The other way to what `_multiply_after` is for: of two products a step that both begin so, ptxas waits for each
    instruction of each (and has 302 spills).
    """
    acc = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], gl.float32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(
        """{
        .reg .pred again;
        AGAIN: setp.lt.s32 again, $1, 0;
        @again st.volatile.shared.u32 [$1], $1;
        @again bra AGAIN;
        mov.u32 $0, 0;
        }""",
        "=r,r", [rows], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return acc


@gluon.jit
def _offsets(index, rows, tiles_m, tiles_n, blocks, group, ROW: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
             LAYOUT: gl.constexpr):  # fmt: skip
    """Where the scales of a tile begin: of its rows from ROW on, of those 64 further on, and of b."""
    m, n = _place(gl.minimum(index, tiles_m * tiles_n - 1), tiles_m, tiles_n, group)
    r = m * BM + ROW + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    # Rows past the last one take its scales; their sums are not stored.
    return gl.minimum(r, rows - 1) * blocks, gl.minimum(r + 64, rows - 1) * blocks, n * BN // 128 * blocks


@gluon.jit
def _scales(a_scales_ptr, b_scales_ptr, offs0, offs1, offs_b, first, blocks, TWO: gl.constexpr):
    """The scales of a, for each product's rows, and that of b, of four blocks of K from `first` on.

    Four neighbouring threads hold the same rows of a product: each takes one of the four blocks, so that a warp reads
    16 bytes of a row at once and a thread keeps one number. What looks like one value a row is four; `_pick` tells them
    apart. They are multiplied where they are needed, as a product of them here would wait for the loads.
    """
    mine = gl.inline_asm_elementwise(
        "mov.u32 $0, %tid.x; and.b32 $0, $0, 3; add.u32 $0, $0, $1;", "=r,r", [first], gl.int32, is_pure=True, pack=1
    )
    mine = gl.minimum(mine, blocks - 1)
    scales0 = gl.load(a_scales_ptr + (offs0 + mine))
    scales1 = scales0
    if TWO:
        scales1 = gl.load(a_scales_ptr + (offs1 + mine))
    return scales0, scales1, gl.load(b_scales_ptr + (offs_b + mine))


@gluon.jit
def _pick(scales, k):
    """The scales of block k of K, from that thread of four that holds them."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, -1;", "=r,r,r", [scales, k], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _store(acc, out_desc, out_s, row, column):
    """64 rows of the result, by a bulk store that only the next one waits for."""
    tma.store_wait(0)
    out_s.store(acc.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row, column], out_s)


@gluon.jit
def _consume(
    a_s, out_s, b_s, full, empty, a_scales_ptr, b_scales_ptr, out_desc, rows, tiles_m, tiles_n, blocks, group,
    WHO: gl.constexpr, WARPGROUPS: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    BM: gl.constexpr = WARPGROUPS * ROWS
    ROW: gl.constexpr = WHO * ROWS
    TWO: gl.constexpr = ROWS == 128
    never = rows < 0
    begun = rows < 0
    index = gl.program_id(0)
    stage = 0
    phase = 0
    before = 0
    offs0, offs1, offs_b = _offsets(index, rows, tiles_m, tiles_n, blocks, group, ROW, BM, BN, layout)
    next0, next1, next_b = _scales(a_scales_ptr, b_scales_ptr, offs0, offs1, offs_b, 0, blocks, TWO)
    mbarrier.wait(full.index(0), 0)
    product = _multiply(a_s.index(0).slice(0, 64, 0), b_s.index(0), BN, layout)
    while index < tiles_m * tiles_n:
        m, n = _place(index, tiles_m, tiles_n, group)
        acc0 = gl.zeros([64, BN], gl.float32, layout)
        acc1 = acc0
        for first in range(0, blocks, 4):
            scales0, scales1 = next0 * next_b, next1 * next_b
            next0, next1, next_b = _scales(a_scales_ptr, b_scales_ptr, offs0, offs1, offs_b, first + 4, blocks, TWO)
            for k in range(first, gl.minimum(first + 4, blocks)):
                # This step's first product is under way. Behind each product comes nothing but its sums, then the next.
                after, phase = _next(stage, phase, STAGES)
                if TWO:
                    scale = _pick(scales0, k)
                    product = warpgroup_mma_wait(0, [product])
                    acc0 += product * scale[:, None]
                    product = _multiply_after(a_s.index(stage).slice(64, 64, 0), b_s.index(stage), product, never)
                scale = _pick(scales1, k)
                mbarrier.arrive(empty.index(before), count=1, pred=begun)  # there is none before the first
                begun = rows >= 0
                mbarrier.wait(full.index(after), phase)
                product = warpgroup_mma_wait(0, [product])
                if TWO:  # the two ways the other way round: 344 us instead of 316 for 4096 x 7168 x 7168
                    acc1 = _settle(acc1 + product * scale[:, None], rows)
                    product = _multiply(a_s.index(after).slice(0, 64, 0), b_s.index(after), BN, layout)
                else:
                    acc0 += product * scale[:, None]
                    product = _multiply_after(a_s.index(after), b_s.index(after), product, never)
                before = stage
                stage = after
        index += gl.num_programs(0)
        # The next tile's scales and its first product are on their way while this one's result is written.
        offs0, offs1, offs_b = _offsets(index, rows, tiles_m, tiles_n, blocks, group, ROW, BM, BN, layout)
        next0, next1, next_b = _scales(a_scales_ptr, b_scales_ptr, offs0, offs1, offs_b, 0, blocks, TWO)
        _store(acc0, out_desc, out_s, m * BM + ROW, n * BN)
        if TWO:
            _store(acc1, out_desc, out_s, m * BM + ROW + 64, n * BN)
    warpgroup_mma_wait(0, [product])
    tma.store_wait(0)


@gluon.jit
def _producer(args, WARPGROUPS: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr):
    _produce(*args, WARPGROUPS, ROWS, BN, STAGES)


@gluon.jit
def _warpgroup(
    a_s, out_s, args, WHO: gl.constexpr, WARPGROUPS: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    _consume(a_s, out_s, *args, WHO, WARPGROUPS, ROWS, BN, STAGES)


# Nothing that changes with the count of rows may specialize the kernel: a new count must not recompile.
@gluon.jit(do_not_specialize=["rows", "tiles_m", "tiles_n", "blocks", "group"])
def _fp8_gemm_hopper_kernel(
    a_desc, b_desc, out_desc, a_scales_ptr, b_scales_ptr, rows, tiles_m, tiles_n, blocks, group,
    WARPGROUPS: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    a0_s = gl.allocate_shared_memory(a_desc.dtype, [STAGES, ROWS, 128], a_desc.layout)
    a1_s = gl.allocate_shared_memory(a_desc.dtype, [STAGES, ROWS, 128], a_desc.layout)
    a2_s = a1_s
    if WARPGROUPS == 3:
        a2_s = gl.allocate_shared_memory(a_desc.dtype, [STAGES, ROWS, 128], a_desc.layout)
    b_s = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, 128], b_desc.layout)
    out0_s = gl.allocate_shared_memory(out_desc.dtype, [64, BN], out_desc.layout)
    out1_s = gl.allocate_shared_memory(out_desc.dtype, [64, BN], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    args = (b_s, full, empty, a_scales_ptr, b_scales_ptr, out_desc, rows, tiles_m, tiles_n, blocks, group)
    produced = (a_desc, b_desc, a0_s, a1_s, a2_s, b_s, full, empty, tiles_m, tiles_n, blocks, group)
    # Constants keep being constants only in tuples that are written where they are used.
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_warpgroup, (a0_s, out0_s, args, 0, 2, ROWS, BN, STAGES)),
                (_warpgroup, (a1_s, out1_s, args, 1, 2, ROWS, BN, STAGES)),
                (_producer, (produced, 2, ROWS, BN, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        out2_s = gl.allocate_shared_memory(out_desc.dtype, [64, BN], out_desc.layout)
        gl.warp_specialize(
            [
                (_warpgroup, (a0_s, out0_s, args, 0, 3, ROWS, BN, STAGES)),
                (_warpgroup, (a1_s, out1_s, args, 1, 3, ROWS, BN, STAGES)),
                (_warpgroup, (a2_s, out2_s, args, 2, 3, ROWS, BN, STAGES)),
                (_producer, (produced, 3, ROWS, BN, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
