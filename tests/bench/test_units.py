import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.bench.units import duration, factors, percent, rate, seconds, three


@pytest.mark.parametrize(
    ("value", "expected"),
    # The docstring's example; each unit; both sides of where a unit ends, where rounding could give "1000 µs"; zero.
    [
        (2.31e-05, "23.1 µs"),
        (1e-6, "1.00 µs"),
        (123.4e-6, "123 µs"),
        (999.4e-6, "999 µs"),
        (999.6e-6, "1.00 ms"),
        (1e-3, "1.00 ms"),
        (12.34e-3, "12.3 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (1.0, "1.00 s"),
        (4321.0, "4321 s"),
        (0.0, "0 µs"),
    ],
)
def test_seconds(value, expected):
    assert seconds(value) == expected


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    # The docstring's example; each prefix and none; both sides of a prefix's start; a rate without a unit.
    [
        (4.26e12, "B/s", "4.26 TB/s"),
        (989e12, "FLOP/s", "989 TFLOP/s"),
        (1e9, "B/s", "1.00 GB/s"),
        (999.4e6, "B/s", "999 MB/s"),
        (999.6e6, "B/s", "1.00 GB/s"),
        (12.34e6, "B/s", "12.3 MB/s"),
        (1500, "B/s", "1.50 kB/s"),
        (12, "B/s", "12.0 B/s"),
        (0, "B/s", "0 B/s"),
        (34500, "", "34.5 k"),
    ],
)
def test_rate(value, unit, expected):
    assert rate(value, unit) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    # Three digits on both sides of each power of ten, where the number of decimals changes; negative; tiny.
    [
        (0, "0"),
        (1, "1.00"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (123.6, "124"),
        (0.9994, "0.999"),
        (0.9996, "1.00"),
        (0.123, "0.123"),
        (-12.34, "-12.3"),
        (0.000123, "1.23e-04"),
    ],
)
def test_three(value, expected):
    assert three(value) == expected


@pytest.mark.parametrize(
    ("fraction", "expected"),
    # The docstring's examples; both sides of where a decimal goes; more than everything; less than nothing.
    [
        (0.453, "45%"),
        (0.0453, "4.5%"),
        (0.0023, "0.23%"),
        (0.0994, "9.9%"),
        (0.0996, "10%"),
        (0.00994, "0.99%"),
        (0.00996, "1.0%"),
        (1.0, "100%"),
        (1.254, "125%"),
        (0.0, "0.00%"),
        (-0.012, "-1.2%"),
    ],
)
def test_percent(fraction, expected):
    assert percent(fraction) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    # Under a minute, the turn of a minute and of an hour reached by rounding up, and more than an hour.
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.6, "1:00:00"),
        (36610, "10:10:10"),
    ],
)
def test_duration(value, expected):
    assert duration(value) == expected


# From a tenth of a microsecond, below any launch, to hours; digits below that are beyond a clock.
@given(st.floats(1e-7, 1e4))
def test_seconds_read_back(value):
    text = seconds(value)
    number, unit = text.split(" ")
    back = float(number) * {"µs": 1e-6, "ms": 1e-3, "s": 1.0}[unit]
    assert back == pytest.approx(value, rel=0.00501)
    assert unit == "s" or float(number) < 1000


@given(st.floats(1.0, 1e16))
def test_rates_read_back(value):
    number, unit = rate(value, "B/s").split(" ")
    factor = {"B/s": 1, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12}[unit]
    assert float(number) * factor == pytest.approx(value, rel=0.00501)
    assert factor == 1e12 or float(number) < 1000


@given(st.floats(1.0, 1e12))
def test_three_has_three_digits(value):
    text = three(value)
    assert float(text) == pytest.approx(value, rel=0.00501)
    assert len(re.sub(r"\D", "", text)) == max(3, math.floor(math.log10(float(text))) + 1)


@given(st.floats(0.001, 10))
def test_percent_reads_back(fraction):
    assert float(percent(fraction).removesuffix("%")) / 100 == pytest.approx(fraction, rel=0.051)


def test_a_range_that_reads_the_same_is_told_once():
    assert factors([2.1, 1.448, 1.7]) == "1.45x to 2.10x"
    assert factors([2.004, 1.996]) == factors([2.0]) == "2.00x"
