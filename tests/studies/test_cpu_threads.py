import pytest
import torch

from mlakit.studies.cpu_threads import steady_threads


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Threads that help, that do nothing for a small operation, and that wait for a core somebody else holds.
@pytest.mark.parametrize(
    ("seconds", "expected"), [({1: 2.0, 2: 1.0}, 2), ({1: 1.0, 2: 1.5}, 2), ({1: 1.0, 2: 99.0}, 1)]
)
def test_one_thread_only_where_several_hold_each_other_up(seconds, expected):
    with steady_threads(seconds.__getitem__) as count:
        assert count == expected
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 2


def test_measures_and_puts_back_the_number():
    with steady_threads() as count:
        assert count in (1, 2)
        assert torch.get_num_threads() == count
    assert torch.get_num_threads() == 2


def test_one_thread_is_not_measured():
    torch.set_num_threads(1)
    with steady_threads({}.__getitem__) as count:
        assert count == 1
