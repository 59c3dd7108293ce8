"""How the sparse kernels are launched: one function of shapes and device chooses a configuration, one the pieces."""

from dataclasses import dataclass, replace

from mlakit.hardware import shared_limit

# The combine kernel loads all pieces of a row at once.
MOST_SPLITS = 64


@dataclass(frozen=True)
class SparseConfig:
    """A launch of the attention kernel."""

    block_m: int  # heads a program
    block_n: int  # keys a step
    num_warps: int
    num_stages: int
    resident: int = 1  # programs that fit a multiprocessor at once
    wgmma: bool = False  # the form for Hopper's warpgroup instructions

    def shared_bytes(self, rank: int, rope: int, item_bytes: int, fp8: bool) -> int:
        """An upper estimate of the shared memory of a program."""
        buffers = max(self.num_stages - 1, 1)
        row = item_bytes * (rank + rope)
        keys = buffers * self.block_n * (rank + 4 * (rank // 128) + 2 * rope if fp8 else row)
        dequantized = self.block_n * item_bytes * rank if fp8 else 0
        return keys + dequantized + self.block_m * (row + item_bytes * self.block_n) + 1024


def choose_config(
    *, group: int, rank: int, rope: int, item_bytes: int, fp8: bool, capability: tuple[int, int] | None
) -> SparseConfig:
    """The launch configuration where `group` query heads share a key head; None as capability is the interpreter."""
    capability = capability or (8, 0)
    limit = shared_limit(capability)
    config = _preferred(group, rank, fp8, capability)
    if not config.wgmma and config.block_m * rank > 4096 * config.num_warps:  # 128 accumulators a thread
        config = SparseConfig(16, 32, 8, 3)
    while config.shared_bytes(rank, rope, item_bytes, fp8) * config.resident > limit - 1024 * (config.resident - 1):
        config = _smaller(config)
    return config


def _preferred(group: int, rank: int, fp8: bool, capability: tuple[int, int]) -> SparseConfig:
    large = shared_limit(capability) > 200 * 1024
    # Measured on an H200 (benchmarks/h200/sparse.py --tune). Prefill of 4096 tokens, 128 heads, topk 2048: (64, 64, 8,
    # 3, wgmma) takes 7.4 ms, the plain form with this tile 10.4, (32, 64, 8, 3) 14.0, (16, 32, 4, 3) 15.9. Decode of
    # 128 requests, 16 heads: from bfloat16 (16, 32, 4, 3) 111 us, wgmma 141; from float8 wgmma 146, (16, 32, 4, 3) 211:
    # the plain form dequantizes for every warp what warpgroups share.
    if capability[0] == 9 and (group > 32 or fp8) and rank in (256, 512):
        return SparseConfig(64, 64, 8, 3, wgmma=True)
    if fp8:
        return SparseConfig(16, 32, 8, 3) if group <= 16 else SparseConfig(32, 16, 8, 3)  # more keys would spill
    if group <= 16 or shared_limit(capability) < 128 * 1024:
        return SparseConfig(16, 32, 4, 3, 2 if large else 1)
    return SparseConfig(32, 64, 8, 3) if large else SparseConfig(32, 32, 8, 3)


def _smaller(config: SparseConfig) -> SparseConfig:
    """The next smaller configuration where one does not fit: fewer resident programs, then stages, then keys, then
    heads.
    """
    if config.resident > 1:
        return replace(config, resident=config.resident - 1)
    if config.num_stages > 2:
        return replace(config, num_stages=config.num_stages - 1)
    if config.block_n > 16:
        return replace(config, block_n=config.block_n // 2)
    if config.block_m > 16:
        return replace(config, block_m=config.block_m // 2, wgmma=False)
    raise ValueError("no launch configuration of sparse attention fits this GPU's shared memory at these dimensions")


def choose_splits(*, programs: int, topk: int, block_n: int, resident: int, num_splits: int | None) -> int:
    """Pieces that each token's indices are cut into, where `programs` would run unsplit and `resident` run at once.

    The least time, in steps of a program: waves of programs, each as long as a piece and what starting and merging one
    costs.
    """
    steps = -(-topk // block_n)
    most = max(1, min(steps, MOST_SPLITS))
    if num_splits is not None:
        return min(num_splits, most)

    def cost(splits: int) -> float:
        waves = -(-programs * splits // resident)
        return waves * (-(-steps // splits) + (3 if splits == 1 else 5))

    return min(range(1, most + 1), key=cost)
