"""One small decoding batch as the tests of every implementation use it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mlakit.decode import mla_decode_reference
from mlakit.testing import PagedCache, assert_close, compare_lse, random_paged_cache

RANK, ROPE = 64, 16  # the `tiny` preset


@dataclass(frozen=True)
class Batch:
    """Inputs of one call; dead table slots hold a wild page number and everything unpromised is NaN."""

    q: torch.Tensor
    paged: PagedCache
    scale: float
    rank: int

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.paged.pages, self.paged.block_table, self.paged.seq_lens

    def check(self, out: torch.Tensor, lse: torch.Tensor, causal: bool = True) -> None:
        """Compare with float64, with eager PyTorch in the same dtype as the yardstick."""
        q, cache, table, lens = self.inputs
        options: dict[str, Any] = {"softmax_scale": self.scale, "causal": causal, "kv_lora_rank": self.rank}
        expected, expected_lse = mla_decode_reference(q.double(), cache.double(), table, lens, **options)
        eager, _ = mla_decode_reference(q, cache, table, lens, **options)
        assert_close(out, expected, eager)
        found = compare_lse(lse, expected_lse)
        assert found.ok, found.reason


MakeBatch = Callable[..., Batch]


@pytest.fixture
def make_batch() -> MakeBatch:
    def make(
        lens: Sequence[int],
        *,
        q_len: int = 1,
        heads: int = 3,
        page_size: int = 16,
        dtype: torch.dtype = torch.float16,
        rank: int = RANK,
        rope: int = ROPE,
    ) -> Batch:
        generator = torch.Generator().manual_seed(len(lens) * 1000 + sum(lens))
        paged = random_paged_cache(
            lens,
            (rank + rope,),
            page_size=page_size,
            dtype=dtype,
            device="cpu",
            generator=generator,
            dead_slot=2**30,
            loud=[q_len] * len(lens),
        )
        q = torch.randn((len(lens), q_len, heads, rank + rope), generator=generator).to(dtype)
        return Batch(q, paged, (rank + rope) ** -0.5, rank)

    return make
