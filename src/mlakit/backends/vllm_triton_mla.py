"""vLLM's Triton decode for MLA.

Signature: vLLM 0.20.2, v1/attention/ops/triton_decode_attention.py.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Parameter
from mlakit.backends.flash_attention import prefill_by_flash
from mlakit.backends.peers import (
    Candidate,
    Library,
    Peer,
    find,
    half_only,
    in_decode,
    latent_only,
    one_token_only,
    without,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlakit.backends.base import Output, Unavailable
    from mlakit.backends.problem import MLAProblem, Problem

_WANTED = without("decode_attention_fwd")
_ELEMENTS = 2**31  # as many as its offsets can number
_KEYS_PER_SPLIT = 512  # vLLM 0.20's own rule for the number of splits: a power of two, two waves at most


class VLLMTritonMLA(Peer):
    """Takes one new token a request; vLLM sends longer ones through prefill."""

    name = "vllm_triton_mla"
    summary = "vLLM's Triton decode"
    hardware = "NVIDIA from Ampere on"
    attention = frozenset({"mla"})
    default_reorder_batch_threshold = 1
    extra_parameters = (
        Parameter("num_kv_splits", int, "pieces that a request's keys are cut into", minimum=1, maximum=512),
    )

    def library(self) -> Library | Unavailable:
        """vLLM, in either of the places where it has kept the module."""
        return find(
            (
                Candidate("vllm.v1.attention.ops.triton_decode_attention", "vllm", _WANTED),
                Candidate("vllm.attention.ops.triton_decode_attention", "vllm", _WANTED),
            ),
            "vLLM: pip install vllm",
        )

    def refusal(self, problem: Problem) -> str | None:
        """In decode DeepSeek's latent, and one token a request."""
        if reason := half_only(problem):
            return reason
        return (one_token_only(problem) or latent_only(problem)) if in_decode(problem) else None

    def known_limit(self, problem: Problem) -> str | None:
        """Its offsets have 32 bits."""
        if not in_decode(problem):
            return None
        slots = sum(problem.batch.page_counts) * problem.batch.page_size
        elements = slots * problem.dims.latent_dim
        if elements <= _ELEMENTS:
            return None
        return (
            f"the cache has {elements} elements, and vLLM's kernel numbers them with 32 bits: beyond 2**31 it reads "
            "addresses that are not its own"
        )

    def prepare_mqa(
        self, problem: MLAProblem, num_kv_splits: int | None = None, **parameters: Any
    ) -> Callable[..., Output]:
        """Scales and partial results are made once: made in each call, two scales cost 60 us (measured on an H200)."""
        import torch

        library = self.require()
        batch, dims = problem.batch, problem.dims
        decode = library.module.decode_attention_fwd
        splits = num_kv_splits or _splits(problem)
        problem.kernel = f"{library.label}, Triton decode, {splits} splits"
        float32: dict[str, Any] = {"dtype": torch.float32, "device": problem.device}
        partial = torch.empty((batch.size, dims.num_heads, splits, dims.kv_lora_rank + 1), **float32)
        lse = torch.empty((batch.size, dims.num_heads), **float32)
        one = torch.ones((), **float32)
        known = inspect.signature(decode).parameters
        options = {k: v for k, v in {"k_scale": one, "v_scale": one, "is_mla": True}.items() if k in known}

        def run(q: Any, cache: Any, out: Any) -> Output:
            keys = cache[:, :, None]
            decode(
                q,
                keys,
                keys[..., : dims.kv_lora_rank],
                out,
                lse,
                batch.block_table,
                batch.seq_lens,
                partial,
                splits,
                problem.softmax_scale,
                batch.page_size,
                **options,
            )
            return out, lse

        return run

    def prepare_mha(self, problem: MLAProblem, **parameters: Any) -> Callable[..., Output]:
        """As vLLM: by FlashAttention."""
        return prefill_by_flash(problem)


def _splits(problem: MLAProblem) -> int:
    from mlakit.hardware import device_info

    wanted = max(1, problem.batch.max_kv_len // _KEYS_PER_SPLIT)
    return min(1 << (wanted - 1).bit_length(), 2 * device_info(problem.device).units)
