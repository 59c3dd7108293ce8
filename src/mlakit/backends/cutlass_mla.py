"""CUTLASS's MLA decode for Blackwell, as vLLM and FlashInfer build it.

Signatures: vLLM 0.20.2 _custom_ops.sm100_cutlass_mla_decode and sm100_cutlass_mla_get_workspace_size; FlashInfer 0.6.8
flashinfer.mla.BatchMLAPagedAttentionWrapper(backend="cutlass").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Parameter, UnsupportedError
from mlakit.backends.flash_attention import prefill_by_flash
from mlakit.backends.flashinfer_common import workspace
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

_HEADS = 128  # rows of the kernel's tile: fewer heads are padded up to it
_BLOCK = 128  # keys of the kernel's tile: a request's pages must fill whole ones
_FLASHINFER_SCALE = (128 + 64) ** -0.5  # FlashInfer's build has DeepSeek's scale written into it


def _vllm_lacks(module: Any) -> str | None:
    import torch

    if reason := without("sm100_cutlass_mla_decode", "sm100_cutlass_mla_get_workspace_size")(module):
        return reason
    return None if hasattr(torch.ops._C, "sm100_cutlass_mla_decode") else "built without CUTLASS MLA"


class CutlassMLA(Peer):
    """Takes one new token a request, and up to 128 heads."""

    name = "cutlass_mla"
    summary = "CUTLASS's MLA decode, as vLLM or FlashInfer builds it"
    hardware = "NVIDIA Blackwell (compute capability 10)"
    attention = frozenset({"mla"})
    capability = (10, 0)
    only_this_generation = True
    default_reorder_batch_threshold = 1
    extra_parameters = (
        Parameter("num_kv_splits", int, "pieces that a request's keys are cut into (vLLM's)", minimum=1, maximum=16),
    )

    def library(self) -> Library | Unavailable:
        """vLLM's, whose splits can be chosen, before FlashInfer's."""
        return find(
            (
                Candidate("vllm._custom_ops", "vllm", _vllm_lacks),
                Candidate("flashinfer.mla", "flashinfer-python", without("BatchMLAPagedAttentionWrapper")),
            ),
            "CUTLASS MLA: pip install vllm, or flashinfer-python",
        )

    def refusal(self, problem: Problem) -> str | None:
        """In decode DeepSeek's latent, one token a request, up to 128 heads and pages of up to 128."""
        if reason := half_only(problem):
            return reason
        if not in_decode(problem):
            return None
        if problem.dims.num_heads > _HEADS:
            return f"takes up to {_HEADS} heads, got {problem.dims.num_heads}"
        if _BLOCK % problem.batch.page_size:
            return f"takes pages of {_BLOCK} tokens or a divisor of that, got {problem.batch.page_size}"
        return one_token_only(problem) or latent_only(problem)

    def prepare_mqa(
        self, problem: MLAProblem, num_kv_splits: int | None = None, **parameters: Any
    ) -> Callable[..., Output]:
        """Fewer than 128 heads are padded in each call, as a caller of the kernel must."""
        library = self.require()
        table = _whole_blocks(problem)
        if hasattr(library.module, "sm100_cutlass_mla_decode"):
            problem.kernel = f"{library.label}, sm100_cutlass_mla_decode"
            return _prepare_vllm(library.module, problem, table, -1 if num_kv_splits is None else num_kv_splits)
        if num_kv_splits is not None:
            raise UnsupportedError("num_kv_splits is a parameter of vLLM's build, and what is here is FlashInfer's")
        if abs(problem.softmax_scale / _FLASHINFER_SCALE - 1) > 1e-6:
            raise UnsupportedError(f"FlashInfer's build has a fixed scale of 1/sqrt(192), got {problem.softmax_scale}")
        problem.kernel = f"{library.label}, cutlass"
        return _prepare_flashinfer(library.module, problem, table)

    def prepare_mha(self, problem: MLAProblem, **parameters: Any) -> Callable[..., Output]:
        """As vLLM: by FlashAttention."""
        return prefill_by_flash(problem)


def _whole_blocks(problem: MLAProblem) -> Any:
    """The block table, with as many columns as fill whole tiles of keys."""
    import torch

    table = problem.batch.block_table
    pages = _BLOCK // problem.batch.page_size
    return torch.nn.functional.pad(table, (0, -table.shape[1] % pages))


def _pad_heads(x: Any) -> Any:
    import torch

    missing = _HEADS - x.shape[1]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _prepare_vllm(ops: Any, problem: MLAProblem, table: Any, splits: int) -> Callable[..., Output]:
    import torch

    from mlakit.hardware import device_info

    batch, dims = problem.batch, problem.dims
    rank, heads = dims.kv_lora_rank, dims.num_heads
    size = ops.sm100_cutlass_mla_get_workspace_size(
        table.shape[1] * batch.page_size, batch.size, device_info(problem.device).units, num_kv_splits=splits
    )
    scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=problem.device)
    padded = None if heads == _HEADS else problem.buffer("padded", batch.size, _HEADS, rank)
    lse = torch.empty((batch.size, _HEADS), dtype=torch.float32, device=problem.device)

    def run(q: Any, cache: Any, out: Any) -> Output:
        q = _pad_heads(q)
        into = out if padded is None else padded
        ops.sm100_cutlass_mla_decode(
            into,
            lse,
            q[..., :rank],
            q[..., rank:],
            cache,
            batch.seq_lens,
            table,
            scratch,
            problem.softmax_scale,
            splits,
        )
        return into[:, :heads], lse[:, :heads]

    return run


def _prepare_flashinfer(mla: Any, problem: MLAProblem, table: Any) -> Callable[..., Output]:
    rank, heads = problem.dims.kv_lora_rank, problem.dims.num_heads
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace(problem), backend="cutlass")

    def run(q: Any, cache: Any, out: Any) -> Output:
        q = _pad_heads(q)
        into = {"out": out} if heads == _HEADS else {}
        found = wrapper.run(
            q[..., :rank],
            q[..., rank:],
            cache[..., :rank],
            cache[..., rank:],
            kv_len=problem.batch.seq_lens,
            page_table=table,
            **into,
        )
        return found[:, :heads]

    return run
