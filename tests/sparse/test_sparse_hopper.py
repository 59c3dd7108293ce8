"""What the Hopper kernels refuse, in words, and how their launches are planned: no GPU, no kernel."""

from typing import Any

import pytest
import torch

from mlakit.dispatch import which_impl
from mlakit.hardware import DeviceInfo, pretend
from mlakit.sparse import mla_sparse_decode, mla_sparse_prefill
from mlakit.sparse.hopper_config import HopperConfig, choose_config, is_taken, refusal

H200 = DeviceInfo("cuda", 0, "NVIDIA H200", (9, 0), 132, 60 * 2**20, 141 * 2**30)
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.uint8


def prefill_inputs(heads: int = 128, d: int = 576, rank: int = 512, dtype: torch.dtype = BF16) -> Any:
    q, kv = torch.empty((3, heads, d), dtype=dtype), torch.empty((10, 1, d), dtype=dtype)
    return q, kv, torch.empty((3, heads, rank), dtype=dtype)


def decode_inputs(heads: int = 128, dtype: torch.dtype = BF16, cache: torch.dtype = FP8) -> Any:
    q, out = torch.empty((3, 2, heads, 576), dtype=dtype), torch.empty((3, 2, heads, 512), dtype=dtype)
    return q, torch.empty((5, 64, 656 if cache == FP8 else 576), dtype=cache), out


def why(q: torch.Tensor, keys: torch.Tensor, out: torch.Tensor) -> str | None:
    return refusal(q, keys, out.shape[-1], out)


@pytest.mark.parametrize("heads", [1, 16, 65, 128])
def test_what_they_take(heads: int) -> None:
    for d in (512, 576):
        for dtype in (BF16, FP16):
            assert why(*prefill_inputs(heads, d, dtype=dtype)) is None
    assert why(*decode_inputs(heads)) is None
    assert why(*decode_inputs(heads, FP16, FP16)) is None


def test_what_they_refuse() -> None:
    assert why(*prefill_inputs(d=320, rank=256)) == "needs values of 512 and keys of 512 or 576, got 256 and 320"
    assert "needs bfloat16 or float16, got torch.float32" in str(why(*prefill_inputs(dtype=torch.float32)))
    assert "needs bfloat16 queries for the float8 cache" in str(why(*decode_inputs(dtype=FP16)))
    q, kv, out = prefill_inputs()
    assert "needs keys aligned to 16 bytes" in str(why(q, torch.empty((10, 1, 580), dtype=BF16)[..., :576], out))
    assert "needs queries aligned to 16 bytes" in str(why(torch.empty((3, 128, 577), dtype=BF16)[..., 1:], kv, out))
    assert "needs at least one key" in str(why(q, kv[:0], out))
    q, cache, out = decode_inputs()
    shifted = torch.empty(5 * 64 * 656 + 8, dtype=FP8)[8:].view(5, 64, 656)
    assert "needs keys aligned to 16 bytes" in str(why(q, shifted, out))
    with pytest.raises(RuntimeError, match="impl='hopper' cannot run: it needs an NVIDIA GPU, got tensors on cpu"):
        mla_sparse_decode(q, cache, torch.zeros((3, 2, 7), dtype=torch.int32), softmax_scale=1.0, impl="hopper")
    q, kv, _ = prefill_inputs(4)
    with pytest.raises(ValueError, match="unknown impl 'gluon'; expected one of reference, triton, hopper"):
        mla_sparse_prefill(q, kv, torch.zeros((3, 1, 7), dtype=torch.int32), softmax_scale=1.0, impl="gluon")


def test_which_impl() -> None:
    q, cache, _ = decode_inputs(4)
    indices = torch.zeros((3, 2, 7), dtype=torch.int32)
    assert which_impl(mla_sparse_decode, q, cache, indices, softmax_scale=1.0) == "reference"
    with pytest.raises(RuntimeError, match="cannot run: it needs an NVIDIA GPU"):
        which_impl(mla_sparse_decode, q, cache, indices, softmax_scale=1.0, impl="hopper")
    with pytest.raises(ValueError, match="indices must have shape"):
        which_impl(mla_sparse_decode, q, cache, indices[:2], softmax_scale=1.0)
    q, kv, _ = prefill_inputs(4)
    indices = torch.zeros((3, 1, 7), dtype=torch.int32)
    assert which_impl(mla_sparse_prefill, q, kv, indices, softmax_scale=1.0) == "reference"
    with pytest.raises(RuntimeError, match="it has no gradient"):
        which_impl(mla_sparse_prefill, q.requires_grad_(), kv, indices, softmax_scale=1.0, impl="hopper")


def test_which_is_taken() -> None:
    assert is_taken(*prefill_inputs(16)[:2])
    q, cache, _ = decode_inputs(128, cache=BF16)  # 12 programs
    assert not is_taken(q, cache)
    assert is_taken(torch.cat([q, q]), cache)
    q, cache, _ = decode_inputs(128)  # float8: likewise
    assert not is_taken(q, cache)
    assert is_taken(torch.cat([q, q]), cache)
    # A thread may have 255 registers, a multiprocessor has 65536; the launch's 168 are what is shared out.
    for fp8 in (False, True):
        config = choose_config(fp8)
        assert 2 * config.consumer_regs + config.producer_regs <= 3 * 168
        assert config.consumer_regs % 8 == config.producer_regs % 8 == 0


# Strides are given in units of 16 bytes; pages that follow one another are one long row of tokens.
def test_the_plan_of_a_launch() -> None:
    from mlakit.sparse.hopper_launch import _plan_call

    q, cache, out = decode_inputs()
    indices = torch.empty((3, 2, 2048), dtype=torch.int32)
    lengths = torch.empty((3, 2), dtype=torch.int32)
    with pretend(H200):
        plan = _plan_call(q, cache, indices, None, lengths, out, None, 1.0, None, None)
        assert plan.constants["PAGE_SIZE"] == 0
        assert plan.splits == 8  # 12 programs unsplit
        assert plan.grid == (96, 1, 1)
        assert plan.pieces == 3 * 2 * 8 * 128
        assert plan.counters == 12
        assert plan.numbers[1:6] == (2 * 128 * 72, 128 * 72, 72, 64 * 41, 0)
        assert plan.numbers[6:11] == (4096, 2048, 0, 2, 1)
        plan = _plan_call(q, cache[:, :48], indices, None, None, out, None, 1.0, 1, HopperConfig(208, 88))
        assert (plan.constants["PAGE_SIZE"], plan.splits, plan.constants["PRODUCER_REGS"]) == (48, 1, 88)
        q, kv, out = prefill_inputs(12)
        kv = torch.empty((10, 4, 576), dtype=BF16)
        plan = _plan_call(q, kv, torch.empty((3, 4, 7)), None, None, out, torch.empty(3, 12), 1.0, 1, None)
        assert plan.grid == (12, 1, 1)  # three tokens, a tile for each key head
        assert plan.constants["STRIDE_KT"] == 4 * 576
