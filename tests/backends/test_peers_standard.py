"""The adapters of libraries for standard attention, driven against stand-ins as in test_peers_mla.py."""

import pytest

# Decode, extend and prefill, alone and in every order; lengths around the ends of pages of 16.
SPECS = ["2q1s33_q1_q1s16", "q20_q9s30", "q20_2q1s33_q4s18_q1"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("build", "capability", "fields", "kernel"),
    # Each build of each generation, on the GPU it is for.
    [
        ("flash_attn_interface", (9, 0), {}, "flash_attn_3 1.2.3, FlashAttention-3, paged"),
        ("vllm_flash_attn", (9, 0), {}, "vllm 0.99, FlashAttention-3, paged"),
        ("vllm_flash_attn", (9, 0), {"parameters": {"fa_version": 2}}, "vllm 0.99, FlashAttention-2, paged"),
        ("vllm_flash_attn", (8, 0), {}, "vllm 0.99, FlashAttention-2, paged"),
        ("flash_attn", (9, 0), {"block_size": 256}, "flash-attn 1.2.3, FlashAttention-2, paged"),
        ("flash_attn", (12, 0), {"block_size": 256}, "flash-attn 1.2.3, FlashAttention-2, paged"),
    ],
    ids=str,
)
def test_flash(peers, install, measure, build, capability, fields, kernel, spec):
    install(getattr(peers, build)([]))
    row = measure("flash", spec, standard=True, capability=capability, **fields)
    assert row.success, row.error
    assert row.kernels == {"all": kernel}
    assert row.check.lse_error is not None


def test_flash_prefers_3_and_the_authors(peers, install, measure):
    install(peers.flash_attn([]), peers.vllm_flash_attn([]), peers.flash_attn_interface([]))
    assert measure("flash", "2q1s33", standard=True).backend_version == "flash_attn_3 1.2.3, FlashAttention-3"


def test_flash_splits(peers, install, measure):
    calls = []
    install(peers.vllm_flash_attn(calls))
    assert measure("flash", "2q1s33", standard=True, parameters={"num_splits": 5}).success
    assert {what["num_splits"] for _, what in calls} == {5}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"parameters": {"fa_version": 3}}, "FlashAttention-3: pip install vllm"),
        ({"parameters": {"num_splits": 2}}, "num_splits is FlashAttention-3's, and what runs is FlashAttention-2"),
        ({"block_size": 64}, "flash-attn 1.2.3, FlashAttention-2 takes pages of multiples of 256, got 64"),
        ({"head_dim": 320}, "takes head dims up to 256 that are multiples of 8, got 320"),
        ({"head_dim": 36}, "takes head dims up to 256 that are multiples of 8, got 36"),
        ({"dtype": "fp32"}, "takes bf16 and fp16, got float32"),
    ],
    ids=str,
)
def test_what_flash_cannot(peers, install, measure, fields, reason):
    calls = []
    install(peers.flash_attn(calls))
    row = measure("flash", "2q1s33", standard=True, **{"block_size": 256, **fields})
    assert row.status == "unsupported"
    assert row.error.startswith(reason)
    assert calls == []


def test_flash_attention_3_on_another_gpu(peers, install, measure):
    install(peers.vllm_flash_attn([]))
    row = measure("flash", "2q1s33", standard=True, capability=(8, 6), parameters={"fa_version": 3})
    assert row.error == "FlashAttention-3 needs compute capability 9.0, this GPU has 8.6"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("parameters", [{}, {"decode_kernel": "cuda_cores"}, {"backend": "fa2"}], ids=str)
def test_flashinfer(peers, install, measure, spec, heads, parameters):
    install(peers.flashinfer([]))
    row = measure("flashinfer", spec, standard=True, num_q_heads=heads[0], num_kv_heads=heads[1], parameters=parameters)
    assert row.success, row.error
    assert row.backend_version == "flashinfer-python 1.2.3"


def test_flashinfer_takes_each_kind_in_one_call(peers, install, measure):
    calls = []
    install(peers.flashinfer(calls))
    row = measure("flashinfer", "q20_q4s18_2q1s33_q1", standard=True, num_layers=1)
    assert row.kernels == {"all": "flashinfer-python 1.2.3, prefill paged, fa3 + decode paged, fa3"}
    assert [name for name, _ in calls][:4] == ["prefill plan", "decode plan", "prefill run", "decode run"]
    assert [what["requests"] for name, what in calls if name.endswith("run")][:2] == [2, 3]
    assert sum(name.endswith("plan") for name, _ in calls) == 2  # outside the calls


def test_flashinfer_on_cuda_cores(peers, install, measure):
    calls = []
    install(peers.flashinfer(calls))
    row = measure("flashinfer", "2q1s33", standard=True, parameters={"decode_kernel": "cuda_cores"})
    assert row.kernels == {"all": "flashinfer-python 1.2.3, decode paged, cuda cores"}
    assert not calls[0][1]["tensor_cores"]


@pytest.mark.parametrize("spec", ["q20", "2q1s33"])
def test_flashinfer_that_runs_another_kernel_is_an_error(peers, install, measure, spec):
    install(peers.flashinfer([], chosen="fa2", stubborn=True))
    with pytest.raises(RuntimeError, match="asked for its fa3 kernel and planned fa2"):
        measure("flashinfer", spec, standard=True, parameters={"backend": "fa3"})
