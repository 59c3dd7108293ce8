"""How the launcher cuts a batch into pieces and picks a configuration: arithmetic, no kernel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.decode.triton_launch import choose_config, shared_limit
from mlakit.decode.triton_schedule import plan_pieces


def pieces_of(lens: list[int], slots: int, block_n: int, min_tiles: int) -> list[int]:
    """What the kernel computes on the device."""
    tiles = [-(-n // block_n) for n in lens]
    low, high = -(-sum(tiles) // slots), -(-sum(tiles) // (slots - len(lens)))
    tries = [max(low + (high - low) * k // 7, min_tiles) for k in range(8)]
    each = [[max(-(-t // per_piece), 1) for t in tiles] for per_piece in tries]
    return next(pieces for pieces in each if sum(pieces) <= slots)  # the last always fits: that is the claim


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


def test_a_batch_that_could_fill_the_gpu_does() -> None:
    # 16 requests of 1024 keys, two tiles of heads on 132 multiprocessors: 66 slots, of which 16 x 4 can be used.
    plan = plan_pieces(batch=16, row_tiles=2, capacity=1024, block_n=32, resident=132, min_tiles=2, num_splits=None)
    assert plan.splits is None
    assert pieces_of([1024] * 16, plan.slots, 32, 2) == [4] * 16


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
