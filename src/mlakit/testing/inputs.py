"""Random inputs as serving systems hand them over: pages in any order, and poison wherever nobody promised a value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PageTable:
    """Where the tokens of a batch lie in a cache of `num_pages` pages.

    `block_table` [batch, max_pages] int32; `seq_lens` [batch] int32; `slots` [total tokens] int64 is the flat slot
    (page * page_size + offset) of each token, requests in order.
    """

    num_pages: int
    page_size: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class PagedCache:
    """A paged cache [num_pages, page_size, *token_shape] and its tables, as in `PageTable`."""

    pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor


def random_page_table(
    seq_lens: Sequence[int],
    *,
    page_size: int,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    spare_pages: int = 3,
    dead_slot: int | None = None,
) -> PageTable:
    """Pages in any order, `spare_pages` of them unused.

    Block-table slots past a request's last page hold `dead_slot`, or point at an unused page if that is None.
    """
    if spare_pages < 1:
        raise ValueError(f"spare_pages must be at least 1, as dead slots point at one; got {spare_pages}")
    lens = list(seq_lens)
    counts = [-(-n // page_size) for n in lens]
    total = sum(counts)
    order = torch.randperm(total + spare_pages, generator=generator, device=generator.device if generator else "cpu")
    order = order.to(device=device, dtype=torch.int32)
    table = torch.empty((len(lens), max([*counts, 1])), dtype=torch.int32, device=device)
    table[:] = order[total] if dead_slot is None else dead_slot
    slots = []
    used = 0
    for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
        mine = order[used : used + count]
        used += count
        table[row, :count] = mine
        positions = torch.arange(length, device=device)
        slots.append(mine.long()[positions // page_size] * page_size + positions % page_size)
    flat = torch.cat(slots) if slots else torch.empty(0, dtype=torch.long, device=device)
    lengths = torch.tensor(lens, dtype=torch.int32, device=device)
    return PageTable(total + spare_pages, page_size, table, lengths, flat)


def random_pages(
    table: PageTable,
    token_shape: Sequence[int],
    *,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    loud: Sequence[int] | None = None,
    loudness: float = 2.0,
) -> torch.Tensor:
    """Normally distributed tokens [num_pages, page_size, *token_shape]; the tails of pages and unused pages hold NaN.

    `loud[i]` newest tokens of request i and its first one are multiplied by `loudness`: they get enough weight in the
    softmax that an off-by-one at either end of a long context shows in the output.
    """
    device = table.slots.device
    # Not `poison_`: arithmetic hands a NaN's payload on, and an output that read padding must not look like one never
    # written.
    pages = torch.full((table.num_pages, table.page_size, *token_shape), torch.nan, dtype=dtype, device=device)
    tokens = torch.randn((table.slots.numel(), *token_shape), dtype=dtype, device=device, generator=generator)
    if loud is not None:
        start = 0
        for length, newest in zip(table.seq_lens.tolist(), loud, strict=True):
            if length:
                tokens[start] *= loudness
                tokens[max(start + 1, start + length - newest) : start + length] *= loudness
            start += length
    pages.view(-1, *token_shape)[table.slots] = tokens
    return pages


def random_paged_cache(
    seq_lens: Sequence[int],
    token_shape: Sequence[int],
    *,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    spare_pages: int = 3,
    dead_slot: int | None = None,
    loud: Sequence[int] | None = None,
    loudness: float = 2.0,
) -> PagedCache:
    """`random_page_table` and `random_pages` in one call."""
    table = random_page_table(
        seq_lens, page_size=page_size, device=device, generator=generator, spare_pages=spare_pages, dead_slot=dead_slot
    )
    pages = random_pages(table, token_shape, dtype=dtype, generator=generator, loud=loud, loudness=loudness)
    return PagedCache(pages, table.block_table, table.seq_lens, table.slots)
