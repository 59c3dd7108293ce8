"""Batches over a paged cache of keys and values, poisoned wherever nobody promised a value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mlakit.paged import paged_attention_reference
from mlakit.testing import assert_close, compare_lse, random_page_table, random_pages

SCALE = 0.3
MakeBatch = Callable[..., "Batch"]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Inputs of a call, and what must come of them."""

    inputs: Inputs
    longest: int

    @property
    def q(self) -> torch.Tensor:
        """[tokens, heads, head_dim]."""
        return self.inputs[0]

    def check(self, out: torch.Tensor, lse: torch.Tensor, causal: bool = True) -> None:
        """Compare with float64."""
        options: dict[str, Any] = {"softmax_scale": SCALE, "causal": causal}
        q, k, v, *where = self.inputs
        expected, expected_lse = paged_attention_reference(q.double(), k.double(), v.double(), *where, **options)
        eager, _ = paged_attention_reference(*self.inputs, **options)
        assert_close(out, expected, eager)
        found = compare_lse(lse, expected_lse)
        assert found.ok, found.reason


@pytest.fixture
def make_batch() -> MakeBatch:
    def make(
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        page_size: int = 16,
        spare_tokens: int = 0,
        dtype: torch.dtype = torch.float16,
    ) -> Batch:
        generator = torch.Generator().manual_seed(sum(kv_lens) + heads)
        table = random_page_table(kv_lens, page_size=page_size, device="cpu", generator=generator, dead_slot=2**30)
        shape = (kv_heads, head_dim)
        k = random_pages(table, shape, dtype=dtype, generator=generator, loud=q_lens)
        v = random_pages(table, shape, dtype=dtype, generator=generator)
        bounds = torch.tensor([0, *q_lens]).cumsum(0).int()
        tokens = sum(q_lens) + spare_tokens
        q = torch.randn((tokens, heads, head_dim), generator=generator, dtype=dtype)
        q[sum(q_lens) :] = torch.nan
        return Batch((q, k, v, table.block_table, table.seq_lens, bounds), max([*q_lens, 0]))

    return make
