"""Short sequences take the short path, others the standard one; both give the same.

The question of the reviewer of the pull request that this comes from (seed 004): is behaviour preserved for naive and
for absorb, the float8 weights' dequantization included, where the short path is not taken?
"""

import pytest
import torch

from mlakit.nn import naive
from tests.support.deepseek_layer import DeepSeekMLA
from tests.support.layers import causal_mask, make_layers, random_x


@pytest.fixture
def taken(monkeypatch):
    """Counts how often the short path is taken."""
    calls = []
    original = naive.attend_to_new
    monkeypatch.setattr(naive, "attend_to_new", lambda *args: calls.append(1) or original(*args))
    return calls


# Both sides of the threshold; a parameter moves it, and 0 turns the path off.
@pytest.mark.parametrize(
    ("seqlen", "tokens", "is_short"),
    [
        (1, 256, True),
        (255, 256, True),
        (256, 256, True),
        (257, 256, False),
        (12, 12, True),
        (13, 12, False),
        (1, 0, False),
    ],
)
@pytest.mark.parametrize("mask", [None, "causal", "tensor"])
def test_taken_up_to_the_threshold(taken, seqlen, tokens, is_short, mask):
    layer = make_layers(impls=("naive",), max_seq_len=257, fast_path_tokens=tokens)["naive"]
    x, freqs = random_x(layer, 1, seqlen), layer.precompute_freqs_cis()[:seqlen]
    layer(x, 0, freqs, causal_mask(seqlen) if mask == "tensor" else mask)
    assert bool(taken) == is_short


def test_not_taken_with_another_mask_or_behind_a_context(taken):
    layer = make_layers(impls=("naive",))["naive"]
    x, freqs = random_x(layer, 1, 8), layer.precompute_freqs_cis()
    layer(x, 0, freqs[:8], causal_mask(8).roll(1, 1))
    layer(x[:, :1], 8, freqs[8:9], None)
    layer(x[:, :1], torch.tensor([8]), freqs, None)
    assert not taken


def _baseline(impl, layer, compute):
    """DeepSeek's own layer with the same weights."""
    baseline = DeepSeekMLA(layer.args, impl, compute)
    baseline.load_state_dict(layer.state_dict())
    return baseline


@pytest.mark.parametrize("impl", ["naive", "absorb"])
@pytest.mark.parametrize("seqlen", [255, 256, 257])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_behaviour_is_preserved(impl, seqlen, masked, dtype):
    """Against DeepSeek's own code, and a step of decode behind it: to bfloat16's rounding, and in float64."""
    for compute in (torch.bfloat16, torch.float64):
        layer = make_layers(compute, impls=(impl,), dtype=dtype, max_seq_len=260)[impl]
        baseline = _baseline(impl, layer, compute)
        x, freqs = random_x(layer, 2, seqlen + 1, compute), layer.precompute_freqs_cis()
        mask = causal_mask(seqlen, dtype=compute) if masked else None
        with torch.no_grad():
            expected = baseline(x[:, :seqlen], 0, freqs[:seqlen], mask)
            actual = layer(x[:, :seqlen], 0, freqs[:seqlen], mask)
            expected_next = baseline(x[:, seqlen:], seqlen, freqs[seqlen : seqlen + 1], None)
            actual_next = layer(x[:, seqlen:], seqlen, freqs[seqlen : seqlen + 1], None)
        exact = compute == torch.float64
        for found, wanted in ((actual, expected), (actual_next, expected_next)):
            if exact:
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
            else:
                torch.testing.assert_close(found, wanted, rtol=1.5e-2, atol=1.5e-2)


@pytest.mark.parametrize("bsz", [1, 8, 16, 32])
@pytest.mark.parametrize("seqlen", [32, 100])
def test_it_equals_the_standard_path(bsz, seqlen):
    short = make_layers(torch.bfloat16, impls=("naive",), max_batch_size=32)["naive"]
    standard = make_layers(torch.bfloat16, impls=("naive",), max_batch_size=32, fast_path_tokens=0, max_seq_len=128)[
        "naive"
    ]
    x, freqs = random_x(short, bsz, seqlen), standard.precompute_freqs_cis()[:seqlen]
    if seqlen > 96:
        short = make_layers(torch.bfloat16, impls=("naive",), max_batch_size=32, max_seq_len=128)["naive"]
    for mask in ("causal", None):
        torch.testing.assert_close(short(x, 0, freqs, mask), standard(x, 0, freqs, mask), rtol=1.5e-2, atol=1.5e-2)


def test_its_softmax_is_in_float32():
    """Summed in bfloat16, 256 weights of 1 stop growing at 256 and those of 200 keys are off by far more than this."""
    q = torch.zeros(1, 256, 1, 8, dtype=torch.bfloat16)
    v = torch.ones(1, 256, 1, 8, dtype=torch.bfloat16)
    from mlakit.nn.flash import batched_attention

    out = batched_attention(q, q, v, 1.0, causal=True)
    assert (out.float() - 1).abs().max() <= 2**-8  # each weight is rounded once
