"""The Triton kernels under the interpreter (TRITON_INTERPRET=1). float16: it has no bfloat16 product."""

from typing import TYPE_CHECKING

import pytest
import torch

from mlakit.hardware import DeviceInfo, pretend
from mlakit.paged import paged_attention
from mlakit.paged.config import Kernels, PagedConfig
from mlakit.testing import count_poison, poison_

if TYPE_CHECKING:
    from tests.paged.conftest import MakeBatch

pytestmark = pytest.mark.interpret
SCALE = 0.3

# A GPU of 12 multiprocessors, so that small batches are cut into pieces as large ones are on a large GPU.
SMALL_GPU = DeviceInfo("cpu", 0, "interpreter", None, 12, 2**20, 2**30)
SPLIT, ROWS = PagedConfig(16, 16, 4, 3, 1), PagedConfig(32, 16, 4, 2)


# Decode: no key, one, around a tile and a page; a request alone, one of fewer keys than queries, one without queries,
# and a row of no request's. Pages below, at and above a tile, and one that no tile divides. Groups of 3, 2, 1 and 20
# heads; a head dim that is no power of two. Pieces: balanced, one (also where no table holds more than 128 keys), more
# than there are tiles.
@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "shape", "page_size", "num_splits"),
    [
        ([1, 1, 1, 0], [5, 0, 65, 8], (3, 1, 16), 16, None),
        ([1, 1, 1, 0, 1], [5, 0, 145, 8, 20], (3, 1, 16), 16, None),
        ([1, 1], [150, 31], (2, 2, 24), 5, None),
        ([2], [150], (4, 2, 16), 16, None),
        ([3, 2], [2, 70], (20, 1, 16), 64, 9),
        ([1, 1], [33, 1], (2, 1, 16), 1, 1),
    ],
)
def test_decode(
    make_batch: "MakeBatch",
    q_lens: list[int],
    kv_lens: list[int],
    shape: tuple[int, int, int],
    page_size: int,
    num_splits: int | None,
) -> None:
    heads, kv_heads, head_dim = shape
    batch = make_batch(
        q_lens, kv_lens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, spare_tokens=1
    )
    out = poison_(torch.empty_like(batch.q))
    with pretend(SMALL_GPU):
        result, lse = paged_attention(
            *batch.inputs,
            softmax_scale=SCALE,
            max_seqlen_q=batch.longest,
            num_splits=num_splits,
            out=out,
            impl="triton",
        )
    assert result is out
    assert count_poison(out) == 0
    batch.check(out, lse)


# Both kernels in one call, each with what the other must leave alone.
@pytest.mark.parametrize("causal", [True, False])
def test_mixed(make_batch: "MakeBatch", causal: bool) -> None:
    from mlakit.paged.triton_launch import _launch_paged

    batch = make_batch([20, 1, 0, 17, 2], [20, 140, 8, 50, 0], heads=6, spare_tokens=3)
    out, lse = poison_(torch.empty_like(batch.q)), poison_(torch.empty(batch.q.shape[:2]))
    config = PagedConfig(64, 16, 4, 2)
    with pretend(SMALL_GPU):
        _launch_paged(
            *batch.inputs, out, lse, softmax_scale=SCALE, causal=causal, max_seqlen_q=20, num_splits=None,
            kernels=Kernels(SPLIT, 16, config),
        )  # fmt: skip
    assert count_poison(out) == 0
    assert count_poison(lse) == 0
    batch.check(out, lse, causal)


def test_strided_inputs_and_output(make_batch: "MakeBatch") -> None:
    # Keys and values side by side in one tensor, and each in one of its own order; a query with columns to spare.
    batch = make_batch([3, 20], [9, 40])
    q, k, v, table, lens, bounds = batch.inputs
    both = torch.full((k.shape[0], 2, *k.shape[1:]), torch.nan, dtype=k.dtype)
    both[:, 0], both[:, 1] = k, v
    heads_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    wide_q = torch.full((*q.shape[:2], 40), torch.nan, dtype=q.dtype)
    wide_q[..., :16] = q
    for keys, values in ((both[:, 0], both[:, 1]), (k, heads_first)):
        out = poison_(torch.empty(wide_q.shape, dtype=q.dtype))
        _, lse = paged_attention(
            wide_q[..., :16], keys, values, table, lens, bounds, softmax_scale=SCALE, out=out[..., :16], impl="triton"
        )
        assert count_poison(out[..., 16:]) == out[..., 16:].numel()  # beside the view nothing is written
        batch.check(out[..., :16], lse)


def test_broken_promises_are_loud(make_batch: "MakeBatch") -> None:
    # On a GPU the host cannot look at the lengths; the kernels must neither read past the table nor give a plausible
    # answer, and the other requests' must be right.
    from mlakit.paged.triton_launch import _launch_paged

    batch = make_batch([1, 1, 20], [16, 16, 30])
    q, k, v, table, lens, bounds = batch.inputs
    right = poison_(torch.empty_like(q))
    for kernels in (Kernels(SPLIT, 16, None), Kernels(SPLIT, 16, ROWS)):
        out, lse = right.clone(), poison_(torch.empty(q.shape[:2]))
        wrong_lens = lens.clone()
        wrong_lens[0] = table.shape[1] * 16 + 1
        with pretend(SMALL_GPU):
            _launch_paged(
                q, k, v, table, wrong_lens, bounds, out, lse, softmax_scale=SCALE, causal=True, max_seqlen_q=20,
                num_splits=None, kernels=kernels,
            )  # fmt: skip
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        assert count_poison(out) == 0
        assert out[1].isfinite().all()
        if kernels.tiles is None:  # 20 tokens are more than a call for 16 rows was promised
            assert out[2:].isnan().all()
        else:
            assert out[2:].isfinite().all()


def test_a_given_number_of_pieces_makes_a_result_independent_of_the_other_requests(make_batch: "MakeBatch") -> None:
    batch = make_batch([1, 1], [90, 100])
    q, k, v, table, lens, bounds = batch.inputs
    options = {"softmax_scale": SCALE, "max_seqlen_q": 1, "num_splits": 3, "impl": "triton"}
    first, first_lse = paged_attention(*batch.inputs, **options)
    shorter = lens.clone()
    shorter[0] = 7
    again, again_lse = paged_attention(q, k, v, table, shorter, bounds, **options)
    assert torch.equal(first[1], again[1])
    assert torch.equal(first_lse[1], again_lse[1])
    assert not torch.equal(first[0], again[0])


def test_opcheck(make_batch: "MakeBatch") -> None:
    batch = make_batch([2, 1], [3, 4], heads=2, kv_heads=1)
    options = (SCALE, True, 2, None, "triton")
    torch.library.opcheck(torch.ops.mlakit.paged_attention, (*batch.inputs, *options))
    torch.library.opcheck(torch.ops.mlakit.paged_attention_out, (*batch.inputs, torch.empty_like(batch.q), *options))
