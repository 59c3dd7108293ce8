"""`mla_decode` over float8 caches on a GPU: the real kernels against float64."""

from typing import Any

import pytest
import torch

from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.decode import mla_decode, mla_decode_reference
from mlakit.testing import assert_close, compare_lse, count_poison, poison_, random_paged_cache

pytestmark = pytest.mark.gpu

E4M3 = torch.float8_e4m3fn
LENS = [0, 1, 20, 64, 140, 1000, 4096]
KINDS = [("e4m3", E4M3, 2.0, 0.5), ("e4m3", torch.bfloat16, 1.0, 0.5), ("rows", torch.bfloat16, 1.0, 1.0)]


# Few heads, more, and two tiles of them with idle rows; one new token and several; pages below, at and above a tile.
@pytest.mark.parametrize(("kind", "q_dtype", "q_scale", "kv_scale"), KINDS)
@pytest.mark.parametrize(
    ("heads", "q_len", "page_size"), [(3, 1, 64), (16, 2, 16), (32, 1, 64), (126, 1, 256), (128, 4, 64)]
)
def test_against_float64(
    kind: str, q_dtype: torch.dtype, q_scale: float, kv_scale: float, heads: int, q_len: int, page_size: int
) -> None:
    generator = torch.Generator("cuda").manual_seed(heads)
    paged = random_paged_cache(
        LENS,
        (576,),
        page_size=page_size,
        dtype=torch.bfloat16,
        device="cuda",
        generator=generator,
        dead_slot=2**30,
        loud=[q_len] * len(LENS),
    )
    latents = paged.pages.float()
    cache = latents.to(E4M3) if kind == "e4m3" else pack_fp8(latents[..., :512], latents[..., 512:])
    q = torch.randn((len(LENS), q_len, heads, 576), generator=generator, device="cuda").to(q_dtype)
    rest = (paged.block_table, paged.seq_lens)
    options: dict[str, Any] = {"softmax_scale": 192**-0.5, "q_scale": q_scale, "kv_scale": kv_scale}
    out = poison_(torch.empty((len(LENS), q_len, heads, 512), dtype=torch.bfloat16, device="cuda"))
    _, lse = mla_decode(q, cache, *rest, out=out, **options)
    assert count_poison(out) == 0
    keys = unpack_fp8(cache) if kind == "rows" else cache  # as a kernel may round them
    expected, expected_lse = mla_decode_reference(q.double(), cache, *rest, **options)
    _, rounded_lse = mla_decode_reference(q.double(), keys, *rest, **options)
    eager, _ = mla_decode_reference(q, keys, *rest, **options)
    assert_close(out, expected, eager)
    found = compare_lse(lse, expected_lse, rounded_lse)
    assert found.ok, found.reason
    again, _ = mla_decode(q, cache, *rest, **options)
    assert torch.equal(again, out)
