"""What ranks tell one another of an attention: partial results as messages, one collective an exchange.

A message is a row for each token and head: the value, the lse behind it, and room that keeps rows aligned. Kernels
write values straight into it and merge straight from it, so that an exchange is one collective of one buffer. All are
PyTorch's own collectives on bytes, which every backend can carry whatever the dtype.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mlakit.merge import merge_states

# Rows are multiples of this many elements: Triton takes a stride that is a multiple of 16 for aligned, and stores 16
# bytes at a time.
_ALIGN = 16

# Up to this many results are merged as tensors of their own, whose loads do not wait for one another. H200, cold L2,
# 128 rows: of 2 ranks 6.9 µs instead of 8.6, of 8 ranks 8.8 instead of 18.0. More would be copied together first.
_APART = 8

# torch 2.13 renamed it and warns at the old name; 2.11 has the old one alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Messages:
    """Partial results [..., row] of some ranks.

    Attributes:
        buffer: [ranks, tokens, heads, row], contiguous.
        dim: width of the value.
        lse_dtype: float32, or float64 where the values are.
    """

    buffer: torch.Tensor
    dim: int
    lse_dtype: torch.dtype

    @classmethod
    def allocate(
        cls, like: torch.Tensor, lse_dtype: torch.dtype, ranks: int, tokens: int, heads: int, dim: int
    ) -> "Messages":
        """Unwritten messages in the dtype and on the device of `like`."""
        per_lse = max(1, lse_dtype.itemsize // like.element_size())
        row = -(-(dim + 2 * per_lse - 1) // _ALIGN) * _ALIGN
        return cls(like.new_empty(ranks, tokens, heads, row), dim, lse_dtype)

    @property
    def out(self) -> torch.Tensor:
        """The values, a view [ranks, tokens, heads, dim]."""
        return self.buffer[..., : self.dim]

    @property
    def lse(self) -> torch.Tensor:
        """The lses, a view [ranks, tokens, heads]."""
        logs = self.buffer.view(self.lse_dtype)
        return logs[..., -(-self.dim * self.buffer.element_size() // self.lse_dtype.itemsize)]

    @property
    def nbytes(self) -> int:
        """Bytes of all messages."""
        return self.buffer.numel() * self.buffer.element_size()

    def merge(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the ranks' results over disjoint keys, the result over all: [tokens, heads, dim] and [tokens, heads]."""
        if self.buffer.shape[0] > _APART:
            return merge_states(self.out, self.lse)
        return merge_states(self.out.unbind(0), self.lse.unbind(0))

    def swapped(self, mesh: DeviceMesh) -> "Messages":
        """Message i goes to rank i; what comes back is what every rank had for this one."""
        received = torch.empty_like(self.buffer)
        dist.all_to_all_single(as_bytes(received), as_bytes(self.buffer), group=mesh.get_group())
        return Messages(received, self.dim, self.lse_dtype)

    def gathered(self, mesh: DeviceMesh) -> "Messages":
        """Every rank's one message."""
        ranks = mesh.size()
        received = self.buffer.new_empty(ranks, *self.buffer.shape[1:])
        _all_gather(as_bytes(received), as_bytes(self.buffer), group=mesh.get_group())
        return Messages(received, self.dim, self.lse_dtype)


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
