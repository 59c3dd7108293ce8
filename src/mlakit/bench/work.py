"""The least work a batch asks for: floating-point operations and bytes, counted from its definition. No torch here.

A row's limit must not depend on the backend, so a job that MLA can do in two modes counts as the cheaper one. Causal
scores that nobody needs are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlakit.bench.batch_spec import BatchRequest
from mlakit.dims import MLADims, StandardDims


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes that must be done and moved at least."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def visible_pairs(requests: Sequence[BatchRequest]) -> int:
    """Pairs of a query token and a key that it sees, causally."""
    return sum(r.q_len * r.context_len + r.q_len * (r.q_len + 1) // 2 for r in requests)


def standard_work(requests: Sequence[BatchRequest], dims: StandardDims, element_size: int) -> Work:
    """Read q and each key and value once, write out; two products over the visible pairs."""
    tokens, keys = sum(r.q_len for r in requests), sum(r.kv_len for r in requests)
    flops = 2 * visible_pairs(requests) * dims.num_q_heads * 2 * dims.head_dim
    elements = 2 * tokens * dims.num_q_heads * dims.head_dim + 2 * keys * dims.num_kv_heads * dims.head_dim
    return Work(flops, elements * element_size)


def mla_candidates(
    requests: Sequence[BatchRequest],
    dims: MLADims,
    element_size: int,
    pipeline: Literal["decode", "prefill"],
    scope: Literal["attention", "pipeline"],
) -> dict[str, Work]:
    """The work of one pipeline's requests in either mode: {"mqa": ..., "mha": ...}; see `backends.problem.MLAProblem`
    for the scopes.
    """
    tokens, keys, pairs = sum(r.q_len for r in requests), sum(r.kv_len for r in requests), visible_pairs(requests)
    heads, rank, nope, value = dims.num_heads, dims.kv_lora_rank, dims.qk_nope_head_dim, dims.v_head_dim
    cache = keys * dims.latent_dim
    weights = heads * (nope + value) * rank

    mqa_flops = 2 * pairs * heads * (dims.latent_dim + rank)
    mha_flops = 2 * pairs * heads * (dims.qk_head_dim + value)
    plain_in_out = tokens * heads * (dims.qk_head_dim + value)
    if scope == "pipeline":
        # Both modes start and end at the plain sizes; what a fused kernel need not write is not counted.
        mqa = Work(mqa_flops + 2 * tokens * weights, plain_in_out + cache + weights)
        mha = Work(mha_flops + 2 * keys * weights, plain_in_out + cache + weights)
    else:
        mqa = Work(mqa_flops, tokens * heads * (dims.latent_dim + rank) + cache)
        if pipeline == "prefill":
            mha = Work(mha_flops, plain_in_out + keys * heads * (dims.qk_head_dim + value))
        else:
            mha = Work(mha_flops + 2 * keys * weights, plain_in_out + cache + weights)
    return {name: Work(work.flops, work.bytes * element_size) for name, work in (("mqa", mqa), ("mha", mha))}
