"""How the Hopper kernels divide a batch: the kernels' own functions, run in Python on numbers."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.decode import hopper_schedule
from mlakit.decode.hopper_config import FEW16, MANY, HopperConfig, HopperPlan, plan_slots


class _Gluon:
    """As much of `gluon.language` as the schedule uses, on numbers and arrays."""

    minimum, maximum, where, sum, max = np.minimum, np.maximum, np.where, np.sum, np.max

    @staticmethod
    def constexpr(value: Any) -> Any:
        return value

    @staticmethod
    def BlockedLayout(*_: Any) -> None: ...

    @staticmethod
    def arange(start: int, end: int, _: Any) -> Any:
        return np.arange(start, end)

    @staticmethod
    def cdiv(a: Any, b: Any) -> Any:
        return -(-a // b)

    @staticmethod
    def load(pointer: Any, mask: Any = None, other: int = 0) -> Any:
        lens, at = pointer
        if mask is None:
            return np.int64(lens[at])
        return np.where(mask, np.asarray(lens)[np.minimum(at, len(lens) - 1)], other)

    @staticmethod
    def associative_scan(values: Any, _: int, __: Any) -> Any:
        return np.cumsum(values)


class _Pointer:
    def __init__(self, lens: list[int]) -> None:
        self.lens = lens

    def __add__(self, at: Any) -> tuple[list[int], Any]:
        return self.lens, at


def _in_python() -> dict[str, Any]:
    names: dict[str, Any] = {"gl": _Gluon}
    for name in (
        "_add", "_steps_of", "_load_lens", "_share_out", "_share_out_one", "_part", "_piece", "_piece_of_one",
        "_partial_at",
    ):  # fmt: skip
        function = getattr(hopper_schedule, name).fn
        names[name] = types.FunctionType(function.__code__, names, name, function.__defaults__)
    return names


_SCHEDULE = _in_python()


def divide(lens: list[int], capacity: int, plan: HopperPlan, config: HopperConfig) -> list[tuple[int, ...]]:
    """Every live piece: slot, request, first step, end, number, count, place of its partial result."""
    found = []
    block = max(128, 1 << (len(lens) - 1).bit_length())
    sizes = plan.splits, plan.most_pieces, plan.slot_items, capacity, config.step, config.least
    for slot in map(np.int64, range(plan.slots)):
        if len(lens) == 1:
            shares = _SCHEDULE["_share_out_one"](np.int64(lens[0]), slot, *sizes)
        else:
            all_lens = _SCHEDULE["_load_lens"](_Pointer(lens), len(lens), block)
            shares = _SCHEDULE["_share_out"](*all_lens, slot, plan.slots, len(lens), *sizes)
        begin, end, aligned, pieces, share, before = shares
        for item in range(int(begin), int(end)):
            if len(lens) == 1:
                piece = _SCHEDULE["_piece_of_one"](np.int64(item), pieces, np.int64(lens[0]), capacity, config.step)
            else:
                piece = _SCHEDULE["_piece"](
                    np.int64(item), before, slot, aligned, pieces, share, _Pointer(lens), capacity, config.step
                )
            request, _, steps, first, last, number, count, base = piece
            if first < last:
                place = _SCHEDULE["_partial_at"](base, number, aligned)
                found.append(tuple(int(x) for x in (slot, request, first, last, number, count, place)))
            before = before + steps
    return found


# Lengths short and long beside one another, both kernels' steps and rows; few slots and more than there is work.
@given(
    lens=st.lists(st.integers(0, 9000) | st.just(0), min_size=1, max_size=40),
    rows=st.integers(1, 300),
    units=st.integers(1, 200),
    num_splits=st.none() | st.integers(1, 20),
    config=st.sampled_from([MANY, FEW16, dataclasses.replace(FEW16, least=3, resident=2)]),
    slack=st.integers(0, 9000),
)
def test_every_step_is_one_piece_s(
    lens: list[int], rows: int, units: int, num_splits: int | None, config: HopperConfig, slack: int
) -> None:
    capacity = max(lens) + slack
    plan = plan_slots(batch=len(lens), rows=rows, capacity=capacity, units=units, num_splits=num_splits, config=config)
    if plan.slots == 0:
        return  # more row tiles than programs, and split: refused
    pieces = divide(lens, capacity, plan, config)
    places = set()
    for request, length in enumerate(lens):
        own = sorted(piece for piece in pieces if piece[1] == request)
        own.sort(key=lambda piece: piece[4])
        steps = -(-length // config.step)
        bounds = [0, *(piece[3] for piece in own)]
        assert [piece[2] for piece in own] == bounds[:-1]  # one after the other, none missing
        assert bounds[-1] == steps
        assert [piece[4] for piece in own] == list(range(len(own)))
        assert all(piece[5] == len(own) for piece in own)
        if num_splits is not None and steps:
            assert len(own) == min(plan.splits, steps)
        if len(own) > 1:
            assert plan.programs <= units * config.resident  # those who wait for one another are all resident
            for piece in own:
                assert piece[6] not in places
                assert piece[6] < plan.partials
                places.add(piece[6])


# Equal lengths: whole pieces, so that nothing is merged that need not be. One long request among short ones: even
# shares, so that no slot has more than its part and a step.
@pytest.mark.parametrize(
    ("lens", "heads", "most_steps", "pieces"),
    [
        ([8192] * 128, 128, 128, 128),
        ([4096] * 32, 128, 16, 64),
        ([4096] * 64, 128, 32, 64),
        ([131072], 128, 16, None),
        ([100] * 65 + [100_000], 128, 13, None),
    ],
)
def test_shares(lens: list[int], heads: int, most_steps: int, pieces: int | None) -> None:
    plan = plan_slots(batch=len(lens), rows=heads, capacity=131072, units=132, num_splits=None, config=MANY)
    found = divide(lens, 131072, plan, MANY)
    load = [sum(piece[3] - piece[2] for piece in found if piece[0] == slot) for slot in range(plan.slots)]
    assert max(load) <= most_steps
    if pieces is not None:
        assert len(found) == pieces


def test_more_rows_than_programs_are_not_split() -> None:
    plan = plan_slots(batch=3, rows=64 * 140, capacity=9000, units=132, num_splits=None, config=MANY)
    assert (plan.slots, plan.splits, plan.partials) == (3, 1, 0)
