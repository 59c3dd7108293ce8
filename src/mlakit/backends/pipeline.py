"""From a backend and a problem to a callable: which mode runs, and the projections around it."""

from collections.abc import Callable
from typing import Any

import torch

from mlakit.backends.base import Backend
from mlakit.backends.problem import MLALayer, MLAProblem, Problem, StandardLayer, StandardProblem

Result = tuple[torch.Tensor, torch.Tensor | None]


def prepare(backend: Backend, problem: Problem, parameters: dict[str, Any]) -> Callable[[Any], Result]:
    """A callable that takes a layer and returns (out, lse or None); `parameters` holds the backend's own, without
    "auto".

    A log-sum-exp is handed on only where the backend starts from what the check starts from: a query or keys that were
    projected here are rounded, and shift it by more than the 1e-3 it is allowed (0.004 in bf16).
    """
    if isinstance(problem, StandardProblem):
        attend = backend.prepare_standard(problem, **parameters)

        def run_standard(layer: StandardLayer) -> Result:
            return _pair(attend(layer.q, layer.k_cache, layer.v_cache, problem.out))

        return run_standard
    if not isinstance(problem, MLAProblem):
        raise TypeError(f"expected an MLAProblem or a StandardProblem, got {type(problem).__name__}")
    if backend.mode(problem.pipeline) == "mqa":
        return _prepare_mqa(backend, problem, parameters)
    return _prepare_mha(backend, problem, parameters)


def _prepare_mqa(backend: Backend, problem: MLAProblem, parameters: dict[str, Any]) -> Callable[[MLALayer], Result]:
    attend = backend.prepare_mqa(problem, **parameters)
    dims = problem.dims
    if problem.scope == "attention":
        return lambda layer: _pair(attend(layer.q_latent, layer.cache, problem.out_latent))

    def run(layer: MLALayer) -> Result:
        latent, _ = _pair(
            attend(absorb_query(layer.q, layer.w_uk, dims.qk_nope_head_dim), layer.cache, problem.out_latent)
        )
        return torch.matmul(latent.transpose(0, 1), layer.w_uv).transpose(0, 1), None

    return run


def _prepare_mha(backend: Backend, problem: MLAProblem, parameters: dict[str, Any]) -> Callable[[MLALayer], Result]:
    attend = backend.prepare_mha(problem, **parameters)
    if problem.scope == "attention" and problem.pipeline == "prefill":
        return lambda layer: _pair(attend(layer.q, layer.k, layer.v, problem.out))

    def run(layer: MLALayer) -> Result:
        k, v = expand(gather(layer.cache, problem.batch.slots), layer)
        return _pair(attend(layer.q, k, v, problem.out))[0], None

    return run


def _pair(output: Any) -> Result:
    return output if isinstance(output, tuple) else (output, None)


def gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Tokens [n, ...] of a paged cache [pages, page_size, ...] at flat slots [n]."""
    return cache.flatten(0, 1).index_select(0, slots)


def absorb_query(q: torch.Tensor, w_uk: torch.Tensor, qk_nope_head_dim: int) -> torch.Tensor:
    """The query [tokens, heads, qk_head_dim] in the latent space: [tokens, heads, latent_dim]."""
    nope, rope = q[..., :qk_nope_head_dim], q[..., qk_nope_head_dim:]
    return torch.cat([torch.matmul(nope.transpose(0, 1), w_uk).transpose(0, 1), rope], dim=-1)


def expand(latent: torch.Tensor, layer: MLALayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [n, heads, qk_head_dim] and values [n, heads, v_head_dim] of cached tokens [n, latent_dim], by the real
    up-projection.
    """
    heads, nope, rank = layer.w_uk.shape
    compressed, rope = latent[:, :rank], latent[:, rank:]
    k = latent.new_empty((latent.shape[0], heads, nope + rope.shape[-1]))
    k[..., :nope] = (compressed @ layer.w_uk.reshape(heads * nope, rank).T).view(-1, heads, nope)
    k[..., nope:] = rope[:, None]
    v_width = layer.w_uv.shape[-1]
    v = (compressed @ layer.w_uv.transpose(0, 1).reshape(rank, heads * v_width)).view(-1, heads, v_width)
    return k, v
