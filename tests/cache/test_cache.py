import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mlakit.cache import append_latent, fp8_row_bytes, gather_latent, pack_fp8, unpack_fp8
from mlakit.testing import random_paged_cache

RANK, ROPE = 128, 8


def _tokens(count: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    angles = torch.rand(count, ROPE // 2, dtype=torch.float64) * 6.28
    return {
        "kv": torch.randn(count, RANK + ROPE, dtype=dtype),
        "norm_weight": torch.rand(RANK, dtype=dtype) + 0.5,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
    }


@pytest.mark.parametrize("rope_layout", ["interleaved", "half"])
def test_append_is_rms_norm_and_rope_at_the_slots(rope_layout):
    tokens = _tokens()
    cache = torch.zeros(3, 4, RANK + ROPE, dtype=torch.float64)
    slots = torch.tensor([7, -1, 0, 11, 4])
    append_latent(**tokens, cache=cache, slot_mapping=slots, rope_layout=rope_layout, eps=1e-3)
    latent = F.rms_norm(tokens["kv"][:, :RANK], (RANK,), tokens["norm_weight"], 1e-3)
    k_pe = tokens["kv"][:, RANK:]
    # Rope as a product of complex numbers, which is how DeepSeek's code writes it.
    pairs = k_pe.unflatten(-1, (-1, 2)) if rope_layout == "interleaved" else k_pe.unflatten(-1, (2, -1)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(tokens["cos"], tokens["sin"])
    back = torch.view_as_real(turned)
    k_pe = back.flatten(-2) if rope_layout == "interleaved" else back.mT.flatten(-2)
    expected = torch.zeros(12, RANK + ROPE, dtype=torch.float64)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot] = torch.cat((latent[token], k_pe[token]))
    torch.testing.assert_close(cache.view(12, -1), expected)


def test_positions_pick_rows_of_a_complex_table():
    tokens = _tokens()
    positions = torch.tensor([30, 2, 2, 0, 9], dtype=torch.int32)
    table = torch.polar(torch.ones(40, ROPE // 2).double(), torch.rand(40, ROPE // 2).double())
    one, other = torch.zeros(2, 1, 5, RANK + ROPE, dtype=torch.float64)
    slots = torch.arange(5)
    append_latent(
        tokens["kv"], tokens["norm_weight"], table.real, table.imag, one, slots, positions=positions, rope_layout="half"
    )
    rows = table[positions.long()]
    append_latent(tokens["kv"], tokens["norm_weight"], rows.real, rows.imag, other, slots, rope_layout="half")
    assert torch.equal(one, other)


def test_the_row_of_deepseek_is_656_bytes():
    assert fp8_row_bytes(512, 64) == 656
    latent, k_pe = torch.randn(3, 512), torch.randn(3, 64).bfloat16()
    rows = pack_fp8(latent, k_pe)
    assert rows.shape == (3, 656)
    scales = rows[:, 512:528].contiguous().view(torch.float32)
    torch.testing.assert_close(scales, latent.view(3, 4, 128).abs().amax(-1) / 448)
    assert torch.equal(rows[:, 528:].contiguous().view(torch.bfloat16), k_pe)
    unpacked = unpack_fp8(rows, dtype=torch.float32)
    assert ((unpacked[:, :512] - latent).abs() <= latent.abs() / 16 + 1e-4).all()


def test_append_to_the_float8_cache_packs_what_the_other_holds():
    tokens = {name: value.bfloat16() for name, value in _tokens().items()}
    wide = torch.zeros(1, 5, RANK + ROPE, dtype=torch.bfloat16)
    packed = torch.zeros(1, 5, fp8_row_bytes(RANK, ROPE), dtype=torch.uint8)
    for cache in (wide, packed):
        append_latent(**tokens, cache=cache, slot_mapping=torch.arange(5), scale_fmt="ue8m0")
    assert torch.equal(packed, pack_fp8(wide[..., :RANK], wide[..., RANK:], "ue8m0"))


@pytest.mark.parametrize("cumulative", [False, True])
def test_gather_reads_requests_end_to_end(cumulative):
    lens = [3, 0, 9, 4]
    cached = random_paged_cache(lens, (RANK + ROPE,), page_size=4, dtype=torch.float32, device="cpu", dead_slot=10**6)
    expected = cached.pages.view(-1, RANK + ROPE)[cached.slots]
    lengths = F.pad(cached.seq_lens.cumsum(0, dtype=torch.int32), (1, 0)) if cumulative else cached.seq_lens
    assert torch.equal(gather_latent(cached.pages, cached.block_table, lengths, 16), expected)
    # A total that is larger than the lengths' sum, as a CUDA graph needs it; and one that is smaller.
    padded = gather_latent(cached.pages, cached.block_table, lengths, 20)
    assert torch.equal(padded[:16], expected)
    assert not padded[16:].any()
    assert torch.equal(gather_latent(cached.pages, cached.block_table, lengths, 10), expected[:10])


def test_gather_from_the_middle_of_a_context():
    cached = random_paged_cache([9, 6], (RANK + ROPE,), page_size=2, dtype=torch.float32, device="cpu")
    rows = cached.pages.view(-1, RANK + ROPE)[cached.slots]
    lens, starts = torch.tensor([4, 3], dtype=torch.int32), torch.tensor([5, 1], dtype=torch.int32)
    got = gather_latent(cached.pages, cached.block_table, lens, 7, starts=starts)
    assert torch.equal(got, torch.cat((rows[5:9], rows[10:13])))


def test_gather_dequantizes():
    latent, k_pe = torch.randn(8, 512), torch.randn(8, 64)
    cache = pack_fp8(latent, k_pe).view(2, 4, 656)
    table, lens = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    got = gather_latent(cache, table, lens, 6, dtype=torch.float32)
    assert torch.equal(got, unpack_fp8(cache[[1, 0]].view(8, 656)[:6], dtype=torch.float32))


def _arguments(**changes: Any) -> dict[str, Any]:
    tokens = {name: value.bfloat16() for name, value in _tokens(3).items()}
    cache = torch.zeros(2, 4, RANK + ROPE, dtype=torch.bfloat16)
    return {**tokens, "cache": cache, "slot_mapping": torch.arange(3), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv": torch.zeros(3, RANK).bfloat16()}, "an even number of rope columns after the 128 of norm_weight, got 0"),
        ({"kv": torch.zeros(3, RANK + 7).bfloat16()}, "an even number of rope columns after the 128"),
        ({"kv": torch.zeros(RANK + ROPE, 3).bfloat16().T}, "kv must have stride 1 in its last dimension"),
        ({"norm_weight": torch.zeros(RANK, 1)}, "norm_weight must have shape [kv_lora_rank], got [128, 1]"),
        ({"norm_weight": torch.zeros(RANK, dtype=torch.bool)}, "norm_weight must be torch.bfloat16 or torch.float16"),
        ({"cos": torch.zeros(4, ROPE // 2)}, "cos must have shape [3, 4], got [4, 4]"),
        ({"sin": torch.zeros(3, ROPE)}, "sin must have shape [3, 4], got [3, 8]"),
        ({"cache": torch.zeros(2, 4, RANK + ROPE)}, "cache must be torch.bfloat16 or torch.uint8, got torch.float32"),
        (
            {"cache": torch.zeros(2, 4, 656, dtype=torch.uint8)},
            "cache must have shape [pages, page_size, 148], got [2, 4, 656]",
        ),
        ({"slot_mapping": torch.arange(4)}, "slot_mapping must have shape [3], got [4]"),
        ({"slot_mapping": torch.zeros(3)}, "slot_mapping must be torch.int64 or torch.int32, got torch.float32"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, "positions must have shape [3], got [2]"),
        ({"slot_mapping": torch.arange(3, device="meta")}, "slot_mapping must be on cpu"),
        ({"rope_layout": "neox"}, "rope_layout must be one of interleaved, half, got 'neox'"),
        ({"scale_fmt": "e8"}, "scale_fmt must be None or 'ue8m0', got 'e8'"),
        ({"impl": "cuda"}, "unknown impl 'cuda'"),
    ],
)
def test_append_refuses_with_expected_and_actual(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        append_latent(**_arguments(**changes))


_TABLE = torch.zeros(2, 3, dtype=torch.int32)
_LENS = torch.ones(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": torch.zeros(2, 576)}, "cache must have shape [pages, page_size, width], got [2, 576]"),
        ({"block_table": _TABLE.long()}, "block_table must be torch.int32, got torch.int64"),
        ({"seq_lens": torch.ones(4, dtype=torch.int32)}, "seq_lens must have shape [2] (lengths) or [3] (cu_seqlens)"),
        ({"seq_lens": torch.tensor([0, 9, 3])}, "cu_seqlens must ascend, got [0, 9, 3]"),
        (
            {"seq_lens": torch.tensor([1, 13]), "total": 14},
            "block_table is too short: its 3 pages of 4 tokens hold 12, request 1 has 13",
        ),
        ({"total": 25}, "block_table is too short: 2 x 3 pages hold 24 tokens, got total=25"),
        ({"total": -1}, "total must be at least 0, got -1"),
        ({"starts": torch.ones(3, dtype=torch.int32)}, "starts must have shape [2], got [3]"),
        (
            {"cache": torch.zeros(5, 4, 500, dtype=torch.uint8)},
            "cache must have rows of 528 + 2 * rope bytes, got 500",
        ),
        ({"cache": torch.zeros(5, 4, 656, dtype=torch.uint8), "dtype": torch.int8}, "got torch.int8"),
    ],
)
def test_gather_refuses_with_expected_and_actual(changes, message):
    arguments = {"cache": torch.zeros(5, 4, 576), "block_table": _TABLE, "seq_lens": _LENS, "total": 2, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        gather_latent(**arguments)


# The cache of kv's dtype and the float8 cache; every token of the requests, and the later ones of each.
@pytest.mark.parametrize("width", [RANK + ROPE, fp8_row_bytes(RANK, ROPE)])
@pytest.mark.parametrize("starts", [None, torch.tensor([2, 0], dtype=torch.int32)])
def test_compiles_without_a_graph_break(width, starts):
    tokens = _tokens(dtype=torch.float32)
    slots = torch.tensor([0, 1, 2, 3, 9])
    table, lens = torch.tensor([[0], [2]], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32)

    def step(cache, kv):
        append_latent(**{**tokens, "kv": kv * 2}, cache=cache, slot_mapping=slots)
        return gather_latent(cache, table, lens, 4, starts=starts, kv_lora_rank=RANK, dtype=torch.float32) + 1

    dtype = torch.float32 if width == RANK + ROPE else torch.uint8
    one, other = torch.zeros(2, 3, 4, width, dtype=dtype)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(one, tokens["kv"])
    assert torch.equal(got, step(other, tokens["kv"]))
    assert torch.equal(one, other)
    assert one[2, 1].any()


def test_a_named_kernel_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it needs an NVIDIA GPU"):
        append_latent(**_arguments(impl="triton"))
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it needs an NVIDIA GPU"):
        gather_latent(torch.zeros(5, 4, 576), _TABLE, _LENS, 2, impl="triton")


@pytest.mark.parametrize("wanted", ["kv", "cache"])
def test_nothing_is_differentiated(wanted):
    """Where a gradient of an input or of the cache is wanted too, the cache is written and remembers nothing."""
    tensors = {"kv": torch.randn(3, 576), "cache": torch.zeros(2, 64, 576)}
    expected = tensors["cache"].clone()
    rest = (torch.ones(512), torch.randn(3, 32), torch.randn(3, 32))
    append_latent(tensors["kv"], *rest, expected, torch.arange(3))
    tensors[wanted].requires_grad_()
    append_latent(tensors["kv"], *rest, tensors["cache"], torch.arange(3))
    assert tensors["cache"].grad_fn is None
    torch.testing.assert_close(tensors["cache"].detach(), expected, rtol=0, atol=0)
    table, bounds = torch.tensor([[0]], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    assert not gather_latent(tensors["cache"], table, bounds, 3).requires_grad
