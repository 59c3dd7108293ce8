"""A latent cache of which each rank holds some pages."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from mlakit.distributed.context import HEADS, context_parallel_decode, local_lengths
from mlakit.nn import Args, LatentCache
from mlakit.nn.caches import Start

_NOT_IN_ONE_PLACE = "a sharded cache is for attn_impl 'fused' without gradients, which attends where the tokens lie"


@dataclass
class ShardedLatentCache(LatentCache):
    """This rank's pages of a latent cache: page j of a request lies on rank j % n of the mesh's n.

    Dealt out in turn, so that a growing request stays balanced to a page. A layer of `mlakit.nn` with attn_impl
    "fused" takes it as it takes a `LatentCache`, and then attends with all ranks of the mesh; each rank's layer gets
    the same tokens, and `filled` and `capacity` count tokens of all ranks, whose tables have as many columns.

    Attributes:
        mesh: one-dimensional; every rank of it has a cache for the same requests.
        heads: which of the heads that the ranks attend to together a layer has: "all", or "own", the ranks' one after
            another.
    """

    mesh: DeviceMesh | None = None
    heads: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mesh is None or self.mesh.ndim != 1:
            dims = None if self.mesh is None else self.mesh.ndim
            raise ValueError(f"mesh must be a DeviceMesh of one dimension, got {dims} dimensions")
        if self.heads not in HEADS:
            raise ValueError(f"heads must be 'all' or 'own', got {self.heads!r}")
        if self.is_fp8:
            raise ValueError("a sharded cache must be of the activations' dtype, got the float8 cache")

    @classmethod
    def for_mesh(
        cls,
        args: Args,
        batch: int,
        seq_len: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        mesh: DeviceMesh,
        heads: str = "all",
    ) -> "ShardedLatentCache":
        """A cache of zeros with room for `batch` requests of up to `seq_len` tokens over all ranks."""
        if args.cache_dtype == "fp8":
            raise ValueError("a sharded cache must be of the activations' dtype, got cache_dtype='fp8'")
        each = -(-seq_len // (args.page_size * mesh.size()))
        pages = torch.zeros(batch * each, args.page_size, args.latent_dim, device=device, dtype=dtype)
        table = torch.arange(batch * each, device=device, dtype=torch.int32).view(batch, each)
        return cls(pages, table, args.kv_lora_rank, dtype, mesh=mesh, heads=heads)

    @property
    def ranks(self) -> int:
        """Among how many the pages are dealt out."""
        assert self.mesh is not None
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """This one's place in the mesh."""
        assert self.mesh is not None
        return self.mesh.get_local_rank()

    @property
    def capacity(self) -> int:
        """Tokens of a request there is room for, over all ranks."""
        return self.block_table.shape[1] * self.page_size * self.ranks

    @property
    def is_whole(self) -> bool:
        """Whether all tokens lie in `pages`."""
        return self.ranks == 1

    def slots(self, start: Start, bsz: int, seqlen: int) -> torch.Tensor:
        """Where the new tokens go, [bsz * seqlen] int64; -1 for what another rank keeps."""
        steps = torch.arange(seqlen, device=self.device)
        positions = (steps + start)[None] if isinstance(start, int) else steps + start.long()[:, None]
        page = torch.div(positions, self.page_size, rounding_mode="floor").expand(bsz, seqlen)
        elsewhere = page % self.ranks != self.rank
        # What another rank keeps may lie beyond this one's table.
        column = torch.div(page, self.ranks, rounding_mode="floor").masked_fill_(elsewhere, 0)
        slots = self.block_table[:bsz].long().gather(1, column) * self.page_size + positions % self.page_size
        return slots.masked_fill_(elsewhere, -1).flatten()

    def write(self, start: Start, latent: torch.Tensor, k_pe: torch.Tensor, scale_fmt: str | None = None) -> None:
        """Not for layers that look at all tokens in one place."""
        raise ValueError(_NOT_IN_ONE_PLACE)

    def read(self, bsz: int, end: int) -> torch.Tensor:
        """As `write`."""
        raise ValueError(_NOT_IN_ONE_PLACE)

    def gather(self, bsz: int, begin: int, end: int) -> torch.Tensor:
        """As `write`; a step that wants a gradient comes here too."""
        raise ValueError(_NOT_IN_ONE_PLACE)

    def local_lens(self, seq_lens: torch.Tensor, q_len: int, causal: bool) -> torch.Tensor:
        """Of the first `seq_lens` tokens, how many lie here: `local_lengths`."""
        return local_lengths(
            seq_lens, page_size=self.page_size, rank=self.rank, ranks=self.ranks, q_len=q_len, causal=causal
        )

    def attend(self, q: torch.Tensor, seq_lens: torch.Tensor, *, softmax_scale: float, causal: bool) -> torch.Tensor:
        """`context_parallel_decode` of absorbed queries [bsz, q_len, heads, latent_dim]."""
        assert self.mesh is not None
        out, _ = context_parallel_decode(
            q,
            self.pages,
            self.block_table[: q.shape[0]],
            self.local_lens(seq_lens, q.shape[1], causal),
            mesh=self.mesh,
            softmax_scale=softmax_scale,
            kv_lora_rank=self.kv_lora_rank,
            query_heads=self.heads,
        )
        return out
