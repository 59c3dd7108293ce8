"""What is timed, how often, and what follows from the samples; never how fast."""

import math

import pytest
import torch

from mlakit.bench import timing
from mlakit.bench.timing import Timing, time_calls


class Counter:
    """Calls that note which of them ran, and flushes beside them."""

    def __init__(self, count: int) -> None:
        self.log: list[str] = []
        self.calls = [lambda i=i: self.log.append(str(i)) for i in range(count)]


def test_repeats_are_passes_over_all_calls_after_warmup():
    counter = Counter(3)
    result = time_calls(counter.calls, "cpu", repeats=2, warmup=4)
    assert counter.log == ["0", "1", "2", "0"] + ["0", "1", "2"] * 2
    assert len(result.samples) == 6


def test_hot_runs_the_same_call_right_before():
    counter = Counter(2)
    time_calls(counter.calls, "cpu", repeats=1, warmup=0, l2="hot")
    assert counter.log == ["0", "0", "1", "1"]


def test_cold_flushes_before_each_sample(monkeypatch):
    counter = Counter(2)

    class Flush:
        def add_(self, value):
            counter.log.append("flush")

    monkeypatch.setattr(timing, "_flush_buffer", lambda device: Flush())
    time_calls(counter.calls, "cpu", repeats=2, warmup=0, l2="cold")
    assert counter.log == ["flush", "0", "flush", "1"] * 2


def test_flush_is_at_least_twice_the_cache():
    from mlakit.hardware import device_info

    buffer = timing._flush_buffer(torch.device("cpu"))
    assert buffer.numel() * buffer.element_size() >= 2 * device_info("cpu").cache_bytes - 4


def test_without_repeats_the_budget_decides(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) * 0.01)  # each call takes 10 ms
    few = time_calls([lambda: None], "cpu", l2="hot", budget=0.2)
    assert len(few.samples) == 20
    assert few.median == pytest.approx(0.01)
    assert len(time_calls([lambda: None], "cpu", l2="hot", budget=1e-6).samples) == 5
    assert len(time_calls([lambda: None], "cpu", l2="hot", budget=1e6).samples) == 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"calls": []}, "at least one call"),
        ({"l2": "warm"}, "'cold' or 'hot', got 'warm'"),
        ({"repeats": 0}, "at least 1, got 0"),
        ({"warmup": -1}, "at least 0, got -1"),
        ({"cuda_graph": True}, "need a GPU, got cpu"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        time_calls(**{"calls": [lambda: None], "device": "cpu", **arguments})


def test_statistics():
    result = Timing((1.0, 2.0, 3.0, 4.0, 10.0))
    assert (result.median, result.mean, result.min, result.max) == (3.0, 4.0, 1.0, 10.0)
    assert result.std == pytest.approx(math.sqrt(12.5))
    assert (result.p20, result.p80) == pytest.approx((1.8, 5.2))
    low, high = result.ci95
    assert 1.0 <= low <= 3.0 <= high <= 10.0
    assert result.ci95 == Timing(result.samples).ci95  # the same samples, the same interval


def test_interval_narrows_with_samples_and_covers_the_median():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, generator=generator).double() * 0.1 + 1
    few, many = Timing(tuple(draws[:10].tolist())), Timing(tuple(draws.tolist()))
    assert many.ci95[1] - many.ci95[0] < few.ci95[1] - few.ci95[0]
    assert many.ci95[0] < 1.0 < many.ci95[1]


def test_a_single_sample_has_no_spread():
    assert Timing((0.5,)).std == 0.0
    assert Timing((0.5,)).ci95 == (0.5, 0.5)
