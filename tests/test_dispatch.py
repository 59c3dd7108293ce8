import inspect
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mlakit
from mlakit import dispatch
from mlakit.decode import mla_decode
from mlakit.dispatch import check_dtype, check_shape, choose_triton, unobserved, which_impl, why_not_triton
from mlakit.hardware import DeviceInfo, pretend
from mlakit.paged import paged_attention
from mlakit.prefill import mla_prefill
from mlakit.sparse import mla_sparse_decode, mla_sparse_prefill


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


# --- which implementation a call would run ---


def _decode_inputs(dtype=torch.float16) -> tuple[torch.Tensor, ...]:
    table, lens = torch.zeros((2, 1), dtype=torch.int32), torch.tensor([3, 16], dtype=torch.int32)
    return torch.randn(2, 1, 4, 80).to(dtype), torch.randn(1, 16, 80).to(dtype), table, lens


def _prefill_inputs() -> tuple[torch.Tensor, ...]:
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    return torch.randn(5, 4, 48), torch.randn(5, 4, 48), torch.randn(5, 4, 32), bounds, bounds


def test_which_impl_says_what_a_call_on_a_cpu_runs():
    assert which_impl(mla_decode, *_decode_inputs(), softmax_scale=0.1, kv_lora_rank=64) == "reference"
    assert which_impl(mla_prefill, *_prefill_inputs(), softmax_scale=0.1) == "reference"


@pytest.mark.parametrize(("operation", "inputs"), [(mla_decode, _decode_inputs), (mla_prefill, _prefill_inputs)])
def test_which_impl_refuses_what_the_call_refuses(operation, inputs):
    options = {"softmax_scale": 0.1, **({"kv_lora_rank": 64} if operation is mla_decode else {})}
    with pytest.raises(RuntimeError, match="impl='hopper' cannot run"):
        which_impl(operation, *inputs(), impl="hopper", **options)
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        which_impl(operation, *inputs(), impl="fast", **options)
    first, *rest = inputs()
    with pytest.raises(ValueError, match="q must have shape"):
        which_impl(operation, first[0, 0], *rest, **options)


def test_which_impl_knows_that_only_the_reference_of_decode_has_gradients():
    q, *rest = _decode_inputs(torch.float32)
    q.requires_grad_()
    assert which_impl(mla_decode, q, *rest, softmax_scale=0.1, kv_lora_rank=64) == "reference"
    with pytest.raises(RuntimeError, match="it has no gradient, and an input requires one"):
        which_impl(mla_decode, q, *rest, softmax_scale=0.1, kv_lora_rank=64, impl="triton")


def test_which_impl_of_something_else():
    with pytest.raises(ValueError, match="which_impl: abs is none of mla_decode, mla_prefill"):
        which_impl(abs, 3)


# A Hopper GPU that is not there: the choice follows from shapes and the device alone. DeepSeek's latent, and another,
# which only the portable kernel takes.
@pytest.mark.parametrize(("latent_dim", "expected"), [(576, "hopper"), (320, "triton")])
def test_which_impl_of_decode_on_hopper(latent_dim, expected):
    with pretend(DeviceInfo("cuda", 0, "a Hopper", (9, 0), 132, 50 * 2**20, 2**37)), torch.device("meta"):
        shapes = ((64, 1, 128, latent_dim), (4, 64, latent_dim))
        q, cache = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
        table, lens = torch.empty((64, 64), dtype=torch.int32), torch.empty(64, dtype=torch.int32)
        found = which_impl(mla_decode, q, cache, table, lens, softmax_scale=0.1, kv_lora_rank=latent_dim - 64)
    assert found == expected


def test_an_implementation_is_asked_for_by_name_only():
    """Arguments may be added before it without a call changing its meaning."""
    functions = [getattr(mlakit, name) for name in mlakit.__all__]
    found = [
        parameter.kind
        for function in functions
        if inspect.isfunction(function) and (parameter := inspect.signature(function).parameters.get("impl"))
    ]
    assert len(found) > 10
    assert set(found) == {inspect.Parameter.KEYWORD_ONLY}


def test_what_is_no_tensor_is_named():
    with pytest.raises(ValueError, match="seq_lens must be a tensor, got list"):
        check_shape("seq_lens", [3, 4], (2,))
    array = torch.zeros(2).numpy()
    with pytest.raises(ValueError, match=r"x must be torch\.float32, got ndarray"):
        check_dtype("x", array, torch.float32)
    with pytest.raises(ValueError, match="x must be a tensor, got NoneType"):
        check_dtype("x", None, torch.float32)
    with pytest.raises(ValueError, match=r"x must be torch\.float32, got torch\.float64"):
        check_dtype("x", torch.zeros(2).double(), torch.float32)


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("ask", [lambda call, *args, **options: call(*args, **options), which_impl])
def test_a_scale_that_turns_scores_round_is_refused(ask, scale):
    q, cache, table = torch.zeros(1, 1, 2, 80), torch.zeros(1, 4, 80), torch.zeros(1, 1, dtype=torch.int32)
    lens, bounds = torch.ones(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    k, indices = torch.zeros(1, 2, 80), torch.zeros(1, 1, 1, dtype=torch.int32)
    calls = (
        (mla_decode, (q, cache, table, lens), {"kv_lora_rank": 64}),
        (mla_prefill, (q[0], k, k, bounds, bounds), {}),
        (mla_sparse_prefill, (q[0], k[:, :1], indices), {"d_v": 64}),
        (mla_sparse_decode, (q, cache, indices), {"kv_lora_rank": 64}),
        (paged_attention, (q[0], cache[:, :, None], cache[:, :, None], table, lens, bounds), {}),
    )
    for call, args, options in calls:
        with pytest.raises(ValueError, match=f"softmax_scale must be positive and finite, got {scale}"):
            ask(call, *args, softmax_scale=scale, **options)
        assert ask(call, *args, softmax_scale=0.1, **options)
