import re
from typing import Any

import pytest
import torch

from mlakit.concat import concat_k


def _inputs(batch=3, heads=5, nope=8, rope=4, dtype=torch.bfloat16):
    return torch.randn(batch, heads, nope).to(dtype), torch.randn(batch, 1, rope).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32])
@pytest.mark.parametrize("impl", ["cat", "direct_copy", None])
def test_every_head_gets_its_part_and_the_shared_row(impl, dtype):
    k_nope, k_pe = (t.mul(10).to(dtype) for t in _inputs(dtype=torch.float32))
    out = concat_k(k_nope, k_pe, impl=impl)
    assert out.shape == (3, 5, 12)
    assert out.dtype == dtype
    for head in range(5):
        assert torch.equal(out[:, head, :8].float(), k_nope[:, head].float())
        assert torch.equal(out[:, head, 8:].float(), k_pe[:, 0].float())


@pytest.mark.parametrize("impl", ["cat", "direct_copy"])
def test_writes_into_a_slice_of_out(impl):
    k_nope, k_pe = _inputs()
    room = torch.zeros(3, 6, 12, dtype=torch.bfloat16)
    out = concat_k(k_nope, k_pe, out=room[:, :5], impl=impl)
    assert out.data_ptr() == room.data_ptr()
    assert torch.equal(room[:, :5], concat_k(k_nope, k_pe))
    assert not room[:, 5].any()


@pytest.mark.parametrize("impl", ["cat", "direct_copy"])
def test_gradients_are_the_slices_and_the_sum_over_heads(impl):
    k_nope, k_pe = (t.double().requires_grad_() for t in _inputs(dtype=torch.float32))
    assert torch.autograd.gradcheck(lambda a, b: concat_k(a, b, impl=impl), (k_nope, k_pe))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_nope": [[1.0]]}, "k_nope must be a tensor, got list"),
        ({"k_nope": torch.zeros(3, 5)}, "k_nope must have shape [B, H, Dn], got [3, 5]"),
        ({"k_pe": torch.zeros(3, 5, 4).bfloat16()}, "k_pe must have shape [3, 1, Dr], got [3, 5, 4]"),
        ({"k_pe": torch.zeros(2, 1, 4).bfloat16()}, "k_pe must have shape [3, 1, Dr], got [2, 1, 4]"),
        ({"k_pe": torch.zeros(3, 1, 4)}, "k_pe must be torch.bfloat16, got torch.float32"),
        ({"k_pe": torch.zeros(3, 1, 4, device="meta").bfloat16()}, "k_pe must be on cpu"),
        ({"out": torch.zeros(3, 5, 11).bfloat16()}, "out must have shape [3, 5, 12], got [3, 5, 11]"),
        ({"out": torch.zeros(3, 5, 12)}, "out must be torch.bfloat16, got torch.float32"),
        ({"out": torch.zeros(3, 5, 12).bfloat16().requires_grad_()}, "out= is not differentiable"),
        ({"impl": "direct"}, "unknown impl 'direct'; expected one of cat, direct_copy, triton"),
    ],
)
def test_refuses_with_expected_and_actual(change, message):
    k_nope, k_pe = _inputs()
    arguments: dict[str, Any] = {"k_nope": k_nope, "k_pe": k_pe, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        concat_k(**arguments)


def test_a_named_kernel_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    k_nope, k_pe = _inputs()
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it needs an NVIDIA GPU"):
        concat_k(k_nope, k_pe, impl="triton")
    with pytest.raises(RuntimeError, match=r"1, 2, 4 or 8 bytes, got torch\.complex128"):
        concat_k(k_nope.to(torch.complex128), k_pe.to(torch.complex128), impl="triton")


def test_compiles_without_a_graph_break():
    k_nope, k_pe = _inputs()
    compiled = torch.compile(lambda a, b: concat_k(a, b), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(k_nope, k_pe), concat_k(k_nope, k_pe))
