"""FlashMLA's dense decode, the authors' build or vLLM's.

Signatures: flash_mla/flash_mla_interface.py of April 2026, which vLLM 0.20.2 ships; and the one before, whose metadata
are tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Parameter
from mlakit.backends.flash_attention import prefill_by_flash
from mlakit.backends.peers import Candidate, Library, Peer, find, half_only, in_decode, latent_only, without

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlakit.backends.base import Output, Unavailable
    from mlakit.backends.problem import MLAProblem, Problem, Run

_PAGE = 64
_WANTED = without("get_mla_metadata", "flash_mla_with_kvcache")


class FlashMLA(Peer):
    """Requests with equally many new tokens that follow one another are one call."""

    name = "flashmla"
    summary = "FlashMLA's dense decode; metadata made once a batch, as for all layers of a step"
    hardware = "NVIDIA Hopper"
    attention = frozenset({"mla"})
    capability = (9, 0)
    only_this_generation = True
    extra_parameters = (
        Parameter(
            "metadata",
            str,
            "decode's metadata: once a batch (default) or in each call",
            choices=("batch", "call"),
            tunes=False,
        ),
    )

    def library(self) -> Library | Unavailable:
        """`flash_mla`, else vLLM's."""
        return find(
            (
                Candidate("flash_mla", "flash_mla", _WANTED),
                Candidate("vllm.third_party.flashmla.flash_mla_interface", "vllm", _WANTED),
            ),
            "FlashMLA: pip install vllm, or build it from github.com/deepseek-ai/FlashMLA",
        )

    def refusal(self, problem: Problem) -> str | None:
        """In decode DeepSeek's latent in half precision, and pages of 64."""
        if reason := half_only(problem):
            return reason
        if not in_decode(problem):
            return None
        if problem.batch.page_size != _PAGE:
            return f"takes pages of {_PAGE} tokens, got {problem.batch.page_size}"
        return latent_only(problem)

    def prepare_mqa(self, problem: MLAProblem, metadata: str = "batch", **parameters: Any) -> Callable[..., Output]:
        """With metadata "call" each call makes its own, which costs another 30 us (measured on an H200).

        Outputs are the library's own: its `out` has another shape for several new tokens than its documentation says.
        """
        library = self.require()
        flash_mla = library.module
        batch, dims = problem.batch, problem.dims
        made = "once a batch" if metadata == "batch" else "in each call"
        problem.kernel = f"{library.label}, dense decode; metadata made {made}"

        def plan(run: Run) -> tuple[Any, Any]:
            # The arguments are for builds whose metadata are tensors; later ones ignore them.
            found: tuple[Any, Any] = flash_mla.get_mla_metadata(
                batch.seq_lens[run.requests], run.q_len * dims.num_heads, 1
            )
            return found

        plans = [(run, plan(run)) for run in batch.runs]

        def attend(q: Any, cache: Any, out: Any) -> Output:
            for run, made_before in plans:
                schedule, splits = made_before if metadata == "batch" else plan(run)
                found, lse = flash_mla.flash_mla_with_kvcache(
                    q[run.rows].view(run.size, run.q_len, dims.num_heads, dims.latent_dim),
                    cache[:, :, None],
                    batch.block_table[run.requests],
                    batch.seq_lens[run.requests],
                    dims.kv_lora_rank,
                    schedule,
                    splits,
                    softmax_scale=problem.softmax_scale,
                    causal=problem.causal,
                )
                found = found.flatten(0, 1)
                if len(plans) == 1:
                    # Its lse is [requests, heads, q_len]: handed on only where that takes no copy, which would count
                    # as FlashMLA's time.
                    return (found, lse[:, :, 0]) if run.q_len == 1 else found
                out[run.rows] = found
            return out

        return attend

    def prepare_mha(self, problem: MLAProblem, **parameters: Any) -> Callable[..., Output]:
        """FlashMLA has no dense prefill for Hopper."""
        return prefill_by_flash(problem)
