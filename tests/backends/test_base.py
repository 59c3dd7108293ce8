import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.backends.base import REORDER_BATCH_THRESHOLD, Backend, Parameter

BOUNDED = Parameter("num_splits", int, "pieces of a sequence", minimum=1, maximum=64)
UNBOUNDED = Parameter("offset", int, "any number")
CHOICE = Parameter("layout", str, "order of the cache", choices=("nhd", "hnd"))


@given(st.integers(1, 64))
def test_whole_numbers_in_bounds(number):
    # From YAML a number, from a command line its digits.
    assert BOUNDED.parse(number) == number
    assert BOUNDED.parse(str(number)) == number
    assert type(BOUNDED.parse(str(number))) is int


@given(st.integers())
def test_whole_numbers_without_bounds(number):
    assert UNBOUNDED.parse(number) == number


@given(st.integers().filter(lambda n: not 1 <= n <= 64))
def test_whole_numbers_out_of_bounds(number):
    with pytest.raises(ValueError, match=rf"^num_splits must be a whole number from 1 to 64, got {number}$"):
        BOUNDED.parse(number)


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    # A bound on one side only; the ends of a range are in it, so one past each; zero is not "from 1".
    [
        (Parameter("a", int, "", minimum=2), 1, "a must be a whole number from 2, got 1"),
        (Parameter("a", int, "", maximum=2), 3, "a must be a whole number to 2, got 3"),
        (BOUNDED, 0, "num_splits must be a whole number from 1 to 64, got 0"),
        (BOUNDED, 65, "num_splits must be a whole number from 1 to 64, got 65"),
        (REORDER_BATCH_THRESHOLD, -1, "reorder_batch_threshold must be a whole number from 0, got -1"),
    ],
)
def test_bounds(parameter, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        parameter.parse(value)


@pytest.mark.parametrize("value", ["", "four", "1.5", 1.5, None, [1], "0x10"])
def test_no_whole_number(value):
    with pytest.raises(ValueError, match=r"^num_splits must be a whole number or auto, got ") as error:
        BOUNDED.parse(value)
    assert str(error.value).endswith(repr(value))


@given(st.text().filter(lambda s: s not in ("nhd", "hnd", "auto")))
def test_no_choice(value):
    with pytest.raises(ValueError, match=r"^layout must be one of auto, nhd, hnd; got ") as error:
        CHOICE.parse(value)
    assert str(error.value).endswith(repr(value))


def test_choices():
    assert [CHOICE.parse(value) for value in ("nhd", "hnd")] == ["nhd", "hnd"]


@pytest.mark.parametrize(
    ("parameter", "values"),
    [(BOUNDED, "1..64"), (UNBOUNDED, ".."), (CHOICE, "nhd|hnd"), (REORDER_BATCH_THRESHOLD, "0..")],
)
def test_what_a_parameter_may_be(parameter, values):
    assert parameter.values == values


@pytest.mark.parametrize("parameter", [BOUNDED, UNBOUNDED, CHOICE, REORDER_BATCH_THRESHOLD])
def test_auto_is_always_accepted(parameter):
    assert parameter.parse("auto") == "auto"


class _MLA(Backend):
    attention = frozenset({"mla"})
    decode_mode = "mha"
    prefill_mode = "mqa"
    extra_parameters = (BOUNDED, CHOICE)


class _Standard(Backend):
    attention = frozenset({"standard"})
    extra_parameters = (BOUNDED,)


def test_only_mla_has_two_pipelines_to_choose_between():
    assert list(_MLA().parameters) == ["reorder_batch_threshold", "num_splits", "layout"]
    assert list(_Standard().parameters) == ["num_splits"]
    assert _MLA().parameters["layout"] is CHOICE


def test_mode_of_each_pipeline():
    assert (_MLA().mode("decode"), _MLA().mode("prefill")) == ("mha", "mqa")
    assert (Backend().mode("decode"), Backend().mode("prefill")) == ("mqa", "mha")


def test_the_interface_imports_no_torch():
    code = (
        "import sys, mlakit.backends, mlakit.backends.base, mlakit.backends.registry as r; r.load('sdpa'); "
        "print([m for m in ('torch', 'triton') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
