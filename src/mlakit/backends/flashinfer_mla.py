"""FlashInfer's MLA: the paged wrapper in decode, the ragged one in prefill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.flashinfer_common import KERNEL, FlashInferPeer, ran, workspace
from mlakit.backends.peers import in_decode, latent_only, page_lists

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlakit.backends.base import Output
    from mlakit.backends.problem import MLAProblem, Problem


class FlashInferMLA(FlashInferPeer):
    """One call for requests of any lengths. The plan, which it makes on the host, is made once a batch."""

    name = "flashinfer_mla"
    summary = "flashinfer.mla.BatchMLAPagedAttentionWrapper; planned once a batch, outside the timed call"
    attention = frozenset({"mla"})
    extra_parameters = (KERNEL,)

    def refusal(self, problem: Problem) -> str | None:
        """In decode DeepSeek's latent."""
        return super().refusal(problem) or (latent_only(problem) if in_decode(problem) else None)

    def prepare_mqa(self, problem: MLAProblem, backend: str = "auto", **parameters: Any) -> Callable[..., Output]:
        """Its lse is left out, as a caller that merges nothing leaves it out."""
        library = self.require()
        batch, dims = problem.batch, problem.dims
        rank = dims.kv_lora_rank
        pages = page_lists(batch)
        wrapper = library.module.mla.BatchMLAPagedAttentionWrapper(workspace(problem), backend=backend)
        wrapper.plan(
            batch.cu_seqlens_q,
            pages.indptr,
            pages.indices,
            batch.seq_lens,
            dims.num_heads,
            rank,
            dims.qk_rope_head_dim,
            batch.page_size,
            problem.causal,
            problem.softmax_scale,
            problem.dtype,
            problem.dtype,
        )
        problem.kernel = f"{library.label}, MLA paged, {ran(wrapper, backend)}"

        def run(q: Any, cache: Any, out: Any) -> Output:
            found: Output = wrapper.run(q[..., :rank], q[..., rank:], cache[..., :rank], cache[..., rank:], out=out)
            return found

        return run

    def prepare_mha(self, problem: MLAProblem, backend: str = "auto", **parameters: Any) -> Callable[..., Output]:
        """Keys and values laid end to end."""
        library = self.require()
        batch, dims = problem.batch, problem.dims
        wrapper = library.module.prefill.BatchPrefillWithRaggedKVCacheWrapper(
            workspace(problem), "NHD", backend=backend
        )
        wrapper.plan(
            batch.cu_seqlens_q,
            batch.cu_seqlens_k,
            dims.num_heads,
            dims.num_heads,
            dims.qk_head_dim,
            head_dim_vo=dims.v_head_dim,
            causal=problem.causal,
            sm_scale=problem.softmax_scale,
            q_data_type=problem.dtype,
            kv_data_type=problem.dtype,
        )
        problem.kernel = f"{library.label}, prefill ragged, {ran(wrapper, backend)}"

        def run(q: Any, k: Any, v: Any, out: Any) -> Output:
            found: Output = wrapper.run(q, k, v, out=out)
            return found

        return run
