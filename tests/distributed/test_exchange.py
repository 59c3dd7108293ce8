"""Messages: values and log-sum-exps in one buffer."""

import pytest
import torch

from mlakit.distributed.context import swaps_first
from mlakit.distributed.exchange import Messages, message_bytes
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
    assert messages.buffer.shape[1] % 16 == 0
    assert messages.lse[0].is_contiguous()  # where kernels can write it
    assert messages.buffer.nbytes == ranks * message_bytes(dtype, lse_dtype, 3, 2, dim)
    for heads in (slice(None), slice(1, 2)):
        expected = merge_states_reference(out[:, :, heads], lse[:, :, heads])
        for actual, right in zip(messages.merge(heads), expected, strict=True):
            assert torch.equal(actual, right)


# A few tokens go to all ranks at once; more of them, or more ranks, get their own heads' results first. Heads that
# cannot be divided always go to all.
@pytest.mark.parametrize(
    ("tokens", "heads", "ranks", "own", "all_"),
    [(1, 128, 2, False, False), (32, 128, 2, True, False), (1, 128, 4, False, False), (1, 128, 8, True, False),
     (2, 128, 8, True, True), (32, 127, 8, False, False)],
)  # fmt: skip
def test_the_cheaper_exchange_is_chosen(tokens, heads, ranks, own, all_):
    nbytes = message_bytes(torch.bfloat16, torch.float32, tokens, heads, 512)
    assert nbytes == -(-tokens * heads * (512 * 2 + 4) // 32) * 32
    assert swaps_first(nbytes, heads, ranks, "own") is own
    assert swaps_first(nbytes, heads, ranks, "all") is all_
