"""Why a backend cannot run here: the GPU first, then what to install, then what is wrong with what is installed."""

import sys

import pytest

from mlakit.backends import registry
from mlakit.backends.base import Available, Unavailable
from mlakit.backends.peers import why_not
from tests.backends.conftest import device
from tests.support import fake_peers

MLA = ["flashmla", "flashattn_mla", "flashinfer_mla", "cutlass_mla", "vllm_triton_mla"]
STANDARD = ["flash", "flashinfer"]
CPU = "needs an NVIDIA GPU of compute capability {}, this is a CPU"
GPU = "needs compute capability {}, this GPU has {}"
FA3 = "FlashAttention-3: pip install vllm, or build flash-attention's hopper folder"
FA2 = "FlashAttention: pip install flash-attn, or vllm"


def _reason(name, *capability):
    found = registry.load(name).availability(device(*capability))
    assert isinstance(found, Unavailable), found
    return found.reason


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("flash", "8.0 or later"),
        ("flashinfer", "8.0 or later"),
        ("flashinfer_mla", "8.0 or later"),
        ("vllm_triton_mla", "8.0 or later"),
        ("mlakit", "8.0 or later"),
        ("mlakit_triton", "8.0 or later"),
        ("flex", "8.0 or later"),
        ("cudnn", "8.0 or later"),
        ("flashmla", "9.0"),
        ("flashattn_mla", "9.0"),
        ("cutlass_mla", "10.0"),
    ],
)
def test_a_cpu_and_an_old_gpu(peers, name, needs):
    assert _reason(name) == CPU.format(needs)
    assert _reason(name, 7, 5) == GPU.format(needs, "7.5")


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    # The generation before and the one after those whose kernels are for one generation alone.
    [
        ("cutlass_mla", (9, 0), GPU.format("10.0", "9.0")),
        ("cutlass_mla", (12, 0), GPU.format("10.0", "12.0")),
        ("flashmla", (8, 0), GPU.format("9.0", "8.0")),
        ("flashmla", (10, 0), GPU.format("9.0", "10.0")),
        ("flashattn_mla", (8, 6), GPU.format("9.0", "8.6")),
        ("flashattn_mla", (10, 0), GPU.format("9.0", "10.0")),
    ],
)
def test_another_generation(peers, install, name, capability, reason):
    # What is installed makes no difference.
    install(peers.flash_mla([]), peers.vllm_flash_attn([]), peers.flashinfer([]))
    assert _reason(name, *capability) == reason


def test_capabilities_of_one_generation():
    assert why_not(device(10, 3), (10, 0), only=True) is None
    assert why_not(device(9, 0), (9, 0), only=True) is None
    assert why_not(device(12, 1), (8, 0)) is None


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("flash", (9, 0), f"{FA3}; {FA2}"),
        ("flash", (8, 0), FA2),
        ("flashattn_mla", (9, 0), FA3),
        ("flashmla", (9, 0), "FlashMLA: pip install vllm, or build it from github.com/deepseek-ai/FlashMLA"),
        ("flashinfer", (9, 0), "FlashInfer: pip install flashinfer-python"),
        ("flashinfer_mla", (9, 0), "FlashInfer: pip install flashinfer-python"),
        ("vllm_triton_mla", (9, 0), "vLLM: pip install vllm"),
        ("cutlass_mla", (10, 0), "CUTLASS MLA: pip install vllm, or flashinfer-python"),
    ],
)
def test_what_to_install(peers, name, capability, reason):
    assert _reason(name, *capability) == reason


def test_a_broken_library_is_not_called_missing(peers, monkeypatch):
    class Finder:
        """Finds flashinfer, and fails as a library does that was built for another PyTorch."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "flashinfer":
                raise OSError("libtorch.so: undefined symbol: _ZN3c104\nand more")

    monkeypatch.delitem(sys.modules, "flashinfer")
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert _reason("flashinfer_mla", 9, 0) == (
        "flashinfer cannot be imported: OSError: libtorch.so: undefined symbol: _ZN3c104; "
        "FlashInfer: pip install flashinfer-python"
    )


def test_a_library_that_lacks_a_library(peers, monkeypatch, tmp_path):
    (tmp_path / "flash_mla.py").write_text("import mlakit_no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_mla")
    assert _reason("flashmla", 9, 0).startswith(
        "flash_mla needs the module mlakit_no_such_module, which is not installed; FlashMLA: "
    )


def test_a_library_of_another_version(peers, install):
    install(fake_peers._module("flash_mla", get_mla_metadata=None))
    assert _reason("flashmla", 9, 0).startswith("flash_mla: has no flash_mla_with_kvcache; FlashMLA: ")


def test_vllm_built_without_flash_attention_3(peers, install):
    install(peers.vllm_flash_attn([], generations=(2,)))
    reason = "vllm.vllm_flash_attn.flash_attn_interface: FA3 is unavailable due to: not built"
    assert _reason("flashattn_mla", 9, 0) == f"{reason}; {FA3}"
    found = registry.load("flash").availability(device(9, 0))
    assert found == Available("vllm 0.99, FlashAttention-2")


def test_vllm_built_without_cutlass_mla(peers, install):
    install(peers.vllm_custom_ops([]))
    assert _reason("cutlass_mla", 10, 0).startswith("vllm._custom_ops: built without CUTLASS MLA; ")


def test_available(peers, install):
    install(
        peers.flash_mla([]), peers.vllm_flash_attn([]), peers.flashinfer([]), peers.triton_decode_attention([])
    )  # fmt: skip
    found = {name: registry.load(name).availability(device(9, 0)) for name in [*MLA, *STANDARD]}
    assert found["flashmla"] == Available("flash_mla 1.2.3")
    assert found["flashattn_mla"] == found["flash"] == Available("vllm 0.99, FlashAttention-3")
    assert found["flashinfer_mla"] == found["flashinfer"] == Available("flashinfer-python 1.2.3")
    assert found["vllm_triton_mla"] == Available("vllm 0.99")
    assert isinstance(found["cutlass_mla"], Unavailable)
    assert registry.load("cutlass_mla").availability(device(10, 0)) == Available("flashinfer-python 1.2.3")


def test_an_unavailable_backend_is_a_row(peers, measure):
    row = measure("cutlass_mla", "2q1s33")
    assert (row.status, row.error) == ("unavailable", GPU.format("10.0", "9.0"))


@pytest.mark.parametrize("name", [*MLA, *STANDARD, "mlakit", "flex", "cudnn"])
def test_declared(name):
    backend = registry.load(name)
    assert backend.name == name
    assert backend.summary
    assert backend.hardware
    for parameter in backend.parameters.values():
        # Sweepable: a range or a list, and what it does.
        assert parameter.help
        assert parameter.choices if parameter.type is str else parameter.minimum is not None


def test_sweepable_parameters():
    found = {name: set(registry.load(name).parameters) for name in [*MLA, *STANDARD, "mlakit"]}
    assert found == {
        "flashmla": {"reorder_batch_threshold", "metadata"},
        "flashattn_mla": {"reorder_batch_threshold", "num_splits", "metadata"},
        "flashinfer_mla": {"reorder_batch_threshold", "backend"},
        "cutlass_mla": {"reorder_batch_threshold", "num_kv_splits"},
        "vllm_triton_mla": {"reorder_batch_threshold", "num_kv_splits"},
        "flash": {"fa_version", "num_splits"},
        "flashinfer": {"backend", "decode_kernel"},
        "mlakit": {"reorder_batch_threshold", "num_splits"},
    }


# Kernels that take one new token send longer requests through prefill unless they are told otherwise.
@pytest.mark.parametrize(("name", "threshold"), [("vllm_triton_mla", 1), ("cutlass_mla", 1), ("flashmla", 8)])
def test_default_threshold(name, threshold):
    assert registry.load(name).default_reorder_batch_threshold == threshold
