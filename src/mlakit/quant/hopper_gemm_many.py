"""`fp8_gemm` of many rows on Hopper, in Gluon: a producer warp, and two warpgroups that scale what they multiply.

The tensor cores keep about 14 bits of a sum of e4m3 products (DeepSeek-V3 report, 3.3.2), so the product of each 128
columns of K is scaled into a sum of float32. A warpgroup has 64 or twice 64 rows of a tile; while it scales one
product, the tensor cores are at the other warpgroup's. docs/kernels-quant.md tells what bounds it and what else was
tried.
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
def _produce(
    a_desc, b_desc, a_s, b_s, full, empty, tiles_m, tiles_n, blocks, group, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    index = gl.program_id(0)
    loaded = 0
    while index < tiles_m * tiles_n:
        m, n = _place(index, tiles_m, tiles_n, group)
        for k in range(blocks):
            stage = loaded % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((loaded // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (BM + BN) * 128)
            tma.async_copy_global_to_shared(a_desc, [m * BM, k * 128], bar, a_s.index(stage))
            tma.async_copy_global_to_shared(b_desc, [n * BN, k * 128], bar, b_s.index(stage))
            loaded += 1
        index += gl.num_programs(0)


@gluon.jit
def _multiply(a, b, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Begin a product."""
    zeros = gl.zeros([64, BN], gl.float32, LAYOUT)
    return warpgroup_mma(a, b.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _settle(acc, rows):
    """Keep what computes acc in front of this place, by an end of a basic block: a loop that is never repeated.

    Else ptxas begins the next product before this one is scaled, in registers of its own, and these are more than there
    are (56 spills). It removes a loop in which nothing changes, hence the clock.
    """
    acc = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], gl.float32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(
        """{
        .reg .pred again; .reg .u32 now;
        AGAIN: mov.u32 now, %clock; setp.lt.s32 again, $1, 0;
        @again st.shared.u32 [$1], now;
        @again bra AGAIN;
        mov.u32 $0, 0;
        }""",
        "=r,r", [rows], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return acc


@gluon.jit
def _scales(a_scales_ptr, b_scales_ptr, offs0, offs1, offs_b, first, blocks, TWO: gl.constexpr):
    """The scales of a times those of b, of four blocks of K from `first` on, for each product's rows.

    Four neighbouring threads hold the same rows of a product: each takes one of the four blocks, so that a warp reads
    16 bytes of a row at once and a thread keeps one number. What looks like one value a row is four; `_pick` tells them
    apart.
    """
    mine = gl.inline_asm_elementwise(
        "mov.u32 $0, %tid.x; and.b32 $0, $0, 3; add.u32 $0, $0, $1;", "=r,r", [first], gl.int32, is_pure=True, pack=1
    )
    mine = gl.minimum(mine, blocks - 1)
    b_scale = gl.load(b_scales_ptr + (offs_b + mine))
    scales0 = gl.load(a_scales_ptr + (offs0 + mine)) * b_scale
    scales1 = scales0
    if TWO:
        scales1 = gl.load(a_scales_ptr + (offs1 + mine)) * b_scale
    return scales0, scales1


@gluon.jit
def _pick(scales, k):
    """The scales of block k of K, from that thread of four that holds them."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, -1;", "=r,r,r", [scales, k], gl.float32, is_pure=True, pack=1
    )


@gluon.constexpr_function
def _output_layout(dim):
    """Each thread holds 8 neighbouring columns of [64, dim], so that it stores 16 bytes at once; from the product's
    layout it is an exchange within each warp.
    """
    wide = [[0, 32 << i] for i in range((dim // 32).bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], *wide, [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, dim])


@gluon.jit
def _store(acc, out_ptr, row, column, rows, columns, BN: gl.constexpr):
    layout: gl.constexpr = _output_layout(BN)
    result = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), layout)
    r = gl.arange(0, 64, gl.SliceLayout(1, layout))
    c = gl.arange(0, BN, gl.SliceLayout(0, layout))
    base = out_ptr + row.to(gl.int64) * columns + column
    mask = (r < rows - row)[:, None] & (column + c < columns)[None, :]
    gl.store(base + r[:, None] * columns + c[None, :], result, mask=mask)


@gluon.jit
def _consume(
    a_s, b_s, full, empty, a_scales_ptr, b_scales_ptr, out_ptr, rows, columns, tiles_m, tiles_n, blocks, group,
    WHO: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    TWO: gl.constexpr = BM == 256
    FIRST: gl.constexpr = WHO * (BM // 2)
    SECOND: gl.constexpr = FIRST + (64 if TWO else 0)
    index = gl.program_id(0)
    loaded = 0
    while index < tiles_m * tiles_n:
        m, n = _place(index, tiles_m, tiles_n, group)
        r = m * BM + FIRST + gl.arange(0, 64, gl.SliceLayout(1, layout))
        # Rows past the last one take its scales; their sums are not stored.
        offs0 = gl.minimum(r, rows - 1) * blocks
        offs1 = gl.minimum(r + 64, rows - 1) * blocks
        offs_b = n * BN // 128 * blocks
        next0, next1 = _scales(a_scales_ptr, b_scales_ptr, offs0, offs1, offs_b, 0, blocks, TWO)
        acc0 = gl.zeros([64, BN], gl.float32, layout)
        acc1 = acc0
        for first in range(0, blocks, 4):
            scales0, scales1 = next0, next1
            next0, next1 = _scales(a_scales_ptr, b_scales_ptr, offs0, offs1, offs_b, first + 4, blocks, TWO)
            for k in range(first, gl.minimum(first + 4, blocks)):
                stage = loaded % STAGES
                mbarrier.wait(full.index(stage), (loaded // STAGES) & 1)
                a = a_s.index(stage)
                b = b_s.index(stage)
                product = _multiply(a.slice(FIRST, 64, 0), b, BN, layout)
                scale = _pick(scales0, k)
                product = warpgroup_mma_wait(0, [product])
                if TWO:
                    acc0 = _settle(acc0 + product * scale[:, None], rows)
                    product = _multiply(a.slice(SECOND, 64, 0), b, BN, layout)
                    scale = _pick(scales1, k)
                    product = warpgroup_mma_wait(0, [product])
                mbarrier.arrive(empty.index(stage), count=1)
                if TWO:
                    acc1 += product * scale[:, None]
                else:
                    acc0 += product * scale[:, None]
                loaded += 1
        _store(acc0, out_ptr, m * BM + FIRST, n * BN, rows, columns, BN)
        if TWO:
            _store(acc1, out_ptr, m * BM + SECOND, n * BN, rows, columns, BN)
        index += gl.num_programs(0)


# Nothing that changes with the count of rows may specialize the kernel: a new count must not recompile.
@gluon.jit(do_not_specialize=["rows", "tiles_m", "tiles_n", "blocks", "group"])
def _fp8_gemm_hopper_kernel(
    a_desc, b_desc, out_ptr, a_scales_ptr, b_scales_ptr, rows, columns, tiles_m, tiles_n, blocks, group,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    a_s = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BM, 128], a_desc.layout)
    b_s = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, 128], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    # Constants keep being constants only in tuples that are written where they are used.
    gl.warp_specialize(
        [
            (_consume, (
                a_s, b_s, full, empty, a_scales_ptr, b_scales_ptr, out_ptr, rows, columns, tiles_m, tiles_n, blocks,
                group, 0, BM, BN, STAGES,
            )),
            (_consume, (
                a_s, b_s, full, empty, a_scales_ptr, b_scales_ptr, out_ptr, rows, columns, tiles_m, tiles_n, blocks,
                group, 1, BM, BN, STAGES,
            )),
            (_produce, (
                a_desc, b_desc, a_s, b_s, full, empty, tiles_m, tiles_n, blocks, group, BM, BN, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
