# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""float8_e4m3fn inside Triton kernels, on GPUs that have it and on those that do not. Shared by the operations'
kernels.

Kernels get e4m3 tensors as uint8 (Triton refuses e4m3 pointers below compute capability 8.9) and a constexpr NATIVE,
from `has_e4m3`; without it the conversions are done in integer arithmetic, bit for bit the same.
"""

import torch
import triton
import triton.language as tl

from mlakit.hardware import capability

E4M3_MAX = tl.constexpr(448.0)
# The least magnitude a block is scaled for: DeepSeek's own, so that a block of zeros has a scale one can divide by.
LEAST_AMAX = tl.constexpr(1e-4)


def has_e4m3(device: torch.device) -> bool:
    """Does the hardware convert and multiply e4m3 (compute capability 8.9 and up)?"""
    found = capability(device)
    return found is not None and found >= (8, 9)


@triton.jit
def e4m3_to_fp16(bits):
    """Decode uint8 to float16, exactly, in integer arithmetic."""
    # The same bit pattern read as float16 is 2^-8 of the value, subnormals included: the exponents are biased by 15 and
    # by 7.
    wide = bits.to(tl.uint16)
    value = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def e4m3_to_fp32(bits, NATIVE: tl.constexpr):
    """Decode uint8 to float32."""
    if NATIVE:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:  # noqa: RET505 - Triton compiles both branches if there is no else
        return e4m3_to_fp16(bits).to(tl.float32)


@triton.jit
def fp32_to_e4m3(value, NATIVE: tl.constexpr):
    """Encode float32 to uint8: to nearest, ties to even, beyond 448 to 448; NaN stays NaN."""
    if NATIVE:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:  # noqa: RET505
        raw = value.to(tl.uint32, bitcast=True)
        sign = (raw >> 24) & 0x80
        magnitude = raw & 0x7FFFFFFF
        # Normal numbers: round the mantissa at bit 20 (an overflow carries into the exponent), then rebias from 127 to
        # 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6: adding 2^14 leaves a mantissa whose last bit is 2^-9, the step of subnormals, and rounds to it.
        shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
        subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, subnormal, normal)
        code = tl.where(magnitude >= 0x43E00000, 0x7E, code)  # 448 and above
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)
        return (sign | code).to(tl.uint8)


@triton.jit
def block_scale(amax, UE8M0: tl.constexpr):
    """The float32 scale of a block whose largest magnitude is `amax`: amax / 448, rounded up to a power of two if
    UE8M0.
    """
    scale = tl.div_rn(tl.maximum(amax, LEAST_AMAX), E4M3_MAX)
    if UE8M0:
        # Never subnormal (at least 1e-4 / 448), so that the next power of two is the next exponent.
        raw = scale.to(tl.uint32, bitcast=True)
        scale = ((raw + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def divide(value, scale, inverse):
    """`value / scale`, correctly rounded, by `inverse` = 1 / scale: three instructions where a division takes ten.

    One Newton step on the product: the remainder is exact in a fused multiply-add (Markstein's theorem).
    """
    quotient = value * inverse
    refined = tl.fma(tl.fma(-quotient, scale, value), inverse, quotient)
    return tl.where(quotient == 0, quotient, refined)  # adding the remainder would turn -0 into 0
