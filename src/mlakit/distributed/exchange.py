"""What ranks tell one another of an attention: partial results as messages, one collective an exchange.

A message is the values of some tokens and heads, and their lses behind them. Kernels write straight into it and merge
straight from it, so that an exchange is one collective of one buffer. All are PyTorch's own collectives on bytes, which
every backend can carry whatever the dtype.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mlakit.merge import merge_states

# Messages are multiples of this many elements, so that all of them begin at as good an address as the first: Triton
# takes a stride that is a multiple of 16 for aligned, and stores 16 bytes at a time.
_ALIGN = 16

# Up to this many results are merged as tensors of their own, whose loads do not wait for one another. H200, cold L2,
# 128 rows: of 2 ranks 6.9 µs instead of 8.6, of 8 ranks 8.8 instead of 18.0. More would be copied together first.
_APART = 8

# torch 2.13 renamed it and warns at the old name; 2.11 has the old one alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Messages:
    """Partial results of some ranks, or for them.

    Attributes:
        buffer: [ranks, elements], contiguous.
        shape: tokens, heads and width of the values of a message.
        lse_dtype: float32, or float64 where the values are.
    """

    buffer: torch.Tensor
    shape: tuple[int, int, int]
    lse_dtype: torch.dtype

    @classmethod
    def allocate(
        cls, like: torch.Tensor, lse_dtype: torch.dtype, ranks: int, tokens: int, heads: int, dim: int
    ) -> "Messages":
        """Unwritten messages in the dtype and on the device of `like`."""
        elements = message_bytes(like.dtype, lse_dtype, tokens, heads, dim) // like.element_size()
        return cls(like.new_empty(ranks, elements), (tokens, heads, dim), lse_dtype)

    @property
    def out(self) -> torch.Tensor:
        """The values, a view [ranks, tokens, heads, dim]."""
        return self.buffer[:, : prod(self.shape)].unflatten(1, self.shape)

    @property
    def lse(self) -> torch.Tensor:
        """The lses, a view [ranks, tokens, heads]; contiguous where there is one rank."""
        tokens, heads, _ = self.shape
        start = _lse_start(self.buffer.dtype, self.lse_dtype, self.shape)
        logs = self.buffer.view(self.lse_dtype)[:, start : start + tokens * heads]
        return logs.unflatten(1, (tokens, heads))

    def merge(self, heads: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the ranks' results over disjoint keys, the result over all: [tokens, heads, dim] and [tokens, heads]; of
        some heads, or of all.
        """
        out, lse = self.out[:, :, heads], self.lse[:, :, heads]
        if self.buffer.shape[0] > _APART:
            return merge_states(out, lse)
        return merge_states(out.unbind(0), lse.unbind(0))

    def swapped(self, mesh: DeviceMesh) -> "Messages":
        """Message i goes to rank i; what comes back is what every rank had for this one."""
        received = torch.empty_like(self.buffer)
        dist.all_to_all_single(as_bytes(received), as_bytes(self.buffer), group=mesh.get_group())
        return Messages(received, self.shape, self.lse_dtype)

    def gathered(self, mesh: DeviceMesh) -> "Messages":
        """Every rank's one message."""
        received = self.buffer.new_empty(mesh.size(), self.buffer.shape[1])
        _all_gather(as_bytes(received), as_bytes(self.buffer), group=mesh.get_group())
        return Messages(received, self.shape, self.lse_dtype)


def message_bytes(dtype: torch.dtype, lse_dtype: torch.dtype, tokens: int, heads: int, dim: int) -> int:
    """Bytes of the message of so many tokens and heads."""
    unit = _ALIGN * dtype.itemsize  # of which float32 and float64 are parts too
    used = (_lse_start(dtype, lse_dtype, (tokens, heads, dim)) + tokens * heads) * lse_dtype.itemsize
    return -(-used // unit) * unit


def _lse_start(dtype: torch.dtype, lse_dtype: torch.dtype, shape: tuple[int, int, int]) -> int:
    """Where lses begin, counted in their own dtype."""
    return -(-prod(shape) * dtype.itemsize // lse_dtype.itemsize)


def gather_heads(q: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Queries of every rank's heads, [batch, q_len, heads, latent_dim] each, as a view [batch, q_len, ranks, heads,
    latent_dim].
    """
    received = q.new_empty(mesh.size(), *q.shape)
    _all_gather(as_bytes(received), as_bytes(q.contiguous()), group=mesh.get_group())
    return received.permute(1, 2, 0, 3, 4)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes, flat."""
    return tensor.view(-1).view(torch.uint8)
