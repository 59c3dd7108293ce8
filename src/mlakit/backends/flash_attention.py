"""FlashAttention's builds behind one face: the authors' FA3 (`flash_attn_interface`) and FA2 (`flash_attn`), and vLLM's
build of both, which takes other arguments.

Signatures: flash-attention hopper/flash_attn_interface.py and flash_attn/flash_attn_interface.py, vLLM 0.20.2
vllm_flash_attn/flash_attn_interface.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Unavailable, UnsupportedError
from mlakit.backends.peers import Candidate, Library, find, why_not, without

if TYPE_CHECKING:
    import torch

    from mlakit.backends.problem import Problem
    from mlakit.hardware import DeviceInfo

    Pair = tuple[torch.Tensor, torch.Tensor]

_VLLM = "vllm.vllm_flash_attn.flash_attn_interface"
_INSTALL = {
    3: "FlashAttention-3: pip install vllm, or build flash-attention's hopper folder",
    2: "FlashAttention: pip install flash-attn, or vllm",
}


def _vllm_has(generation: int) -> Callable[[Any], str | None]:
    def lacks(module: Any) -> str | None:
        if reason := without("flash_attn_varlen_func", "fa_version_unsupported_reason")(module):
            return reason
        found: str | None = module.fa_version_unsupported_reason(generation)
        return found

    return lacks


_CANDIDATES = {
    3: (
        Candidate("flash_attn_interface", "flash_attn_3", without("flash_attn_varlen_func", "flash_attn_with_kvcache")),
        Candidate(_VLLM, "vllm", _vllm_has(3)),
    ),
    2: (
        Candidate("flash_attn", "flash-attn", without("flash_attn_varlen_func")),
        Candidate(_VLLM, "vllm", _vllm_has(2)),
    ),
}


@dataclass(frozen=True)
class FlashAttention:
    """One build, of one generation."""

    generation: int
    library: Library

    @property
    def of_vllm(self) -> bool:
        """Whether this is vLLM's build."""
        return self.library.module.__name__ == _VLLM

    @property
    def label(self) -> str:
        """Library and generation, "vllm 0.20.2, FlashAttention-3"."""
        return f"{self.library.label}, FlashAttention-{self.generation}"

    @property
    def smallest_page(self) -> int:
        """Pages must be a multiple of this."""
        return 1 if self.generation == 3 else 16 if self.of_vllm else 256

    def paged(
        self, problem: Problem, *, num_splits: int = 0, metadata: Any = None
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """Prepare `run(q, k_cache, v_cache, q_v, out)` over a paged cache, for requests of any lengths in one call.

        q is [tokens, heads, dim], the caches [pages, page_size, kv_heads, dim]; q_v (FA3) is multiplied with v_cache
        and added to the scores. Gives (out, lse [tokens, heads]).
        """
        batch, function = problem.batch, self.library.module
        common = {"softmax_scale": problem.softmax_scale, "causal": problem.causal}
        lengths = {"cu_seqlens_q": batch.cu_seqlens_q, "max_seqlen_q": batch.max_q_len}

        def of_vllm(q: Any, k: Any, v: Any, q_v: Any, out: Any) -> Pair:
            out, lse = function.flash_attn_varlen_func(
                q,
                k,
                v,
                **lengths,
                max_seqlen_k=batch.max_kv_len,
                seqused_k=batch.seq_lens,
                block_table=batch.block_table,
                q_v=q_v,
                out=out,
                return_softmax_lse=True,
                scheduler_metadata=metadata,
                num_splits=num_splits,
                fa_version=self.generation,
                **common,
            )
            return out, lse.transpose(0, 1)

        def third(q: Any, k: Any, v: Any, q_v: Any, out: Any) -> Pair:
            out, lse, *_ = function.flash_attn_with_kvcache(
                q,
                k,
                v,
                qv=q_v,
                cache_seqlens=batch.seq_lens,
                page_table=batch.block_table,
                **lengths,
                scheduler_metadata=metadata,
                num_splits=num_splits,
                return_softmax_lse=True,
                **common,
            )
            return out, lse.transpose(0, 1)

        def second(q: Any, k: Any, v: Any, q_v: Any, out: Any) -> Pair:
            out, lse, _ = function.flash_attn_varlen_func(
                q,
                k,
                v,
                **lengths,
                cu_seqlens_k=batch.cu_seqlens_k,
                max_seqlen_k=batch.max_kv_len,
                block_table=batch.block_table,
                return_attn_probs=True,
                **common,
            )
            return out, lse.transpose(0, 1)

        return of_vllm if self.of_vllm else third if self.generation == 3 else second

    def varlen(self, problem: Problem) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """Prepare `run(q, k, v, out)` on keys and values laid end to end: (out, lse [tokens, heads])."""
        batch, function = problem.batch, self.library.module.flash_attn_varlen_func
        arguments: dict[str, Any] = {
            "cu_seqlens_q": batch.cu_seqlens_q,
            "cu_seqlens_k": batch.cu_seqlens_k,
            "max_seqlen_q": batch.max_q_len,
            "max_seqlen_k": batch.max_kv_len,
            "softmax_scale": problem.softmax_scale,
            "causal": problem.causal,
        }
        if self.of_vllm:
            arguments |= {"return_softmax_lse": True, "fa_version": self.generation}
        else:
            arguments |= {"return_attn_probs": True}

        def run(q: Any, k: Any, v: Any, out: Any) -> Pair:
            given = {"out": out} if self.of_vllm else {}
            found, lse, *_ = function(q, k, v, **arguments, **given)
            return found, lse.transpose(0, 1)

        return run

    def schedule(
        self, problem: Problem, *, heads: int, kv_heads: int, head_dim: int, v_head_dim: int, num_splits: int = 0
    ) -> Any:
        """FA3's division of a batch among multiprocessors: the same for all layers of a step. None where the build has
        no such function: it then divides within each call.
        """
        if self.generation != 3 or not hasattr(self.library.module, "get_scheduler_metadata"):
            return None
        batch = problem.batch
        return self.library.module.get_scheduler_metadata(
            batch_size=batch.size,
            max_seqlen_q=batch.max_q_len,
            max_seqlen_k=batch.max_kv_len,
            num_heads_q=heads,
            num_heads_kv=kv_heads,
            headdim=head_dim,
            cache_seqlens=batch.seq_lens,
            qkv_dtype=problem.dtype,
            headdim_v=v_head_dim,
            cu_seqlens_q=batch.cu_seqlens_q,
            page_size=batch.page_size,
            causal=problem.causal,
            num_splits=num_splits,
        )


def find_flash(device: DeviceInfo, generation: int | None = None) -> FlashAttention | Unavailable:
    """FlashAttention of a generation, or of the latest that this GPU and what is installed allow: FA3 is for Hopper."""
    elsewhere = why_not(device, (9, 0), only=True)
    if generation == 3 and elsewhere:
        return Unavailable(f"FlashAttention-3 {elsewhere}")
    wanted = [generation] if generation else [2] if elsewhere else [3, 2]
    reasons = []
    for each in wanted:
        found = find(_CANDIDATES[each], _INSTALL[each])
        if isinstance(found, Library):
            return FlashAttention(each, found)
        reasons.append(found.reason)
    return Unavailable("; ".join(reasons))


def require_flash(problem: Problem, generation: int | None = None) -> FlashAttention:
    """`find_flash` on a problem's device.

    Raises:
        UnsupportedError: there is none.
    """
    from mlakit.hardware import device_info

    found = find_flash(device_info(problem.device), generation)
    if isinstance(found, Unavailable):
        raise UnsupportedError(found.reason)
    return found


def prefill_by_flash(problem: Any) -> Callable[..., Any]:
    """MLA's prefill pipeline by FlashAttention, for backends whose library has a decode kernel alone: what vLLM does
    for all of them.
    """
    flash = require_flash(problem)
    dims = (problem.dims.qk_head_dim, problem.dims.v_head_dim)
    if flash.generation == 2 and dims[0] != dims[1]:
        raise UnsupportedError(f"prefill: FlashAttention-2 takes equal head dims, got {dims[0]} and {dims[1]}")
    problem.kernel = f"{flash.label}, varlen"
    return flash.varlen(problem)
