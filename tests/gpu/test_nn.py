"""The layer on a GPU: right in bfloat16 and float16 by every implementation, under CUDA graphs and torch.compile."""

import pytest
import torch

from mlakit.nn import ATTN_IMPLS, KVCache, LatentCache
from tests.support.layers import causal_mask, make_layers, random_x

pytestmark = pytest.mark.gpu

# DeepSeek's heads at a width that fits a test; dimensions of the tiny layer, none a power of two but one.
DEEPSEEK = {
    "dim": 512,
    "n_heads": 16,
    "q_lora_rank": 192,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "page_size": 64,
    "max_seq_len": 1024,
}


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def _exact(layer, **args):
    exact = make_layers(impls=("naive",), device="cuda", **args)["naive"]
    exact.load_state_dict(layer.state_dict())
    return exact


# Prefill, a chunk, speculative tokens, steps; the seed's batch sizes; within the fast path and past it; few heads, many
# heads, heads that fill no tile.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bsz", "seqlen", "args"),
    [
        (1, 32, {}),
        (8, 257, {}),
        (32, 256, {}),
        (2, 900, {}),
        (3, 100, {"n_heads": 3}),
        (2, 70, {"n_heads": 128}),
        (2, 40, "tiny"),
    ],
    ids=str,
)
def test_against_float64(dtype, bsz, seqlen, args):
    dims = {} if args == "tiny" else {**DEEPSEEK, **args}
    dims["max_batch_size"] = bsz
    layers = make_layers(dtype, device="cuda", **dims)
    exact = _exact(layers["naive"], **dims)
    x, freqs = random_x(exact, bsz, seqlen + 8).to(dtype), exact.precompute_freqs_cis()
    pieces = [(0, seqlen, "causal"), (seqlen, seqlen + 6, "causal"), (seqlen + 6, seqlen + 8, causal_mask(2).cuda())]
    yardstick = {}
    for impl in ("naive", "absorb", "naive+flash", "fused"):
        for begin, end, mask in pieces:
            given = (begin, freqs[begin:end], mask)
            expected = exact(x[:, begin:end].double(), *given)
            error = _error(layers[impl](x[:, begin:end], *given), expected)
            yardstick.setdefault(begin, error)
            assert error < max(2 * yardstick[begin], 2**-7), (impl, begin)


@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_step_under_a_cuda_graph(impl):
    """Captured once, replayed with other tokens and other lengths."""
    layer = make_layers(torch.bfloat16, device="cuda", impls=(impl,), **DEEPSEEK)[impl]
    freqs, cache = layer.precompute_freqs_cis(), layer.make_cache(4)
    prompt = random_x(layer, 4, 200)
    layer(prompt, 0, freqs[:200], "causal", cache)
    x, start = random_x(layer, 4, 1), torch.tensor([200, 17, 64, 0], dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer(x, start, freqs, None, cache)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x, start, freqs, None, cache)
    for lengths in ([200, 17, 64, 0], [5, 199, 0, 130]):
        x.copy_(random_x(layer, 4, 1))
        start.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        expected = layer(x, start.clone(), freqs, None, cache)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
        for request, length in enumerate(lengths):  # and each is what it would be alone
            alone = _copy(cache, layer, request)
            alone.filled = length
            one = layer(x[request : request + 1], length, freqs[length : length + 1], None, alone)
            torch.testing.assert_close(out[request : request + 1], one, rtol=2e-2, atol=2e-2)


def test_branches_of_a_graph_keep_out_of_each_others_memory():
    """Four layers one after another, so that what a layer's branch frees is the next one's to take."""
    layers = [make_layers(torch.bfloat16, device="cuda", impls=("fused",), **DEEPSEEK)["fused"] for _ in range(4)]
    freqs, caches = layers[0].precompute_freqs_cis(), [layer.make_cache(4) for layer in layers]

    def step(x, start):
        for layer, cache in zip(layers, caches, strict=True):
            x = x + layer(x, start, freqs, None, cache)
        return x

    x, start = random_x(layers[0], 4, 1), torch.tensor([200, 17, 64, 0], dtype=torch.int32, device="cuda")
    for cache in caches:
        cache.pages.normal_()
    step(x, start)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x, start)
    for lengths in ([200, 17, 64, 0], [5, 199, 0, 130]):
        x.copy_(random_x(layers[0], 4, 1))
        start.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.testing.assert_close(out, step(x, start), rtol=1e-2, atol=1e-2)


def _copy(cache, layer, request):
    if isinstance(cache, LatentCache):
        pages = cache.pages[cache.block_table[request].long()]
        table = torch.arange(len(pages), dtype=torch.int32, device="cuda")[None]
        return LatentCache(pages, table, cache.kv_lora_rank, cache.dtype, contiguous=True)
    return KVCache(cache.k[request : request + 1].clone(), cache.v[request : request + 1].clone())


@pytest.mark.parametrize("impl", ["absorb", "fused"])
def test_shuffled_pages_with_nan_between(impl):
    layer = make_layers(torch.bfloat16, device="cuda", impls=(impl,), **DEEPSEEK)[impl]
    x, freqs = random_x(layer, 3, 300), layer.precompute_freqs_cis()
    pages = torch.full((64, 64, 576), torch.nan, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(64, device="cuda")[:15].view(3, 5).to(torch.int32)
    cache, own = LatentCache(pages, table, 512, torch.bfloat16), layer.make_cache(3, 320)
    for begin, end in ((0, 290), (290, 299), (299, 300)):
        given = (x[:, begin:end], begin, freqs[begin:end], "causal")
        torch.testing.assert_close(layer(*given, cache), layer(*given, own), rtol=1e-2, atol=1e-2)
    assert int(pages.isfinite().all(-1).sum()) == 900


@pytest.mark.parametrize("impl", ["naive", "naive+flash", "fused"])
@pytest.mark.parametrize("seqlen", [100, 300])
def test_gradients(impl, seqlen):
    """Through the kernels' own backward, against float64."""
    dims = {**DEEPSEEK, "n_heads": 4}
    layer = make_layers(torch.bfloat16, device="cuda", impls=(impl,), **dims)[impl]
    exact = _exact(layer, **dims)
    x = random_x(layer, 2, seqlen)
    target = torch.randn_like(x)
    grads = []
    for module in (layer, exact):
        module.requires_grad_(True).train()
        own = x.to(module.wo.weight.dtype, copy=True).requires_grad_(True)
        (module(own, 0, module.precompute_freqs_cis()[:seqlen], "causal") * target).sum().backward()
        grads.append({"x": own.grad, **{name: p.grad for name, p in module.named_parameters()}})
    for name, expected in grads[1].items():
        assert _error(grads[0][name], expected) < 2**-5, name


@pytest.mark.parametrize("gemm_impl", ["bf16", "fp8"])
@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_float8_weights(impl, gemm_impl):
    dims = {**DEEPSEEK, "q_lora_rank": 256}
    layer = make_layers(torch.bfloat16, device="cuda", impls=(impl,), dtype="fp8", gemm_impl=gemm_impl, **dims)[impl]
    exact = make_layers(torch.float64, device="cuda", impls=("naive",), dtype="fp8", **dims)["naive"]
    exact.load_state_dict(layer.state_dict())
    x, freqs = random_x(layer, 2, 130, torch.bfloat16), layer.precompute_freqs_cis()
    for begin, end in ((0, 129), (129, 130)):
        given = (begin, freqs[begin:end], "causal")
        error = _error(layer(x[:, begin:end], *given), exact(x[:, begin:end].double(), *given))
        assert error < (0.1 if gemm_impl == "fp8" else 0.03)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_float8_cache(scale_fmt):
    layer = make_layers(
        torch.bfloat16, device="cuda", impls=("fused",), cache_dtype="fp8", scale_fmt=scale_fmt, **DEEPSEEK
    )["fused"]
    exact = _exact(layer, **DEEPSEEK)
    x, freqs = random_x(layer, 3, 300, torch.bfloat16), layer.precompute_freqs_cis()
    for begin, end in ((0, 280), (280, 299), (299, 300)):
        given = (begin, freqs[begin:end], "causal")
        error = _error(layer(x[:, begin:end], *given), exact(x[:, begin:end].double(), *given))
        assert error < (0.02 if begin == 0 else 0.06), begin
    cache = layer._own_cache
    start = torch.tensor([299, 10, 299], device="cuda")
    mixed = layer(x[:, 299:], start, freqs, None, cache)
    whole = layer(x[:, 299:], 299, freqs[299:300], None, cache)
    torch.testing.assert_close(mixed[::2], whole[::2], rtol=2e-2, atol=2e-2)
    assert not torch.allclose(mixed[1], whole[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_compiled(impl):
    """Inductor's code, one graph, for a prefill, a step and a training step."""
    torch._dynamo.reset()
    layer = make_layers(torch.bfloat16, device="cuda", impls=(impl,), **{**DEEPSEEK, "n_heads": 4})[impl]
    compiled = torch.compile(layer, fullgraph=True)
    x, freqs, cache = random_x(layer, 2, 65), layer.precompute_freqs_cis(), layer.make_cache()
    for begin, end in ((0, 64), (64, 65)):
        given = (x[:, begin:end], begin, freqs[begin:end], "causal", cache)
        torch.testing.assert_close(compiled(*given), layer(*given), rtol=2e-2, atol=2e-2)
    if impl != "absorb":
        layer.requires_grad_(True).train()
        compiled(x, 0, freqs[:65], "causal").float().square().sum().backward()
        found = layer.wkv_b.weight.grad.clone()
        layer.zero_grad()
        layer(x, 0, freqs[:65], "causal").float().square().sum().backward()
        assert _error(found, layer.wkv_b.weight.grad.double()) < 0.03


def test_the_fused_step_waits_for_nothing():
    """No synchronization in a prefill, a chunk or a step: an error if PyTorch sees one."""
    layer = make_layers(torch.bfloat16, device="cuda", impls=("fused",), **DEEPSEEK)["fused"]
    x, freqs, cache = random_x(layer, 2, 400), layer.precompute_freqs_cis(), layer.make_cache()
    start = torch.tensor([399, 399], device="cuda", dtype=torch.int32)
    calls = [
        lambda: layer(x[:, :200], 0, freqs[:200], "causal", cache),
        lambda: layer(x[:, 200:399], 200, freqs[200:399], "causal", cache),
        lambda: layer(x[:, 399:], start, freqs, None, cache),
    ]
    for call in calls:
        call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_a_prefill():
    """No tensor of scores: the fused layer's temporaries grow with the tokens, not with their square."""
    layer = make_layers(torch.bfloat16, device="cuda", impls=("fused",), **{**DEEPSEEK, "max_seq_len": 8192})["fused"]
    freqs, cache = layer.precompute_freqs_cis(), layer.make_cache(1)
    peaks = []
    for seqlen in (4096, 8192):
        x = random_x(layer, 1, seqlen)
        layer(x, 0, freqs[:seqlen], "causal", cache)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x, 0, freqs[:seqlen], "causal", cache)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]
