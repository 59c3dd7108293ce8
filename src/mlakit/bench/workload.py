"""Random (never zero) tensors for one row: paged caches with shuffled pages and poisoned padding, one cache a layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mlakit.backends.pipeline import absorb_query, expand, gather
from mlakit.backends.problem import MLALayer, MLAProblem, Problem, Ragged, StandardLayer, StandardProblem
from mlakit.bench.batch_spec import BatchRequest
from mlakit.bench.config import BenchmarkConfig
from mlakit.dims import MLADims, StandardDims
from mlakit.testing import PageTable, random_page_table, random_pages

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Layer = MLALayer | StandardLayer
PartName = Literal["decode", "prefill", "all"]


@dataclass(frozen=True)
class Part:
    """The requests of one pipeline: a problem, and the tensors of each layer."""

    name: PartName  # "all" for standard attention
    problem: Problem
    layers: Sequence[Layer]


def split_requests(config: BenchmarkConfig, default_threshold: int) -> dict[PartName, list[BatchRequest]]:
    """Requests by pipeline, order kept; a pipeline without requests is left out. Standard attention has the one
    pipeline "all".
    """
    requests = config.requests()
    if config.attention == "standard":
        return {"all": requests}
    given = config.reorder_batch_threshold
    threshold = default_threshold if given == "auto" else given
    if config.pipeline == "decode":
        threshold = max(r.q_len for r in requests)
    elif config.pipeline == "prefill":
        threshold = 0
    parts: dict[PartName, list[BatchRequest]] = {
        "decode": [r for r in requests if r.q_len <= threshold],
        "prefill": [r for r in requests if r.q_len > threshold],
    }
    return {name: part for name, part in parts.items() if part}


def estimate_bytes(config: BenchmarkConfig, parts: dict[PartName, list[BatchRequest]]) -> int:
    """Memory the workload itself takes, of all layers, outputs and temporaries of a backend not counted."""
    size = DTYPES[config.dtype].itemsize
    dims = config.dims()
    total = 0
    for name, requests in parts.items():
        tokens = sum(r.q_len for r in requests)
        slots = sum(-(-r.kv_len // config.block_size) * config.block_size for r in requests)
        if isinstance(dims, StandardDims):
            total += slots * 2 * dims.num_kv_heads * dims.head_dim + tokens * dims.num_q_heads * dims.head_dim
            continue
        total += slots * dims.latent_dim + tokens * dims.num_heads * (dims.qk_head_dim + dims.latent_dim)
        if config.scope == "attention" and name == "prefill":
            keys = sum(r.kv_len for r in requests)
            total += keys * dims.num_heads * (dims.qk_head_dim + dims.v_head_dim)
    return total * size * config.num_layers


def build(config: BenchmarkConfig, parts: dict[PartName, list[BatchRequest]], device: torch.device) -> list[Part]:
    """Make the workload. The same config gives the same numbers on the same kind of device.

    Raises:
        torch.OutOfMemoryError, RuntimeError: it does not fit.
    """
    generator = torch.Generator(device=device).manual_seed(config.seed)
    dtype = DTYPES[config.dtype]
    dims = config.dims()
    weights = [_weights(dims, dtype, generator) for _ in range(config.num_layers)] if isinstance(dims, MLADims) else []
    built: list[Part] = []
    for name, requests in parts.items():
        batch, table = _ragged(requests, config.block_size, device, generator)
        common = (batch, dtype, device, dims.softmax_scale)
        if name == "all":
            assert isinstance(dims, StandardDims)
            standard = StandardProblem(*common, dims=dims)
            caches = [_standard_layer(standard, table, generator) for _ in range(config.num_layers)]
            built.append(Part(name, standard, caches))
        else:
            assert isinstance(dims, MLADims)
            mla = MLAProblem(*common, dims=dims, pipeline=name, scope=config.scope)
            built.append(Part(name, mla, [_mla_layer(mla, table, *w, generator) for w in weights]))
    return built


def _ragged(
    requests: Sequence[BatchRequest], page_size: int, device: torch.device, generator: torch.Generator
) -> tuple[Ragged, PageTable]:
    q_lens = tuple(r.q_len for r in requests)
    kv_lens = tuple(r.kv_len for r in requests)
    table = random_page_table(kv_lens, page_size=page_size, device=device, generator=generator)
    ragged = Ragged(
        q_lens=q_lens,
        kv_lens=kv_lens,
        page_size=page_size,
        seq_lens=table.seq_lens,
        cu_seqlens_q=_cumulative(q_lens, device),
        cu_seqlens_k=_cumulative(kv_lens, device),
        block_table=table.block_table,
        slots=table.slots,
    )
    return ragged, table


def _cumulative(lens: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lens], device=device).cumsum(0).to(torch.int32)


def _weights(dims: MLADims, dtype: torch.dtype, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    # 1/sqrt(kv_lora_rank) keeps expanded keys and values at unit variance, as a trained model's are about.
    shape_k = (dims.num_heads, dims.qk_nope_head_dim, dims.kv_lora_rank)
    shape_v = (dims.num_heads, dims.kv_lora_rank, dims.v_head_dim)
    scale = dims.kv_lora_rank**-0.5
    return _randn(shape_k, dtype, generator).mul_(scale), _randn(shape_v, dtype, generator).mul_(scale)


def _mla_layer(
    problem: MLAProblem, table: PageTable, w_uk: torch.Tensor, w_uv: torch.Tensor, generator: torch.Generator
) -> MLALayer:
    dims, batch = problem.dims, problem.batch
    q = _randn((batch.tokens, dims.num_heads, dims.qk_head_dim), problem.dtype, generator)
    cache = random_pages(table, (dims.latent_dim,), dtype=problem.dtype, generator=generator, loud=batch.q_lens)
    layer = MLALayer(q, absorb_query(q, w_uk, dims.qk_nope_head_dim), cache, w_uk, w_uv)
    if problem.scope == "attention" and problem.pipeline == "prefill":
        k, v = expand(gather(cache, batch.slots), layer)
        layer = MLALayer(q, layer.q_latent, cache, w_uk, w_uv, k, v)
    return layer


def _standard_layer(problem: StandardProblem, table: PageTable, generator: torch.Generator) -> StandardLayer:
    dims, batch = problem.dims, problem.batch
    q = _randn((batch.tokens, dims.num_q_heads, dims.head_dim), problem.dtype, generator)
    shape = (dims.num_kv_heads, dims.head_dim)
    k = random_pages(table, shape, dtype=problem.dtype, generator=generator, loud=batch.q_lens)
    v = random_pages(table, shape, dtype=problem.dtype, generator=generator)
    return StandardLayer(q, k, v)


def _randn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)
