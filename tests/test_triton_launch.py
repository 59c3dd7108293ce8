from contextlib import nullcontext

import pytest
import torch

from mlakit.triton_launch import Launches, Remembered

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


class _Kernel:
    """A Triton kernel that notes how it was launched: itself, or as what it was compiled to."""

    arg_names = ("x_ptr", "out_ptr", "n", "BLOCK", "STORE")

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            self.calls.append(("bound", grid, args, kwargs))
            return _Compiled(self.calls)

        return run


class _Compiled:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *args: self.calls.append(("again", grid, args))


@pytest.fixture
def devices(monkeypatch):
    """Two devices, the first one current; the list of those that were made current."""
    made = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or nullcontext())
    return made


def _tensors(offset=0):
    room = torch.zeros(64)
    start = (-room.data_ptr() % 64) // 4 + offset
    return room[start : start + 8], torch.zeros(64)[:8]


def _first(launches, key, device, tensors):
    launches.first(key, device, (7, 1, 1), tensors, (5,), {"STORE": ".cs", "BLOCK": 64}, num_warps=4)


def test_the_second_launch_has_the_numbers_and_constants_of_the_first_in_the_kernels_order(devices):
    kernel, tensors = _Kernel(), _tensors()
    launches = Launches(kernel)
    assert not launches.again("key", GPU, tensors)
    _first(launches, "key", GPU, tensors)
    others = _tensors()
    assert launches.again("key", GPU, others)
    assert kernel.calls == [
        ("bound", (7, 1, 1), (*tensors, 5), {"STORE": ".cs", "BLOCK": 64, "num_warps": 4}),
        ("again", (7, 1, 1), (*others, 5, 64, ".cs")),
    ]


# What a kernel was compiled for depends on each of these.
@pytest.mark.parametrize(
    ("key", "device", "offset"), [("other key", GPU, 0), ("key", OTHER, 0), ("key", GPU, 1), ("key", GPU, 2)]
)
def test_another_key_device_or_alignment_is_another_launch(devices, key, device, offset):
    launches = Launches(_Kernel())
    _first(launches, "key", GPU, _tensors())
    assert not launches.again(key, device, _tensors(offset))


def test_a_device_that_is_not_current_is_made_so(devices):
    launches = Launches(_Kernel())
    _first(launches, "key", OTHER, _tensors())
    assert launches.again("key", OTHER, _tensors())
    assert devices == [OTHER, OTHER]


def test_nothing_is_remembered_of_the_interpreter(devices):
    kernel, tensors = _Kernel(), _tensors()
    launches = Launches(kernel)
    _first(launches, "key", torch.device("cpu"), tensors)
    assert not launches.again("key", torch.device("cpu"), tensors)
    assert len(kernel.calls) == 1


def test_it_does_not_grow_for_ever(devices, monkeypatch):
    monkeypatch.setattr("mlakit.triton_launch._MOST_REMEMBERED", 3)
    launches = Launches(_Kernel())
    for key in range(10):
        _first(launches, key, GPU, _tensors())
        assert launches.again(key, GPU, _tensors())
    assert len(launches._known) <= 3


def test_what_is_remembered_does_not_grow_for_ever(monkeypatch):
    monkeypatch.setattr("mlakit.triton_launch._MOST_REMEMBERED", 2)
    found = Remembered()
    for key in range(5):
        found[key] = str(key)
        assert found.get(key) == str(key)
    assert len(found) <= 2
