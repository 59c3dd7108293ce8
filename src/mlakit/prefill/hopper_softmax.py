"""Softmax of a block of scores in the Hopper prefill kernel: weights by a maximum that may be old.

A block's weights are 2^(score - m) for any m that is near the row's maximum: the sum and the output have it in common,
and it cancels. So m is what an earlier block left, and no weight waits for this block's maximum: exponentials begin as
soon as the scores are there, and what else there is to do fits between them. Where m turns out too low (a thread's 32
weights of a row sum to more than 2^13, or its row has seen no key yet), the warp computes the maximum and the weights
again and scales that row's sum and output to it. A row's result depends on its own scores alone.

It is one piece of PTX, since Triton has no branch that a warp takes alone. A thread's registers of a [64, 128] tile in
the layout of products are those of two rows, two neighbouring columns of the one and then of the other in turn.
"""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_WIDTH = 128  # keys of a tile
_HELD = _WIDTH // 2  # numbers of a tile that a thread holds
_OUTGROWN = 8192.0  # 32 weights may sum to this; float16 ends at 65504
_PAIRS, _OUT, _SUM, _SHIFT = 0, _HELD // 2, _HELD // 2 + _HELD, _HELD // 2 + 2 * _HELD  # results' first operands
_TIED = _SHIFT + _HELD  # where inputs begin: what starts as the output, the sum and the shift was
_SCORES = _TIED + 3 * _HELD
_SCALE = _SCORES + _HELD


def _float(value: float) -> str:
    return "0f" + struct.pack(">f", value).hex().upper()


def _row(i: int) -> int:
    return (i >> 1) & 1


def _weights(shifts: tuple[str, str], pairs: str) -> str:
    """w0..w63 = 2^(score * scale + shift), t0 and t1 = their sums by row, and all of them packed in pairs."""
    lines = []
    for i in range(_HELD):
        lines.append(f"fma.rn.ftz.f32 w{i}, ${_SCORES + i}, ${_SCALE}, {shifts[_row(i)]};")
        lines.append(f"ex2.approx.ftz.f32 w{i}, w{i};")
    for row in (0, 1):
        for part in ("a", "b"):  # two chains a row: an addition takes as long as the exponential that it adds
            first, second, *rest = [i for i in range(_HELD) if _row(i) == row and i % 2 == (part == "b")]
            lines.append(f"add.f32 {part}{row}, w{first}, w{second};")
            lines += [f"add.f32 {part}{row}, {part}{row}, w{i};" for i in rest]
        lines.append(f"add.f32 t{row}, a{row}, b{row};")
    lines += [f"cvt.rn.{pairs}.f32 ${_PAIRS + i}, w{2 * i + 1}, w{2 * i};" for i in range(_HELD // 2)]
    return " ".join(lines)


def _again() -> str:
    """Rows not marked by q0 and q1 get their maximum so far; weights again, and sum and output scaled to it."""
    lines = []
    for row in (0, 1):
        mine = [f"${_SCORES + i}" for i in range(_HELD) if _row(i) == row]
        shift, total = f"${_SHIFT + 2 * row}", f"${_SUM + 2 * row}"
        lines.append(f"max.f32 m{row}, {mine[0]}, {mine[1]};")
        lines += [f"max.f32 m{row}, m{row}, {score};" for score in mine[2:]]
        lines.append(f"selp.f32 f{row}, {_float(0)}, {_float(1)}, q{row};")
        for lane in (1, 2):  # four threads share a row: what one of them found holds for all
            for value in ("m", "f"):
                lines.append(f"shfl.sync.bfly.b32 x, {value}{row}, {lane}, 0x1f, 0xffffffff;")
                lines.append(f"max.f32 {value}{row}, {value}{row}, x;")
        lines += [
            f"setp.neu.f32 p, f{row}, {_float(0)};",
            f"mul.f32 m{row}, m{row}, ${_SCALE};",
            f"neg.f32 m{row}, m{row};",
            f"selp.f32 m{row}, m{row}, {shift}, p;",
            f"min.f32 m{row}, m{row}, {shift};",
            # A row that has seen no key yet keeps +inf, which its weights must not be computed with.
            f"setp.eq.f32 p, m{row}, {_float(float('inf'))};",
            f"selp.f32 n{row}, {_float(0)}, m{row}, p;",
            f"sub.f32 f{row}, n{row}, {shift};",
            f"ex2.approx.ftz.f32 f{row}, f{row};",
            f"mov.f32 {shift}, m{row};",
            f"mul.f32 {total}, {total}, f{row};",
        ]
    lines += [f"mul.f32 ${_OUT + i}, ${_OUT + i}, f{_row(i)};" for i in range(_HELD)]
    return " ".join(lines)


def _block_asm(pairs: str, first: bool) -> str:
    """The whole of it. `first`: the maximum is wanted at once, as of the first block that a row sees."""
    lines = [
        "{ .reg .pred p, q0, q1;",
        f".reg .f32 w<{_HELD}>, a<2>, b<2>, t<2>, m<2>, n<2>, f<2>, x;",
    ]
    if first:
        lines += ["setp.ne.u32 q0, 0, 0;", "mov.pred q1, q0;", _again(), _weights(("n0", "n1"), pairs)]
    else:
        lines += [
            _weights((f"${_SHIFT}", f"${_SHIFT + 2}"), pairs),
            *(f"setp.le.f32 q{row}, t{row}, {_float(_OUTGROWN)};" for row in (0, 1)),  # not for NaN either
            "and.pred p, q0, q1;",
            "vote.sync.all.pred p, p, 0xffffffff;",
            "@p bra DONE;",
            _again(),
            _weights(("n0", "n1"), pairs),
            "DONE:",
        ]
    lines += [f"add.f32 ${_SUM + 2 * row}, ${_SUM + 2 * row}, t{row};" for row in (0, 1)]
    return " ".join(lines) + " }"


def _block_constraints() -> str:
    outputs = ["=r"] * (_HELD // 2) + ["=f"] * (3 * _HELD)
    return ",".join(outputs + [str(i) for i in range(_OUT, _TIED)] + ["f"] * (2 * _HELD))


def _mask_asm() -> str:
    """-inf for what a row does not see. Columns are compared as the constants that they are but for the thread's place
    in its row: 32 of them held in registers all along are what one gets otherwise.
    """
    lines = [
        "{ .reg .pred p; .reg .s32 lane, n<2>;",
        "mov.u32 lane, %laneid; and.b32 lane, lane, 3; shl.b32 lane, lane, 1;",
        *(f"sub.s32 n{row}, ${2 * _HELD + 2 * row}, lane;" for row in (0, 1)),
    ]
    for i in range(_HELD):
        lines.append(f"setp.gt.s32 p, n{_row(i)}, {i // 4 * 8 + i % 2};")
        lines.append(f"selp.f32 ${i}, ${i}, {_float(-float('inf'))}, p;")
    return " ".join(lines) + " }"


_MASK = gl.constexpr(_mask_asm())
_MASK_CONSTRAINTS = gl.constexpr(",".join(["=f"] * _HELD + [str(i) for i in range(_HELD)] + ["r"] * _HELD))
_CONSTRAINTS = gl.constexpr(_block_constraints())
_FIRST_BF16, _LATER_BF16 = (gl.constexpr(_block_asm("bf16x2", first)) for first in (True, False))
_FIRST_FP16, _LATER_FP16 = (gl.constexpr(_block_asm("f16x2", first)) for first in (True, False))


@gluon.jit
def softmax_block(s, o, shift, total, scale_log2, DTYPE: gl.constexpr, FIRST: gl.constexpr):
    """A block's weights in DTYPE, and the output, shift and sum that go with them.

    s, o, shift, total: [64, 128] of float32 in one layout. shift is minus a row's m, in units of log2, and +inf before
    it has seen a key; total is a thread's share of the row's sum. Of these two a thread's first number of a row counts;
    the others are there for the shape and cost no register.
    """
    gl.static_assert(s.shape[0] == 64 and s.shape[1] == 128, "a tile of scores is 64 x 128")
    HALF: gl.constexpr = DTYPE.is_fp16()
    ASM: gl.constexpr = (_FIRST_FP16 if FIRST else _LATER_FP16) if HALF else (_FIRST_BF16 if FIRST else _LATER_BF16)
    scale = gl.zeros_like(s) + scale_log2
    weights, o, total, shift = gl.inline_asm_elementwise(
        ASM, _CONSTRAINTS, [o, total, shift, s, scale], (gl.int16, gl.float32, gl.float32, gl.float32), is_pure=True,
        pack=64,
    )  # fmt: skip
    return weights.to(DTYPE, bitcast=True), o, shift, total


@gluon.jit
def mask_block(s, seen):
    """-inf in the columns of [64, 128] scores from `seen` [64] of each row on."""
    ends = gl.zeros_like(s).to(gl.int32) + seen[:, None]
    return gl.inline_asm_elementwise(_MASK, _MASK_CONSTRAINTS, [s, ends], gl.float32, is_pure=True, pack=64)


@gluon.jit
def of_rows(x):
    """[64, 4]: what counts of `shift` or `total`, a column for each of the threads that share a row."""
    rows: gl.constexpr = x.shape[0]
    for _level in gl.static_range(x.shape[1].bit_length() - 4):
        x, _ = gl.split(gl.permute(gl.reshape(x, [rows, 2, x.shape[1] // 2]), (0, 2, 1)))
    x, _ = gl.split(gl.reshape(x, [rows, 4, 2]))
    return x


@gluon.jit
def widened(o, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """[64, WIDTH] from [64, dim]: itself, or with zeros beside it."""
    if o.shape[1] < WIDTH:
        pair = gl.permute(gl.join(o, gl.zeros_like(o)), (0, 2, 1))
        o = gl.reshape(pair, [o.shape[0], WIDTH])
    return gl.convert_layout(o, LAYOUT)


@gluon.jit
def narrowed(o, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """The first DIM columns of what `widened` gave."""
    if o.shape[1] > DIM:
        o, _ = gl.split(gl.permute(gl.reshape(o, [o.shape[0], 2, DIM]), (0, 2, 1)))
    return gl.convert_layout(o, LAYOUT)
