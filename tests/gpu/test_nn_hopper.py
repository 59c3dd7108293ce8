"""A fused layer's step by kernels that begin before the one before them is done: right, and the same every time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlakit.hardware import capability
from mlakit.nn import fused, hopper_step
from mlakit.testing import poison_
from tests.support.layers import make_layers, random_x

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16

# DeepSeek-V3's heads; a hidden state and a low rank that are no multiples of a tile.
ARGS = {
    "dim": 1088,
    "n_heads": 128,
    "q_lora_rank": 448,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "page_size": 64,
    "max_seq_len": 512,
    "max_batch_size": 32,
}


@pytest.fixture(autouse=True)
def _hopper():
    if capability("cuda") != (9, 0):
        pytest.skip("kernels for compute capability 9.0")


@pytest.fixture
def calls(monkeypatch):
    """How often a step was made by these kernels."""
    found = []
    run = fused._step_on_hopper

    def counting(*args):
        found.append(args)
        return run(*args)

    monkeypatch.setattr(fused, "_step_on_hopper", counting)
    return found


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def _filled(layer, bsz: int, before: int):
    cache = layer.make_cache(bsz, 512)
    if cache.is_fp8:
        layer(random_x(layer, bsz, before), 0, layer.precompute_freqs_cis()[:before], "causal", cache)
    else:
        cache.pages.normal_()
        cache.filled = before
    return cache


# One token, few, as many as the narrower product takes, one more, as many as there may be; several tokens a request.
@pytest.mark.parametrize(
    ("bsz", "seqlen", "dtype"),
    [(1, 1, BF16), (16, 1, BF16), (17, 1, BF16), (32, 1, BF16), (5, 3, BF16), (3, 1, torch.float16)],
    ids=str,
)
def test_against_float64(bsz, seqlen, dtype, calls, monkeypatch):
    layer = make_layers(dtype, device="cuda", impls=("fused",), **ARGS)["fused"]
    exact = make_layers(device="cuda", impls=("absorb",), **ARGS)["absorb"]
    exact.load_state_dict(layer.state_dict())
    freqs, before = layer.precompute_freqs_cis(), 200
    cache = _filled(layer, bsz, before)
    kept = exact.make_cache(bsz, 512)
    kept.pages.copy_(cache.pages)
    kept.filled = before
    x = random_x(layer, bsz, seqlen)
    expected = exact(x.double(), before, freqs[before : before + seqlen], "causal", kept)
    number = layer(x, before, freqs[before : before + seqlen], "causal", cache)
    start = torch.full((bsz,), before, dtype=torch.int32, device="cuda")
    tensor = layer(x, start, freqs, "causal", cache)
    assert len(calls) == 2
    monkeypatch.setattr(hopper_step, "suits", lambda *_: False)
    apart = layer(x, before, freqs[before : before + seqlen], "causal", cache)
    assert torch.equal(number, tensor)
    assert _error(number, expected) < max(1.5 * _error(apart, expected), 2**-9)


def test_other_lengths_under_a_cuda_graph(calls):
    layer = make_layers(BF16, device="cuda", impls=("fused",), **ARGS)["fused"]
    freqs, cache = layer.precompute_freqs_cis(), _filled(layer, 4, 200)
    x, start = random_x(layer, 4, 1), torch.tensor([200, 17, 64, 0], device="cuda")
    layer(x, start, freqs, None, cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(layer(x, start, freqs, None, cache), start, freqs, None, cache)
    for lengths in ([200, 17, 64, 0], [5, 199, 0, 130]):
        x.copy_(random_x(layer, 4, 1))
        start.copy_(torch.tensor(lengths))
        for _ in range(3):
            poison_(out)
            graph.replay()
            once = layer(x, start, freqs, None, cache)
            assert torch.equal(out, layer(once, start, freqs, None, cache))
    assert len(calls) == 3 + 2 * 3 * 2


def test_a_float8_cache(calls):
    layer = make_layers(BF16, device="cuda", impls=("fused",), cache_dtype="fp8", **ARGS)["fused"]
    cache, freqs = _filled(layer, 2, 130), layer.precompute_freqs_cis()
    x = random_x(layer, 2, 1)
    found = layer(x, 130, freqs[130:131], None, cache)
    assert len(calls) == 1
    plain = make_layers(BF16, device="cuda", impls=("fused",), **ARGS)["fused"]
    plain.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    whole = plain.make_cache(2, 512)
    whole.pages.view(2, 512, -1)[:, :131] = cache.read(2, 131)
    whole.filled = 130
    assert _error(found, plain(x, 130, freqs[130:131], None, whole).double()) < 0.02


def test_rows_that_begin_anywhere(calls):
    layer = make_layers(BF16, device="cuda", impls=("fused",), **ARGS)["fused"]
    cache, freqs = _filled(layer, 2, 30), layer.precompute_freqs_cis()
    x = random_x(layer, 2, 1)
    odd = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x).copy_(x)
    wide = torch.full((2, 1, 2000), torch.nan, dtype=x.dtype, device="cuda")
    wide[..., :1088] = x
    found = [layer(some, 30, freqs[30:31], None, cache) for some in (x, odd, wide[..., :1088])]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert len(calls) == 3


# Products of float8, and of weights that are dequantized first, which other kernels multiply.
@pytest.mark.parametrize(("gemm_impl", "tokens"), [("fp8", 1), ("fp8", 20), ("bf16", 1)])
def test_float8_weights(gemm_impl, tokens, calls):
    args = {**ARGS, "dim": 1152, "q_lora_rank": 384}
    layer = make_layers(BF16, device="cuda", impls=("fused",), dtype="fp8", gemm_impl=gemm_impl, **args)["fused"]
    exact = make_layers(device="cuda", impls=("absorb",), dtype="fp8", **args)["absorb"]
    exact.load_state_dict(layer.state_dict())
    freqs, cache = layer.precompute_freqs_cis(), layer.make_cache(tokens, 512)
    kept = exact.make_cache(tokens, 512, torch.float64)  # of float8 weights it would be bfloat16
    cache.pages.normal_()
    kept.pages.copy_(cache.pages)
    kept.filled = cache.filled = 130
    x = random_x(exact, tokens, 1, BF16)
    found = layer(x, 130, freqs[130:131], None, cache)
    assert len(calls) == (gemm_impl == "fp8")
    expected = exact(x.double(), 130, freqs[130:131], None, kept)
    assert _error(found, expected) < (0.1 if gemm_impl == "fp8" else 0.03)


def test_what_is_left_to_the_other_kernels(calls):
    """A gradient, 33 tokens, few heads, other dims."""
    layer = make_layers(BF16, device="cuda", impls=("fused",), **ARGS)["fused"]
    freqs = layer.precompute_freqs_cis()
    cache = _filled(layer, 11, 30)
    layer(random_x(layer, 11, 3), 30, freqs[30:33], "causal", cache)
    with torch.enable_grad():
        x = random_x(layer, 1, 1).requires_grad_()
        layer(x, 33, freqs[33:34], None, cache).sum().backward()
    assert x.grad is not None
    for other in ({"n_heads": 16}, {"qk_nope_head_dim": 64}):
        layer = make_layers(BF16, device="cuda", impls=("fused",), **{**ARGS, **other})["fused"]
        cache = _filled(layer, 1, 30)
        layer(random_x(layer, 1, 1, BF16), 30, freqs[30:31], None, cache)
    assert not calls


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_access_out_of_bounds_and_no_race(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        pytest.skip("compute-sanitizer is not installed")
    script = Path(__file__).parent / "sanitize_linear.py"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "86", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.count("right: ") == 4, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, done.stdout[-3000:]
