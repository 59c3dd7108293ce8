"""Messages: values and log-sum-exps in one buffer."""

import pytest
import torch

from mlakit.distributed.exchange import Messages
from mlakit.merge import merge_states_reference


# One rank, as many as the kernel takes apart, and more; widths that leave the lse no aligned place; each size of dtype.
@pytest.mark.parametrize("ranks", [1, 2, 8, 9])
@pytest.mark.parametrize(
    ("dtype", "lse_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("dim", [1, 33, 512])
def test_values_and_logs_lie_side_by_side(ranks, dtype, lse_dtype, dim):
    like = torch.empty(0, dtype=dtype)
    messages = Messages.allocate(like, lse_dtype, ranks, 3, 2, dim)
    messages.buffer.view(torch.uint8).fill_(0xFF)  # NaN in every dtype
    out, lse = torch.randn(ranks, 3, 2, dim).to(dtype), torch.randn(ranks, 3, 2).to(lse_dtype)
    lse[0, 0] = -torch.inf
    messages.out.copy_(out)
    messages.lse.copy_(lse)
    assert torch.equal(messages.out, out)  # neither has overwritten the other
    assert torch.equal(messages.lse, lse)
    assert messages.buffer.shape[-1] % 16 == 0
    for actual, expected in zip(messages.merge(), merge_states_reference(out, lse), strict=True):
        assert torch.equal(actual, expected)
