"""mlakit: Multi-head Latent Attention as exact kernels, a layer, and a benchmark one can believe.

Names are imported when they are first used: `import mlakit` loads neither torch nor triton and touches no GPU.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that holds it.
_PUBLIC = {
    "BatchRequest": "mlakit.bench.batch_spec",
    "BenchmarkConfig": "mlakit.bench.config",
    "BenchmarkResult": "mlakit.bench.results",
    "MLADims": "mlakit.dims",
    "ResultsFormatter": "mlakit.bench.formatter",
    "StandardDims": "mlakit.dims",
    "act_quant": "mlakit.quant",
    "append_latent": "mlakit.cache",
    "apply_rope": "mlakit.rope",
    "concat_k": "mlakit.concat",
    "format_batch_spec": "mlakit.bench.batch_spec",
    "fp8_gemm": "mlakit.quant",
    "gather_latent": "mlakit.cache",
    "get_batch_stats": "mlakit.bench.batch_spec",
    "get_batch_type": "mlakit.bench.batch_spec",
    "indexer_logits": "mlakit.indexer",
    "indexer_logits_paged": "mlakit.indexer",
    "merge_states": "mlakit.merge",
    "mla_decode": "mlakit.decode",
    "mla_prefill": "mlakit.prefill",
    "mla_sparse_decode": "mlakit.sparse",
    "mla_sparse_prefill": "mlakit.sparse",
    "paged_attention": "mlakit.paged",
    "parse_batch_spec": "mlakit.bench.batch_spec",
    "run_mla_benchmark": "mlakit.bench.runner",
    "select_topk": "mlakit.indexer",
    "weight_dequant": "mlakit.quant",
    "which_impl": "mlakit.dispatch",
}

__all__ = [*sorted(_PUBLIC), "__version__"]

if TYPE_CHECKING:
    from mlakit.bench.batch_spec import BatchRequest as BatchRequest
    from mlakit.bench.batch_spec import format_batch_spec as format_batch_spec
    from mlakit.bench.batch_spec import get_batch_stats as get_batch_stats
    from mlakit.bench.batch_spec import get_batch_type as get_batch_type
    from mlakit.bench.batch_spec import parse_batch_spec as parse_batch_spec
    from mlakit.bench.config import BenchmarkConfig as BenchmarkConfig
    from mlakit.bench.formatter import ResultsFormatter as ResultsFormatter
    from mlakit.bench.results import BenchmarkResult as BenchmarkResult
    from mlakit.bench.runner import run_mla_benchmark as run_mla_benchmark
    from mlakit.cache import append_latent as append_latent
    from mlakit.cache import gather_latent as gather_latent
    from mlakit.concat import concat_k as concat_k
    from mlakit.decode import mla_decode as mla_decode
    from mlakit.dims import MLADims as MLADims
    from mlakit.dims import StandardDims as StandardDims
    from mlakit.dispatch import which_impl as which_impl
    from mlakit.indexer import indexer_logits as indexer_logits
    from mlakit.indexer import indexer_logits_paged as indexer_logits_paged
    from mlakit.indexer import select_topk as select_topk
    from mlakit.merge import merge_states as merge_states
    from mlakit.paged import paged_attention as paged_attention
    from mlakit.prefill import mla_prefill as mla_prefill
    from mlakit.quant import act_quant as act_quant
    from mlakit.quant import fp8_gemm as fp8_gemm
    from mlakit.quant import weight_dequant as weight_dequant
    from mlakit.rope import apply_rope as apply_rope
    from mlakit.sparse import mla_sparse_decode as mla_sparse_decode
    from mlakit.sparse import mla_sparse_prefill as mla_sparse_prefill


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mlakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
