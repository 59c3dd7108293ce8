"""What the Hopper kernels refuse, in words, and which configuration they take: no GPU, no kernel."""

from typing import Any

import pytest
import torch
import triton

from mlakit.decode import mla_decode
from mlakit.decode.hopper_config import (
    FEW16,
    FEW32,
    MANY,
    HopperConfig,
    choose_config,
    choose_fp8_config,
    plan_slots,
    refusal,
)
from mlakit.decode.ops import _hopper_reason, candidates
from mlakit.hardware import DeviceInfo, pretend

H200 = DeviceInfo("cuda", 0, "NVIDIA H200", (9, 0), 132, 60 * 2**20, 141 * 2**30)
A100 = DeviceInfo("cuda", 0, "NVIDIA A100", (8, 0), 108, 40 * 2**20, 80 * 2**30)


def inputs(
    heads: int = 128, dtype: torch.dtype = torch.bfloat16, page_size: int = 64, latent: int = 576
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty((2, 1, heads, latent), dtype=dtype), torch.empty((3, page_size, latent), dtype=dtype)


def why(q: torch.Tensor, cache: torch.Tensor, **options: Any) -> str | None:
    given = {"softmax_scale": 0.1, "kv_lora_rank": 512, "num_splits": None, "units": 132, **options}
    return refusal(q, cache, **given)


@pytest.mark.parametrize("heads", [1, 16, 33, 64, 128, 200])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 4096])
def test_what_they_take(heads: int, page_size: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert why(*inputs(heads, dtype, page_size)) is None


# One case for every reason; each message must hold what is needed and what came.
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"dtype": torch.float32}, {}, r"bfloat16, float16 or float8_e4m3fn, got torch\.float32"),
        ({"latent": 320}, {}, "kv_lora_rank 512 and latent_dim 576, got 512 and 320"),
        ({}, {"kv_lora_rank": 256}, "kv_lora_rank 512 and latent_dim 576, got 256 and 576"),
        ({}, {"softmax_scale": -0.1}, "a positive softmax_scale, got -0.1"),
        ({"page_size": 8}, {}, "a power of two and at least 16, got 8"),
        ({"page_size": 96}, {}, "a power of two and at least 16, got 96"),
        ({"heads": 9000}, {"num_splits": 4}, "at most 8448 query rows a request where it is split, got 9000"),
        ({}, {"num_splits": 100_000}, "fewer than 2\\*\\*31 elements of partial results"),
    ],
)
def test_what_they_refuse(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    found = why(*inputs(**change), **options)
    assert found is not None
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(found)


def test_caches_that_are_no_matrix_are_refused() -> None:
    q, _ = inputs()
    assert "without gaps" in (why(q, torch.empty((3, 128, 576), dtype=q.dtype)[:, :64]) or "")
    assert "aligned to 16 bytes" in (why(q, torch.empty((3, 64, 580), dtype=q.dtype)[..., :576]) or "")
    assert "aligned to 16 bytes" in (why(q, torch.empty((3, 64, 584), dtype=q.dtype)[..., 4:580]) or "")
    assert why(q, torch.empty((3, 64, 640), dtype=q.dtype)[..., :576]) is None  # keys further apart are fine
    small = torch.empty((3, 64, 576), dtype=torch.float8_e4m3fn)
    assert "aligned to 16 bytes" in (
        why(q.to(small.dtype), torch.empty((3, 64, 584), dtype=small.dtype)[..., :576]) or ""
    )
    assert why(q, small) == "needs a cache of q's dtype torch.bfloat16, got torch.float8_e4m3fn"
    many = torch.empty((1025, 1, 16, 576), dtype=q.dtype, device="meta")
    assert why(many, torch.empty((3, 64, 576), dtype=q.dtype)) == "needs at most 1024 requests, got 1025"
    assert "at least one page" in (why(q, torch.empty((0, 64, 576), dtype=q.dtype)) or "")


# The cache of 656 bytes a token: whatever the other caches are refused for, and rows of what sparse attention reads.
def test_caches_with_scales_of_their_own() -> None:
    rows = torch.empty((3, 64, 656), dtype=torch.uint8)
    for heads, q_len in ((1, 1), (16, 1), (33, 1), (4, 8), (128, 8)):
        assert why(torch.empty((2, q_len, heads, 576), dtype=torch.bfloat16), rows) is None
    q, _ = inputs(heads=16)
    assert why(q.half(), rows) == "needs bfloat16 over a cache with scales of its own, got torch.float16"
    many = torch.empty((1, 33, 129, 576), dtype=q.dtype, device="meta")
    assert why(many, rows, num_splits=1) is None
    assert why(many, rows, num_splits=2) == "needs at most 4224 query rows a request where it is split, got 4257"
    assert why(q, rows[:, :48]) == "needs a page size that is a power of two and at least 16, got 48"
    assert "without gaps" in (why(q, torch.empty((3, 128, 656), dtype=torch.uint8)[:, :64]) or "")
    assert "aligned to 16 bytes" in (why(q, torch.empty((3, 64, 664), dtype=torch.uint8)[..., :656]) or "")
    assert "aligned to 16 bytes" in (why(q, torch.empty((3, 64, 672), dtype=torch.uint8)[..., 4:660]) or "")
    assert why(q, torch.empty((3, 64, 672), dtype=torch.uint8)[..., 16:]) is None
    assert why(q, torch.empty((2**15, 2**16, 656), dtype=torch.uint8, device="meta")) == (
        f"needs fewer than 2**31 slots in the cache, got {2**31}"
    )


def test_other_gpus_and_older_tritons_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _hopper_reason.cache_clear()
    with pretend(A100):
        assert _hopper_reason("cuda:0") == "needs an NVIDIA GPU of compute capability 9.0, found (8, 0)"
    _hopper_reason.cache_clear()
    with pretend(H200):
        assert _hopper_reason("cuda:0") is None
        _hopper_reason.cache_clear()
        monkeypatch.setattr(triton, "__version__", "3.5.1")
        assert _hopper_reason("cuda:0") == "needs Triton 3.6 or later for Gluon, found 3.5.1"
    _hopper_reason.cache_clear()
    q, cache = inputs()
    table, lens = torch.zeros((2, 1), dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    found = candidates(q, cache, 0.1, 512, None)
    assert found["reference"] is None
    assert found["hopper"] == "the tensors are on the CPU, and Gluon has no interpreter"
    with pytest.raises(RuntimeError, match="impl='hopper' cannot run: the tensors are on the CPU"):
        mla_decode(q, cache, table, lens, softmax_scale=0.1, impl="hopper")


# Up to 16 and 32 query rows the kernel whose columns they are, above that the one of 64 rows.
@pytest.mark.parametrize(
    ("batch", "rows", "config"),
    [(16, 1, FEW16), (64, 16, FEW16), (64, 17, FEW32), (64, 32, FEW32), (64, 33, MANY), (4, 512, MANY)],
)
def test_configurations(batch: int, rows: int, config: HopperConfig) -> None:
    assert choose_config(rows=rows) == config
    codes = choose_fp8_config(rows=rows, packed=False)
    assert (codes.kernel, codes.tile_rows) == (config.kernel, config.tile_rows)
    plan = plan_slots(batch=batch, rows=rows, capacity=8192, units=132, num_splits=None, config=config)
    assert 0.8 * 132 * config.resident <= plan.programs <= 132 * config.resident


# These for whatever they can take, the portable kernels for 16-bit queries over e4m3 and for small pages.
@pytest.mark.parametrize(
    ("batch", "rows", "page_size", "dtype", "chosen"),
    [
        (1, 16, 64, torch.bfloat16, "hopper"),
        (128, 128, 16, torch.bfloat16, "hopper"),
        (128, 128, 8, torch.bfloat16, "triton"),
        (128, 16, 64, torch.float8_e4m3fn, "triton"),
        (1, 16, 64, torch.uint8, "hopper"),
        (128, 32, 16, torch.uint8, "hopper"),
        (128, 16, 8, torch.uint8, "triton"),
        (128, 128, 64, torch.uint8, "hopper"),
    ],
)
def test_what_is_taken_unasked(batch: int, rows: int, page_size: int, dtype: torch.dtype, chosen: str) -> None:
    q = torch.empty((batch, 1, rows, 576), device="meta", dtype=torch.bfloat16)
    cache = torch.empty((9, page_size, 656 if dtype == torch.uint8 else 576), device="meta", dtype=dtype)
    _hopper_reason.cache_clear()
    with pretend(H200):
        found = candidates(q, cache, 0.1, 512, None)
    _hopper_reason.cache_clear()
    assert next(name for name, reason in found.items() if reason is None) == chosen
    assert list(found)[2] == "reference"
