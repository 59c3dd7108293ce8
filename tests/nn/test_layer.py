"""The four implementations agree, however the tokens come in."""

import pytest
import torch

from mlakit.nn import ATTN_IMPLS, LatentCache
from tests.support.layers import causal_mask, make_layers, random_x

EXACT = {"rtol": 1e-9, "atol": 1e-11}


# The seed's batch sizes; lengths from one token to past the fast path, at its edges and at no multiple of a page.
@pytest.mark.parametrize(
    ("bsz", "seqlen"), [(1, 1), (1, 512), (2, 255), (3, 256), (2, 257), (8, 64), (16, 33), (32, 32)]
)
@pytest.mark.parametrize("mask", ["causal", None, "tensor"])
def test_prefill_agrees_in_float64(bsz, seqlen, mask):
    layers = make_layers(max_batch_size=bsz, max_seq_len=512)
    x = random_x(layers["naive"], bsz, seqlen)
    freqs = layers["naive"].precompute_freqs_cis()[:seqlen]
    given = causal_mask(seqlen) if mask == "tensor" else mask
    outs = {impl: layer(x, 0, freqs, given) for impl, layer in layers.items()}
    assert outs["naive"].shape == x.shape
    for impl in ATTN_IMPLS[1:]:
        torch.testing.assert_close(outs[impl], outs["naive"], **EXACT, msg=impl)


# Without a low rank of queries; without YaRN and with it, past the original context; one head; pages of one token;
# a wide rope part.
@pytest.mark.parametrize(
    "args",
    [
        {"q_lora_rank": 0},
        {"original_seq_len": 16, "max_seq_len": 96},
        {"n_heads": 1},
        {"page_size": 1},
        {"qk_rope_head_dim": 32, "qk_nope_head_dim": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_tokens_may_come_in_pieces(impl, args):
    """A prefill, a chunk, speculative tokens and single steps give what all at once gives."""
    layer = make_layers(impls=(impl,), **args)[impl]
    x = random_x(layer, 2, 40)
    freqs = layer.precompute_freqs_cis()
    whole = layer(x, 0, freqs[:40], "causal")
    pieces, begin = [], 0
    for seqlen, mask in [
        (17, "causal"),
        (12, causal_mask(12)),
        (4, causal_mask(4, 33)),
        (1, None),
        (1, "causal"),
        (5, "causal"),
    ]:
        end = begin + seqlen
        pieces.append(layer(x[:, begin:end], begin, freqs[begin:end], mask))
        begin = end
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)


@pytest.mark.parametrize("impl", ATTN_IMPLS)
@pytest.mark.parametrize("mask", ["causal", None])
def test_requests_of_different_lengths(impl, mask):
    """With a tensor of starts, every request is what it would be alone; what lies behind it is not looked at."""
    layer = make_layers(impls=(impl,))[impl]
    x, freqs = random_x(layer, 3, 30), layer.precompute_freqs_cis()
    starts = [0, 26, 11]
    cache, alone = layer.make_cache(), []
    for tensor in (cache.pages,) if isinstance(cache, LatentCache) else (cache.k, cache.v):
        tensor.fill_(torch.nan)
    for request, start in enumerate(starts):
        own = layer.make_cache(1)
        if start:
            layer(x[request : request + 1, :start], 0, freqs[:start], "causal", own)
        alone.append(layer(x[request : request + 1, start : start + 4], start, freqs[start : start + 4], mask, own))
        _copy_request(own, cache, request, start)
    new = torch.stack([x[request, start : start + 4] for request, start in enumerate(starts)])
    together = layer(new, torch.tensor(starts, dtype=torch.int32), freqs, mask, cache)
    torch.testing.assert_close(together, torch.cat(alone), **EXACT)


def _copy_request(own, cache, request, tokens):
    if isinstance(cache, LatentCache):
        pages = cache.block_table[request].long()
        rows = cache.pages[pages].flatten(0, 1)
        rows[:tokens] = own.pages.flatten(0, 1)[:tokens]
        cache.pages[pages] = rows.view(len(pages), cache.page_size, -1)
    else:
        cache.k[request, :tokens] = own.k[0, :tokens]
        cache.v[request, :tokens] = own.v[0, :tokens]


@pytest.mark.parametrize("impl", ["absorb", "fused"])
@pytest.mark.parametrize("start_is_tensor", [False, True])
def test_pages_may_lie_anywhere(impl, start_is_tensor):
    """Shuffled pages, twice as many as needed, NaN in the unused ones and in tails."""
    layer = make_layers(impls=(impl,))[impl]
    x, freqs = random_x(layer, 4, 21), layer.precompute_freqs_cis()
    expected = torch.cat((layer(x[:, :18], 0, freqs[:18], "causal"), layer(x[:, 18:], 18, freqs[18:21], "causal")), 1)
    pages = torch.full((4 * 3 * 2, 8, layer.args.latent_dim), torch.nan, dtype=x.dtype)
    table = torch.randperm(24)[:12].view(4, 3).to(torch.int32)
    cache = LatentCache(pages, table, layer.args.kv_lora_rank, x.dtype)
    first = layer(x[:, :18], 0, freqs[:18], "causal", cache)
    if start_is_tensor:
        second = layer(x[:, 18:], torch.full((4,), 18), freqs, "causal", cache)
    else:
        second = layer(x[:, 18:], 18, freqs[18:21], "causal", cache)
    torch.testing.assert_close(torch.cat((first, second), 1), expected, **EXACT)
    assert int(pages.isfinite().all(-1).sum()) == 4 * 21


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_bfloat16_is_near_float64_at_any_scale_of_the_input(scale):
    """No further off than twice the standard path's own error: large scores feel every rounding before them."""
    exact = make_layers(impls=("naive",))["naive"]
    layers = make_layers(torch.bfloat16)
    standard = make_layers(torch.bfloat16, impls=("naive",), fast_path_tokens=0)["naive"]
    exact.load_state_dict(standard.state_dict())  # the rounded weights, in float64
    x = (random_x(standard, 2, 48) * scale).to(torch.bfloat16)
    freqs = exact.precompute_freqs_cis()
    for begin, end in ((0, 44), (44, 47), (47, 48)):
        given = (begin, freqs[begin:end], "causal")
        expected = exact(x[:, begin:end].double(), *given)
        yardstick = _error(standard(x[:, begin:end], *given), expected)
        if scale <= 1:  # seven roundings to 8 bits in a row, one for each tensor between x and the result
            assert yardstick < 7 * 2**-8
        for impl, layer in layers.items():
            assert _error(layer(x[:, begin:end], *given), expected) < 2 * yardstick, impl


def _error(actual, expected):
    return (actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()


@pytest.mark.parametrize("impl", ["naive", "absorb"])
def test_any_other_mask(impl):
    """A window of 5 tokens, over new tokens and over a context, against both ways of writing it."""
    layer = make_layers(impls=(impl,))[impl]
    x, freqs = random_x(layer, 2, 30), layer.precompute_freqs_cis()
    position = torch.arange(30)
    age = position[:, None] - position
    window = torch.zeros(30, 30, dtype=torch.float64).masked_fill_((age < 0) | (age >= 5), -torch.inf)
    whole = layer(x, 0, freqs[:30], window)
    assert not torch.allclose(whole, layer(x, 0, freqs[:30], "causal"))
    layer(x[:, :20], 0, freqs[:20], window[:20, :20])
    torch.testing.assert_close(layer(x[:, 20:], 20, freqs[20:30], window[20:]), whole[:, 20:], **EXACT)
    per_request = torch.stack((window, causal_mask(30)))
    both = layer(x, 0, freqs[:30], per_request)
    torch.testing.assert_close(both[0], whole[0], **EXACT)
    torch.testing.assert_close(both[1], layer(x, 0, freqs[:30], "causal")[1], **EXACT)


def test_a_mask_that_is_changed_is_looked_at_again():
    layer = make_layers(impls=("naive",))["naive"]
    x, freqs = random_x(layer, 1, 6), layer.precompute_freqs_cis()[:6]
    mask = causal_mask(6)
    causal = layer(x, 0, freqs, mask)
    mask.zero_()
    torch.testing.assert_close(layer(x, 0, freqs, mask), layer(x, 0, freqs, None), **EXACT)
    assert not torch.allclose(layer(x, 0, freqs, mask), causal)


def test_the_module_prints_what_it_is():
    text = repr(make_layers(impls=("fused",))["fused"])
    assert "attn_impl=fused" in text
    assert "in_features=48, out_features=24" in text


def test_the_state_dict_has_deepseeks_names():
    layer = make_layers(impls=("fused",))["fused"]
    names = [
        "wq_a.weight",
        "q_norm.weight",
        "wq_b.weight",
        "wkv_a.weight",
        "kv_norm.weight",
        "wkv_b.weight",
        "wo.weight",
    ]
    assert list(layer.state_dict()) == names
    assert "wq.weight" in make_layers(impls=("fused",), q_lora_rank=0)["fused"].state_dict()
    assert "wkv_b.scale" in make_layers(impls=("fused",), dtype="fp8")["fused"].state_dict()
