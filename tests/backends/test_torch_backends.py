"""PyTorch's own kernels behind the interface: what is asked of them on a CPU, without cuDNN and without a compiler."""

import contextlib

import pytest
import torch

KINDS = ["2q1s33_q1", "2q4s33_q20s40", "q20_2q1s33"]


@pytest.fixture
def uncompiled(monkeypatch):
    """flex_attention as PyTorch defines it, without a compiler; what it was asked to be compiled with."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    return asked


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("standard", [False, True], ids=["mla", "standard"])
def test_flex(measure, uncompiled, spec, standard):
    row = measure("flex", spec, standard=standard, model="tiny-gqa" if standard else "tiny", num_q_heads=4)
    assert row.success, row.error
    # One graph for a shape, and an error instead of an uncompiled run.
    assert {"dynamic": False, "fullgraph": True} in uncompiled


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("standard", [False, True], ids=["mla", "standard"])
def test_cudnn_and_nothing_else(measure, monkeypatch, spec, standard):
    asked = []

    @contextlib.contextmanager
    def sdpa_kernel(backends):
        asked.append(backends)
        yield

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", sdpa_kernel)
    row = measure("cudnn", spec, standard=standard, model="tiny-gqa" if standard else "tiny", num_q_heads=4)
    assert row.success, row.error
    assert set(asked) == {torch.nn.attention.SDPBackend.CUDNN_ATTENTION}
    assert row.modes == ({"all": "standard"} if standard else dict.fromkeys(row.modes, "mha"))


@pytest.mark.parametrize("asked_first", [True, False])
def test_without_a_cudnn_kernel_a_row_is_unsupported(measure, monkeypatch, asked_first):
    def none(*args, **options):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    if not asked_first:
        monkeypatch.delattr(torch, "_fused_sdp_choice")
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", none)
    row = measure("cudnn", "q20", model="tiny", num_q_heads=4, check=False)
    reason = "PyTorch offers no cuDNN kernel for these shapes and masks"
    assert (row.status, row.error) == ("unsupported", reason)


def test_without_cudnn(measure, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    row = measure("cudnn", "q20", model="tiny")
    assert (row.status, row.error) == ("unavailable", f"PyTorch {torch.__version__} was built without cuDNN")


@pytest.mark.parametrize("backend", ["flex", "cudnn"])
def test_half_precision_only(measure, monkeypatch, backend):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    row = measure(backend, "q20", model="tiny", dtype="fp32")
    assert row.error == "takes bf16 and fp16, got float32"


def test_sdpa_says_which_kernel_it_took(measure):
    row = measure("sdpa", "q20_2q1s33", model="tiny", num_q_heads=4)
    assert row.success, row.error
    # A CPU has one fused kernel; in the latent space key and value differ in width, which only plain PyTorch does.
    assert row.kernels == {
        "decode": f"torch {torch.__version__}, math",
        "prefill": f"torch {torch.__version__}, {row.kernels['prefill'].split(', ')[1]}",
    }
    assert row.kernels["prefill"].split(", ")[1] in {"flash_attention", "math"}


def test_a_kernel_is_recorded_even_if_it_is_wrong(measure, monkeypatch):
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **o: right(*a, **o) + 1)
    row = measure("sdpa", "q20", model="tiny", num_q_heads=4)
    assert row.status == "wrong"
    assert row.kernels["prefill"].startswith("torch ")
