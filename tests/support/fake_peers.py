"""Stand-ins for the libraries that backends run: recorded signatures, checks of what they are handed, and the right
answer in PyTorch. tests/gpu/test_backends.py compares the signatures with the real ones where those are installed.
"""

from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch

HALF = (torch.bfloat16, torch.float16)


def attend(q, k, v, scale, causal, q_v=None):
    """One request: q [tokens, heads, dim], k and v [keys, kv_heads, dim]; (out, lse [tokens, heads]), in float32."""
    heads, kv_heads = q.shape[1], k.shape[1]
    k, v = (x.float().repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k)
    if q_v is not None:
        scores = scores + torch.einsum("qhd,khd->hqk", q_v.float(), v)
    scores = scores * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + k.shape[0] - q.shape[0])
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).transpose(0, 1)


def keys_of(cache, table, length):
    """The first `length` tokens of a paged cache by one row of a block table."""
    page_size = cache.shape[1]
    return cache[table[: -(-int(length) // page_size)].long()].flatten(0, 1)[: int(length)]


def check(x, *shape, dtype=None):
    """A shape (None: any size) and a dtype, with unit stride in the last dimension."""
    assert len(x.shape) == len(shape), (x.shape, shape)
    assert all(want in (None, got) for want, got in zip(shape, x.shape, strict=True)), (x.shape, shape)
    assert dtype is None or x.dtype == dtype, (x.dtype, dtype)
    assert x.shape[-1] == 1 or x.stride(-1) == 1, x.stride()


def _bounds(cu_seqlens, total, longest):
    check(cu_seqlens, None, dtype=torch.int32)
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == total
    assert type(longest) is int, "a length read from a GPU tensor is a host sync"
    assert longest == max(b - a for a, b in pairwise(bounds))
    return [slice(a, b) for a, b in pairwise(bounds)]


def _ragged(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    assert q.dtype in HALF
    check(k, None, None, q.shape[2], dtype=q.dtype)
    check(v, k.shape[0], k.shape[1], None, dtype=q.dtype)
    rows, keys = _bounds(cu_q, q.shape[0], max_q), _bounds(cu_k, k.shape[0], max_k)
    found = [attend(q[r], k[n], v[n], scale, causal) for r, n in zip(rows, keys, strict=True)]
    return torch.cat([out for out, _ in found]).to(q.dtype), torch.cat([lse for _, lse in found])


def _paged(q, k, v, cu_q, max_q, seqused, table, scale, causal, q_v, pages_of):
    assert q.dtype in HALF
    check(q, None, None, None)
    check(k, None, None, None, q.shape[2], dtype=q.dtype)
    check(v, *k.shape[:3], None, dtype=q.dtype)
    if q_v is not None:
        check(q_v, *q.shape[:2], v.shape[3], dtype=q.dtype)
    assert k.shape[1] % pages_of == 0
    rows = _bounds(cu_q, q.shape[0], max_q)
    check(seqused, len(rows), dtype=torch.int32)
    check(table, len(rows), None, dtype=torch.int32)
    outs, lses = [], []
    for i, r in enumerate(rows):
        keys, values = keys_of(k, table[i], seqused[i]), keys_of(v, table[i], seqused[i])
        out, lse = attend(q[r], keys, values, scale, causal, None if q_v is None else q_v[r])
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs).to(q.dtype), torch.cat(lses)


def _module(name, version="1.2.3", **content):
    module = ModuleType(name)
    for key, value in {"__version__": version, **content}.items():
        setattr(module, key, value)
    return module


def flash_attn_interface(calls):
    """FlashAttention-3 of the authors."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        calls.append(("varlen", {"num_splits": num_splits}))
        out, lse = _ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
        return (out, lse.transpose(0, 1).contiguous()) if return_attn_probs else out

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
    ):  # fmt: skip
        calls.append(("paged", {"num_splits": num_splits, "metadata": scheduler_metadata}))
        out, lse = _paged(
            q, k_cache, v_cache, cu_seqlens_q, max_seqlen_q, cache_seqlens, page_table, softmax_scale, causal, qv, 1
        )
        return (out, lse.transpose(0, 1).contiguous(), None, None) if return_softmax_lse else out

    return _module(
        "flash_attn_interface", flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache, get_scheduler_metadata=_scheduler(calls),
    )  # fmt: skip


def _scheduler(calls):
    def get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
        qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None,
        page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), has_softcap=False, num_splits=0,
        pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        check(cache_seqlens, batch_size, dtype=torch.int32)
        assert max_seqlen_k == int(cache_seqlens.max())
        assert len(_bounds(cu_seqlens_q, int(cu_seqlens_q[-1]), max_seqlen_q)) == batch_size
        calls.append(("get_scheduler_metadata", {"dims": (headdim, headdim_v), "page_size": page_size}))
        return torch.zeros(1, dtype=torch.int32)

    return get_scheduler_metadata


def flash_attn(calls):
    """FlashAttention-2 of the authors."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append(("varlen" if block_table is None else "paged", {}))
        if block_table is None:
            assert q.shape[2] == v.shape[2]
            out, lse = _ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
        else:
            lengths = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
            out, lse = _paged(
                q, k, v, cu_seqlens_q, max_seqlen_q, lengths, block_table, softmax_scale, causal, None, 256
            )
        return (out, lse.transpose(0, 1).contiguous(), None) if return_attn_probs else out

    return _module("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)


def vllm_flash_attn(calls, *, generations=(2, 3)):
    """vLLM's build of both."""

    def fa_version_unsupported_reason(fa_version):
        return None if fa_version in generations else f"FA{fa_version} is unavailable due to: not built"

    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,
        q_descale=None, k_descale=None, v_descale=None, num_splits=0, fa_version=2, s_aux=None, cp_world_size=1,
        cp_rank=0, cp_tot_seqused_k=None,
    ):  # fmt: skip
        assert fa_version in generations
        what = {"num_splits": num_splits, "metadata": scheduler_metadata}
        calls.append(("varlen" if block_table is None else "paged", what))
        assert (cu_seqlens_k is None) != (seqused_k is None)
        if block_table is None:
            assert fa_version == 3 or q.shape[2] == v.shape[2]
            found, lse = _ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
        else:
            assert type(max_seqlen_k) is int
            assert max_seqlen_k >= int(seqused_k.max())
            pages_of = 1 if fa_version == 3 else 16
            found, lse = _paged(
                q, k, v, cu_seqlens_q, max_seqlen_q, seqused_k, block_table, softmax_scale, causal, q_v, pages_of
            )
        if out is not None:
            check(out, *found.shape, dtype=q.dtype)
            found = out.copy_(found)
        return (found, lse.transpose(0, 1).contiguous()) if return_softmax_lse else found

    return _module(
        "vllm.vllm_flash_attn.flash_attn_interface", flash_attn_varlen_func=flash_attn_varlen_func,
        get_scheduler_metadata=_scheduler(calls), fa_version_unsupported_reason=fa_version_unsupported_reason,
    )  # fmt: skip


def flash_mla(calls, *, name="flash_mla", tensors=False):
    """FlashMLA; with `tensors` a build whose metadata are tensors, and which has no `out`."""

    def get_mla_metadata(*args, **kwargs):
        calls.append(("get_mla_metadata", {}))
        if not tensors:
            return SimpleNamespace(config=None), None
        lengths, rows, kv_heads = args
        check(lengths, None, dtype=torch.int32)
        assert kv_heads == 1
        return torch.full((1,), rows, dtype=torch.int32), torch.zeros(len(lengths) + 1, dtype=torch.int32)

    def compute(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal):
        batch, q_len, heads, _ = q.shape
        assert q.dtype in HALF
        check(q, batch, q_len, heads, 576)
        check(k_cache, None, 64, 1, 576, dtype=q.dtype)
        check(block_table, batch, None, dtype=torch.int32)
        check(cache_seqlens, batch, dtype=torch.int32)
        assert head_dim_v == 512
        calls.append(("flash_mla_with_kvcache", {"shape": tuple(q.shape)}))
        found = []
        for i in range(batch):
            keys = keys_of(k_cache, block_table[i], cache_seqlens[i])
            found.append(attend(q[i], keys, keys[..., :512], softmax_scale, causal))
        out = torch.stack([out for out, _ in found]).to(q.dtype)
        return out, torch.stack([lse for _, lse in found]).transpose(1, 2).contiguous()

    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None,
        extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None, out=None,
    ):  # fmt: skip
        assert num_splits is None
        config = (tuple(q.shape), causal, cache_seqlens.tolist())
        assert tile_scheduler_metadata.config in (None, config), "metadata of another batch"
        tile_scheduler_metadata.config = config
        found, lse = compute(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal)
        if out is not None:
            # What vLLM 0.20.2's build wants, whatever its documentation says.
            check(out, q.shape[0], 1, q.shape[1] * q.shape[2], 512, dtype=q.dtype)
            found = out.copy_(found.view(out.shape)).view(found.shape)
        return found, lse

    def before(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale=None,
        causal=False,
    ):  # fmt: skip
        assert int(tile_scheduler_metadata) == q.shape[1] * q.shape[2]
        check(num_splits, q.shape[0] + 1, dtype=torch.int32)
        return compute(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal)

    return _module(
        name, get_mla_metadata=get_mla_metadata, flash_mla_with_kvcache=before if tensors else flash_mla_with_kvcache
    )


def triton_decode_attention(calls):
    """vLLM's Triton decode."""

    def decode_attention_fwd(
        q, k_buffer, v_buffer, o, lse, req_to_token, b_seq_len, attn_logits, num_kv_splits, sm_scale, page_size=1,
        logit_cap=0.0, k_scale=None, v_scale=None, is_mla=False,
    ):  # fmt: skip
        batch, heads, dim = q.shape
        calls.append(("decode_attention_fwd", {"splits": num_kv_splits, "scale": k_scale.data_ptr()}))
        check(k_buffer, None, page_size, 1, dim, dtype=q.dtype)
        check(v_buffer, None, page_size, 1, 512, dtype=q.dtype)
        check(o, batch, heads, 512, dtype=q.dtype)
        check(lse, batch, heads, dtype=torch.float32)
        check(req_to_token, batch, None, dtype=torch.int32)
        check(b_seq_len, batch, dtype=torch.int32)
        check(attn_logits, batch, heads, num_kv_splits, 513, dtype=torch.float32)
        assert is_mla
        assert k_scale.numel() == v_scale.numel() == 1
        assert float(k_scale) == float(v_scale) == 1.0
        for i in range(batch):
            keys, values = (keys_of(x, req_to_token[i], b_seq_len[i]) for x in (k_buffer, v_buffer))
            out, found = attend(q[i : i + 1], keys, values, sm_scale, True)
            o[i], lse[i] = out[0].to(q.dtype), found[0]

    return _module("vllm.v1.attention.ops.triton_decode_attention", decode_attention_fwd=decode_attention_fwd)


def vllm_custom_ops(calls):
    """vLLM's CUTLASS decode for Blackwell."""

    def sm100_cutlass_mla_get_workspace_size(max_seq_len, num_batches, sm_count, num_kv_splits):
        assert max_seq_len % 128 == 0
        calls.append(("workspace", {"splits": num_kv_splits, "units": sm_count}))
        return 1000

    def sm100_cutlass_mla_decode(
        out, lse, q_nope, q_pe, kv_c_and_k_pe_cache, seq_lens, page_table, workspace, scale, num_kv_splits
    ):
        batch = q_nope.shape[0]
        page_size = kv_c_and_k_pe_cache.shape[1]
        check(q_nope, batch, 128, 512)
        check(q_pe, batch, 128, 64, dtype=q_nope.dtype)
        check(kv_c_and_k_pe_cache, None, page_size, 576, dtype=q_nope.dtype)
        check(out, batch, 128, 512, dtype=q_nope.dtype)
        check(lse, batch, 128, dtype=torch.float32)
        check(seq_lens, batch, dtype=torch.int32)
        check(page_table, batch, None, dtype=torch.int32)
        assert page_table.shape[1] % (128 // page_size) == 0
        check(workspace, 1000, dtype=torch.uint8)
        calls.append(("sm100_cutlass_mla_decode", {"splits": num_kv_splits}))
        _cutlass(out, lse, torch.cat([q_nope, q_pe], -1), kv_c_and_k_pe_cache, seq_lens, page_table, scale)
        return out

    return _module(
        "vllm._custom_ops", sm100_cutlass_mla_decode=sm100_cutlass_mla_decode,
        sm100_cutlass_mla_get_workspace_size=sm100_cutlass_mla_get_workspace_size,
    )  # fmt: skip


def _cutlass(out, lse, q, cache, lengths, table, scale):
    for i in range(len(q)):
        keys = keys_of(cache, table[i], lengths[i])[:, None]
        found, sums = attend(q[i : i + 1], keys, keys[..., :512], scale, True)
        out[i] = found[0].to(q.dtype)
        if lse is not None:
            lse[i] = sums[0]
