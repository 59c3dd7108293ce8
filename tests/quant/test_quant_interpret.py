# mypy: disallow-incomplete-defs=False
import pytest
import torch
import triton
import triton.language as tl

from mlakit.quant import act_quant, fp8_gemm, ops, weight_dequant, weight_quant
from mlakit.quant.reference import act_quant_reference, fp8_gemm_reference, weight_dequant_reference
from mlakit.quant.triton_gemm import GemmConfig, launch_fp8_gemm
from mlakit.testing import assert_close
from mlakit.triton_e4m3 import e4m3_to_fp32, fp32_to_e4m3

pytestmark = pytest.mark.interpret
F8 = torch.float8_e4m3fn


@triton.jit
def _encode_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, fp32_to_e4m3(tl.load(x_ptr + offs), False))


@triton.jit
def _decode_kernel(x_ptr, out_ptr):
    offs = tl.arange(0, 256)
    tl.store(out_ptr + offs, e4m3_to_fp32(tl.load(x_ptr + offs), False))


def test_encoding_without_hardware_rounds_as_pytorch_does():
    # Every bfloat16 (infinities and NaN with it), every point halfway between two neighbours of e4m3, and its float32
    # neighbours.
    every = torch.arange(2**16).to(torch.int32).bitwise_left_shift(16).view(torch.float32)
    finite = torch.arange(0x7F, dtype=torch.uint8).view(F8).float()
    halfway = (finite[1:] + finite[:-1]) / 2
    ties = torch.cat([halfway, halfway.nextafter(torch.tensor(0.0)), halfway.nextafter(torch.tensor(1e3))])
    x = torch.cat([every, ties, -ties])
    x = torch.cat([x, x.new_zeros(2**17 - x.numel())])
    out = torch.empty(x.shape, dtype=torch.uint8)
    _encode_kernel[(1,)](x, out, BLOCK=2**17)
    expected = x.clamp(-448, 448).to(F8)
    nan = x.isnan()
    assert torch.equal(out.view(F8).float().isnan(), nan)
    assert torch.equal(out[~nan], expected.view(torch.uint8)[~nan])


def test_decoding_without_hardware_is_exact():
    codes, out = torch.arange(256, dtype=torch.uint8), torch.empty(256)
    _decode_kernel[(1,)](codes, out)
    assert torch.equal(out.nan_to_num(nan=-1.0), codes.view(F8).float().nan_to_num(nan=-1.0))


# A tile of one row, more tiles than one program takes and no multiple of it, leading dimensions, nothing; other block
# sizes.
@pytest.mark.parametrize(
    ("shape", "block"), [((1, 128), 128), ((37, 384), 128), ((2, 3, 128), 128), ((0, 256), 128), ((5, 96), 32)]
)
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_act_quant_is_bit_exact(shape, block, scale_fmt, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7).to(dtype)
    codes, scales = act_quant(x, block, scale_fmt, impl="triton")
    expected_codes, expected_scales = act_quant_reference(x, block, scale_fmt)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


def test_act_quant_of_zeros_nan_and_rows_apart():
    x = torch.randn(6, 512).bfloat16()[::2, 128:384]
    x[0] = 0
    x[1, :5] = torch.nan
    x[2, :5] = -0.0
    codes, scales = act_quant(x, impl="triton")
    expected_codes, expected_scales = act_quant_reference(x)
    assert torch.equal(scales, expected_scales)
    number = ~x.isnan()  # a NaN may have either sign
    assert torch.equal(codes.float().isnan(), ~number)
    assert torch.equal(codes.view(torch.uint8)[number], expected_codes.view(torch.uint8)[number])


# Whole blocks; ragged edges in both directions; a single element; nothing; rows apart; a block smaller than the tile.
@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(128, 256, 128), (130, 257, 128), (1, 1, 128), (0, 5, 128), (33, 47, 16)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_dequant_rounds_once(rows, columns, block, dtype):
    codes, scales = weight_quant(torch.randn(rows, columns + 3), block)
    codes, scales = codes[:, :columns], scales[:, : -(-columns // block)]
    out = weight_dequant(codes, scales, block, dtype, impl="triton")
    expected = weight_dequant_reference(codes, scales, block, dtype)
    # Triton's interpreter cuts float32 to bfloat16 where the hardware rounds.
    torch.testing.assert_close(out, expected, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


# One row and a batch that needs masked rows, for each shape of tile; N over the edge of a block of scales; a ragged
# last block of K; leading dimensions. The same values in every block would hide a scale taken from a neighbour, so the
# scales differ by octaves.
@pytest.mark.parametrize(
    ("lead", "n", "k"), [((1,), 33, 256), ((17,), 130, 384), ((2, 35), 150, 128), ((3,), 5, 200), ((0,), 5, 128)]
)
def test_fp8_gemm_against_float64(lead, n, k):
    blocks = -(-k // 128)
    a, b = torch.randn(*lead, k).to(F8), torch.randn(n, k).to(F8)
    a_scales = torch.rand(*lead, blocks) + 0.5
    b_scales = (torch.rand(-(-n // 128), blocks) * 4).exp2()
    # Not bfloat16, to which Triton's interpreter cuts where the hardware rounds.
    out = fp8_gemm(a, a_scales, b, b_scales, torch.float16, impl="triton")
    reference = fp8_gemm_reference(a, a_scales, b, b_scales, torch.float64)
    assert_close(out, reference, fp8_gemm_reference(a, a_scales, b, b_scales, torch.float16))


# Both ways of loading, on tiles that rows, columns and K do not fill.
@pytest.mark.parametrize("descriptors", [False, True])
def test_fp8_gemm_by_every_kind_of_configuration(descriptors):
    m, n, k = 37, 150, 272
    a, b = torch.randn(m, k).to(F8), torch.randn(n, k).to(F8)
    a_scales, b_scales = torch.rand(m, 3) + 0.5, (torch.rand(2, 3) * 4).exp2()
    out = torch.full((m, n), torch.nan, dtype=torch.float16)
    config = GemmConfig(32, 64, 4, 3, group_m=1, descriptors=descriptors)
    launch_fp8_gemm(a, a_scales, b, b_scales, out, config)
    reference = fp8_gemm_reference(a, a_scales, b, b_scales, torch.float64)
    assert_close(out, reference, fp8_gemm_reference(a, a_scales, b, b_scales, torch.float16))


def test_operators_keep_their_schemas():
    codes, scales = weight_quant(torch.randn(40, 128))
    torch.library.opcheck(ops.act_quant, (torch.randn(2, 128), 128, "ue8m0"))
    # Its schema check compares inputs before and after with torch.allclose, which float8 does not have.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.weight_dequant, (codes, scales, 128, torch.bfloat16), test_utils=checks)
    product = (*act_quant(torch.randn(3, 128)), codes, scales, torch.bfloat16)
    torch.library.opcheck(ops.fp8_gemm, product, test_utils=checks)


def test_compiles_without_a_graph_break():
    b, b_scales = weight_quant(torch.randn(40, 128))

    def linear(x):
        return fp8_gemm(*act_quant(x, impl="triton"), b, b_scales, impl="triton")

    x = torch.randn(3, 128)
    assert torch.equal(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), linear(x))
