"""mlakit's own kernels: `mlakit` is the fastest for the GPU at hand, `mlakit_triton` the portable ones, both for MLA;
`triton` is for standard attention.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Available, Backend, Parameter, Unavailable
from mlakit.backends.peers import half_only, why_not

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlakit.backends.base import Output
    from mlakit.backends.problem import MLAProblem, Problem, StandardProblem
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
        if device.capability is None and os.environ.get("TRITON_INTERPRET") == "1":
            return Available(f"triton {found}, interpreted")
        if reason := why_not(device, (8, 0)):
            return Unavailable(reason)
        return Available(f"triton {found}")

    def refusal(self, problem: Problem) -> str | None:
        """The kernels take half precision only."""
        return half_only(problem)


class MlakitTriton(_OwnKernels):
    """`mla_decode` and `mla_prefill` with impl="triton"."""

    name = "mlakit_triton"
    summary = "mlakit's portable Triton kernels"
    attention = frozenset({"mla"})
    decode_mode = "mqa"
    prefill_mode = "mha"
    impl: str | None = "triton"
    extra_parameters = (
        Parameter("num_splits", int, "pieces that a request's keys are cut into in decode", minimum=1, maximum=256),
    )

    def prepare_mqa(
        self, problem: MLAProblem, num_splits: int | None = None, **parameters: Any
    ) -> Callable[..., Output]:
        """Requests with equally many new tokens that follow one another are one call."""
        from mlakit.decode import mla_decode
        from mlakit.dispatch import which_impl

        batch, dims = problem.batch, problem.dims
        options: dict[str, Any] = {
            "softmax_scale": problem.softmax_scale,
            "causal": problem.causal,
            "kv_lora_rank": dims.kv_lora_rank,
            "num_splits": num_splits,
            "impl": self.impl,
        }

        def run(q: Any, cache: Any, out: Any) -> Output:
            lses, chosen = [], []
            for part in batch.runs:
                shape = (part.size, part.q_len, dims.num_heads)
                given = (
                    q[part.rows].view(*shape, dims.latent_dim),
                    cache,
                    batch.block_table[part.requests],
                    batch.seq_lens[part.requests],
                )
                into = out[part.rows].view(*shape, dims.kv_lora_rank)
                if problem.kernel is None:
                    chosen.append(which_impl(mla_decode, *given, out=into, **options))
                _, lse = mla_decode(*given, out=into, **options)
                lses.append(lse.view(-1, dims.num_heads))
            if problem.kernel is None:
                problem.kernel = f"mla_decode, {' + '.join(dict.fromkeys(chosen))}"
            return out, lses[0] if len(lses) == 1 else _concatenate(lses)

        return run

    def prepare_mha(
        self, problem: MLAProblem, num_splits: int | None = None, **parameters: Any
    ) -> Callable[..., Output]:
        """One call for all requests."""
        return _prefill(problem, self.impl)


class Mlakit(MlakitTriton):
    """`mla_decode` and `mla_prefill` without a named implementation: the Hopper kernels on Hopper."""

    name = "mlakit"
    summary = "mlakit's fastest kernels for this GPU"
    impl = None


class TritonStandard(_OwnKernels):
    """`paged_attention`: pages are read where they lie."""

    name = "triton"
    summary = "mlakit's portable Triton kernels for standard attention; one call for all requests"
    attention = frozenset({"standard"})
    extra_parameters = (
        Parameter(
            "num_splits", int, "pieces that the keys of a request of few tokens are cut into", minimum=1, maximum=256
        ),
    )

    def refusal(self, problem: Problem) -> str | None:
        """Half precision, and head dims up to 256."""
        from mlakit.backends.problem import StandardProblem

        if reason := super().refusal(problem):
            return reason
        if isinstance(problem, StandardProblem) and problem.dims.head_dim > 256:
            return f"takes head dims up to 256, got {problem.dims.head_dim}"
        return None

    def prepare_standard(
        self, problem: StandardProblem, num_splits: int | None = None, **parameters: Any
    ) -> Callable[..., Output]:
        """One call for all requests."""
        from mlakit.paged import paged_attention

        batch = problem.batch
        tables = (batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
        options: dict[str, Any] = {
            "softmax_scale": problem.softmax_scale,
            "causal": problem.causal,
            "max_seqlen_q": batch.max_q_len,
            "num_splits": num_splits,
            "impl": "triton",
        }
        problem.kernel = "paged_attention, triton"
        return lambda q, k_cache, v_cache, out: paged_attention(q, k_cache, v_cache, *tables, out=out, **options)


def _prefill(problem: Problem, impl: str | None) -> Callable[..., Output]:
    from mlakit.dispatch import which_impl
    from mlakit.prefill import mla_prefill

    batch = problem.batch
    options: dict[str, Any] = {
        "softmax_scale": problem.softmax_scale,
        "causal": problem.causal,
        "max_seqlen_q": batch.max_q_len,
        "impl": impl,
    }

    def run(q: Any, k: Any, v: Any, out: Any) -> Output:
        given = (q, k, v, batch.cu_seqlens_q, batch.cu_seqlens_k)
        if problem.kernel is None:
            problem.kernel = f"mla_prefill, {which_impl(mla_prefill, *given, out=out, **options)}"
        return mla_prefill(*given, out=out, **options)

    return run


def _concatenate(tensors: list[Any]) -> Any:
    import torch

    return torch.cat(tensors)
