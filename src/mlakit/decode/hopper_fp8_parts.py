"""What the Hopper decode kernels for e4m3 caches share: codes on their way into float16 operands, and back out."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

# Weights are 2^BASE at the maximum that they are relative to, so that few of them are subnormal in float16, and that
# maximum is kept until scores are larger by a factor of 2^SLACK: only then are outputs multiplied.
BASE = gl.constexpr(7.0)
SLACK = gl.constexpr(8.0)


@gluon.jit
def _fill(
    k_desc, r_desc, page_rows, keys, rope, full, FIRST: gl.constexpr, ROPE: gl.constexpr, wanted, PAGE: gl.constexpr
):  # fmt: skip
    """Copy columns from FIRST on of a tile's keys, with the rope part if ROPE: a box, or one for each page and 128
    columns.
    """
    WIDTH: gl.constexpr = keys.shape[1]
    mbarrier.expect(full, 64 * (WIDTH + 64 * ROPE), pred=wanted)
    if PAGE >= 64:
        tma.async_copy_global_to_shared(k_desc, [page_rows[0], FIRST], full, keys, pred=wanted)
        if ROPE:
            tma.async_copy_global_to_shared(r_desc, [page_rows[0], 512], full, rope, pred=wanted)
    else:
        for i in gl.static_range(64 // PAGE):
            for part in gl.static_range(WIDTH // 128):
                box = keys.slice(i * PAGE, PAGE, 0).slice(part * 128, 128, 1)
                tma.async_copy_global_to_shared(k_desc, [page_rows[i], FIRST + part * 128], full, box, pred=wanted)
            if ROPE:
                box = rope.slice(i * PAGE, PAGE, 0)
                tma.async_copy_global_to_shared(r_desc, [page_rows[i], 512], full, box, pred=wanted)


@gluon.jit
def _zero_tail(words, valid):
    """Set codes of a tile's keys past the request's last one to zero: 0 * NaN would not be 0. Rows of words."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    for part in gl.static_range(words.shape[1] // 32):
        some = words.slice(part * 32, 32, 1)
        some.store(gl.where(row[:, None] < valid, some.load(layout), 0))


@gluon.jit
def _halves(pairs):
    """Codes of two neighbouring columns, as one number of 16 bits, in float16: those of the even column and those of
    the odd one.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t; .reg .b16 even, odd;
        prmt.b32 t, $2, 0, 0x3120;
        mov.b32 {even, odd}, t;
        cvt.rn.f16x2.e4m3x2 $0, even;
        cvt.rn.f16x2.e4m3x2 $1, odd;
        }""",
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _add_halves(part, weights, o_even, o_odd, operand: gl.constexpr):
    """O^T += V^T P^T of some keys and columns, on its way; the operands too, which must live until it is done."""
    even, odd = _halves(part.permute((1, 0)).load(operand))
    o_even = warpgroup_mma(even, weights, o_even, is_async=True)
    o_odd = warpgroup_mma(odd, weights, o_odd, is_async=True)
    return o_even, o_odd, even, odd


@gluon.jit
def _words(even, odd, BF16: gl.constexpr):
    """Two columns of the output in one word."""
    if BF16:
        word = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        word = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    return word


@gluon.jit
def _kept_maximum(m, largest):
    """The maximum that weights are relative to, once scores with `largest` as theirs have come."""
    return gl.where(largest > m + SLACK, largest, m)


@gluon.jit
def _finite(m, CAUSAL: gl.constexpr):
    """What to subtract from scores whose maximum is m: with a causal mask a row may not have seen a key yet."""
    if CAUSAL:
        m = gl.where(m == -float("inf"), 0.0, m)
    return m


@gluon.jit
def _largest(s, tops, of_row: gl.constexpr, BLOCK_R: gl.constexpr):
    """Each column's maximum: of each warp's 16 keys, and through shared memory of the four warps'."""
    flat = tops.index(0)
    flat.store(gl.reshape(gl.max(gl.reshape(s, [4, 16, BLOCK_R]), 1), [4 * BLOCK_R]))
    left = gl.maximum(flat.slice(0, BLOCK_R, 0).load(of_row), flat.slice(BLOCK_R, BLOCK_R, 0).load(of_row))
    right = gl.maximum(
        flat.slice(2 * BLOCK_R, BLOCK_R, 0).load(of_row), flat.slice(3 * BLOCK_R, BLOCK_R, 0).load(of_row)
    )
    return gl.maximum(left, right)
