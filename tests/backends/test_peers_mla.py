"""The adapters of MLA libraries, driven against stand-ins that check what they are handed and compute the right answer.
What the bench itself checks (poisoned outputs, float64, every layer) is checked here too.
"""

import pytest
import torch

# Decode of odd lengths around the ends of pages of 64, one key included; several new tokens beside one; prefill, whole
# and behind a context, beside decode: each kind of batch a row of the suite may hold.
DECODE = "2q1s70_q1_q1s64"
SPECULATIVE = "2q4s70_q1s33_q2s65"
MIXED = "q20_q17s70_2q1s65"


def _kernels(row):
    assert row.success, row.error
    return row.kernels


def _names(calls):
    return [name for name, _ in calls]


@pytest.fixture
def flash3(peers, install):
    """FlashAttention-3, for the prefill pipelines."""
    calls = []
    install(peers.vllm_flash_attn(calls, generations=(3,)))
    return calls


@pytest.mark.parametrize("spec", [DECODE, SPECULATIVE, MIXED])
@pytest.mark.parametrize("scope", ["attention", "pipeline"])
def test_flashmla(peers, install, measure, flash3, spec, scope):
    calls = []
    install(peers.flash_mla(calls))
    kernels = _kernels(measure("flashmla", spec, scope=scope))
    assert kernels["decode"] == "flash_mla 1.2.3, dense decode; metadata made once a batch"
    assert ("prefill" in kernels) == (spec == MIXED)
    assert kernels.get("prefill", "") in ("", "vllm 0.99, FlashAttention-3, varlen")


def test_flashmla_takes_requests_of_one_length_in_one_call(peers, install, measure):
    calls = []
    install(peers.flash_mla(calls))
    row = measure("flashmla", "2q4s70_3q4s33_2q1s65", num_layers=1)
    assert row.success, row.error
    shapes = [what["shape"] for name, what in calls if name == "flash_mla_with_kvcache"]
    assert shapes[:2] == [(5, 4, 3, 576), (2, 1, 3, 576)]
    assert _names(calls).count("get_mla_metadata") == 2  # a run of requests each, whatever the number of calls


def test_flashmla_metadata_in_each_call(peers, install, measure):
    calls = []
    install(peers.flash_mla(calls))
    kernels = _kernels(measure("flashmla", DECODE, parameters={"metadata": "call"}))
    assert kernels["decode"].endswith("metadata made in each call")
    assert _names(calls).count("get_mla_metadata") > _names(calls).count("flash_mla_with_kvcache")


def test_flashmla_whose_metadata_are_tensors(peers, install, measure):
    install(peers.flash_mla([], tensors=True))
    assert measure("flashmla", SPECULATIVE).success


def test_flashmla_of_vllm(peers, install, measure):
    install(peers.flash_mla([], name="vllm.third_party.flashmla.flash_mla_interface"))
    row = measure("flashmla", DECODE)
    assert row.backend_version == "vllm 0.99"
    assert row.check.lse_error is not None


@pytest.mark.parametrize("spec", [DECODE, SPECULATIVE, MIXED])
@pytest.mark.parametrize("build", ["flash_attn_interface", "vllm_flash_attn"])
@pytest.mark.parametrize("parameters", [{}, {"num_splits": 4, "metadata": "call"}], ids=str)
def test_flashattn_mla(peers, install, measure, build, spec, parameters):
    calls = []
    install(getattr(peers, build)(calls))
    row = measure("flashattn_mla", spec, parameters=parameters)
    made = "in each call" if parameters else "once a batch"
    assert _kernels(row)["decode"].endswith(f"FlashAttention-3, paged with q_v; schedule made {made}")
    assert row.check.lse_error is not None
    assert ("get_scheduler_metadata" in _names(calls)) == (not parameters)
    paged = [what for name, what in calls if name == "paged"]
    assert {what["num_splits"] for what in paged} == {parameters.get("num_splits", 0)}
    assert all((what["metadata"] is None) == bool(parameters) for what in paged)


@pytest.mark.parametrize("spec", [DECODE, SPECULATIVE, MIXED])
@pytest.mark.parametrize("parameters", [{}, {"backend": "fa2"}, {"backend": "fa3"}], ids=str)
def test_flashinfer_mla(peers, install, measure, spec, parameters):
    calls = []
    install(peers.flashinfer(calls))
    kernels = _kernels(measure("flashinfer_mla", spec, parameters=parameters))
    ran = parameters.get("backend", "fa3")
    assert kernels["decode"] == f"flashinfer-python 1.2.3, MLA paged, {ran}"
    assert kernels.get("prefill", "") in ("", f"flashinfer-python 1.2.3, prefill ragged, {ran}")
    assert _names(calls).count("mla plan") == 1  # outside the calls


@pytest.mark.parametrize("spec", [DECODE, "q20"])
def test_flashinfer_that_runs_another_kernel_is_an_error(peers, install, measure, spec):
    install(peers.flashinfer([], chosen="fa2", stubborn=True))
    with pytest.raises(RuntimeError, match="asked for its fa3 kernel and planned fa2"):
        measure("flashinfer_mla", spec, parameters={"backend": "fa3"})


@pytest.mark.parametrize("spec", [DECODE, MIXED])
@pytest.mark.parametrize("block_size", [16, 64])
def test_vllm_triton_mla(peers, install, measure, flash3, spec, block_size):
    calls = []
    install(peers.triton_decode_attention(calls))
    row = measure("vllm_triton_mla", spec, block_size=block_size)
    assert _kernels(row)["decode"] == "vllm 0.99, Triton decode, 1 splits"
    assert row.check.lse_error is not None
    assert len({what["scale"] for _, what in calls}) == 1  # made once


# vLLM's rule: a power of two, a split for 512 keys, two for each multiprocessor at most (132 here).
@pytest.mark.parametrize(("spec", "splits"), [("q1s511", 1), ("q1s1500", 2), ("q1s1536", 4), ("q1s2k_q1", 4)])
def test_vllm_triton_splits(peers, install, measure, spec, splits):
    install(peers.triton_decode_attention([]))
    assert f", {splits} splits" in _kernels(measure("vllm_triton_mla", spec, num_layers=1))["decode"]
    row = measure("vllm_triton_mla", spec, num_layers=1, parameters={"num_kv_splits": 3})
    assert ", 3 splits" in _kernels(row)["decode"]


# Fewer heads than the kernel's tile and as many; pages that fill its tile of keys together, and one that does alone.
@pytest.mark.parametrize(("heads", "block_size", "splits"), [(3, 32, None), (128, 32, 2), (3, 128, 2)])
def test_cutlass_mla_of_vllm(peers, install, measure, heads, block_size, splits):
    calls = []
    install(peers.vllm_custom_ops(calls))
    operator = torch.library.Library("_C", "FRAGMENT")
    operator.define("sm100_cutlass_mla_decode() -> ()")
    try:
        row = measure(
            "cutlass_mla", "q1s70_q1", capability=(10, 0), num_q_heads=heads, block_size=block_size, num_layers=1,
            parameters={"num_kv_splits": splits} if splits else {},
        )  # fmt: skip
    finally:
        operator._destroy()
    assert _kernels(row) == {"decode": "vllm 0.99, sm100_cutlass_mla_decode"}
    assert row.check.lse_error is not None
    assert {what["splits"] for _, what in calls} == {splits or -1}  # -1: its own choice


@pytest.mark.parametrize("heads", [3, 128])
def test_cutlass_mla_of_flashinfer(peers, install, measure, heads):
    install(peers.flashinfer([]))
    row = measure("cutlass_mla", "q1s70_q1", capability=(10, 0), num_q_heads=heads, block_size=64, num_layers=1)
    assert _kernels(row) == {"decode": "flashinfer-python 1.2.3, cutlass"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"parameters": {"num_kv_splits": 2}}, "num_kv_splits is a parameter of vLLM's build"),
        ({"qk_nope_head_dim": 192}, r"FlashInfer's build has a fixed scale of 1/sqrt\(192\), got 0.0625"),
    ],
)
def test_what_the_cutlass_of_flashinfer_cannot(peers, install, measure, fields, reason):
    install(peers.flashinfer([]))
    row = measure("cutlass_mla", DECODE, capability=(10, 0), **fields)
    assert row.status == "unsupported"
    assert row.error.startswith(reason.replace("\\", ""))


LATENT = "takes kv_lora_rank 512 and qk_rope_head_dim 64, got 256 and 64"


@pytest.mark.parametrize(
    ("backend", "fields", "reason"),
    # What a library's kernel cannot take is told before anything is launched; prefill has limits of its own.
    [
        ("flashmla", {"block_size": 16}, "takes pages of 64 tokens, got 16"),
        ("flashmla", {"dtype": "fp32"}, "takes bf16 and fp16, got float32"),
        ("flashmla", {"kv_lora_rank": 256}, LATENT),
        ("flashattn_mla", {"kv_lora_rank": 256}, LATENT),
        ("flashattn_mla", {"dtype": "fp32"}, "takes bf16 and fp16, got float32"),
        ("flashinfer_mla", {"kv_lora_rank": 256}, LATENT),
        ("flashinfer_mla", {"dtype": "fp32"}, "takes bf16 and fp16, got float32"),
        ("vllm_triton_mla", {"kv_lora_rank": 256}, LATENT),
        ("vllm_triton_mla", {"reorder_batch_threshold": 4}, "takes one new token a request in decode, got 4"),
        ("cutlass_mla", {"reorder_batch_threshold": 4}, "takes one new token a request in decode, got 4"),
        ("cutlass_mla", {"num_q_heads": 129}, "takes up to 128 heads, got 129"),
        ("cutlass_mla", {"block_size": 256}, "takes pages of 128 tokens or a divisor of that, got 256"),
    ],
)
def test_refusals(peers, install, measure, backend, fields, reason):
    calls = []
    install(
        peers.flash_mla(calls), peers.vllm_flash_attn(calls), peers.flashinfer(calls),
        peers.triton_decode_attention(calls),
    )  # fmt: skip
    capability = (10, 0) if backend == "cutlass_mla" else (9, 0)
    row = measure(backend, "2q4s70_q1s33", capability=capability, num_layers=1, **fields)
    assert row.status == "unsupported"
    assert row.error.startswith(reason)
    assert calls == []


def test_without_flash_attention_prefill_is_a_reason(peers, install, measure):
    install(peers.flash_mla([]))
    row = measure("flashmla", MIXED)
    assert row.status == "unsupported"
    assert "FlashAttention-3: pip install vllm" in row.error
    assert measure("flashmla", DECODE).success


def test_flash_attention_2_cannot_do_prefill_with_unequal_head_dims(peers, install, measure):
    install(peers.triton_decode_attention([]), peers.flash_attn([]))
    row = measure("vllm_triton_mla", "q20", capability=(8, 0))
    assert row.error == "prefill: FlashAttention-2 takes equal head dims, got 192 and 128"


@pytest.mark.parametrize(("spec", "said"), [("q1s64_q1s70", True), ("2q1s64", False)])
def test_a_page_that_flash_attention_reads_to_its_end_is_said_when_the_result_is_wrong(
    peers, install, measure, spec, said
):
    module = peers.vllm_flash_attn([])
    right = module.flash_attn_varlen_func

    def flash_attn_varlen_func(*args, **options):
        out, lse = right(*args, **options)
        return out * torch.nan, lse

    module.flash_attn_varlen_func = flash_attn_varlen_func
    install(module)
    row = measure("flashattn_mla", spec)
    assert row.status == "wrong"
    assert ("a request ends within a page" in row.error) == said


def test_a_cache_that_vllm_cannot_number_is_said_when_it_fails(peers, install, measure, monkeypatch):
    module = peers.triton_decode_attention([])

    def decode_attention_fwd(*args, is_mla=False, k_scale=None, v_scale=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    module.decode_attention_fwd = decode_attention_fwd
    install(module)
    monkeypatch.setattr("mlakit.backends.vllm_triton_mla._ELEMENTS", 2**15)
    with pytest.raises(RuntimeError, match="illegal memory access") as error:
        measure("vllm_triton_mla", "q1s70")
    from mlakit.bench.measure import first_line

    assert first_line(error.value) == (
        "RuntimeError: CUDA error: an illegal memory access was encountered; the cache has 73728 elements, and vLLM's "
        "kernel numbers them with 32 bits: beyond 2**31 it reads addresses that are not its own"
    )
