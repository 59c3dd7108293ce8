"""Who holds how many of a request's keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlakit.distributed import local_lengths


@given(
    length=st.integers(0, 200),
    page_size=st.sampled_from([1, 2, 8, 64]),
    ranks=st.integers(1, 9),
    q_len=st.integers(1, 5),
    first=st.integers(0, 12),
)
def test_every_key_has_one_rank(length, page_size, ranks, q_len, first):
    """As counting them one by one says, for each new token; also where there are fewer keys than new tokens."""
    lens = torch.tensor([length], dtype=torch.int32)
    for rank in range(ranks):
        found = local_lengths(lens, page_size=page_size, rank=rank, ranks=ranks, q_len=q_len, first=first)
        assert found.dtype == torch.int32
        visible = [max(length - q_len + token + 1, 0) for token in range(q_len)]
        held = [sum((first + key // page_size) % ranks == rank for key in range(seen)) for seen in visible]
        assert found.flatten().tolist() == held
        assert found.shape == ((1,) if q_len == 1 else (1, q_len))
        every = local_lengths(lens, page_size=page_size, rank=rank, ranks=ranks, q_len=q_len, first=first, causal=False)
        assert every.tolist() == [sum((first + key // page_size) % ranks == rank for key in range(length))]


def test_a_rank_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="rank must be in 0 to 3, got 4"):
        local_lengths(torch.zeros(1, dtype=torch.int32), page_size=8, rank=4, ranks=4)
    with pytest.raises(ValueError, match="at least 1, got 0 and 1"):
        local_lengths(torch.zeros(1, dtype=torch.int32), page_size=0, rank=0, ranks=4)
