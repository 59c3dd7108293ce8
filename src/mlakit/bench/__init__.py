"""The bench: any attention backend on any batch, checked before it is timed, against the device's own limit.

spec → workload → check → time → record → show. Names are imported when first used, so that parsing a spec needs no
torch.
"""

import importlib
from typing import Any

_PUBLIC = {
    "BatchRequest": "batch_spec",
    "format_batch_spec": "batch_spec",
    "get_batch_stats": "batch_spec",
    "get_batch_type": "batch_spec",
    "parse_batch_spec": "batch_spec",
    "split_by_type": "batch_spec",
    "to_batch_spec": "batch_spec",
    "BenchmarkConfig": "config",
    "BenchmarkResult": "results",
    "Record": "results",
    "ResultsFormatter": "formatter",
    "run_mla_benchmark": "runner",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"mlakit.bench.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'mlakit.bench' has no attribute {name!r}")
