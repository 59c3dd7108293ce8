import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlakit import dispatch
from mlakit.dispatch import check_shape, choose_triton, unobserved, why_not_triton


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


def test_plain_tensors_are_unobserved_and_so_are_parameters_without_gradients():
    plain, parameter = torch.zeros(1), torch.nn.Parameter(torch.zeros(1))
    assert unobserved(plain, plain)
    assert not unobserved(plain, parameter)
    with torch.no_grad():
        assert unobserved(plain, parameter)
    with torch.inference_mode():
        assert unobserved(plain, torch.zeros(1))


def test_subclasses_modes_transforms_and_compilers_look_on():
    plain = torch.zeros(3)
    assert not unobserved(plain, torch.zeros(1).as_subclass(_Subclass))
    with _Mode():
        assert not unobserved(plain)
    seen = []
    torch.func.vmap(lambda x: seen.append(unobserved(x)) or x)(plain)
    assert seen == [False]
    compiled = torch.compile(lambda x: x + (1 if unobserved(x) else 2), fullgraph=True, backend="eager")
    assert compiled(plain).tolist() == [2, 2, 2]


def test_a_cpu_has_the_kernel_only_when_it_is_interpreted_and_asked_for(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_triton("op", None, x) == "reference"
    with pytest.raises(
        RuntimeError, match=r"op: impl='triton' cannot run: it needs an NVIDIA GPU .* got tensors on cpu"
    ):
        choose_triton("op", "triton", x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_triton("op", None, x) == "reference"
    assert choose_triton("op", "triton", x) == "triton"
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it is too odd"):
        choose_triton("op", "triton", x, "it is too odd")
    with pytest.raises(ValueError, match="unknown impl 'cat'; expected one of reference, triton"):
        choose_triton("op", "cat", x)
    assert choose_triton("op", None, x, others=("cat", "copy")) == "cat"


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "it needs compute capability 8.0 or more, got (7, 5)"), ((8, 0), None)]
)
def test_a_gpu_must_be_new_enough(monkeypatch, capability, reason):
    monkeypatch.setattr(dispatch, "_reasons", {})
    monkeypatch.setattr(dispatch, "capability", lambda device: capability)
    assert why_not_triton("cuda:0") == reason


@pytest.mark.parametrize(
    ("expected", "text"), [((2, 4), "[2, 4], got [2, 3]"), (("B",), "[B], got [2, 3]"), ((2, 3, "C"), "[2, 3, C], got")]
)
def test_shapes_are_refused_with_expected_and_actual(expected, text):
    check_shape("x", torch.zeros(2, 3), ("B", 3))
    with pytest.raises(ValueError, match=re.escape(f"x must have shape {text}")):
        check_shape("x", torch.zeros(2, 3), expected)
