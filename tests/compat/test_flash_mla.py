"""FlashMLA's face: its shapes, defaults and conventions, over the reference on a CPU."""

import math

import pytest
import torch

import mlakit.compat.flash_mla as flash_mla
from mlakit.cache import pack_fp8
from mlakit.decode import mla_decode_reference
from mlakit.prefill import mla_prefill_reference
from mlakit.sparse import mla_sparse_decode_reference, mla_sparse_prefill_reference
from mlakit.testing import PagedCache, random_paged_cache

RANK, LATENT, PAGE = 64, 80, 16


def make(lens: list[int], q_len: int = 2, heads: int = 3) -> tuple[torch.Tensor, torch.Tensor, PagedCache]:
    generator = torch.Generator().manual_seed(0)
    paged = random_paged_cache(
        lens, (LATENT,), page_size=PAGE, dtype=torch.float32, device="cpu", generator=generator, dead_slot=2**30
    )
    q = torch.randn((len(lens), q_len, heads, LATENT), generator=generator)
    return q, paged.pages[:, :, None], paged


@pytest.mark.parametrize("causal", [False, True])
def test_dense_decode_with_flash_mla_s_conventions(causal: bool) -> None:
    q, cache, paged = make([20, 0, 1, 33])
    metadata, num_splits = flash_mla.get_mla_metadata()
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, cache, paged.block_table, paged.seq_lens, RANK, metadata, num_splits, causal=causal
    )
    expected, expected_lse = mla_decode_reference(
        q.double(),
        paged.pages.double(),
        paged.block_table,
        paged.seq_lens,
        softmax_scale=1 / math.sqrt(LATENT),
        causal=causal,
        kv_lora_rank=RANK,
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert lse.shape == (4, 3, 2)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    expected_lse = expected_lse.transpose(1, 2)
    empty = expected_lse == -torch.inf
    assert int(empty.sum()) == (9 if causal else 6)  # request 1, and the older token of request 2 under the mask
    assert (lse[empty] == torch.inf).all()
    torch.testing.assert_close(lse[~empty].double(), expected_lse[~empty], rtol=1e-5, atol=1e-5)


def test_a_scale_and_an_out_that_are_given_are_used() -> None:
    q, cache, paged = make([20, 7])
    out = torch.full((2, 2, 3, RANK), torch.nan)
    result, _ = flash_mla.flash_mla_with_kvcache(
        q, cache, paged.block_table, paged.seq_lens, RANK, flash_mla.FlashMLASchedMeta(), softmax_scale=0.3, out=out
    )
    expected, _ = mla_decode_reference(
        q, paged.pages, paged.block_table, paged.seq_lens, softmax_scale=0.3, causal=False, kv_lora_rank=RANK
    )
    assert result is out
    torch.testing.assert_close(out, expected)


def test_older_callers_pass_and_receive_tensors() -> None:
    q, cache, paged = make([20, 7])
    metadata, num_splits = flash_mla.get_mla_metadata(paged.seq_lens, 2 * 3, 1)
    assert isinstance(metadata, torch.Tensor)
    assert isinstance(num_splits, torch.Tensor)
    assert metadata.shape[1] == 8
    assert num_splits.shape == (3,)
    inputs = (q, cache, paged.block_table, paged.seq_lens, RANK)
    old = flash_mla.flash_mla_with_kvcache(*inputs, metadata, num_splits, causal=True)
    new = flash_mla.flash_mla_with_kvcache(*inputs, flash_mla.get_mla_metadata()[0], causal=True)
    for a, b in zip(old, new, strict=True):
        assert torch.equal(a, b)


def test_dense_decode_reads_the_float8_cache_too() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((3, PAGE, 576), generator=generator)
    cache = pack_fp8(latents[..., :512], latents[..., 512:])[:, :, None].view(torch.int8)
    q = torch.randn((1, 2, 3, 576), generator=generator)
    rest = (torch.tensor([[2, 0, 1]], dtype=torch.int32), torch.tensor([40], dtype=torch.int32))
    out, _ = flash_mla.flash_mla_with_kvcache(q, cache, *rest, 512, is_fp8_kvcache=True, causal=True)
    expected, _ = mla_decode_reference(q, latents, *rest, softmax_scale=576**-0.5)
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)


def test_refusals_name_what_is_wrong() -> None:
    q, cache, paged = make([20])
    inputs = (q, cache, paged.block_table, paged.seq_lens, RANK)
    indices = torch.zeros((1, 2, 4), dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="a second cache is not supported"):
        flash_mla.flash_mla_with_kvcache(*inputs, indices=indices, extra_k_cache=cache)
    with pytest.raises(ValueError, match="the float8 cache needs a kv_lora_rank that is a multiple of 128, got 64"):
        flash_mla.flash_mla_with_kvcache(*inputs, is_fp8_kvcache=True)
    with pytest.raises(ValueError, match="causal must be False for sparse attention"):
        flash_mla.flash_mla_with_kvcache(*inputs, indices=indices, causal=True)
    with pytest.raises(ValueError, match="attn_sink and topk_length must be None for dense attention"):
        flash_mla.flash_mla_with_kvcache(*inputs, attn_sink=torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[pages, page_size, 1, head_dim\], got \[\d+, 16, 2, 80\]"):
        flash_mla.flash_mla_with_kvcache(q, cache.expand(-1, -1, 2, -1), *inputs[2:])
    with pytest.raises(ValueError, match="block_table and cache_seqlens must be given"):
        flash_mla.flash_mla_with_kvcache(q, cache, None, None, RANK)


def test_sparse_decode() -> None:
    q, cache, paged = make([20, 33])
    slots = paged.slots.int()
    indices = torch.stack([slots[:16], slots[20:36]])[:, None].repeat(1, 2, 1)
    indices[0, 1] = -1  # a token without a key
    sink = torch.tensor([0.3, -torch.inf, 1.0])
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, cache, None, None, RANK, flash_mla.get_mla_metadata()[0], indices=indices, attn_sink=sink
    )
    scale = 1 / math.sqrt(LATENT)
    expected, expected_lse = mla_sparse_decode_reference(
        q, paged.pages, indices, softmax_scale=scale, kv_lora_rank=RANK, attn_sink=sink
    )
    torch.testing.assert_close(out, expected)
    assert lse.shape == (2, 3, 2)
    assert (lse[0, :, 1] == torch.inf).all()
    assert (out[0, 1] == 0).all()
    torch.testing.assert_close(lse[:, :, 0], expected_lse.transpose(1, 2)[:, :, 0])


def test_sparse_prefill() -> None:
    generator = torch.Generator().manual_seed(0)
    q, kv = torch.randn((3, 2, LATENT), generator=generator), torch.randn((9, 1, LATENT), generator=generator)
    indices = torch.tensor([[[0, 3, 8]], [[1, -1, 9]], [[-1, -1, -1]]], dtype=torch.int32)
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.2, RANK)
    expected = mla_sparse_prefill_reference(q, kv, indices, softmax_scale=0.2, d_v=RANK)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(max_logits, expected[1])
    torch.testing.assert_close(lse[:2], expected[2][:2])
    assert (lse[2] == torch.inf).all()


def test_sparse_prefill_has_no_second_lse() -> None:
    q, kv = torch.randn(2, 3, LATENT), torch.randn(5, 1, LATENT)
    indices = torch.zeros(2, 1, 4, dtype=torch.int32)
    assert len(flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.1, RANK, indexer_topk=0)) == 3
    with pytest.raises(NotImplementedError, match="indexer_topk must be 0, got 512"):
        flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.1, RANK, indexer_topk=512)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_prefill_and_its_packed_forms(causal: bool) -> None:
    """Two sequences, one with more keys than queries where they may differ; keys and values of other widths."""
    qk, dv, heads = 24, 16, 2
    lens = torch.tensor([0, 3, 8], dtype=torch.int32)
    longer = torch.tensor([0, 5, 10], dtype=torch.int32)
    qkv, kv = torch.randn(8, heads, 2 * qk + dv), torch.randn(10, heads, qk + dv)
    q = qkv[..., :qk].clone().requires_grad_()
    out, lse = flash_mla.flash_attn_varlen_func(q, kv[..., :qk], kv[..., qk:], lens, longer, 5, 5, 0.0, None, causal)
    expected, expected_lse = mla_prefill_reference(
        q.double(), kv[..., :qk].double(), kv[..., qk:].double(), lens, longer, softmax_scale=qk**-0.5, causal=causal
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert lse.shape == (8, heads)
    out.sum().backward()
    assert q.grad is not None
    packed, _ = flash_mla.flash_attn_varlen_kvpacked_func(q, kv, lens, longer, 5, 5, qk, causal=causal)
    torch.testing.assert_close(packed, out)
    packed, _ = flash_mla.flash_attn_varlen_qkvpacked_func(qkv, lens, 5, qk, softmax_scale=0.3, causal=causal)
    parts = qkv.split((qk, qk, dv), -1)
    apart, _ = flash_mla.flash_attn_varlen_func(
        parts[0], parts[1], parts[2], lens, lens, 5, 5, softmax_scale=0.3, causal=causal
    )
    torch.testing.assert_close(packed, apart)
    for dropout, deterministic in ((0.1, False), (0.0, True)):
        with pytest.raises(ValueError, match="dropout_p must be 0 and deterministic False"):
            flash_mla.flash_attn_varlen_kvpacked_func(
                q, kv, lens, longer, 5, 5, qk, dropout, deterministic=deterministic
            )
