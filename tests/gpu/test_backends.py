"""The backends of other libraries on a GPU that has them: right on every kind of batch, and running the kernel that
they record. Where a library is not installed its cases are skipped with the reason that `mlakit backends` gives.
"""

import inspect

import pytest
import torch

from mlakit.backends import registry
from mlakit.backends.base import Unavailable
from mlakit.backends.pipeline import prepare
from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.limits import Ceilings
from mlakit.bench.measure import measure_row
from mlakit.bench.results import Record
from mlakit.bench.runner import Run, new_session, probe
from mlakit.bench.workload import build, split_requests
from mlakit.hardware import device_info
from tests.support import fake_flashinfer, fake_peers

pytestmark = pytest.mark.gpu
CEILINGS = Ceilings("a GPU", "bfloat16", 4e12, 4e12, 8e14)
MLA = ["flashmla", "flashattn_mla", "flashinfer_mla", "vllm_triton_mla", "cudnn", "sdpa", "mlakit", "mlakit_triton"]
# FlashInfer's prefill kernels take more than a minute to compile: tests of `flashinfer` are the records' business.
STANDARD = ["flash", "cudnn", "sdpa", "triton"]


def _available(name):
    backend = registry.load(name)
    found = backend.availability(device_info("cuda:0"))
    if isinstance(found, Unavailable):
        pytest.skip(found.reason)
    return backend


def _config(name, spec, **fields):
    mla = {"attention": "mla", "model": "deepseek-v3", "num_q_heads": 16}
    standard = {"attention": "standard", "model": "llama-3-8b", "block_size": 16}
    small = {"num_layers": 2, "dtype": "bf16", "device": "cuda:0", "repeats": 2, "warmup_iters": 1}
    which = standard if fields.pop("standard", False) else mla
    return BenchmarkConfig(backend=name, batch_spec=spec, **{**which, **small, **fields})


# Lengths around the ends of pages of 64, NaN behind them; several new tokens, some beside one; prefill too. The
# narrowest of queries and the widest; with the projections; the other dtype.
@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ("3q1s700_q1s64_q1s33", {}),
        ("3q1s700_q1s64_q1s33", {"num_q_heads": 128}),
        ("3q1s700_q1s64_q1s33", {"dtype": "fp16"}),
        ("3q4s700_2q4s333", {}),
        ("3q4s700_2q4s333", {"num_q_heads": 128}),
        ("4q4s1k_4q1s1k", {}),
        ("2q1s704_q200_q300s1k", {}),
        ("2q1s704_q200_q300s1k", {"scope": "pipeline"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MLA)
def test_mla(name, spec, fields):
    _available(name)
    if name == "flashinfer_mla" and ("q200" in spec or "dtype" in fields):
        pytest.skip("a kernel that takes a minute to compile")
    row = measure_row(_config(name, spec, **fields), CEILINGS)
    if name == "flashattn_mla" and row.status == "wrong":  # vLLM 0.20.2's build, with 128 heads
        assert "with many heads FlashAttention-3 multiplies what follows there by zero" in row.error
        return
    assert row.success, row.error
    assert row.kernels


@pytest.mark.parametrize("spec", ["8q1s1k", "2q2k_32q1s1k", "3q1s700_2q4s333_q200_q100s900"])
@pytest.mark.parametrize("name", STANDARD)
def test_standard(name, spec):
    _available(name)
    row = measure_row(_config(name, spec, standard=True), CEILINGS)
    assert row.success, row.error
    assert row.kernels


@pytest.mark.parametrize("name", MLA)
def test_cuda_graph(name):
    _available(name)
    row = measure_row(_config(name, "16q1s1k", cuda_graph=True), CEILINGS)
    assert row.success, row.error


@pytest.mark.parametrize(
    ("name", "spec", "fields", "kernel"),
    # What the row says ran, against a part of the name of a kernel that the profiler saw.
    [
        ("flashmla", "4q1s1k", {}, "sm90::flash_fwd_splitkv_mla_kernel"),
        ("flashattn_mla", "4q1s1k", {}, "FlashAttnFwdSm90"),
        ("flashattn_mla", "q512", {}, "FlashAttnFwdSm90"),
        ("vllm_triton_mla", "4q1s1k", {}, "_fwd_grouped_kernel_stage1"),
        ("mlakit_triton", "4q1s1k", {}, "_mla_decode_kernel"),
        ("cudnn", "q512", {}, "cudnn_generated"),
        ("flash", "8q1s1k", {"standard": True}, "FlashAttnFwdSm90"),
        ("flashinfer_mla", "4q1s1k", {"parameters": {"backend": "fa3"}}, "MLA"),
    ],
)
def test_the_kernel_that_runs(name, spec, fields, kernel):
    backend = _available(name)
    config = _config(name, spec, num_layers=1, **fields)
    (part,) = build(config, split_requests(config, backend.default_reorder_batch_threshold), torch.device("cuda:0"))
    run = prepare(backend, part.problem, dict(config.parameters))
    for _ in range(2):
        run(part.layers[0])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(part.layers[0])
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any(kernel in found for found in names), (part.problem.kernel, names)
    if name == "flashmla":  # its metadata were made before
        assert not any("metadata" in found for found in names)


def test_what_is_beyond_vllms_offsets_is_a_row_that_says_so():
    """Wrong or an illegal address, depending on where the cache lies; and the run goes on."""
    _available("vllm_triton_mla")
    device = probe("auto", ["bf16"])
    plan = [_config("vllm_triton_mla", "128q1s32k", num_layers=1), _config("vllm_triton_mla", "4q1s1k")]
    record = Record(name="test", planned=2, sessions=[new_session(device, [])])
    bad, good = Run(plan, device, record).execute().rows
    assert bad.status in ("wrong", "error")
    assert "numbers them with 32 bits" in bad.error
    assert good.success, good.error


@pytest.mark.parametrize(
    ("module", "fake", "names"),
    [
        ("flash_mla", fake_peers.flash_mla, ["flash_mla_with_kvcache"]),
        ("vllm.third_party.flashmla.flash_mla_interface", fake_peers.flash_mla, ["flash_mla_with_kvcache"]),
        (
            "vllm.vllm_flash_attn.flash_attn_interface",
            fake_peers.vllm_flash_attn,
            ["flash_attn_varlen_func", "get_scheduler_metadata", "fa_version_unsupported_reason"],
        ),
        (
            "vllm.v1.attention.ops.triton_decode_attention",
            fake_peers.triton_decode_attention,
            ["decode_attention_fwd"],
        ),
    ],
)
def test_recorded_signatures(module, fake, names):
    real = pytest.importorskip(module)
    for name in names:
        _same(getattr(fake([]), name), getattr(real, name))


def test_recorded_signatures_of_flashinfer():
    real = pytest.importorskip("flashinfer")
    fake = fake_flashinfer.flashinfer([])
    for module, wrapper in (
        ("mla", "BatchMLAPagedAttentionWrapper"),
        ("prefill", "BatchPrefillWithRaggedKVCacheWrapper"),
        ("prefill", "BatchPrefillWithPagedKVCacheWrapper"),
        ("decode", "BatchDecodeWithPagedKVCacheWrapper"),
    ):
        for method in ("__init__", "plan", "run"):
            _same(
                *(getattr(getattr(getattr(library, module), wrapper), method) for library in (fake, real)),
            )


def _same(fake, real):
    """Names and order of the parameters that the stand-in has, in the library."""
    recorded, found = (list(inspect.signature(function).parameters) for function in (fake, real))
    assert found == recorded
