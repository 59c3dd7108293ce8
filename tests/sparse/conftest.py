"""Small sparse problems as the tests of every implementation use them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.sparse import mla_sparse_decode_reference, mla_sparse_prefill_reference
from mlakit.testing import assert_close, compare_lse

WILD = (-1, -(2**31), 2147480000, 2**31 - 1)  # indices that are ignored


def random_indices(
    shape: tuple[int, ...], keys: int, generator: torch.Generator, wild: tuple[int, ...] = WILD
) -> torch.Tensor:
    """Indices [..., topk] with duplicates and a fifth of them invalid, anywhere; the second row is wholly invalid."""
    indices = torch.randint(0, max(keys, 1), shape, generator=generator)
    bad = torch.rand(shape, generator=generator) < (0.2 if keys else 1.1)
    rows = bad.flatten(0, -2)
    if len(rows) > 1:
        rows[1] = True
    some = torch.tensor([*wild, keys])[torch.randint(0, len(wild) + 1, shape, generator=generator)]
    return torch.where(bad, some, indices).int()


@dataclass(frozen=True)
class Prefill:
    """Inputs of one `mla_sparse_prefill`; keys that no index names are NaN."""

    q: torch.Tensor
    kv: torch.Tensor
    indices: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.kv, self.indices

    def check(self, out: torch.Tensor, max_logits: torch.Tensor, lse: torch.Tensor) -> None:
        """Compare with float64, with eager PyTorch in the same dtype as the yardstick."""
        exact = mla_sparse_prefill_reference(self.q.double(), self.kv.double(), self.indices, **self.options)
        eager = mla_sparse_prefill_reference(*self.inputs, **self.options)
        assert_close(out, exact[0], eager[0])
        for found in (compare_lse(max_logits, exact[1]), compare_lse(lse, exact[2])):
            assert found.ok, found.reason


@dataclass(frozen=True)
class Decode:
    """Inputs of one `mla_sparse_decode`; slots that no index names are NaN."""

    q: torch.Tensor
    cache: torch.Tensor
    indices: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.cache, self.indices

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Compare with float64, with eager PyTorch in the same dtype as the yardstick."""
        q, cache, rank = self.q, self.cache, self.options["kv_lora_rank"]
        fp8 = cache.dtype == torch.uint8
        keys = unpack_fp8(cache, rank, q.dtype) if fp8 else cache  # as a kernel may round them
        exact = mla_sparse_decode_reference(q.double(), cache if fp8 else keys.double(), self.indices, **self.options)
        rounded = mla_sparse_decode_reference(q.double(), keys.double(), self.indices, **self.options)
        eager = mla_sparse_decode_reference(q, keys, self.indices, **self.options)
        assert_close(out, exact[0], eager[0])
        found = compare_lse(lse, exact[1], rounded[1])
        assert found.ok, found.reason


MakePrefill = Callable[..., Prefill]
MakeDecode = Callable[..., Decode]


def make_prefill_problem(
    s_q: int,
    s_kv: int,
    topk: int,
    *,
    heads: int = 3,
    kv_heads: int = 1,
    rank: int = 64,
    rope: int = 16,
    dtype: torch.dtype = torch.float16,
    sink: bool = False,
    lengths: bool = False,
    device: str = "cpu",
) -> Prefill:
    generator = torch.Generator().manual_seed(s_q * 1000 + s_kv + topk)
    d = rank + rope
    indices = random_indices((s_q, kv_heads, topk), s_kv, generator)
    kv = torch.randn((s_kv, kv_heads, d), generator=generator)
    for head in range(kv_heads):  # what no index names must not be read
        named = torch.zeros(s_kv, dtype=torch.bool)
        row = indices[:, head].long()
        named[row[(row >= 0) & (row < s_kv)]] = True
        kv[~named, head] = torch.nan
    options: dict[str, Any] = {"softmax_scale": d**-0.5, "d_v": rank}
    if sink:
        sinks = torch.randn(heads, generator=generator)
        sinks[0] = torch.inf
        sinks[-1] = -torch.inf
        options["attn_sink"] = sinks.to(device)
    if lengths:
        some = torch.randint(-2, topk + 3, (s_q,), generator=generator, dtype=torch.int32)
        options["topk_length"] = some.to(device)
    q = torch.randn((s_q, heads, d), generator=generator)
    return Prefill(q.to(device, dtype), kv.to(device, dtype), indices.to(device), options)


def make_decode_problem(
    batch: int,
    q_len: int,
    topk: int,
    *,
    pages: int = 5,
    page_size: int = 16,
    heads: int = 3,
    fp8: bool = False,
    rank: int = 64,
    rope: int = 16,
    dtype: torch.dtype = torch.float16,
    sink: bool = False,
    lengths: str = "",
    valid_first: int = 0,
    device: str = "cpu",
) -> Decode:
    generator = torch.Generator().manual_seed(batch * 1000 + q_len * 100 + topk)
    d = rank + rope
    slots = pages * page_size
    indices = random_indices((batch, q_len, topk), slots, generator)
    if valid_first:
        indices = torch.randint(0, slots, indices.shape, generator=generator, dtype=torch.int32)
        indices[..., valid_first:] = -1
    keys = torch.randn((slots, d), generator=generator)
    named = torch.zeros(slots, dtype=torch.bool)
    row = indices.long()
    named[row[(row >= 0) & (row < slots)]] = True
    if fp8:
        cache = pack_fp8(keys[:, :rank], keys[:, rank:])
        cache[~named] = 255  # NaN in every format
    else:
        keys[~named] = torch.nan
        cache = keys.to(dtype)
    options: dict[str, Any] = {"softmax_scale": d**-0.5, "kv_lora_rank": rank}
    if sink:
        options["attn_sink"] = torch.randn(heads, generator=generator).to(device)
    if lengths:
        shape = (batch, q_len) if lengths == "token" else (batch,)
        some = torch.randint(-2, topk + 3, shape, generator=generator, dtype=torch.int32)
        options["topk_length"] = some.to(device)
    q = torch.randn((batch, q_len, heads, d), generator=generator)
    return Decode(q.to(device, dtype), cache.view(pages, page_size, -1).to(device), indices.to(device), options)


@pytest.fixture
def make_prefill() -> MakePrefill:
    return make_prefill_problem


@pytest.fixture
def make_decode() -> MakeDecode:
    return make_decode_problem
