"""e4m3 codes on their way into float16 operands, and output rows on their way out of them."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _halves(pairs):
    """Codes of two neighbouring columns, in float16: those of the even one and those of the odd one."""
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
