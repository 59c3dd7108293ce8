"""How a batch is divided among slots: arithmetic, no kernel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.triton_pieces import plan_slots


# One long request on an idle GPU must use all of it; so must many, in equal shares. One more wave where 70 tiles of
# rows would leave nearly half a wave idle. Short requests are not worth sharing, nor is what there is none of.
@pytest.mark.parametrize(
    ("batch", "programs", "capacity", "slots", "split"),
    [
        (1, 1, 131072, 132, True),
        (1, 2, 131072, 66, True),
        (128, 1, 8192, 132, True),
        (300, 2, 8192, 66, True),
        (2, 70, 8192, 7, True),
        (16, 2, 128, 32, True),
        (4, 1, 64, 4, False),
        (0, 1, 8192, 0, False),
    ],
)
def test_automatic_slots(batch: int, programs: int, capacity: int, slots: int, split: bool) -> None:
    plan = plan_slots(
        batch=batch, programs=programs, capacity=capacity, block_n=32, resident=132, min_tiles=2, num_splits=None
    )
    assert plan.slots == slots
    assert plan.is_split == split


def test_named_splits_are_kept_but_for_more_than_there_are_tiles() -> None:
    shapes = {"batch": 3, "programs": 1, "capacity": 128, "block_n": 32, "resident": 132, "min_tiles": 2}
    assert plan_slots(**shapes, num_splits=3).splits == 3
    assert plan_slots(**shapes, num_splits=100).splits == 4
    assert not plan_slots(**{**shapes, "capacity": 0}, num_splits=2).is_split


# What the kernels compute on the device, in Python: every tile of every request is in exactly one slot, partial results
# never share a place nor leave the workspace, and the combine kernel looks for them where they are.
@given(
    lens=st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    programs=st.integers(1, 8),
    resident=st.integers(1, 300),
    min_tiles=st.integers(1, 4),
    slack=st.integers(1, 10_000),
)
def test_slots_share_every_tile_once(lens: list[int], programs: int, resident: int, min_tiles: int, slack: int) -> None:
    plan = plan_slots(
        batch=len(lens),
        programs=programs,
        capacity=max(lens) + slack,
        block_n=32,
        resident=resident,
        min_tiles=min_tiles,
        num_splits=None,
    )
    if plan.splits is not None:
        assert plan.slots == len(lens)
        return
    tiles = [-(-n // 32) for n in lens]
    share = max(-(-sum(tiles) // plan.slots), min_tiles)
    kept: dict[int, tuple[int, int]] = {}
    for slot in range(plan.slots):
        begin, end = slot * share, min((slot + 1) * share, sum(tiles))
        before = 0
        for request, own in enumerate(tiles):
            first, last = max(begin - before, 0), min(end - before, own)
            if first < last and last - first < own:
                index = 2 * slot + (first == 0)
                assert index not in kept
                assert index < plan.partials
                kept[index] = (request, last - first)
            before += own
    before = 0
    for request, own in enumerate(tiles):
        if own:
            slots = range(before // share, (before + own - 1) // share + 1)
            if len(slots) > 1:
                found = [kept.pop(2 * slot + (i == 0)) for i, slot in enumerate(slots)]
                assert {owner for owner, _ in found} == {request}
                assert sum(count for _, count in found) == own
        before += own
    assert not kept
