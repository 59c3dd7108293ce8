"""The tolerance must pass what is as good as eager PyTorch and catch the mistakes that kernels make."""

import pytest
import torch

from mlakit.decode.reference import mla_decode_reference
from mlakit.testing import assert_close, compare, compare_lse, count_poison, poison_, random_paged_cache


@pytest.fixture(scope="module")
def attention():
    """Decode of 2 requests in bf16: inputs, the float64 answer and the eager one."""
    generator = torch.Generator().manual_seed(0)
    cache = random_paged_cache(
        [300, 90], (80,), page_size=16, dtype=torch.bfloat16, device="cpu", generator=generator, loud=[1, 1]
    )
    q = torch.randn(2, 1, 4, 80, generator=generator, dtype=torch.bfloat16)

    def run(q, pages, lens=cache.seq_lens):
        return mla_decode_reference(q, pages, cache.block_table, lens, softmax_scale=48**-0.5, kv_lora_rank=64)

    exact, exact_lse = run(q.double(), cache.pages.double())
    eager, _ = run(q, cache.pages)
    one_short, short_lse = run(q.double(), cache.pages.double(), cache.seq_lens - 1)
    return exact, exact_lse, eager, one_short, short_lse


def test_the_exact_answer_rounded_and_eager_pass(attention):
    exact, _, eager, _, _ = attention
    assert_close(exact.bfloat16(), exact, eager)
    assert_close(eager, exact, eager)


def test_mistakes_are_caught(attention):
    exact, _, eager, one_short, _ = attention
    one_off = exact.bfloat16()
    one_off[0, 0, 2, 5] = 1.0
    mistakes = {
        "one key too few": one_short.bfloat16(),
        "scaled by a percent": (exact * 1.01).bfloat16(),
        "two heads swapped": exact.bfloat16()[:, :, [1, 0, 2, 3]],
        "one row zero": exact.bfloat16().index_fill(0, torch.tensor([1]), 0),
        "one value off": one_off,
        "a NaN": exact.bfloat16().index_fill(3, torch.tensor([7]), torch.nan),
    }  # fmt: skip
    for name, result in mistakes.items():
        found = compare(result, exact, eager)
        assert not found.ok, name
        with pytest.raises(AssertionError, match="out: "):
            assert_close(result, exact, eager)


def test_lse(attention):
    _, lse, _, _, short = attention
    assert compare_lse(lse.float(), lse).ok
    assert not compare_lse(short.float(), lse).ok
    assert not compare_lse((lse + 2e-3).float(), lse).ok
    empty = lse.clone()
    empty[0] = -torch.inf
    assert compare_lse(empty.float(), empty).ok
    assert "-inf" in compare_lse(lse.float(), empty).reason
    assert "-inf" in compare_lse(empty.float(), lse).reason
    nan = lse.float().clone()
    nan[0] = torch.nan
    assert not compare_lse(nan, lse).ok
    rounded = lse + 0.4e-3  # what rounding the keys does: twice that is less than is allowed anyway, then more
    assert not compare_lse((lse + 1.1e-3).float(), lse, rounded).ok
    rounded = lse - 1.5e-3
    assert compare_lse((lse + 2.9e-3).float(), lse, rounded).ok
    assert "allowed 0.003" in compare_lse((lse + 3.1e-3).float(), lse, rounded).reason
    assert not compare_lse(nan, lse, rounded).ok
    with pytest.raises(ValueError, match="must have shape"):
        compare_lse(lse.float(), lse, rounded[0])
    with pytest.raises(ValueError, match=r"must be float32, got torch\.bfloat16"):
        compare_lse(lse.bfloat16(), lse)
    with pytest.raises(ValueError, match="must have shape"):
        compare_lse(lse[0].float(), lse)


def test_shapes_must_agree(attention):
    exact, _, eager, _, _ = attention
    with pytest.raises(ValueError, match="shapes must agree"):
        compare(exact[0], exact, eager)
    assert compare(exact[:0].float(), exact[:0], eager[:0]).ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_poison_is_nan_and_is_recognized(dtype):
    tensor = poison_(torch.empty(3, 5, dtype=dtype))
    assert torch.isnan(tensor.float()).all()
    assert count_poison(tensor) == 15
    tensor[1] = 0
    assert count_poison(tensor) == 10
    assert count_poison(poison_(torch.zeros(4, 6, dtype=dtype).t())) == 24  # any strides


def test_a_computed_nan_is_no_poison():
    computed = torch.zeros(4) / 0
    assert torch.isnan(computed).all()
    assert count_poison(computed) == 0
    with pytest.raises(ValueError, match=r"cannot poison a tensor of torch\.int32"):
        poison_(torch.zeros(1, dtype=torch.int32))


def test_paged_cache_places_tokens_where_its_tables_say():
    generator = torch.Generator().manual_seed(1)
    lens = [0, 1, 16, 17, 40]
    cache = random_paged_cache(
        lens, (3,), page_size=16, dtype=torch.float32, device="cpu", generator=generator, dead_slot=-7
    )
    tokens = cache.pages.flatten(0, 1)[cache.slots]
    assert torch.isfinite(tokens).all()
    assert int(torch.isfinite(cache.pages[..., 0]).sum()) == sum(lens)
    start = 0
    for row, length in enumerate(lens):
        used = -(-length // 16)
        by_table = cache.pages[cache.block_table[row, :used].long()].flatten(0, 1)[:length]
        assert torch.equal(by_table, tokens[start : start + length])
        assert (cache.block_table[row, used:] == -7).all()
        start += length
    with pytest.raises(ValueError, match="spare_pages must be at least 1, as dead slots point at one; got 0"):
        random_paged_cache([1], (1,), page_size=1, dtype=torch.float32, device="cpu", spare_pages=0)
