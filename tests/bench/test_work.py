import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.bench.batch_spec import BatchRequest, parse_batch_spec
from mlakit.bench.work import Work, mla_candidates, standard_work, visible_pairs
from mlakit.dims import MLADims, StandardDims

# 2 new tokens of 3 see 2 and 3 keys, one of 2 sees 2: 7 pairs, 3 tokens, 5 keys. No two sizes alike, so that none can
# stand for another unnoticed.
REQUESTS = [BatchRequest(2, 3), BatchRequest(1, 2)]
DIMS = MLADims(num_heads=2, kv_lora_rank=3, qk_nope_head_dim=5, qk_rope_head_dim=2, v_head_dim=4)
SHAPES = st.builds(lambda q, context: BatchRequest(q, q + context), st.integers(1, 12), st.integers(0, 12))


@given(st.lists(SHAPES, max_size=5))
def test_visible_pairs_by_brute_force(requests):
    pairs = [
        (query, key)
        for request in requests
        for query in range(request.q_len)
        for key in range(request.kv_len)
        if key <= request.context_len + query
    ]
    assert visible_pairs(requests) == len(pairs)


@pytest.mark.parametrize(
    ("spec", "pairs"),
    # A decode sees all, a prefill the lower triangle, an extend its context and a triangle.
    [("q1s1k", 1024), ("q4", 10), ("q4s10", 6 * 4 + 10), ("3q4_2q1s7", 3 * 10 + 2 * 7)],
)
def test_visible_pairs(spec, pairs):
    assert visible_pairs(parse_batch_spec(spec)) == pairs


@pytest.mark.parametrize(
    ("pipeline", "scope", "mode", "flops", "elements"),
    # Counted by hand. Latent 5 wide, query and key heads 7; a pair costs 2 operations for each of its head's key and
    # value entries; the up-projections hold 2 heads * (5 + 4) * 3 = 54 weights.
    [
        # q 3*2*5, out 3*2*3, cache 5*5; 7 pairs * 2 heads * (5 + 3) * 2
        ("decode", "attention", "mqa", 224, 30 + 18 + 25),
        ("prefill", "attention", "mqa", 224, 30 + 18 + 25),
        # q 3*2*7, out 3*2*4, k 5*2*7, v 5*2*4; 7 pairs * 2 heads * (7 + 4) * 2
        ("prefill", "attention", "mha", 308, 42 + 24 + 70 + 40),
        # the same from the cache, whose 5 keys each go through the 54 weights: 308 + 5 * 54 * 2
        ("decode", "attention", "mha", 848, 42 + 24 + 25 + 54),
        # plain query in, plain output out; 3 tokens through the weights: 224 + 3 * 54 * 2
        ("decode", "pipeline", "mqa", 548, 42 + 24 + 25 + 54),
        ("prefill", "pipeline", "mqa", 548, 42 + 24 + 25 + 54),
        ("decode", "pipeline", "mha", 848, 42 + 24 + 25 + 54),
        ("prefill", "pipeline", "mha", 848, 42 + 24 + 25 + 54),
    ],
)
@pytest.mark.parametrize("element_size", [2, 4])
def test_mla_work_by_hand(pipeline, scope, mode, flops, elements, element_size):
    found = mla_candidates(REQUESTS, DIMS, element_size, pipeline, scope)
    assert set(found) == {"mqa", "mha"}
    assert found[mode] == Work(flops, elements * element_size)


@pytest.mark.parametrize("element_size", [2, 4])
def test_standard_work_by_hand(element_size):
    # q and out 3*4*3 each, k and v 5*2*3 each; 7 pairs * 4 heads * (3 + 3) * 2
    found = standard_work(REQUESTS, StandardDims(num_q_heads=4, num_kv_heads=2, head_dim=3), element_size)
    assert found == Work(336, (36 + 36 + 30 + 30) * element_size)


def test_deepseek_v3_decode_on_one_key():
    # One token of one key: the published sizes, so that a slip in the preset's use shows. 2 * 128 heads * (576 + 512).
    found = mla_candidates(parse_batch_spec("q1"), MLADims(num_heads=128), 2, "decode", "attention")
    assert found["mqa"] == Work(278528, 2 * (128 * 576 + 128 * 512 + 576))


@given(st.lists(SHAPES, max_size=4), st.lists(SHAPES, max_size=4), st.sampled_from(["decode", "prefill"]))
def test_attention_work_adds_up_over_requests(first, second, pipeline):
    # Weights are read once a batch; what a request brings adds up.
    def total(requests):
        return mla_candidates(requests, DIMS, 2, pipeline, "attention")["mqa"]

    assert total(first) + total(second) == total(first + second)


@given(SHAPES, st.sampled_from(["decode", "prefill"]), st.sampled_from(["attention", "pipeline"]))
def test_a_longer_context_is_never_less_work(request_, pipeline, scope):
    longer = BatchRequest(request_.q_len, request_.kv_len + 1)
    for mode, work in mla_candidates([request_], DIMS, 2, pipeline, scope).items():
        more = mla_candidates([longer], DIMS, 2, pipeline, scope)[mode]
        assert more.flops > work.flops
        assert more.bytes > work.bytes
