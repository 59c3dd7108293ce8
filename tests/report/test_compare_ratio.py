import numpy as np
import pytest

from mlakit.report.compare_ratio import FEWEST_ROUNDS, Ratio, Times, median_interval, ratio, ratio_of_rounds


def times(*samples: float) -> Times:
    return Times(float(np.median(samples)), samples)


def noisy(median: float, count: int, seed: int, spread: float = 0.05) -> Times:
    return times(*(median * np.exp(spread * np.random.default_rng(seed).standard_normal(count))))


def test_the_interval_of_samples_holds_the_true_ratio_about_as_often_as_it_says():
    held = [
        found.low <= 1.2 <= found.high
        for seed in range(60)
        if (found := ratio(noisy(1e-3, 30, seed), noisy(1.2e-3, 30, 1000 + seed)))
    ]
    assert sum(held) >= 54  # of 60 intervals with 95%, fewer than that come once in 10,000


def test_the_interval_is_the_same_every_time():
    assert ratio(noisy(1, 20, 0), noisy(1, 20, 1)) == ratio(noisy(1, 20, 0), noisy(1, 20, 1))


def test_slow_spells_widen_the_interval():
    """The same samples, slow ones in a row or spread evenly: in a row they are one event, and tell less."""
    spell = [1.0] * 40 + [2.0] * 20
    spread = [2.0 if i % 3 == 0 else 1.0 for i in range(60)]
    steady = times(*([1.0] * 60))
    assert ratio(steady, times(*spell)).high >= ratio(steady, times(*spread)).high
    low, high = median_interval([float(i % 7) for i in range(70)])
    assert low <= 3 <= high


def test_without_samples_the_recorded_interval_serves():
    a, b = Times(1e-3, (), (0.98e-3, 1.02e-3)), Times(1.3e-3, (), (1.28e-3, 1.34e-3))
    found = ratio(a, b)
    assert found.basis == "intervals"
    assert found.value == pytest.approx(1.3)
    # Widths add in squares: -1.5% +3.1% of B and 2% of A.
    assert found.low == pytest.approx(1.3 * (1 - np.hypot(0.015, 0.02)), rel=0.006)
    assert found.high == pytest.approx(1.3 * (1 + np.hypot(0.031, 0.02)), rel=0.006)
    assert ratio(a, noisy(1e-3, 30, 0)).basis == "intervals"
    assert ratio(noisy(1e-3, 30, 0), noisy(1e-3, 30, 1)).basis == "samples"


@pytest.mark.parametrize("other", [Times(1.0), Times(1.0, (1.0,)), Times(1.0, (), (1.0, 1.0))])
def test_a_median_alone_makes_no_interval_and_no_claim(other):
    found = ratio(Times(1.0, (), (0.9, 1.1)), other)
    assert (found.low, found.high, found.basis) == (None, None, "medians")
    assert found.verdict(0.5) == "UNSURE"
    assert not found.is_above(0.0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    # At a margin of 2%: within it, whatever side of 1; beyond it on one side; across 1.
    [
        (0.99, 1.015, "SAME"), (1.001, 1.019, "SAME"), (1 / 1.02, 1.02, "SAME"), (1.001, 1.021, "SLOWER"),
        (1.1, 1.2, "SLOWER"), (0.7, 0.9, "FASTER"), (0.97, 0.999, "FASTER"), (0.99, 1.021, "UNSURE"),
        (0.5, 2.0, "UNSURE"),
    ],
)  # fmt: skip
def test_words(low, high, verdict):
    assert Ratio((low + high) / 2, low, high, "samples").verdict(0.02) == verdict


def test_a_regression_is_what_all_of_the_interval_says():
    assert Ratio(1.1, 1.051, 1.2, "samples").is_above(0.05)
    assert not Ratio(1.1, 1.049, 1.2, "samples").is_above(0.05)  # ten percent slower, but not surely five


def test_drift_cancels_in_rounds():
    """The machine gets twice as slow while both sides are measured; B takes 3% longer."""
    drift = np.linspace(1, 2, 12)[:, None]
    random = np.random.default_rng(0)
    before = drift * np.exp(0.002 * random.standard_normal((12, 5)))
    after = 1.03 * drift * np.exp(0.002 * random.standard_normal((12, 5)))
    found = ratio_of_rounds(before.tolist(), after.tolist())
    assert found.basis == "rounds"
    assert 1.02 < found.low < 1.03 < found.high < 1.04
    assert found.verdict(0.01) == "SLOWER"


# The signed ranks that tables of the sign test leave out on each side: none up to 8, one up to 11, two from 12 on.
@pytest.mark.parametrize(("count", "left_out"), [(6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3), (20, 5)])
def test_intervals_of_rounds_are_exact(count, left_out):
    ratios = [1.0 + i for i in range(count)]
    found = ratio_of_rounds([[1.0]] * count, [[r] for r in reversed(ratios)])
    assert (found.low, found.high) == (ratios[left_out], ratios[-1 - left_out])


def test_too_few_rounds():
    with pytest.raises(ValueError, match=f"{FEWEST_ROUNDS} at least, got 5 and 5"):
        ratio_of_rounds([[1.0]] * 5, [[1.0]] * 5)
    with pytest.raises(ValueError, match="got 7 and 6"):
        ratio_of_rounds([[1.0]] * 7, [[1.0]] * 6)
