"""Dense decode by sparse attention over all slots, on a CPU: when, that it is the same attention, and its kernels."""

import pytest
import torch

from mlakit.cache import pack_fp8
from mlakit.decode import mla_decode_reference
from mlakit.decode.all_slots import decode_all_slots, is_faster
from mlakit.hardware import DeviceInfo, pretend
from mlakit.testing import count_poison, poison_, random_paged_cache

CHIPS = {
    80: DeviceInfo("cuda", 0, "NVIDIA A100", (8, 0), 108, 40 * 2**20, 80 * 2**30),
    90: DeviceInfo("cuda", 0, "NVIDIA H200", (9, 0), 132, 60 * 2**20, 141 * 2**30),
}


# The Hopper kernels: many heads of large batches; not for few heads, small batches, or heads of the output that are far
# apart. The portable one: from less work on, few heads too, but not where several tokens share a tile, and not on other
# GPUs or at other dimensions. Neither where pieces are named.
@pytest.mark.parametrize(
    ("impl", "batch", "q_len", "heads", "pages", "changes", "faster"),
    [
        ("hopper", 128, 1, 128, 128, {}, True),
        ("hopper", 64, 1, 33, 64, {}, True),
        ("hopper", 64, 1, 32, 64, {}, False),
        ("hopper", 64, 4, 16, 64, {}, False),
        ("hopper", 1, 1, 128, 128, {}, False),
        ("hopper", 1, 1, 128, 1024, {}, True),
        ("hopper", 128, 1, 128, 128, {"num_splits": 1}, False),
        ("hopper", 128, 1, 128, 128, {"apart": 2**24}, False),
        ("triton", 8, 1, 16, 64, {}, True),
        ("triton", 7, 1, 16, 64, {}, False),
        ("triton", 32, 4, 16, 64, {}, False),
        ("triton", 32, 2, 64, 64, {}, True),
        ("triton", 128, 1, 128, 128, {"apart": 2**24}, True),
        ("triton", 128, 1, 128, 128, {"num_splits": 1}, False),
        ("triton", 128, 1, 128, 128, {"target": 80}, False),
        ("triton", 128, 1, 128, 128, {"rank": 256}, False),
        ("reference", 128, 1, 128, 128, {}, False),
    ],
)
def test_when(impl: str, batch: int, q_len: int, heads: int, pages: int, changes: dict[str, int], faster: bool) -> None:
    q = torch.empty((batch, q_len, heads, 576), device="meta")
    out = torch.empty_strided(
        (batch, q_len, heads, changes.get("rank", 512)), (512, 512, changes.get("apart", 512), 1), device="meta"
    )
    table = torch.empty((batch, pages), dtype=torch.int32, device="meta")
    cache = torch.empty((9, 64, 656), dtype=torch.uint8, device="meta")
    with pretend(CHIPS[changes.get("target", 90)]):
        assert is_faster(impl, q, cache, table, out, changes.get("num_splits")) == faster


# Empty requests, fewer keys than new tokens, a full table, one key too many; tokens, and keys, of several steps, which
# a program or two take in turn; a table without a page. Pages of one key, of a number that is no power of two, of many.
@pytest.mark.interpret
@pytest.mark.parametrize(
    ("lens", "page_size", "pages", "q_len", "causal"),
    [
        ([0, 1, 5, 6], 1, 5, 1, True),
        ([0, 2, 48, 49, 1000], 16, 3, 3, True),
        ([0, 2, 48, 49, 1000], 16, 3, 3, False),
        ([20, 21, 22], 7, 3, 1200, True),
        ([2560, 1024, 1025, 2561, 0], 256, 10, 2, True),
        ([1025, 3500], 64, 60, 1, True),
        ([3, 0], 64, 0, 2, True),
    ],
)
def test_slots(
    monkeypatch: pytest.MonkeyPatch, lens: list[int], page_size: int, pages: int, q_len: int, causal: bool
) -> None:
    from mlakit.decode import triton_all_slots

    monkeypatch.setattr(triton_all_slots, "_PROGRAMS", 4)
    batch, capacity = len(lens), pages * page_size
    generator = torch.Generator().manual_seed(0)
    wide = torch.randperm(batch * (pages + 1), generator=generator).int().view(batch, pages + 1)
    table, seq_lens = wide[:, :pages], torch.tensor(lens, dtype=torch.int32)
    slots, seen = (torch.full(shape, -7, dtype=torch.int32) for shape in ((batch, 1, capacity), (batch, q_len)))
    triton_all_slots._launch_all_slots(table, seq_lens, slots, seen, page_size=page_size, causal=causal)
    position = torch.arange(capacity)
    expected = table[:, position // page_size] * page_size + position % page_size
    live = torch.where(seq_lens > capacity, 0, seq_lens)
    expected = expected.masked_fill(position >= live[:, None], -7)
    assert torch.equal(slots[:, 0], expected.int())
    hidden = torch.arange(q_len - 1, -1, -1) if causal else torch.zeros(q_len)
    assert torch.equal(seen, (live[:, None] - hidden).int())


# Empty requests, one shorter than the new tokens, one longer than its table; dead table slots that would be far away.
# An output whose heads are apart, and a query that bulk loads cannot read.
@pytest.mark.interpret
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
    q = torch.randn((4, 3, 5, 577))[..., 1:]
    expected, expected_lse = mla_decode_reference(
        q, cache, paged.block_table, paged.seq_lens, softmax_scale=0.1, causal=causal
    )
    out, lse = poison_(torch.empty((4, 3, 6, 512))), torch.empty((4, 3, 5))
    lens = paged.seq_lens.clone()
    lens[3] = paged.block_table.shape[1] * 16 + 1
    decode_all_slots(
        q, cache, paged.block_table, lens, out[:, :, :5], lse, softmax_scale=0.1, causal=causal, impl="reference"
    )  # fmt: skip
    torch.testing.assert_close(out[:3, :, :5], expected[:3])
    torch.testing.assert_close(lse[:3], expected_lse[:3])
    assert out[3, :, :5].isnan().all()
    assert lse[3].isnan().all()
    assert count_poison(out[:, :, 5:]) == 4 * 3 * 512


@pytest.mark.compiled
@pytest.mark.parametrize("target", [80, 90, 100])
def test_compiled(target: int) -> None:
    from mlakit.decode.triton_all_slots import _launch_all_slots, _launch_finish
    from mlakit.testing.offline import offline

    table, lens = torch.empty((128, 128), dtype=torch.int32), torch.empty(128, dtype=torch.int32)
    slots, seen = torch.empty((128, 1, 8192), dtype=torch.int32), torch.empty((128, 2), dtype=torch.int32)
    out, lse = torch.empty((128, 2, 128, 512), dtype=torch.bfloat16), torch.empty((128, 2, 128))
    with offline(target) as kernels:
        _launch_all_slots(table, lens, slots, seen, page_size=64, causal=True)
        _launch_finish(lens, lse, out, lse, capacity=8192)
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.spills == 0
        assert kernel.registers <= 64
