"""What the Hopper decode kernels for e4m3 caches share: codes on their way into float16 operands, and back out."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mlakit.decode.hopper_parts import _copy_page, _uniform

# Weights are 2^BASE at the maximum that they are relative to, so that few of them are subnormal in float16, and that
# maximum is kept until scores are larger by a factor of 2^SLACK: only then are outputs multiplied.
BASE = gl.constexpr(7.0)
SLACK = gl.constexpr(8.0)


@gluon.jit
def _fill(
    k_desc, r_desc, page_rows, keys, rope, full, FIRST: gl.constexpr, ROPE: gl.constexpr, wanted, PAGE: gl.constexpr
):  # fmt: skip
    """Copy columns from FIRST on of a tile's keys, with the rope part if ROPE."""
    mbarrier.expect(full, 64 * (keys.shape[1] + 64 * ROPE), pred=wanted)
    for i in gl.static_range(len(page_rows)):
        _copy_page(k_desc, page_rows[i], FIRST, keys, i, full, wanted, PAGE)
        if ROPE:
            _copy_page(r_desc, page_rows[i], 512, rope, i, full, wanted, PAGE)


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
def _rescale(factor, o0, o1, o2, o3):
    """Outputs relative to a larger maximum, if it has become larger for any row."""
    if _uniform((gl.min(factor, 0) < 1.0).to(gl.int32)) != 0:  # what each warp finds for itself, the same for all
        f = factor[None, :]
        o0, o1, o2, o3 = o0 * f, o1 * f, o2 * f, o3 * f
    return o0, o1, o2, o3


@gluon.jit
def _add_values(pairs, weights, o0, o1, o2, o3, operand: gl.constexpr):
    """O^T += V^T P^T of a tile of 64 keys, pairs of whose columns are read as one: the even and the odd columns of its
    left half and of its right half, 32 keys at a time; operands of 32 keys are made while the 32 before are multiplied.
    """
    HALF: gl.constexpr = pairs.shape[1] // 2
    left, right = pairs.slice(0, HALF, 1), pairs.slice(HALF, HALF, 1)
    p_first, p_last = weights.slice(0, 32, 0), weights.slice(32, 32, 0)
    o0, o1, a, b = _add_halves(left.slice(0, 32, 0), p_first, o0, o1, operand)
    o0, o1, c, d = _add_halves(left.slice(32, 32, 0), p_last, o0, o1, operand)
    a, b = warpgroup_mma_wait(2, [a, b])
    o2, o3, a, b = _add_halves(right.slice(0, 32, 0), p_first, o2, o3, operand)
    c, d = warpgroup_mma_wait(2, [c, d])
    o2, o3, c, d = _add_halves(right.slice(32, 32, 0), p_last, o2, o3, operand)
    o0, o1, o2, o3, a, b, c, d = warpgroup_mma_wait(0, [o0, o1, o2, o3, a, b, c, d])
    return o0, o1, o2, o3


@gluon.jit
def _words(even, odd, BF16: gl.constexpr):
    """Two columns of the output in one word."""
    CONVERT: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if BF16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(CONVERT, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _kept_maximum(m, largest):
    """The maximum that weights are relative to, once scores with `largest` as theirs have come."""
    return gl.where(largest > m + SLACK, largest, m)


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
