"""Launch configurations of the paged attention kernels, and which of them a batch takes: from shapes and device."""

from dataclasses import dataclass
from functools import lru_cache

from mlakit.hardware import shared_limit

MAX_HEAD_DIM = 256
MIN_DOT_DIM = 16  # tl.dot's least depth
# A piece of fewer keys costs more to start and to merge than its keys cost to read.
MIN_PIECE_KEYS = 128


@dataclass(frozen=True)
class PagedConfig:
    """Tile of one program and how it is run; `resident` programs are meant to share a multiprocessor."""

    block_m: int  # query rows: tokens x the heads that share a KV head
    block_n: int  # keys a step
    num_warps: int
    num_stages: int
    resident: int = 1
    branch: bool = True  # around the mask, instead of masking every tile

    def shared_bytes(self, head_dim: int) -> int:
        """An upper estimate of the shared memory of a program: a ring of keys and values, and the queries. The small
        matrix instructions need a stage less, but room for the weights and, in 2 KiB, for reductions.
        """
        width = padded_dim(head_dim)
        if self.block_m >= 64:
            return 2 * width * (self.num_stages * 2 * self.block_n + self.block_m)
        ring = max(self.num_stages - 1, 1) * 2 * self.block_n * width
        return 2 * (ring + self.block_m * (width + self.block_n)) + 2048


@dataclass(frozen=True)
class Kernels:
    """The kernels that a batch takes: `split` for requests of up to `split_rows` query rows, `tiles` for the others;
    None where no request can need it.
    """

    split: PagedConfig | None
    split_rows: int
    tiles: PagedConfig | None


def padded_dim(head_dim: int) -> int:
    """Columns computed: a power of two."""
    return max(MIN_DOT_DIM, 1 << (head_dim - 1).bit_length())


@lru_cache
def choose_kernels(
    *,
    tokens: int,
    batch: int,
    group: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    max_seqlen_q: int | None,
    capability: tuple[int, int] | None,
    units: int,
) -> Kernels:
    """Which kernels run `tokens` query tokens of `batch` requests, each with room for `capacity` keys in its table, on
    a device of `units` multiprocessors; None as capability is the interpreter.
    """
    capability = capability or (8, 0)
    rows = tokens * group
    tiles = _tiles_config(rows * kv_heads // units, head_dim, capability)
    small_rows = max(16, 1 << (group - 1).bit_length())  # one token's rows, in a tile
    if max_seqlen_q is None:
        return Kernels(_split_config(small_rows, head_dim, capability), small_rows, tiles)
    longest = max(max_seqlen_q, 1) * group
    # Programs that would each go through all keys of a tile of rows, and not fill half of the device.
    few_tiles = (rows // tiles.block_m + batch) * kv_heads * 2 <= units and capacity >= 8 * MIN_PIECE_KEYS
    if longest <= 64 or few_tiles:
        config = _split_config(longest, head_dim, capability)
        return Kernels(config, -(-longest // config.block_m) * config.block_m, None)
    if tokens == batch * max_seqlen_q:  # all are as long
        return Kernels(None, 0, tiles)
    return Kernels(_split_config(small_rows, head_dim, capability), small_rows, tiles)


def _split_config(rows: int, head_dim: int, capability: tuple[int, int]) -> PagedConfig:
    # None of these spills registers, whatever the page size (Triton 3.6). On an H200 (results/h200/tuning/paged.json)
    # one program of 16 rows a multiprocessor takes 289 us for 64q1s4k, two take 259; of 64 rows 56.3 and 54.8 for
    # 8q16s4k.
    if rows <= 16:
        candidates = [PagedConfig(16, 64, 4, 3, 2), PagedConfig(16, 32, 4, 3, 2), PagedConfig(16, 32, 4, 3)]
    elif padded_dim(head_dim) > 128:
        candidates = [PagedConfig(32, 64, 8, 2), PagedConfig(32, 32, 8, 2)]
    elif rows <= 32:
        candidates = [PagedConfig(32, 64, 4, 3, 2), PagedConfig(32, 64, 4, 3), PagedConfig(32, 32, 4, 3)]
    elif capability[0] == 9:
        candidates = [PagedConfig(64, 64, 4, 3, 2)]
    else:
        candidates = [PagedConfig(64, 64, 8, 3), PagedConfig(32, 32, 4, 3)]
    return _first_that_fits(candidates, head_dim, capability)


def _tiles_config(rows_a_unit: int, head_dim: int, capability: tuple[int, int]) -> PagedConfig:
    wide = padded_dim(head_dim) > 128
    if capability[0] == 9 and wide:
        # With a branch around the mask four registers spill with Triton 3.6.
        candidates = [PagedConfig(128, 64, 8, 2, branch=False)]
    elif capability[0] == 9 and rows_a_unit > 256:
        # Four warpgroups: one's softmax beside another's products. 51 loads and stores of spilled registers, 8 of them
        # in the loop, and yet q8k takes 1131 us instead of 1320, and q2k 93 instead of 106.
        candidates = [PagedConfig(256, 64, 16, 3)]
    elif capability[0] == 9:
        candidates = [PagedConfig(128, 64, 8, 3)]  # q1ks2k 76 us, with 256 rows 83; q512 20.4 and 29.4
    elif capability[0] == 10:
        candidates = [PagedConfig(64, 64, 8, 2)] if wide else [PagedConfig(128, 64, 8, 3)]
    elif wide:
        candidates = [PagedConfig(64, 32, 8, 2), PagedConfig(32, 32, 4, 2)]
    else:
        candidates = [PagedConfig(128, 32, 8, 2), PagedConfig(64, 32, 4, 2)]
    return _first_that_fits(candidates, head_dim, capability)


def _first_that_fits(candidates: list[PagedConfig], head_dim: int, capability: tuple[int, int]) -> PagedConfig:
    limit = shared_limit(capability)
    for config in candidates:
        if config.shared_bytes(head_dim) * config.resident + 1024 * (config.resident - 1) <= limit:
            return config
    return PagedConfig(16, 16, 4, 2)
