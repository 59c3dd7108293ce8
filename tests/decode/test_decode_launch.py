"""How the launcher picks a configuration: arithmetic, no kernel."""

import pytest

from mlakit.decode.triton_launch import choose_config
from mlakit.hardware import shared_limit


# Every generation, from the 99 KiB of consumer chips to Hopper's 227; dimensions smaller and larger than DeepSeek's;
# few keys and many; pages below a tile and as large.
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), None])
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 128, 512])
@pytest.mark.parametrize(("batch", "capacity", "page_size"), [(1, 1024, 64), (128, 2**17, 16)])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (64, 16), (256, 64), (1024, 64)])
def test_every_configuration_fits_shared_memory(
    capability: tuple[int, int] | None, batch: int, rows: int, capacity: int, page_size: int, rank: int, rope: int
) -> None:
    shapes = {
        "batch": batch,
        "rows": rows,
        "capacity": capacity,
        "kv_lora_rank": rank,
        "rope_dim": rope,
        "item_bytes": 2,
    }
    config = choose_config(**shapes, page_size=page_size, capability=capability)
    limit = shared_limit(capability or (8, 0))
    assert config.resident * (config.shared_bytes(rank, rope, 2) + 1024) <= limit + 1024
    assert config.block_m * rank // (32 * config.num_warps) <= 128  # accumulators a thread


def test_dimensions_that_fit_no_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="no launch configuration of mla_decode fits"):
        choose_config(
            batch=1, rows=1, capacity=1, page_size=64, kv_lora_rank=8192, rope_dim=64, item_bytes=2, capability=(8, 6)
        )
