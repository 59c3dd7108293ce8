import re
from typing import Any

import pytest
import torch

from mlakit.rope import apply_rope


def _table(rows, half, dtype=torch.float64):
    angle = torch.randn(rows, half, dtype=dtype) * 3
    return torch.polar(torch.ones_like(angle), angle)


def _inputs(tokens=3, heads=5, dim=8, dtype=torch.bfloat16):
    table = _table(tokens, dim // 2)
    return torch.randn(tokens, heads, dim).to(dtype), table.real.float(), table.imag.float()


def test_interleaved_is_a_product_of_complex_numbers():
    x, table = torch.randn(4, 3, 6, dtype=torch.float64), _table(4, 3)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table[:, None]).flatten(-2)
    torch.testing.assert_close(apply_rope(x, table.real, table.imag), expected)


def test_half_is_interleaved_after_a_permutation():
    x, table = torch.randn(4, 3, 6, dtype=torch.float64), _table(4, 3)
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    got = apply_rope(x[..., order], table.real, table.imag, layout="half")
    assert torch.equal(got, apply_rope(x, table.real, table.imag)[..., order])


def test_scores_depend_on_how_far_apart_tokens_are():
    frequencies = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    angles = torch.arange(20)[:, None] * frequencies
    q, k = torch.randn(1, 1, 6, dtype=torch.float64), torch.randn(1, 1, 6, dtype=torch.float64)

    def score(i, j):
        turned = [apply_rope(x, angles.cos(), angles.sin(), positions=torch.tensor([at])) for x, at in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(19, 16))
    assert score(5, 2) != pytest.approx(score(5, 3))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_positions_pick_rows_and_requests_share_them_without(layout):
    x, (cos, sin) = torch.randn(2, 3, 4, 6), (_table(9, 3).real.float(), _table(9, 3).imag.float())
    positions = torch.tensor([[0, 1, 2], [8, 3, 3]], dtype=torch.int32)
    got = apply_rope(x, cos, sin, positions=positions, layout=layout)
    for request in range(2):
        alone = apply_rope(x[request], cos[positions[request]], sin[positions[request]], layout=layout)
        assert torch.equal(got[request], alone)
    shared = apply_rope(x, cos[:3], sin[:3], layout=layout)
    assert torch.equal(shared[1], apply_rope(x[1], cos[:3], sin[:3], layout=layout))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rounds_once(layout):
    x, cos, sin = _inputs(tokens=33, dim=32)
    got = apply_rope(x, cos, sin, layout=layout)
    exact = apply_rope(x.double(), cos.double(), sin.double(), layout=layout)
    # float32's own error may tip a tie, and only there is the result off by one unit in the last place.
    assert (got == exact.bfloat16()).double().mean() > 0.999


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_in_place_and_into_a_slice(layout):
    wide = torch.randn(3, 5, 24).bfloat16()
    _, cos, sin = _inputs()
    before = wide.clone()
    expected = apply_rope(wide[..., 16:], cos, sin, layout=layout)
    room = torch.zeros(3, 5, 12, dtype=torch.bfloat16)
    out = room[..., 4:]
    assert apply_rope(wide[..., 16:], cos, sin, layout=layout, out=out) is out
    assert torch.equal(room[..., 4:], expected)
    assert not room[..., :4].any()
    x = wide[..., 16:]
    apply_rope(x, cos, sin, layout=layout, out=x)
    assert torch.equal(wide[..., 16:], expected)
    assert torch.equal(wide[..., :16], before[..., :16])


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("with_positions", [False, True])
def test_gradients(layout, with_positions):
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    table = _table(3, 2)
    positions = torch.tensor([2, 0, 0]) if with_positions else None

    def function(x):
        return apply_rope(x, table.real, table.imag, positions=positions, layout=layout)

    assert torch.autograd.gradcheck(function, (x,))


def test_no_gradient_flows_to_the_table():
    x, cos, sin = _inputs(dtype=torch.float32)
    out = apply_rope(x.requires_grad_(), cos.requires_grad_(), sin)
    out.sum().backward()
    assert x.grad is not None
    assert cos.grad is None


def test_no_tokens():
    x, cos, sin = _inputs(tokens=0)
    assert apply_rope(x, cos, sin).shape == (0, 5, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, "x must have shape [T, H, D] or [B, T, H, D], got [3, 8]"),
        ({"x": torch.zeros(3, 5, 8).int()}, "x must be torch.bfloat16 or"),
        ({"x": torch.zeros(3, 5, 16)[..., ::2]}, "x must have stride 1 in its last dimension"),
        ({"x": torch.zeros(3, 5, 7)}, "x must have an even last dimension, as rope turns pairs; got 7"),
        ({"cos": torch.zeros(3, 8)}, "cos must have shape [3, 4], got [3, 8]"),
        ({"cos": torch.zeros(2, 4)}, "cos must have shape [3, 4], got [2, 4]"),
        ({"sin": torch.zeros(4, 4)}, "sin must have shape [3, 4], got [4, 4]"),
        ({"sin": torch.zeros(3, 4).double()}, "sin must be torch.float32, got torch.float64"),
        ({"sin": torch.zeros(3, 4, device="meta")}, "sin must be on cpu"),
        ({"cos": torch.zeros(3, 4, dtype=torch.complex64)}, "cos must be torch.bfloat16 or"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, "positions must have shape [3], got [4]"),
        ({"positions": torch.zeros(3)}, "positions must be torch.int64 or torch.int32, got torch.float32"),
        ({"layout": "neox"}, "layout must be one of interleaved, half, got 'neox'"),
        ({"out": torch.zeros(3, 5, 9).bfloat16()}, "out must have shape [3, 5, 8], got [3, 5, 9]"),
        ({"out": torch.zeros(3, 5, 8)}, "out must be torch.bfloat16, got torch.float32"),
        ({"out": torch.zeros(3, 5, 8).bfloat16().requires_grad_()}, "out= is not differentiable"),
        ({"x": [1.0]}, "x must be a tensor, got list"),
        ({"impl": "cuda"}, "unknown impl 'cuda'; expected one of reference, triton"),
    ],
)
def test_refuses_with_expected_and_actual(change, message):
    x, cos, sin = _inputs()
    arguments: dict[str, Any] = {"x": x, "cos": cos, "sin": sin, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_rope(**arguments)


def test_a_named_kernel_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, cos, sin = _inputs()
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it needs an NVIDIA GPU"):
        apply_rope(x, cos, sin, impl="triton")
    with pytest.raises(RuntimeError, match=r"cannot run: it takes no torch\.float64"):
        apply_rope(x.double(), cos, sin, impl="triton")


def test_compiles_without_a_graph_break():
    x, cos, sin = _inputs()
    compiled = torch.compile(lambda *a: apply_rope(*a), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, cos, sin), apply_rope(x, cos, sin))
