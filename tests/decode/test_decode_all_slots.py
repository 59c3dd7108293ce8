"""Dense decode by sparse attention over all slots, on a CPU: when, and that it is the same attention."""

import pytest
import torch

from mlakit.cache import pack_fp8
from mlakit.decode import mla_decode_reference
from mlakit.decode.all_slots import decode_all_slots, is_faster
from mlakit.testing import poison_, random_paged_cache


# Many heads of large batches; not for few heads, small batches, or where pieces are named.
@pytest.mark.parametrize(
    ("batch", "q_len", "heads", "pages", "num_splits", "faster"),
    [
        (128, 1, 128, 128, None, True),
        (64, 1, 33, 64, None, True),
        (64, 1, 32, 64, None, False),
        (64, 4, 16, 64, None, False),
        (1, 1, 128, 128, None, False),
        (1, 1, 128, 2048, None, True),
        (128, 1, 128, 128, 1, False),
    ],
)
def test_when(batch: int, q_len: int, heads: int, pages: int, num_splits: int | None, faster: bool) -> None:
    q = torch.empty((batch, q_len, heads, 576), device="meta")
    table = torch.empty((batch, pages), dtype=torch.int32, device="meta")
    cache = torch.empty((9, 64, 656), dtype=torch.uint8, device="meta")
    assert is_faster(q, cache, table, num_splits) == faster


# Empty requests, one shorter than the new tokens, one longer than its table; dead table slots that would be far away.
@pytest.mark.parametrize("causal", [True, False])
def test_the_same_attention(causal: bool) -> None:
    paged = random_paged_cache(
        [0, 2, 100, 64],
        (576,),
        page_size=16,
        dtype=torch.bfloat16,
        device="cpu",
        generator=torch.Generator().manual_seed(0),
        dead_slot=2**30,
    )
    latents = paged.pages.float()
    cache = pack_fp8(latents[..., :512], latents[..., 512:])
    q = torch.randn((4, 3, 5, 576))
    expected, expected_lse = mla_decode_reference(
        q, cache, paged.block_table, paged.seq_lens, softmax_scale=0.1, causal=causal
    )
    out, lse = poison_(torch.empty((4, 3, 6, 512))), torch.empty((4, 3, 5))
    lens = paged.seq_lens.clone()
    lens[3] = paged.block_table.shape[1] * 16 + 1
    decode_all_slots(
        q, cache, paged.block_table, lens, out[:, :, :5], lse, softmax_scale=0.1, causal=causal
    )  # fmt: skip
    torch.testing.assert_close(out[:3, :, :5], expected[:3])
    torch.testing.assert_close(lse[:3], expected_lse[:3])
    assert out[3, :, :5].isnan().all()
    assert lse[3].isnan().all()
