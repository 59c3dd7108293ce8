import re
from typing import Any

import pytest
import torch

from mlakit.quant import act_quant, fp8_gemm, weight_dequant, weight_quant
from mlakit.quant.reference import fp8_gemm_reference, weight_dequant_reference

F8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_act_quant_fills_the_range_of_each_tile(dtype):
    x = (torch.randn(3, 5, 256) * torch.logspace(-2, 2, 256)).to(dtype)
    codes, scales = act_quant(x)
    assert (codes.dtype, codes.shape) == (F8, x.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (3, 5, 2))
    tiles = codes.float().unflatten(-1, (2, 128))
    assert (tiles.abs().amax(-1) == 448).all()
    # Three mantissa bits: a relative error of at most 2^-4, or half a step of the subnormals.
    error = (tiles * scales[..., None] - x.float().unflatten(-1, (2, 128))).abs()
    assert (error <= torch.maximum(x.float().abs().unflatten(-1, (2, 128)) / 16, scales[..., None] * 2**-10)).all()


def test_act_quant_of_zeros_has_a_scale_to_divide_by():
    codes, scales = act_quant(torch.zeros(1, 128))
    assert not codes.float().any()
    assert scales.item() == pytest.approx(1e-4 / 448, rel=1e-6)


def test_ue8m0_scales_are_powers_of_two_that_reach_the_largest_value():
    x = torch.randn(64, 256) * torch.logspace(-6, 6, 64)[:, None]
    x[0] = 448 * 2.0**-5  # its scale already is a power of two
    codes, scales = act_quant(x, scale_fmt="ue8m0")
    exact = act_quant(x)[1]
    mantissa, _ = torch.frexp(scales)
    assert (mantissa == 0.5).all()
    assert (scales >= exact).all()
    assert (scales < 2 * exact).all()
    assert scales[0].tolist() == [2.0**-5] * 2
    assert (codes.float().abs() <= 448).all()


def test_a_nan_stays_alone():
    x = torch.ones(1, 128)
    x[0, 3] = torch.nan
    codes, scales = act_quant(x)
    assert codes.float().isnan().nonzero().tolist() == [[0, 3]]
    assert scales.item() == pytest.approx(1 / 448)


# Whole blocks, ragged edges in both directions, a single element, and another block size.
@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(256, 128, 128), (130, 257, 128), (1, 1, 128), (0, 5, 128), (33, 47, 16)]
)
def test_weight_dequant_undoes_weight_quant(rows, columns, block):
    w = torch.randn(rows, columns) * torch.rand(rows, 1).exp()
    codes, scales = weight_quant(w, block)
    assert scales.shape == (-(-rows // block), -(-columns // block))
    out = weight_dequant(codes, scales, block, torch.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block_of = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            assert torch.equal(out[block_of], codes[block_of].float() * scales[i, j])
    assert (out - w).norm() <= 0.04 * w.norm()
    assert weight_dequant(codes, scales, block).dtype == torch.bfloat16


# K with a ragged last block; leading dimensions; nothing to multiply.
@pytest.mark.parametrize(("lead", "n", "k"), [((3,), 130, 384), ((2, 2), 7, 200), ((), 5, 128), ((0,), 5, 128)])
def test_fp8_gemm_is_the_product_of_the_dequantized(lead, n, k):
    padded = -(-k // 128) * 128
    a = torch.zeros(*lead, padded)
    a[..., :k] = torch.randn(*lead, k)
    codes, a_scales = act_quant(a)
    codes = codes[..., :k].contiguous()
    b, b_scales = weight_quant(torch.randn(n, k))
    out = fp8_gemm(codes, a_scales, b, b_scales, torch.float32)
    wide_a = codes.double() * a_scales.double().repeat_interleave(128, -1)[..., :k]
    expected = wide_a @ weight_dequant_reference(b, b_scales, dtype=torch.float64).T
    assert out.shape == (*lead, n)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fp8_gemm_reference(codes, a_scales, b, b_scales, torch.float64), expected)


def _gemm_arguments(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "a": torch.zeros(3, 256).to(F8),
        "a_scales": torch.ones(3, 2),
        "b": torch.zeros(130, 256).to(F8),
        "b_scales": torch.ones(2, 2),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(3, 256)}, "a must be torch.float8_e4m3fn, got torch.float32"),
        ({"a": torch.zeros(3, 128).to(F8)}, "b must have shape [N, 128], got [130, 256]"),
        ({"a": torch.zeros(256, 3).to(F8).T}, "a must be contiguous, got strides [1, 3]"),
        ({"a_scales": torch.ones(3, 3)}, "a_scales must have shape [3, 2], got [3, 3]"),
        ({"b_scales": torch.ones(1, 2)}, "b_scales must have shape [2, 2], got [1, 2]"),
        ({"b_scales": torch.ones(2, 2).double()}, "b_scales must be torch.float32, got torch.float64"),
        ({"b": torch.zeros(130, 256, device="meta").to(F8)}, "b must be on cpu"),
        ({"dtype": torch.float64}, "dtype must be torch.bfloat16 or torch.float16 or torch.float32, got torch.float64"),
        ({"impl": "cutlass"}, "unknown impl 'cutlass'"),
    ],
)
def test_fp8_gemm_refuses_with_expected_and_actual(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fp8_gemm(**_gemm_arguments(**changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: act_quant(torch.zeros(2, 100)), "a last dimension that block_size=128 divides, got [2, 100]"),
        (lambda: act_quant(torch.zeros(2, 128).double()), "x must be torch.bfloat16 or torch.float16 or torch.float32"),
        (lambda: act_quant(torch.zeros(2, 128), scale_fmt="e8"), "scale_fmt must be None or 'ue8m0', got 'e8'"),
        (lambda: act_quant(torch.zeros(2, 128), 0), "block_size must be at least 1, got 0"),
        (lambda: act_quant(torch.zeros(128, 2).T), "x must have stride 1 in its last dimension"),
        (lambda: weight_dequant(torch.zeros(2, 3), torch.ones(1, 1)), "w must be torch.float8_e4m3fn"),
        (
            lambda: weight_dequant(torch.zeros(2, 129).to(F8), torch.ones(1, 1)),
            "scales must have shape [1, 2], got [1, 1]",
        ),
    ],
)
def test_the_others_refuse_with_expected_and_actual(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_named_kernel_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it needs an NVIDIA GPU"):
        act_quant(torch.zeros(1, 128), impl="triton")
    with pytest.raises(RuntimeError, match="block_size must be a power of two from 16 to 1024, got 96"):
        act_quant(torch.zeros(1, 96), 96, impl="triton")


def test_compiles_without_a_graph_break():
    x = torch.randn(4, 256)
    codes, scales = torch.compile(lambda t: act_quant(t), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(codes.float(), act_quant(x)[0].float())
    assert torch.equal(scales, act_quant(x)[1])
