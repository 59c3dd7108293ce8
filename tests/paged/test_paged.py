"""`paged_attention` on a CPU: the definition, what is refused and why, which kernels a batch takes."""

import re
from typing import TYPE_CHECKING

import pytest
import torch

from mlakit.dispatch import which_impl
from mlakit.hardware import shared_limit
from mlakit.paged import paged_attention, paged_attention_reference
from mlakit.paged.config import Kernels, PagedConfig, choose_kernels

if TYPE_CHECKING:
    from tests.paged.conftest import MakeBatch


# MHA, GQA and MQA; decode, prefill, extend; a page that divides nothing; with and without the mask.
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (5, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_reference_agrees_with_sdpa(make_batch: "MakeBatch", heads: int, kv_heads: int, causal: bool) -> None:
    q_lens, kv_lens = [1, 7, 3], [5, 7, 40]
    batch = make_batch(q_lens, kv_lens, heads=heads, kv_heads=kv_heads, page_size=3, dtype=torch.float64)
    q, k, v, table, _, bounds = batch.inputs
    out, lse = paged_attention(*batch.inputs, softmax_scale=0.3, causal=causal)
    for i, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        slots = [int(table[i, t // 3]) * 3 + t % 3 for t in range(kv_len)]
        rows = slice(int(bounds[i]), int(bounds[i + 1]))
        keys, values = (x.flatten(0, 1)[slots].repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for x in (k, v))
        queries = q[rows].transpose(0, 1)
        mask = torch.ones(q_len, kv_len, dtype=torch.bool)
        if causal:
            mask = mask.tril(kv_len - q_len)
        expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(out[rows], expected.transpose(0, 1))
        scores = (queries @ keys.mT * 0.3).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(lse[rows], scores.logsumexp(-1).T)


def test_rows_without_keys_are_zero(make_batch: "MakeBatch") -> None:
    # More queries than keys, no keys, no queries, and rows that are no request's.
    batch = make_batch([3, 2, 0], [2, 0, 3], spare_tokens=2, dtype=torch.float64)
    out, lse = paged_attention(*batch.inputs, softmax_scale=0.3)
    empty = torch.tensor([True, False, False, True, True, True, True])
    assert torch.equal(lse.isneginf(), empty[:, None].expand(7, 4))
    assert not out[empty].any()
    assert out.isfinite().all()


def test_out_is_filled_and_returned(make_batch: "MakeBatch") -> None:
    batch = make_batch([5, 2], [5, 9])
    out = torch.full_like(batch.q, torch.nan)
    got, lse = paged_attention(*batch.inputs, softmax_scale=0.3, out=out)
    expected, expected_lse = paged_attention_reference(*batch.inputs, softmax_scale=0.3)
    assert got is out
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_default_on_a_cpu_is_the_reference(make_batch: "MakeBatch", monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([5], [5])
    assert which_impl(paged_attention, *batch.inputs, softmax_scale=0.3) == "reference"
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it needs an NVIDIA GPU"):
        paged_attention(*batch.inputs, softmax_scale=0.3, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert which_impl(paged_attention, *batch.inputs, softmax_scale=0.3) == "reference"


# One wrong thing a case; each message names what was expected and what was found.
@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda q: q[0], "q must have shape [tokens, num_heads, head_dim], got [4, 16]"),
        (0, lambda q: q.long(), "q must be torch.bfloat16 or torch.float16"),
        (0, lambda q: q[:, :3], "num_heads must be a multiple of k_cache's num_kv_heads 2, got 3"),
        (0, lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "q must have stride 1 in its last dimension"),
        (0, lambda q: q.clone().requires_grad_(), "has no gradient, and an input requires one"),
        (1, lambda k: k[..., :8], "k_cache must have shape [pages, page_size, num_kv_heads, 16], got"),
        (1, lambda k: k.float(), "k_cache must be torch.float16, got torch.float32"),
        (1, lambda k: k[:, :0], "v_cache must have shape [5, 0, 2, 16], got [5, 16, 2, 16]"),
        (2, lambda v: v[:, :5], "v_cache must have shape [5, 16, 2, 16], got [5, 5, 2, 16]"),
        (3, lambda t: t[:1], "block_table must have shape [2, max_pages], got [1, 1]"),
        (3, lambda t: t.long(), "block_table must be torch.int32, got torch.int64"),
        (4, lambda n: n[None], "seq_lens must have shape [batch], got [1, 2]"),
        (4, lambda n: n + 100, "block_table is too short: its 1 pages of 16 tokens hold 16 keys, seq_lens has 109"),
        (4, lambda n: n - 9, "seq_lens must not be negative, got -4"),
        (5, lambda c: c[:2], "cu_seqlens_q must have shape [3], got [2]"),
        (5, lambda c: c.float(), "cu_seqlens_q must be torch.int32, got torch.float32"),
        (5, lambda c: c.to("meta"), "cu_seqlens_q must be on cpu like the first argument, got meta"),
    ],
)
def test_wrong_inputs(make_batch: "MakeBatch", position: int, change, message: str) -> None:
    inputs = list(make_batch([5, 2], [5, 9]).inputs)
    inputs[position] = change(inputs[position])
    with pytest.raises(ValueError, match=re.escape(message)):
        paged_attention(*inputs, softmax_scale=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax_scale": -1.0}, "softmax_scale must be positive and finite, got -1.0"),
        ({"max_seqlen_q": -1}, "max_seqlen_q must be None or at least 0, got -1"),
        ({"max_seqlen_q": 4}, "max_seqlen_q must be at least the longest request's 5 tokens, got 4"),
        ({"num_splits": 0}, "num_splits must be None or from 1 to 256, got 0"),
        ({"num_splits": 257}, "num_splits must be None or from 1 to 256, got 257"),
        ({"out": torch.empty(7, 4, 8)}, "out must have shape [7, 4, 16], got [7, 4, 8]"),
        ({"out": torch.empty(7, 4, 16)}, "out must be torch.float16, got torch.float32"),
        ({"impl": "hopper"}, "unknown impl 'hopper'; expected one of reference, triton"),
    ],
)
def test_wrong_options(make_batch: "MakeBatch", options: dict, message: str) -> None:
    batch = make_batch([5, 2], [5, 9])
    with pytest.raises(ValueError, match=re.escape(message)):
        paged_attention(*batch.inputs, **{"softmax_scale": 0.3, **options})


def kernels(tokens: int, batch: int, longest: int | None, **options) -> Kernels:
    sizes = {"group": 4, "kv_heads": 8, "head_dim": 128, "capacity": 8192, "capability": (9, 0), "units": 132}
    return choose_kernels(tokens=tokens, batch=batch, max_seqlen_q=longest, **(sizes | options))


def test_which_kernels_a_batch_takes() -> None:
    decode = kernels(64, 64, 1)
    assert decode.tiles is None
    assert decode.split_rows == 16
    speculative = kernels(64, 8, 8)
    assert speculative.tiles is None
    assert speculative.split_rows == 32
    prefill = kernels(8192, 4, 2048)
    assert prefill.split is None
    mixed = kernels(4128, 33, 4096)
    assert mixed.split is not None
    assert mixed.tiles is not None
    assert mixed.split_rows == 16
    # Not known to be without long requests, or without short ones.
    assert None not in (kernels(64, 64, None).split, kernels(64, 64, None).tiles)
    # A few rows over many keys would not fill the device by rows alone.
    assert kernels(48, 1, 48, capacity=131072).tiles is None
    assert kernels(48, 1, 48, capacity=64).split is None
    # Of Hopper's tiles the larger only where there are enough of them.
    assert prefill.tiles == PagedConfig(256, 64, 16, 3)
    assert kernels(1024, 1, 1024).tiles == PagedConfig(128, 64, 8, 3)


# The widest group of heads, and dims from the least to the largest, fit every generation's shared memory.
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
def test_configurations_fit(capability: tuple[int, int], head_dim: int) -> None:
    found: set[PagedConfig] = set()
    for group in (1, 8, 128):
        for longest in (1, 12, 48, None):
            chosen = kernels(2000, 100, longest, group=group, head_dim=head_dim, capability=capability)
            found |= {config for config in (chosen.split, chosen.tiles) if config is not None}
    for config in found:
        assert config.shared_bytes(head_dim) * config.resident <= shared_limit(capability), config
