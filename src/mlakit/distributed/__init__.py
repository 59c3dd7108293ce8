"""Beyond one GPU: sweeps over a cluster, and attention whose heads or keys are spread over ranks.

Names are imported when they are first used: what plans a sweep needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> the module that holds it.
_PUBLIC = {
    "ParallelMLA": "mlakit.distributed.layer",
    "ShardedLatentCache": "mlakit.distributed.cache",
    "context_parallel_decode": "mlakit.distributed.context",
    "local_lengths": "mlakit.distributed.context",
    "process_group": "mlakit.distributed.group",
}

__all__ = list(_PUBLIC)

if TYPE_CHECKING:
    from mlakit.distributed.cache import ShardedLatentCache as ShardedLatentCache
    from mlakit.distributed.context import context_parallel_decode as context_parallel_decode
    from mlakit.distributed.context import local_lengths as local_lengths
    from mlakit.distributed.group import process_group as process_group
    from mlakit.distributed.layer import ParallelMLA as ParallelMLA


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mlakit.distributed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
