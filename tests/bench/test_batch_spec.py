import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.bench.batch_spec import (
    BatchRequest,
    format_batch_spec,
    get_batch_stats,
    get_batch_type,
    multiply_batch,
    parse_batch_spec,
    split_by_type,
    to_batch_spec,
)


@pytest.mark.parametrize(
    ("spec", "expected"),
    # The seed's own examples, each with the meaning it states.
    [
        ("q2k", [(2048, 2048)]),
        ("q1s1k", [(1, 1024)]),
        ("8q1s1k", [(1, 1024)] * 8),
        ("q4s1k", [(4, 1024)]),
        ("2q2k_32q1s1k", [(2048, 2048)] * 2 + [(1, 1024)] * 32),
        ("16q4s1k", [(4, 1024)] * 16),
        ("q1ks2k", [(1024, 2048)]),
        ("q1", [(1, 1)]),
    ],
)
def test_parse(spec, expected):
    assert [r.as_tuple() for r in parse_batch_spec(spec)] == expected


def test_printed_example_letter_for_letter():
    requests = parse_batch_spec("2q2k_q4s1k_32q1s1k")
    assert format_batch_spec(requests) == "2 prefill (2x2k), 1 extend (1xq4kv1k), 32 decode (32x1k)"


@pytest.mark.parametrize(
    ("spec", "segment", "hint"),
    [
        ("q0", 'segment 1 ("q0")', "q1 for decode"),
        ("q1s1k_q0s1k", 'segment 2 ("q0s1k")', "at least one new token"),
        ("q8s4", 'segment 1 ("q8s4")', '"q8s12"'),
        ("3q2ks1k", 'segment 1 ("3q2ks1k")', '"3q2ks3k"'),
        ("0q1s1k", 'segment 1 ("0q1s1k")', '"q1s1k"'),
        ("q1s1k__q2k", 'segment 2 ("")', "is empty"),
        ("", 'segment 1 ("")', "is empty"),
        ("_q2k", 'segment 1 ("")', "is empty"),
        ("8Q1S1K", 'segment 1 ("8Q1S1K")', 'did you mean "8q1s1k"'),
        ("q2m", 'segment 1 ("q2m")', '"8q1s1k"'),
        ("q1kv1k", 'segment 1 ("q1kv1k")', '"8q1s1k"'),
        ("-1q1s1k", 'segment 1 ("-1q1s1k")', '"8q1s1k"'),
        ("q1.5k", 'segment 1 ("q1.5k")', '"8q1s1k"'),
        ("q1s3000000k", 'segment 1 ("q1s3000000k")', "2^31"),
        ("2000000q1s1k_2000000q1s1k", 'segment 2 ("2000000q1s1k")', "2^31"),
        ("999999999999q1", 'segment 1 ("999999999999q1")', "2^31"),  # refused before a list of that length is made
        ("q1s1k\n", "segment 1", "does not read"),
        ("q１s1k", "segment 1", "does not read"),  # a full-width digit: \d would take it
    ],
)
def test_malformed(spec, segment, hint):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is what is tested
        parse_batch_spec(spec)
    assert f'batch spec "{spec}"' in str(error.value)
    assert segment in str(error.value)
    assert hint in str(error.value)


def test_largest_batch_is_accepted():
    assert parse_batch_spec("q1s2097152k")[0].kv_len == 2**31


REQUESTS = st.builds(
    lambda q, context: BatchRequest(q, q + context),
    st.one_of(st.just(1), st.integers(1, 5000), st.integers(1, 8).map(lambda n: 1024 * n)),
    st.one_of(st.just(0), st.integers(0, 5000), st.integers(1, 32).map(lambda n: 1024 * n)),
)
BATCHES = st.lists(st.tuples(REQUESTS, st.integers(1, 5)), min_size=1, max_size=6).map(
    lambda segments: [request for request, count in segments for _ in range(count)]
)


@given(BATCHES)
def test_grammar_round_trip(batch):
    spec = to_batch_spec(batch)
    assert parse_batch_spec(spec) == batch
    assert to_batch_spec(parse_batch_spec(spec)) == spec


@given(BATCHES)
def test_printed_form_parses_back(batch):
    # Printing groups by kind, so the order comes back only of a batch that has prefills first, then extends, then
    # decodes.
    back = parse_batch_spec(format_batch_spec(batch))
    assert sorted(back) == sorted(batch)
    assert parse_batch_spec(format_batch_spec(back)) == back
    assert format_batch_spec(back) == format_batch_spec(batch)


@pytest.mark.parametrize(
    "printed",
    [
        "3 decode (2x1k)",
        "1 extend (1x1k)",
        "1 decode (1xq4kv1k)",
        "1 prefill (1x2k);",
        "1 decode (1x1k) 1 decode (1x1k)",
        "1 decode (x)",
    ],
)
def test_malformed_printed_form(printed):
    with pytest.raises(ValueError, match="batch spec"):
        parse_batch_spec(printed)


@given(BATCHES)
def test_every_request_has_exactly_one_kind(batch):
    for request in batch:
        assert request.is_decode + request.is_prefill + request.is_extend == 1
        assert request.context_len == request.kv_len - request.q_len >= 0
    parts = split_by_type(batch)
    assert sum(map(len, parts.values())) == len(batch)
    assert all(request.kind == kind for kind, part in parts.items() for request in part)


def test_stats():
    stats = get_batch_stats(parse_batch_spec("2q2k_q4s1k_32q1s1k"))
    assert stats == {
        "total_requests": 35,
        "num_decode": 32,
        "num_prefill": 2,
        "num_extend": 1,
        "total_tokens": 2 * 2048 + 4 + 32,
        "total_kv_cache": 2 * 2048 + 1024 + 32 * 1024,
        "max_q_len": 2048,
        "max_kv_len": 2048,
        "avg_q_len": (2 * 2048 + 4 + 32) / 35,
        "avg_kv_len": (2 * 2048 + 1024 + 32 * 1024) / 35,
    }
    assert get_batch_stats([])["avg_q_len"] == 0


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("q2k", "prefill"),
        ("q1", "decode"),
        ("8q1s1k", "decode"),
        ("q8s1k", "spec-decode"),
        ("q9s1k", "extend"),
        ("2q2k_32q1s1k", "mixed (decode+prefill)"),
        ("2q1k_16q4s1k_16q1s1k", "mixed (decode+prefill+spec-decode)"),
    ],
)
def test_batch_type(spec, kind):
    assert get_batch_type(spec) == kind
    assert get_batch_type(parse_batch_spec(spec)) == kind


def test_batch_type_threshold_and_empty():
    assert get_batch_type("q9s1k", spec_decode_threshold=16) == "spec-decode"
    with pytest.raises(ValueError, match="at least one request"):
        get_batch_type([])


def test_requests_that_cannot_be():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BatchRequest(0, 4)
    with pytest.raises(ValueError, match="at least q_len = 5, got 4"):
        BatchRequest(5, 4)


def test_multiply_batch():
    assert multiply_batch("q4s1k", 8) == "8q4s1k"
    assert multiply_batch("2q2k_q1s1k", 3) == "6q2k_3q1s1k"
    with pytest.raises(ValueError, match="at least 1, got 0"):
        multiply_batch("q1s1k", 0)
