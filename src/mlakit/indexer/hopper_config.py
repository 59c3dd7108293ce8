"""What the Hopper kernels of the indexer can run, and how they are launched. No Triton is imported here."""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch

from mlakit.hardware import capability

TILE = 64  # keys of a tile
DIM = 128  # bytes of a key: a row that the swizzle of shared memory takes whole
_COLUMNS = 128  # of a product: queries times heads
RESIDENT = 4  # warpgroups of logits that share a multiprocessor
# A selection's bitmap of a row, and the ranks of its words, lie where its candidates and bins were.
MOST_COLUMNS = 163840
MOST_K = 2048


@dataclass(frozen=True)
class HopperLogitsConfig:
    """An item is `queries` queries of a request and `split` keys, a multiple of 64; a warpgroup has room for `stages`
    tiles of keys, a power of two. The four of a multiprocessor are programs of their own, or, `shared`, one program.
    """

    queries: int
    split: int
    stages: int = 2
    shared: bool = False


def hopper_logits_config(batch: int, q_len: int, heads: int, columns: int, units: int) -> HopperLogitsConfig:
    """The launch for requests of q_len queries of so many heads, and up to so many keys.

    Measured on an H200 with 64 heads: 64 requests of one query and 32768 keys took 82.7 us in parts of 4096 keys, 82.4
    in parts of 2048; 128 of two queries and 8192 keys 49.3 in parts of 2048, 83.7 in one part.
    """
    queries = 1 << (max(min(_COLUMNS // heads, q_len), 1).bit_length() - 1)
    blocks = max(batch * -(-q_len // queries), 1)
    parts = max(1, min(RESIDENT * units // blocks, -(-columns // 512)))
    # A product of fewer columns takes half the time, and its queries half the memory.
    stages = 2 if queries * heads == _COLUMNS else 4
    return HopperLogitsConfig(queries, max(-(-columns // (parts * TILE)), 1) * TILE, stages)


def hopper_rows_config(s_q: int, heads: int, s_kv: int, units: int) -> HopperLogitsConfig:
    """The launch for so many queries and keys in a row.

    Measured on an H200 with 64 heads: 4096 x 8192 took 466 us by programs of four warpgroups and 506 by programs of
    one, 4096 x 32768 1842 and 2107; 4096 x 4096, causal, 147 and 145, 1024 x 1024, causal, 22.4 and 19.7.
    """
    config = hopper_logits_config(1, s_q, heads, s_kv, units)
    if s_q * s_kv < 2**25 or config.queries * heads < _COLUMNS or heads < 64:  # more queries' limits would spill
        return config
    return HopperLogitsConfig(config.queries, min(-(-s_kv // TILE) * TILE, 8192), 4, shared=True)


@dataclass(frozen=True)
class HopperTopkConfig:
    """How `select_topk` works on a row, with `threads` threads: 512 or 1024.

    `sample` 0: a row is held in registers, `held` values a thread. Otherwise it is looked through `held` values a
    thread at a time, those of the next step loaded ahead if `ahead`, for candidates: what is above a threshold that a
    sample of so many values (a multiple of 2048) tells.
    """

    threads: int
    held: int
    sample: int
    ahead: bool = False
    max_registers: int | None = None


def hopper_topk_config(columns: int, rows: int, units: int) -> HopperTopkConfig:
    """The launch for so many rows of so many columns.

    Measured on an H200, k = 2048: 4096 rows of 8192 took 87 us, with 1024 threads 100; 4096 of 32768 (with half the
    sample) 213 us with 16 values a thread, 225 with 8. One row of 131072 took 24 us with 1024 threads, 28 with 512.
    """
    if columns <= 8192:
        return HopperTopkConfig(512, 1 << max(-(-columns // 512) - 1, 0).bit_length(), 0)
    # A warp has room for 256 candidates, or 128. The larger the sample, the nearer to k their number can be.
    sample = 4096 if columns <= 32768 else 8192 if columns <= 65536 else 16384
    if rows <= units and columns <= 131072:
        return HopperTopkConfig(1024, 8, sample, ahead=True, max_registers=64)
    return HopperTopkConfig(512, 16, sample, max_registers=40)


def why_not_rows(q: torch.Tensor, k: torch.Tensor) -> str | None:
    """Why the kernel cannot score these queries [s_q, heads, dim] and keys [s_kv, dim], None if it can; what is checked
    for all implementations is not checked again, and addresses are looked at in `why_not_aligned`.
    """
    s_q, heads, dim = q.shape
    reason = _why_not_heads(heads, dim)
    if reason is not None:
        return reason
    if not q.is_contiguous():
        return f"it needs contiguous queries, got strides {list(q.stride())}"
    if k.stride(0) % 16:
        return f"bulk loads need keys at multiples of 16 bytes, got a stride of {k.stride(0)}"
    rows = max(s_q * heads, k.shape[0])
    return None if rows < 2**30 else f"it counts fewer than 2**30 rows of queries and keys, got {rows}"


def why_not_paged(q: torch.Tensor, cache: torch.Tensor) -> str | None:
    """Why the kernel cannot score these queries [batch, q_len, heads, dim] and this cache, None if it can; what is
    checked for all implementations is not checked again. Addresses are looked at in `why_not_aligned` alone:
    torch.compile has none to show.
    """
    batch, q_len, heads, dim = q.shape
    reason = _why_not_heads(heads, dim)
    if reason is not None:
        return reason
    pages, page_size, _ = cache.shape
    if page_size % TILE:
        return f"it needs a page size that is a multiple of {TILE}, got {page_size}"
    if cache.stride(0) % DIM:
        return f"it needs pages at multiples of {DIM} bytes, got a stride of {cache.stride(0)}"
    rows = max(batch * q_len * heads, pages * (cache.stride(0) // DIM))
    return None if rows < 2**31 else f"bulk loads count fewer than 2**31 rows, got {rows}"


def _why_not_heads(heads: int, dim: int) -> str | None:
    if dim != DIM:
        return f"dim must be {DIM}, got {dim}"
    return None if heads in (32, 64, 128) else f"heads must be 32, 64 or 128, got {heads}"


def why_not_topk(columns: int, k: int) -> str | None:
    """Why the kernel cannot select k of so many columns, None if it can."""
    if columns > MOST_COLUMNS:
        return f"it takes up to {MOST_COLUMNS} columns, got {columns}"
    return None if k <= MOST_K else f"k must be at most {MOST_K}, got {k}"


def why_not_aligned(*tensors: torch.Tensor) -> str | None:
    """Why bulk loads cannot read these tensors, None if they can."""
    for x in tensors:
        if x.data_ptr() % 16:
            return f"bulk loads need addresses that are multiples of 16, got {x.data_ptr() % 16} mod 16"
    return None


@lru_cache
def why_not_device(device: str) -> str | None:
    """Why the kernels cannot run on a device, None if they can."""
    found = capability(device) if device.startswith("cuda") else None
    if found != (9, 0):
        return f"it needs compute capability 9.0 (Hopper), got {f'{found[0]}.{found[1]}' if found else device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton  # on a GPU that these kernels are for; importing mlakit must not

    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 6):
        return f"it needs Triton 3.6 or later for Gluon, got {triton.__version__}"
    return None
