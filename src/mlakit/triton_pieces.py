"""Pieces of a request whose keys are shared among programs: where their results lie, and how they are merged."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import triton
import triton.language as tl


@triton.jit
def partial_index(slot, starts_request):
    """Where an evenly shared slot keeps a partial result: the request it leaves to the next slot comes second."""
    return 2 * slot + starts_request.to(tl.int32)


@triton.jit
def add_pieces(acc, m, l, part, part_lse):
    """Add pieces of one row, [pieces, columns] and their logarithms to base 2, to what is merged already."""
    m_new = tl.maximum(m, tl.max(part_lse, 0))
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row that sees no key: 0 instead of inf - inf
    old = tl.exp2(m - shift)
    weight = tl.exp2(part_lse - shift)
    return acc * old + tl.sum(part * weight[:, None], 0), m_new, l * old + tl.sum(weight, 0)
