import re
from typing import Any

import pytest
import torch

import mlakit
from mlakit.indexer import (
    indexer_logits,
    indexer_logits_paged,
    pack_index_cache,
    quantize_queries,
    select_topk,
    slots_of,
    unpack_index_cache,
)
from mlakit.indexer.reference import indexer_logits_reference, select_topk_reference
from mlakit.sparse import mla_sparse_decode, mla_sparse_prefill
from mlakit.testing import random_page_table

F8 = torch.float8_e4m3fn


def test_logits_are_the_papers_sum():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 32, generator=generator).to(F8)
    k = torch.randn(6, 32, generator=generator).to(F8)
    scales, weights = torch.rand(6, generator=generator), torch.randn(3, 4, generator=generator)
    start, end = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([6, 3, 4], dtype=torch.int32)
    out = indexer_logits(q, k, scales, weights, start, end)
    for token in range(3):
        for key in range(6):
            if not int(start[token]) <= key < int(end[token]):
                assert out[token, key] == -torch.inf
                continue
            dots = (q[token].double() @ k[key].double()) * scales[key].double()
            expected = float((dots.clamp(min=0) * weights[token].double()).sum())
            assert abs(float(out[token, key]) - expected) < 1e-4
    exact = indexer_logits_reference(q, k, scales, weights, start, end, dtype=torch.float64)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_paged_logits_are_those_of_the_keys_in_a_row():
    lens = [9, 0, 3]
    generator = torch.Generator().manual_seed(0)
    table = random_page_table(lens, page_size=4, device="cpu", generator=generator, dead_slot=-99)
    codes = torch.randn(table.num_pages, 4, 32, generator=generator).to(F8)
    scales = torch.rand(table.num_pages, 4, generator=generator)
    q = torch.randn(3, 2, 5, 32, generator=generator).to(F8)
    weights = torch.randn(3, 2, 5, generator=generator)
    cache = pack_index_cache(codes, scales)
    for got, expected in zip(unpack_index_cache(cache, 32), (codes, scales), strict=True):
        assert torch.equal(got.float(), expected.float())
    out = indexer_logits_paged(q, cache, weights, table.block_table, table.seq_lens, max_context_len=11)
    assert out.shape == (6, 11)
    first = 0
    for request, length in enumerate(lens):
        slots = table.slots[first : first + length]
        first += length
        for token in range(2):
            seen = max(length - 2 + token + 1, 0)
            row = out[2 * request + token]
            assert torch.isneginf(row[seen:]).all()
            some = codes.view(torch.uint8).view(-1, 32)[slots[:seen]].view(F8)
            one = indexer_logits(
                q[request, token, None], some, scales.view(-1)[slots[:seen]], weights[request, token, None]
            )
            torch.testing.assert_close(row[:seen], one[0])


def test_a_page_is_laid_out_codes_first():
    codes = torch.arange(64, dtype=torch.uint8).view(1, 2, 32).view(F8)
    page = pack_index_cache(codes, torch.tensor([[1.0, 2.0]])).flatten()
    assert page[:64].tolist() == list(range(64))
    assert page[64:].view(torch.float32).tolist() == [1.0, 2.0]


def test_a_querys_scale_moves_into_its_weight():
    q, weights = torch.randn(3, 4, 64), torch.randn(3, 4)
    codes, scaled = quantize_queries(q, weights)
    assert codes.dtype == F8
    scales = scaled / weights
    torch.testing.assert_close(codes.float() * scales[..., None], q, rtol=0.07, atol=0.02)
    assert torch.equal(torch.log2(scales), torch.log2(scales).round())


def test_selection_takes_the_largest_and_of_equals_the_first():
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 3.0, 2.0], [-torch.inf, 0.0, -0.0, -torch.inf, 0.0, -5.0]])
    assert select_topk(logits, 2).tolist() == [[1, 2], [1, 2]]
    assert select_topk(logits, 4).tolist() == [[1, 2, 4, 5], [1, 2, 4, 5]]
    assert select_topk(logits, 6).tolist() == [[0, 1, 2, 4, 5, -1], [1, 2, 4, 5, -1, -1]]
    assert select_topk(logits, 2, torch.tensor([1, 0], dtype=torch.int32)).tolist() == [[0, -1], [-1, -1]]
    wild = torch.tensor([[torch.nan, 1.0, torch.inf, -torch.nan]])
    assert select_topk(wild, 3).tolist() == [[0, 2, 3]]
    assert select_topk(torch.zeros(2, 0), 3).tolist() == [[-1] * 3] * 2


def test_selection_agrees_with_pytorch():
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    out = select_topk_reference(logits, 40)
    assert torch.equal(out.long(), torch.topk(logits, 40).indices.sort().values)


def test_slots_are_page_and_offset():
    table = torch.tensor([[7, 2, -99], [5, -99, -99]], dtype=torch.int32)
    indices = torch.tensor([[0, 5, 7, -1], [3, -1, -1, -1]], dtype=torch.int32)
    assert slots_of(indices, table, 4).tolist() == [[28, 9, 11, -1], [23, -1, -1, -1]]


# Index, select, attend. With k as large as the context it is dense attention; with less, attention to the keys that
# the indexer scores highest.
@pytest.mark.parametrize("k", [7, 64])
def test_a_whole_step_of_prefill(k):
    generator = torch.Generator().manual_seed(0)
    s = 40
    q_index, k_index = torch.randn(s, 4, 32, generator=generator), torch.randn(s, 32, generator=generator)
    q = torch.randn(s, 2, 24, dtype=torch.float64, generator=generator)
    kv = torch.randn(s, 1, 24, dtype=torch.float64, generator=generator)
    codes, weights = quantize_queries(q_index, torch.rand(s, 4, generator=generator))
    end = torch.arange(1, s + 1, dtype=torch.int32)
    logits = indexer_logits(codes, k_index.to(F8), torch.ones(s), weights, None, end)
    chosen = select_topk(logits, k, end)
    out, _, lse = mla_sparse_prefill(q, kv, chosen[:, None], softmax_scale=0.2, d_v=16)
    for token in range(s):
        best = torch.topk(logits[token, : token + 1], min(k, token + 1)).indices
        scores = q[token] @ kv[best, 0].T * 0.2
        torch.testing.assert_close(out[token], torch.softmax(scores, -1) @ kv[best, 0, :16])
        torch.testing.assert_close(lse[token], torch.logsumexp(scores, -1))


def test_a_whole_step_of_decoding():
    generator = torch.Generator().manual_seed(0)
    lens, page = [13, 40], 8
    table = random_page_table(lens, page_size=page, device="cpu", generator=generator)
    index_cache = pack_index_cache(
        torch.randn(table.num_pages, page, 32, generator=generator).to(F8),
        torch.rand(table.num_pages, page, generator=generator) + 0.5,
    )
    latents = torch.randn(table.num_pages, page, 24, dtype=torch.float64, generator=generator)
    q_index = torch.randn(2, 1, 4, 32, generator=generator).to(F8)
    weights = torch.rand(2, 1, 4, generator=generator)
    logits = indexer_logits_paged(q_index, index_cache, weights, table.block_table, table.seq_lens, max_context_len=40)
    chosen = select_topk(logits, 16, table.seq_lens)
    slots = slots_of(chosen, table.block_table, page)
    q = torch.randn(2, 1, 3, 24, dtype=torch.float64, generator=generator)
    out, _ = mla_sparse_decode(q, latents, slots[:, None], softmax_scale=0.2, kv_lora_rank=16)
    first = 0
    for request, length in enumerate(lens):
        keys = latents.view(-1, 24)[table.slots[first : first + length]]
        first += length
        best = keys[torch.topk(logits[request, :length], min(16, length)).indices]
        weights_of = torch.softmax(q[request, 0] @ best.T * 0.2, -1)
        torch.testing.assert_close(out[request, 0], weights_of @ best[:, :16])


def _arguments(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "q": torch.zeros(3, 4, 32).to(F8),
        "k": torch.zeros(5, 32).to(F8),
        "k_scales": torch.ones(5),
        "weights": torch.ones(3, 4),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 4, 32)}, "q must be torch.float8_e4m3fn, got torch.float32"),
        ({"k": torch.zeros(5, 16).to(F8)}, "k must have shape [s_kv, 32], got [5, 16]"),
        ({"k_scales": torch.ones(4)}, "k_scales must have shape [5], got [4]"),
        ({"weights": torch.ones(3, 4).half()}, "weights must be torch.float32, got torch.float16"),
        ({"weights": torch.ones(4, 3).T}, "weights must have stride 1 in its last dimension"),
        ({"k_end": torch.ones(3)}, "k_end must be torch.int32, got torch.float32"),
        ({"k_start": torch.ones(2, dtype=torch.int32)}, "k_start must have shape [3], got [2]"),
        ({"k": torch.zeros(5, 32, device="meta").to(F8)}, "k must be on cpu"),
        ({"impl": "deep_gemm"}, "unknown impl 'deep_gemm'"),
    ],
)
def test_logits_refuse_with_expected_and_actual(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        indexer_logits(**_arguments(**changes))


def _paged_arguments(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 1, 4, 32).to(F8),
        "cache": torch.zeros(3, 8, 36, dtype=torch.uint8),
        "weights": torch.ones(2, 1, 4),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "context_lens": torch.ones(2, dtype=torch.int32),
        "max_context_len": 16,
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": torch.zeros(3, 8, 32, dtype=torch.uint8)}, "cache must have shape [pages, page_size, 36]"),
        ({"cache": torch.zeros(3, 8, 36)}, "cache must be torch.uint8, got torch.float32"),
        (
            {"cache": torch.zeros(3, 36, 8, dtype=torch.uint8).mT},
            "cache must have contiguous pages, got strides [288, 1, 8]",
        ),
        ({"q": torch.zeros(2, 4, 1, 32).to(F8).transpose(1, 2)[:, :, ::2]}, "weights must have shape [2, 1, 2]"),
        ({"block_table": torch.zeros(2, 2)}, "block_table must be torch.int32"),
        ({"context_lens": torch.ones(3, dtype=torch.int32)}, "context_lens must have shape [2], got [3]"),
        ({"max_context_len": -1}, "max_context_len must not be negative, got -1"),
    ],
)
def test_paged_logits_refuse_with_expected_and_actual(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        indexer_logits_paged(**_paged_arguments(**changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_topk(torch.zeros(2, 3).double(), 1), "logits must be torch.float32, got torch.float64"),
        (lambda: select_topk(torch.zeros(2, 3), 0), "k must be at least 1, got 0"),
        (lambda: select_topk(torch.zeros(3, 2).T, 1), "logits must have stride 1 in its last dimension"),
        (lambda: select_topk(torch.zeros(3), 1), "logits must have shape [rows, columns], got [3]"),
        (lambda: select_topk(torch.zeros(2, 3), 1, torch.ones(2)), "lengths must be torch.int32, got torch.float32"),
    ],
)
def test_selection_refuses_with_expected_and_actual(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_named_kernel_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it needs an NVIDIA GPU"):
        indexer_logits(**_arguments(), impl="triton")
    with pytest.raises(RuntimeError, match="heads must be from 1 to 128, got 130"):
        indexer_logits(**_arguments(q=torch.zeros(3, 130, 32).to(F8), weights=torch.ones(3, 130)), impl="triton")
    with pytest.raises(RuntimeError, match="dim must be 32, 64 or 128, got 48"):
        indexer_logits(**_arguments(q=torch.zeros(3, 4, 48).to(F8), k=torch.zeros(5, 48).to(F8)), impl="triton")
    with pytest.raises(RuntimeError, match="k must be at most 4096, got 9000"):
        select_topk(torch.zeros(2, 3), 9000, impl="triton")


def test_compiles_without_a_graph_break():
    def step(q, k, k_scales, weights):
        return select_topk(indexer_logits(q, k, k_scales, weights) * 2, 2)

    arguments = _arguments(weights=torch.randn(3, 4), k=torch.randn(5, 32).to(F8), q=torch.randn(3, 4, 32).to(F8))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), step(**arguments))


def test_paged_logits_compile_without_a_graph_break():
    table = random_page_table([11, 0, 3], page_size=4, device="cpu", generator=torch.Generator())
    cache = pack_index_cache(torch.randn(table.num_pages, 4, 32).to(F8), torch.rand(table.num_pages, 4))

    def step(q, weights):
        tables = (table.block_table, table.seq_lens)
        return indexer_logits_paged(q, cache, weights * 2, *tables, max_context_len=12) + 1

    arguments = (torch.randn(3, 2, 4, 32).to(F8), torch.randn(3, 2, 4))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), step(*arguments))


def test_the_names_are_public():
    for name in ("indexer_logits", "indexer_logits_paged", "select_topk"):
        assert getattr(mlakit, name) is globals()[name]
