"""What the Hopper kernels of the indexer can run, and how they are launched. No Triton is imported here."""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch

from mlakit.hardware import capability

TILE = 64  # keys of a tile
DIM = 128  # bytes of a key: a row that the swizzle of shared memory takes whole
_COLUMNS = 128  # of a product: queries times heads
# A selection's bitmap of a row, and the ranks of its words, lie where its candidates and bins were.
MOST_COLUMNS = 163840
MOST_K = 2048


@dataclass(frozen=True)
class HopperLogitsConfig:
    """A program scores `split` keys, a multiple of 64, for `queries` queries, with `stages` tiles of keys in shared
    memory.
    """

    queries: int
    split: int
    stages: int = 4


def hopper_logits_config(
    s_q: int, s_kv: int, heads: int, units: int, *, q_len: int | None = None
) -> HopperLogitsConfig:
    """The launch for s_q queries of so many heads and s_kv keys; `q_len` queries a request of paged keys."""
    queries = min(_COLUMNS // heads, s_q if q_len is None else q_len)
    queries = 1 << (max(queries, 1).bit_length() - 1)
    programs = -(-s_q // queries) if q_len is None else s_q // max(q_len, 1) * -(-q_len // queries)
    rounds, least = (16, 4096) if q_len is None else (1, 1024)
    parts = max(1, min(2 * rounds * units // max(programs, 1), -(-s_kv // least)))
    return HopperLogitsConfig(queries, -(-s_kv // (parts * TILE)) * TILE)


@dataclass(frozen=True)
class HopperTopkConfig:
    """How `select_topk` works on a row, with `threads` threads: 512 or 1024.

    `sample` 0: a row is held in registers, `held` values a thread. Otherwise it is looked through `held` values a
    thread at a time, those of the next step loaded ahead if `ahead`, for candidates: what is above a threshold that a
    sample of so many values tells. `staged`: indices go through shared memory, if there is room.
    """

    threads: int
    held: int
    sample: int
    ahead: bool = False
    max_registers: int | None = None
    staged: bool = True


def hopper_topk_config(columns: int, rows: int, units: int) -> HopperTopkConfig:
    """The launch for so many rows of so many columns."""
    if columns <= 8192:
        return HopperTopkConfig(512, 1 << max(-(-columns // 512) - 1, 0).bit_length(), 0)
    # Of longer rows a larger sample is needed, or a few of its values would decide.
    sample = 2048 if columns <= 32768 else 4096 if columns <= 65536 else 8192
    if rows <= units:
        # Each of 32 warps has room for 128 candidates: a larger sample lets fewer through.
        return HopperTopkConfig(1024, 8, 2 * sample, ahead=True, max_registers=64)
    return HopperTopkConfig(512, 8, sample, max_registers=40)


def why_not_logits(q: torch.Tensor, k: torch.Tensor) -> str | None:
    """Why the kernel cannot score these queries [s_q, heads, dim] and keys [s_kv, dim], None if it can; what is checked
    for all implementations is not checked again. Addresses are looked at in `why_not_aligned` alone: torch.compile has
    none to show.
    """
    s_q, heads, dim = q.shape
    if (reason := _why_not_sizes(heads, dim)) is not None:
        return reason
    if (s_q > 1 and q.stride(0) != heads * q.stride(1)) or q.stride(1) % 16:
        return f"it needs heads of q evenly spaced, by multiples of 16 bytes, got strides {list(q.stride())}"
    if k.shape[0] > 1 and k.stride(0) % 16:
        return f"it needs rows of k at multiples of 16 bytes, got a stride of {k.stride(0)}"
    return _why_not_rows(s_q * heads)


def why_not_paged(q: torch.Tensor, cache: torch.Tensor) -> str | None:
    """`why_not_logits` of queries [batch, q_len, heads, dim] and a paged cache."""
    batch, q_len, heads, dim = q.shape
    if (reason := _why_not_sizes(heads, dim)) is not None:
        return reason
    pages, page_size, _ = cache.shape
    if page_size % TILE:
        return f"it needs a page size that is a multiple of {TILE}, got {page_size}"
    if cache.stride(0) % DIM:
        return f"it needs pages at multiples of {DIM} bytes, got a stride of {cache.stride(0)}"
    return _why_not_rows(batch * q_len * heads) or _why_not_rows(pages * (cache.stride(0) // DIM))


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


def _why_not_sizes(heads: int, dim: int) -> str | None:
    if dim != DIM:
        return f"dim must be {DIM}, got {dim}"
    return None if heads in (32, 64, 128) else f"heads must be 32, 64 or 128, got {heads}"


def _why_not_rows(rows: int) -> str | None:
    return None if rows < 2**31 else f"bulk loads count fewer than 2**31 rows, got {rows}"
