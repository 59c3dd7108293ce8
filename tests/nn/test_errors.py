"""What a user gets wrong is said before any work, with what was expected and what was found."""

import re

import pytest
import torch

from mlakit.nn import ATTN_IMPLS, Args, KVCache, LatentCache, get_mla
from tests.support.layers import TINY, causal_mask, make_layers, random_x


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_heads": 0}, "n_heads must be a whole number of at least 1, got 0"),
        ({"dim": 2.5}, "dim must be a whole number of at least 1, got 2.5"),
        ({"max_batch_size": True}, "max_batch_size must be a whole number of at least 1, got True"),
        ({"q_lora_rank": -1}, "q_lora_rank must be a whole number of at least 0, got -1"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, as rope turns pairs; got 7"),
        ({"page_size": 48}, "page_size must be a power of two, got 48"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number, got -1.0"),
        ({"eps": float("nan")}, "eps must be a positive number, got nan"),
        ({"dtype": "fp16"}, "dtype cannot be 'fp16'; did you mean 'bf16'? valid: bf16, fp8"),
        ({"attn_impl": "absorbed"}, "did you mean 'absorb'? valid: absorb, fused, naive, naive+flash"),
        ({"scale_fmt": "e8m0"}, "scale_fmt cannot be 'e8m0'; did you mean 'ue8m0'? valid: ue8m0 or None"),
        ({"gemm_impl": "fp8"}, "gemm_impl='fp8' needs fp8 weights (dtype='fp8'), got dtype='bf16'"),
        (
            {"attn_impl": "naive", "cache_dtype": "fp8"},
            "cache_dtype='fp8' is for absorb and fused, got attn_impl='naive'",
        ),
        ({"kv_lora_rank": 96, "cache_dtype": "fp8"}, "needs a kv_lora_rank that is a multiple of 128, got 96"),
    ],
    ids=str,
)
def test_bad_args(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Args(**wrong)


def test_an_unknown_implementation_lists_the_valid_ones():
    with pytest.raises(
        ValueError, match=re.escape("unknown attn_impl 'fuse'; did you mean 'fused'? valid: absorb, fused")
    ):
        get_mla("fuse", Args())


@pytest.fixture(scope="module")
def layers():
    return make_layers()


def _given(layer, **changes):
    given = {
        "x": random_x(layer, 2, 4),
        "start_pos": 0,
        "freqs_cis": layer.precompute_freqs_cis()[:4],
        "mask": "causal",
    }
    return {**given, **changes}


@pytest.mark.parametrize("impl", ATTN_IMPLS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 4, 47).double()}, "x must have shape [bsz, seqlen, 48], none of them 0, got [2, 4, 47]"),
        ({"x": torch.zeros(2, 0, 48).double()}, "none of them 0, got [2, 0, 48]"),
        ({"x": torch.zeros(4, 48).double()}, "x must have shape [bsz, seqlen, 48]"),
        ({"x": torch.zeros(2, 4, 48)}, "x must be torch.float64 like the weights, got torch.float32"),
        ({"x": torch.zeros(2, 4, 48, device="meta").double()}, "x must be on cpu like the weights, got meta"),
        ({"start_pos": -1}, "start_pos must be a whole number of at least 0 or a tensor, got -1"),
        ({"start_pos": 1.0}, "start_pos must be a whole number of at least 0 or a tensor, got 1.0"),
        ({"start_pos": 93}, "the cache has room for 96 tokens a request (max_seq_len), got start_pos 93 + 4 new ones"),
        ({"start_pos": torch.zeros(3, dtype=torch.int32)}, "start_pos must be an int32 or int64 tensor [2] on cpu"),
        ({"start_pos": torch.zeros(2)}, "got torch.float32 [2] on cpu"),
        (
            {"freqs_cis": torch.ones(5, 4, dtype=torch.complex64)},
            "freqs_cis must have shape [4, 4] (a row a new token), got [5, 4]",
        ),
        ({"freqs_cis": torch.ones(4, 8)}, "freqs_cis must have shape [4, 4]"),
        ({"freqs_cis": torch.ones(4, 4)}, "freqs_cis must be complex and on cpu, got torch.float32 on cpu"),
        ({"mask": "triangular"}, "mask must be None, 'causal' or an additive tensor, got 'triangular'"),
        ({"mask": causal_mask(5)}, "mask must have shape [4, 4] or [2, 4, 4], got [5, 5]"),
        (
            {"mask": torch.ones(4, 4, dtype=torch.bool)},
            "mask must be floating point and is added to the scores, got torch.bool",
        ),
        ({"x": torch.zeros(5, 4, 48).double()}, "the cache has room for 4 requests (max_batch_size), got 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(layers, impl, changes, message):
    layer = layers[impl]
    layer(**_given(layer))  # so that there is a cache
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(**_given(layer, **changes))


@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_earlier_tokens_must_be_there(impl):
    layer = make_layers(impls=(impl,))[impl]
    with pytest.raises(ValueError, match="no earlier tokens are kept, got start_pos=4"):
        layer(**_given(layer, start_pos=4))
    layer(**_given(layer))
    with pytest.raises(ValueError, match=re.escape("the cache holds 4 tokens, got start_pos=5")):
        layer(**_given(layer, start_pos=5))


@pytest.mark.parametrize("impl", ["naive+flash", "fused"])
def test_kernels_take_no_other_mask(layers, impl):
    layer = layers[impl]
    with pytest.raises(
        ValueError, match=re.escape(f"{impl} takes mask None, 'causal' or a causal tensor, got another")
    ):
        layer(**_given(layer, mask=torch.zeros(4, 4)))


def test_the_cache_must_be_of_the_right_kind(layers):
    naive, fused = layers["naive"], layers["fused"]
    with pytest.raises(ValueError, match="naive keeps a KVCache, got a LatentCache"):
        naive(**_given(naive), cache=fused.make_cache())
    with pytest.raises(ValueError, match="fused keeps a LatentCache, got a KVCache"):
        fused(**_given(fused), cache=naive.make_cache())
    other = Args(**{**TINY, "n_heads": 5})
    with pytest.raises(
        ValueError, match=re.escape("the cache must be of heads and widths (3, 24, 40), got (5, 24, 40)")
    ):
        naive(**_given(naive), cache=KVCache.allocate(other, 2, 8, torch.device("cpu"), torch.float64))
    with pytest.raises(ValueError, match=re.escape("the cache must be torch.float64 on cpu like x, got torch.float32")):
        fused(**_given(fused), cache=fused.make_cache(dtype=torch.float32))
    with pytest.raises(ValueError, match="at least one request of one token, got 0 of 8"):
        naive.make_cache(0, 8)


def test_a_latent_cache_checks_its_parts():
    pages, table = torch.zeros(4, 8, 136), torch.zeros(2, 2, dtype=torch.int32)
    LatentCache(pages, table, 128, torch.float32)
    with pytest.raises(ValueError, match=r"block_table must be torch.int32, got torch.int64"):
        LatentCache(pages, table.long(), 128, torch.float32)
    with pytest.raises(ValueError, match=r"pages must be torch.bfloat16 or torch.uint8, got torch.float32"):
        LatentCache(pages, table, 128, torch.bfloat16)
    with pytest.raises(ValueError, match=r"\[4, 8, 136\] and \[2\]"):
        LatentCache(pages, table[0], 128, torch.float32)


def test_a_device_without_bfloat16_is_refused(monkeypatch):
    layer = make_layers(torch.bfloat16, impls=("fused",))["fused"]
    monkeypatch.setattr("mlakit.nn.mla.capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(
        ValueError, match=re.escape("bfloat16 needs compute capability 8.0 or more, this device has (7, 5)")
    ):
        layer(**_given(layer))
