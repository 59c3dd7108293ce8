"""The Triton kernels under the interpreter (TRITON_INTERPRET=1). float16: it has no bfloat16 product."""

from typing import TYPE_CHECKING

import pytest
import torch

from mlakit.decode import mla_decode
from mlakit.hardware import DeviceInfo, pretend
from mlakit.testing import count_poison, poison_

if TYPE_CHECKING:
    from tests.decode.conftest import MakeBatch

pytestmark = pytest.mark.interpret

# A GPU of 12 multiprocessors, so that small batches are cut into pieces as large ones are on a large GPU.
SMALL_GPU = DeviceInfo("cpu", 0, "interpreter", None, 12, 2**20, 2**30)


# Lengths around a tile of 32 keys and a page, an empty request, one key; fewer keys than new tokens (rows that see
# nothing). Pages below, at and above the tile. 3 heads and 17 rows leave rows of a tile of 16 idle and make a second
# tile. Splits: balanced, none, more than tiles. One request, whose slots need no sums, and one that is empty.
@pytest.mark.parametrize(
    ("lens", "q_len", "heads", "page_size", "num_splits"),
    [
        ([1, 0, 65, 130], 1, 3, 16, None),
        ([1, 0, 65, 130], 2, 3, 1, None),
        ([1, 0, 33], 1, 3, 16, 1),
        ([2, 0, 65, 31], 3, 7, 64, 5),
        ([200], 1, 17, 32, None),
        ([0], 2, 3, 16, None),
    ],
)
def test_against_float64(
    make_batch: "MakeBatch", lens: list[int], q_len: int, heads: int, page_size: int, num_splits: int | None
) -> None:
    batch = make_batch(lens, q_len=q_len, heads=heads, page_size=page_size)
    out = poison_(torch.empty((len(lens), q_len, heads, batch.rank), dtype=batch.q.dtype))
    with pretend(SMALL_GPU):
        result, lse = mla_decode(
            *batch.inputs,
            softmax_scale=batch.scale,
            kv_lora_rank=batch.rank,
            num_splits=num_splits,
            out=out,
            impl="triton",
        )
    assert result is out
    assert count_poison(out) == 0
    batch.check(out, lse)


# Tiles that the default configurations do not take: keys of 16 and 64, rows of 32; split and not.
@pytest.mark.parametrize(("block_m", "block_n", "num_splits"), [(16, 64, None), (32, 16, 2), (16, 32, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_other_tiles(make_batch: "MakeBatch", block_m: int, block_n: int, num_splits: int | None, causal: bool) -> None:
    from mlakit.decode.triton_launch import DecodeConfig, _launch_decode

    batch = make_batch([150, 1, 64], q_len=2, heads=5)
    out = poison_(torch.empty((3, 2, 5, batch.rank), dtype=batch.q.dtype))
    lse = poison_(torch.empty((3, 2, 5)))
    with pretend(SMALL_GPU):
        _launch_decode(
            *batch.inputs,
            out,
            lse,
            softmax_scale=batch.scale,
            causal=causal,
            kv_lora_rank=batch.rank,
            num_splits=num_splits,
            config=DecodeConfig(block_m, block_n, 4, 3, 1),
        )
    assert count_poison(out) == 0
    assert count_poison(lse) == 0
    batch.check(out, lse, causal)


def test_strided_inputs_and_output(make_batch: "MakeBatch") -> None:
    batch = make_batch([40, 9], q_len=2, heads=3)
    q, cache, table, lens = batch.inputs
    wide_q = torch.full((2, 3, 2, 96), torch.nan, dtype=q.dtype).transpose(1, 2)
    wide_q[..., :80] = q
    wide_cache = torch.full((*cache.shape[:2], 128), torch.nan, dtype=q.dtype)
    wide_cache[..., :80] = cache
    wide_table = torch.full((2, table.shape[1] + 5), 2**30, dtype=torch.int32)
    wide_table[:, : table.shape[1]] = table
    out = poison_(torch.empty((2, 3, 2, 70), dtype=q.dtype)).transpose(1, 2)
    _, lse = mla_decode(
        wide_q[..., :80],
        wide_cache[..., :80],
        wide_table[:, : table.shape[1]],
        lens,
        softmax_scale=batch.scale,
        kv_lora_rank=64,
        out=out[..., :64],
        impl="triton",
    )
    assert count_poison(out[..., 64:]) == out[..., 64:].numel()  # beside the view nothing is written
    batch.check(out[..., :64], lse)


def test_a_request_longer_than_its_table_is_loud(make_batch: "MakeBatch") -> None:
    # On a GPU the host cannot look at the lengths; the kernel must neither read past the table nor give a plausible
    # answer.
    from mlakit.decode.triton_launch import _launch_decode

    batch = make_batch([48, 48], heads=2)
    q, cache, table, lens = batch.inputs
    lens[0] = 49
    for num_splits in (None, 1):
        out, lse = poison_(torch.empty((2, 1, 2, 64), dtype=q.dtype)), poison_(torch.empty((2, 1, 2)))
        with pretend(SMALL_GPU):
            _launch_decode(
                q, cache, table, lens, out, lse,
                softmax_scale=1.0, causal=True, kv_lora_rank=64, num_splits=num_splits,
            )  # fmt: skip
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        assert out[1].isfinite().all()
        assert lse[1].isfinite().all()


def test_opcheck(make_batch: "MakeBatch") -> None:
    batch = make_batch([20, 0], heads=2)
    torch.library.opcheck(torch.ops.mlakit.mla_decode, (*batch.inputs, batch.scale, True, batch.rank, 2, "triton"))
    out = torch.empty((2, 1, 2, batch.rank), dtype=batch.q.dtype)
    options = (batch.scale, True, batch.rank, 2, "triton")
    torch.library.opcheck(torch.ops.mlakit.mla_decode_out, (*batch.inputs, out, torch.empty((2, 1, 2)), *options))
