"""A stand-in for FlashInfer: its four wrappers with their recorded signatures, as tests/support/fake_peers.py has them
for the other libraries.
"""

from itertools import pairwise

import torch

from tests.support.fake_peers import HALF, _cutlass, _module, attend, check

FIXED_SCALE = 192**-0.5  # written into its CUTLASS kernel


class _Wrapper:
    """`chosen` is what a plan comes to when the caller leaves the choice, or whatever it asks for if `stubborn`."""

    calls: list
    chosen = "fa3"
    stubborn = False

    def _choose(self, backend):
        return self.chosen if backend == "auto" or self.stubborn else backend

    def _note(self, name, **what):
        self.calls.append((name, what))


def _workspace(buffer):
    check(buffer, None, dtype=torch.uint8)
    assert buffer.numel() >= 2**20


def _lists(indptr, indices, last, page_size):
    """Pages and length of each request."""
    check(indptr, None, dtype=torch.int32)
    check(indices, int(indptr[-1]), dtype=torch.int32)
    check(last, len(indptr) - 1, dtype=torch.int32)
    assert ((last >= 1) & (last <= page_size)).all()
    bounds = indptr.tolist()
    pages = [indices[a:b].long() for a, b in pairwise(bounds)]
    return [(p, (len(p) - 1) * page_size + n) for p, n in zip(pages, last.tolist(), strict=True)]


def _keys(cache, pages, length):
    return cache[pages].flatten(0, 1)[:length]


def flashinfer(calls, *, chosen="fa3", stubborn=False):
    """The package, with the submodules that are used."""

    class Base(_Wrapper):
        pass

    Base.calls, Base.chosen, Base.stubborn = calls, chosen, stubborn

    class BatchMLAPagedAttentionWrapper(Base):
        def __init__(
            self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None,
            kv_len_arr=None, backend="auto",
        ):  # fmt: skip
            _workspace(float_workspace_buffer)
            self._backend = self._choose(backend)

        def plan(
            self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size,
            causal, sm_scale, q_data_type, kv_data_type, use_profiler=False,
        ):  # fmt: skip
            check(qo_indptr, len(kv_len_arr) + 1, dtype=torch.int32)
            check(kv_len_arr, None, dtype=torch.int32)
            check(kv_indptr, len(kv_len_arr) + 1, dtype=torch.int32)
            check(kv_indices, int(kv_indptr[-1]), dtype=torch.int32)
            assert (head_dim_ckv, head_dim_kpe) == (512, 64)
            assert q_data_type == kv_data_type
            assert q_data_type in HALF
            self._plan = (qo_indptr.tolist(), kv_indptr.tolist(), kv_indices.long(), kv_len_arr.tolist())
            self._rest = (num_heads, page_size, causal, sm_scale)
            self._note("mla plan", backend=self._backend)

        def run(
            self, q_nope, q_pe, ckv_cache, kpe_cache, out=None, lse=None, return_lse=False, profiler_buffer=None,
            kv_len=None, page_table=None, return_lse_base_on_e=False,
        ):  # fmt: skip
            assert not return_lse
            if self._backend == "cutlass":
                assert q_nope.shape[1] == 128
                q, cache = torch.cat([q_nope, q_pe], -1), torch.cat([ckv_cache, kpe_cache], -1)
                assert page_table.shape[1] % (128 // cache.shape[1]) == 0
                out = torch.empty_like(q_nope) if out is None else out
                check(out, *q_nope.shape, dtype=q_nope.dtype)
                _cutlass(out, None, q, cache, kv_len, page_table, FIXED_SCALE)
                return out
            heads, page_size, causal, scale = self._rest
            check(q_nope, None, heads, 512)
            check(q_pe, q_nope.shape[0], heads, 64, dtype=q_nope.dtype)
            check(ckv_cache, None, page_size, 512, dtype=q_nope.dtype)
            check(kpe_cache, ckv_cache.shape[0], page_size, 64, dtype=q_nope.dtype)
            check(out, *q_nope.shape, dtype=q_nope.dtype)
            bounds_q, bounds_k, indices, lengths = self._plan
            for i, length in enumerate(lengths):
                rows, pages = slice(*bounds_q[i : i + 2]), indices[slice(*bounds_k[i : i + 2])]
                latent, rope = _keys(ckv_cache, pages, length), _keys(kpe_cache, pages, length)
                q = torch.cat([q_nope[rows], q_pe[rows]], -1)
                keys = torch.cat([latent, rope], -1)[:, None]
                out[rows] = attend(q, keys, latent[:, None], scale, causal)[0].to(out.dtype)
            self._note("mla run")
            return out

    class BatchPrefillWithRaggedKVCacheWrapper(Base):
        def __init__(
            self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
            kv_indptr_buf=None, custom_mask_buf=None, mask_indptr_buf=None, backend="auto", jit_args=None,
            jit_kwargs=None,
        ):  # fmt: skip
            _workspace(float_workspace_buffer)
            assert kv_layout == "NHD"
            self._backend = backend

        def plan(
            self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, custom_mask=None,
            packed_custom_mask=None, causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False,
            window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None,
            q_data_type="float16", kv_data_type=None, o_data_type=None, non_blocking=True, prefix_len_ptr=None,
            token_pos_in_items_ptr=None, token_pos_in_items_len=0, max_item_len_ptr=None, fixed_split_size=None,
            disable_split_kv=False, seq_lens=None, seq_lens_q=None, max_token_per_sequence=None, max_sequence_kv=None,
            v_indptr=None, o_indptr=None,
        ):  # fmt: skip
            self._backend = self._choose(self._backend)
            self._dims = (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo)
            self._plan = (qo_indptr.tolist(), kv_indptr.tolist(), sm_scale, causal, q_data_type)
            self._note("ragged plan", backend=self._backend)

        def run(
            self, q, k, v, *args, q_scale=None, k_scale=None, v_scale=None, o_scale=None, out=None, lse=None,
            return_lse=False, enable_pdl=None,
        ):  # fmt: skip
            heads, kv_heads, qk, vo = self._dims
            bounds_q, bounds_k, scale, causal, dtype = self._plan
            check(q, bounds_q[-1], heads, qk, dtype=dtype)
            check(k, bounds_k[-1], kv_heads, qk, dtype=dtype)
            check(v, bounds_k[-1], kv_heads, vo, dtype=dtype)
            check(out, *q.shape[:2], vo, dtype=dtype)
            for i in range(len(bounds_q) - 1):
                rows, keys = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
                out[rows] = attend(q[rows], k[keys], v[keys], scale, causal)[0].to(dtype)
            self._note("ragged run")
            return out

    class BatchPrefillWithPagedKVCacheWrapper(Base):
        def __init__(
            self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
            paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None,
            custom_mask_buf=None, mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None,
        ):  # fmt: skip
            _workspace(float_workspace_buffer)
            assert kv_layout == "NHD"
            self._backend = backend

        def plan(
            self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
            head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
            pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1,
            logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
            o_data_type=None, non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None,
            token_pos_in_items_len=0, max_item_len_ptr=None, seq_lens=None, seq_lens_q=None, block_tables=None,
            max_token_per_sequence=None, max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False,
        ):  # fmt: skip
            check(qo_indptr, len(paged_kv_indptr), dtype=torch.int32)
            assert int(qo_indptr[0]) == 0
            self._backend = self._choose(self._backend)
            self._lists = _lists(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
            self._plan = (qo_indptr.tolist(), num_qo_heads, num_kv_heads, head_dim_qk, page_size, sm_scale, causal)
            self._note("prefill plan", backend=self._backend)

        def run(
            self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None,
            return_lse=False, enable_pdl=None, window_left=None, sinks=None, kv_cache_sf=None,
            skip_softmax_threshold_scale_factor=None,
        ):  # fmt: skip
            bounds, heads, kv_heads, dim, page_size, scale, causal = self._plan
            k, v = paged_kv_cache
            check(q, bounds[-1], heads, dim)
            check(k, None, page_size, kv_heads, dim, dtype=q.dtype)
            check(out, *q.shape, dtype=q.dtype)
            for i, (pages, length) in enumerate(self._lists):
                rows = slice(*bounds[i : i + 2])
                found = attend(q[rows], _keys(k, pages, length), _keys(v, pages, length), scale, causal)
                out[rows] = found[0].to(q.dtype)
            self._note("prefill run", requests=len(self._lists))
            return out

    class BatchDecodeWithPagedKVCacheWrapper(Base):
        def __init__(
            self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
            paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None,
            backend="auto", jit_args=None,
        ):  # fmt: skip
            _workspace(float_workspace_buffer)
            assert kv_layout == "NHD"
            self._backend = backend
            self._tensor_cores = use_tensor_cores

        def plan(
            self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
            o_data_type=None, data_type=None, sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True,
            block_tables=None, seq_lens=None, fixed_split_size=None, disable_split_kv=False,
        ):  # fmt: skip
            if self._tensor_cores:
                self._backend = self._choose(self._backend)
            self._lists = _lists(indptr, indices, last_page_len, page_size)
            self._plan = (num_qo_heads, num_kv_heads, head_dim, page_size, sm_scale)
            self._note("decode plan", backend=self._backend, tensor_cores=self._tensor_cores)

        def run(
            self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None,
            return_lse=False, enable_pdl=None, window_left=None, sinks=None, q_len_per_req=1,
            skip_softmax_threshold_scale_factor=None, kv_cache_sf=None,
        ):  # fmt: skip
            heads, kv_heads, dim, page_size, scale = self._plan
            k, v = paged_kv_cache
            check(q, len(self._lists), heads, dim)
            check(k, None, page_size, kv_heads, dim, dtype=q.dtype)
            check(out, *q.shape, dtype=q.dtype)
            for i, (pages, length) in enumerate(self._lists):
                keys, values = _keys(k, pages, length), _keys(v, pages, length)
                out[i] = attend(q[i : i + 1], keys, values, scale, True)[0][0].to(q.dtype)
            self._note("decode run", requests=len(self._lists))
            return out

    mla = _module("flashinfer.mla", BatchMLAPagedAttentionWrapper=BatchMLAPagedAttentionWrapper)
    prefill = _module(
        "flashinfer.prefill", BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
        BatchPrefillWithRaggedKVCacheWrapper=BatchPrefillWithRaggedKVCacheWrapper,
    )  # fmt: skip
    decode = _module("flashinfer.decode", BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper)
    return _module("flashinfer", mla=mla, prefill=prefill, decode=decode)
