"""How the launcher cuts a batch into pieces and picks a configuration: arithmetic, no kernel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.decode.triton_launch import choose_config, shared_limit
from mlakit.decode.triton_schedule import plan_pieces


def pieces_of(lens: list[int], slots: int, block_n: int, min_tiles: int) -> list[int]:
    """What the kernel computes on the device."""
    tiles = [-(-n // block_n) for n in lens]
    per_piece = max(-(-sum(tiles) // (slots - len(lens))), min_tiles)
    return [max(-(-t // per_piece), 1) for t in tiles]


@given(
    lens=st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    row_tiles=st.integers(1, 8),
    resident=st.integers(1, 300),
    min_tiles=st.integers(1, 4),
    slack=st.integers(0, 10_000),
)
def test_balanced_pieces_fit_the_slots(
    lens: list[int], row_tiles: int, resident: int, min_tiles: int, slack: int
) -> None:
    plan = plan_pieces(
        batch=len(lens),
        row_tiles=row_tiles,
        capacity=max(lens) + slack,
        block_n=32,
        resident=resident,
        min_tiles=min_tiles,
        num_splits=None,
    )
    if plan.splits is not None:
        assert plan.splits == 1
        assert plan.slots == len(lens)
        return
    assert plan.slots * row_tiles <= resident  # one wave
    assert sum(pieces_of(lens, plan.slots, 32, min_tiles)) <= plan.slots


# One long request on an idle GPU must use all of it; requests that fill it alone must not be cut; short ones neither.
@pytest.mark.parametrize(
    ("batch", "row_tiles", "capacity", "slots", "split"),
    [(1, 1, 131072, 132, True), (1, 2, 131072, 66, True), (128, 1, 8192, 128, False), (4, 1, 64, 4, False)],
)
def test_automatic_splits(batch: int, row_tiles: int, capacity: int, slots: int, split: bool) -> None:
    plan = plan_pieces(
        batch=batch, row_tiles=row_tiles, capacity=capacity, block_n=32, resident=132, min_tiles=2, num_splits=None
    )
    assert plan.slots == slots
    assert plan.is_split == split


def test_named_splits_are_kept_but_for_more_than_there_are_tiles() -> None:
    shapes = {"batch": 3, "row_tiles": 1, "capacity": 128, "block_n": 32, "resident": 132, "min_tiles": 2}
    assert plan_pieces(**shapes, num_splits=3).splits == 3
    assert plan_pieces(**shapes, num_splits=100).splits == 4
    assert not plan_pieces(**{**shapes, "capacity": 0}, num_splits=2).is_split


# Every generation, from the 99 KiB of consumer chips to Hopper's 227, and dimensions smaller and larger than
# DeepSeek's.
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), None])
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 128, 512])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (64, 16), (256, 64), (1024, 64)])
def test_every_configuration_fits_shared_memory(
    capability: tuple[int, int] | None, rows: int, rank: int, rope: int
) -> None:
    config = choose_config(rows=rows, kv_lora_rank=rank, rope_dim=rope, item_bytes=2, capability=capability)
    limit = shared_limit(capability or (8, 0))
    assert config.resident * (config.shared_bytes(rank, rope, 2) + 1024) <= limit + 1024
    assert config.block_m * rank // (32 * config.num_warps) <= 128  # accumulators a thread


def test_dimensions_that_fit_no_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="no launch configuration of mla_decode fits"):
        choose_config(rows=1, kv_lora_rank=8192, rope_dim=64, item_bytes=2, capability=(8, 6))
