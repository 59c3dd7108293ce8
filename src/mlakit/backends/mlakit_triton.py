"""mlakit's own portable kernels: `mlakit_triton` for MLA, `triton` for standard attention."""

from __future__ import annotations

import os
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Available, Backend, Parameter, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlakit.backends.base import Output
    from mlakit.backends.problem import MLAProblem, Problem, Ragged, StandardProblem
    from mlakit.hardware import DeviceInfo


class _OwnKernels(Backend):
    hardware = "NVIDIA from Ampere on"

    def availability(self, device: DeviceInfo) -> Available | Unavailable:
        """Triton, and a GPU that its kernels are compiled for."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("triton")
        except PackageNotFoundError:
            return Unavailable("needs Triton: pip install triton")
        if device.capability is None:
            if os.environ.get("TRITON_INTERPRET") == "1":
                return Available(f"triton {found}, interpreted")
            return Unavailable("needs an NVIDIA GPU of compute capability 8.0 or later, this is a CPU")
        if device.capability < (8, 0):
            has = ".".join(map(str, device.capability))
            return Unavailable(f"needs compute capability 8.0 or later, this GPU has {has}")
        return Available(f"triton {found}")

    def refusal(self, problem: Problem) -> str | None:
        """The kernels take half precision only."""
        import torch

        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"takes bf16 and fp16, got {str(problem.dtype).removeprefix('torch.')}"
        return None


class MlakitTriton(_OwnKernels):
    """`mla_decode` and `mla_prefill` with impl="triton"."""

    name = "mlakit_triton"
    summary = "mlakit's portable Triton kernels"
    attention = frozenset({"mla"})
    decode_mode = "mqa"
    prefill_mode = "mha"
    extra_parameters = (
        Parameter("num_splits", int, "pieces that a request's keys are cut into in decode", minimum=1, maximum=256),
    )

    def prepare_mqa(
        self, problem: MLAProblem, num_splits: int | None = None, **parameters: Any
    ) -> Callable[..., Output]:
        """Requests with equally many new tokens that follow one another are one call."""
        from mlakit.decode import mla_decode

        batch, dims = problem.batch, problem.dims
        runs = _runs(batch)

        def run(q: Any, cache: Any, out: Any) -> Output:
            lses = []
            for rows, requests, q_len in runs:
                shape = (requests.stop - requests.start, q_len, dims.num_heads)
                _, lse = mla_decode(
                    q[rows].view(*shape, dims.latent_dim),
                    cache,
                    batch.block_table[requests],
                    batch.seq_lens[requests],
                    softmax_scale=problem.softmax_scale,
                    causal=problem.causal,
                    kv_lora_rank=dims.kv_lora_rank,
                    num_splits=num_splits,
                    out=out[rows].view(*shape, dims.kv_lora_rank),
                    impl="triton",
                )
                lses.append(lse.view(-1, dims.num_heads))
            return out, lses[0] if len(lses) == 1 else _concatenate(lses)

        return run

    def prepare_mha(
        self, problem: MLAProblem, num_splits: int | None = None, **parameters: Any
    ) -> Callable[..., Output]:
        """One call for all requests."""
        return _prefill(problem)


class TritonStandard(_OwnKernels):
    """`mla_prefill` with grouped KV heads; keys and values are gathered from their pages first."""

    name = "triton"
    summary = "mlakit's portable Triton kernel for standard attention"
    attention = frozenset({"standard"})

    def prepare_standard(self, problem: StandardProblem, **parameters: Any) -> Callable[..., Output]:
        """Gather, then one call for all requests."""
        from mlakit.backends.pipeline import gather

        attend, slots = _prefill(problem), problem.batch.slots
        return lambda q, k_cache, v_cache, out: attend(q, gather(k_cache, slots), gather(v_cache, slots), out)


def _prefill(problem: Problem) -> Callable[..., Output]:
    from mlakit.prefill import mla_prefill

    batch = problem.batch

    def run(q: Any, k: Any, v: Any, out: Any) -> Output:
        return mla_prefill(
            q,
            k,
            v,
            batch.cu_seqlens_q,
            batch.cu_seqlens_k,
            softmax_scale=problem.softmax_scale,
            causal=problem.causal,
            max_seqlen_q=batch.max_q_len,
            out=out,
            impl="triton",
        )

    return run


def _runs(batch: Ragged) -> list[tuple[slice, slice, int]]:
    """Neighbouring requests of one q_len: their query rows, their indices, the q_len."""
    runs, row, request = [], 0, 0
    for q_len, members in groupby(batch.q_lens):
        count = len(list(members))
        runs.append((slice(row, row + count * q_len), slice(request, request + count), q_len))
        row, request = row + count * q_len, request + count
    return runs


def _concatenate(tensors: list[Any]) -> Any:
    import torch

    return torch.cat(tensors)
