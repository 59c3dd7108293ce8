"""What a layer remembers of earlier tokens: keys and values (`KVCache`), or the paged latent (`LatentCache`)."""

from dataclasses import dataclass

import torch

from mlakit.cache import gather_latent
from mlakit.cache.layout import fp8_row_bytes, pack_fp8, unpack_fp8
from mlakit.concat import concat_k
from mlakit.decode import mla_decode
from mlakit.nn.args import Args

Start = int | torch.Tensor


@dataclass
class KVCache:
    """Keys and values of every head, as naive and naive+flash keep them.

    Attributes:
        k: [batch, max_seq_len, n_heads, qk_head_dim].
        v: [batch, max_seq_len, n_heads, v_head_dim].
        filled: tokens of each request that hold something; set it yourself after writing to k and v yourself. Steps
            whose start_pos is a tensor do not keep count.
    """

    k: torch.Tensor
    v: torch.Tensor
    filled: int = 0

    @classmethod
    def allocate(cls, args: Args, batch: int, seq_len: int, device: torch.device, dtype: torch.dtype) -> "KVCache":
        """A cache of zeros for `batch` requests of up to `seq_len` tokens."""
        k = torch.zeros(batch, seq_len, args.n_heads, args.qk_head_dim, device=device, dtype=dtype)
        v = torch.zeros(batch, seq_len, args.n_heads, args.v_head_dim, device=device, dtype=dtype)
        return cls(k, v)

    @property
    def batch(self) -> int:
        """Requests there is room for."""
        return self.k.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens of a request there is room for."""
        return self.k.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations it belongs to."""
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.k.device

    @torch.no_grad()
    def write(self, start: Start, k_nope: torch.Tensor, k_pe: torch.Tensor, v: torch.Tensor) -> None:
        """Put new tokens, [bsz, seqlen, n_heads (k_pe: 1), ...], behind those before `start`."""
        bsz, seqlen = k_nope.shape[:2]
        if isinstance(start, int):
            k, new_v = (tensor[:bsz, start : start + seqlen] for tensor in (self.k, self.v))
            if torch.compiler.is_compiling():
                # Inductor (2.11 and 2.13) hands an operator a view whose offset is a symbol as if it began at 0.
                k[..., : k_nope.shape[-1]], k[..., k_nope.shape[-1] :], new_v[:] = k_nope, k_pe, v
            else:
                concat_k(k_nope.detach(), k_pe.detach(), out=k)
                concat_k(v.detach(), v.detach()[..., :1, :0], out=new_v)  # a copy of rows, at its full speed
            self.filled = start + seqlen
            return
        request = torch.arange(bsz, device=v.device)[:, None]
        position = start.long()[:, None] + torch.arange(seqlen, device=v.device)
        self.k[request, position] = join_key(k_nope, k_pe)
        self.v[request, position] = v


@dataclass
class LatentCache:
    """The latent and the shared rope part of every token, in pages, as absorb and fused keep them.

    Attributes:
        pages: [pages, page_size, latent_dim] of the activations' dtype, or uint8 [pages, page_size, bytes], the float8
            cache (656 bytes a token for DeepSeek's dimensions).
        block_table: [batch, max_pages] int32: which page holds a request's tokens i * page_size and on.
        kv_lora_rank: columns of the latent; the rest of a token is the rope part.
        dtype: of the activations it belongs to.
        contiguous: request i's pages are i * max_pages and on, in order, so that nothing has to be gathered.
        filled: tokens of each request that hold something; set it yourself after writing to the pages yourself. Steps
            whose start_pos is a tensor do not keep count.
    """

    pages: torch.Tensor
    block_table: torch.Tensor
    kv_lora_rank: int
    dtype: torch.dtype
    contiguous: bool = False
    filled: int = 0

    def __post_init__(self) -> None:
        if self.pages.ndim != 3 or self.block_table.ndim != 2:
            shapes = f"{list(self.pages.shape)} and {list(self.block_table.shape)}"
            raise ValueError(
                f"pages and block_table must be [pages, page_size, width] and [batch, max_pages]: {shapes}"
            )
        if self.block_table.dtype != torch.int32:
            raise ValueError(f"block_table must be torch.int32, got {self.block_table.dtype}")
        if self.pages.dtype not in (self.dtype, torch.uint8):
            raise ValueError(f"pages must be {self.dtype} or torch.uint8, got {self.pages.dtype}")
        if self.block_table.device != self.pages.device:
            raise ValueError(f"block_table must be on {self.pages.device}, got {self.block_table.device}")

    @classmethod
    def allocate(cls, args: Args, batch: int, seq_len: int, device: torch.device, dtype: torch.dtype) -> "LatentCache":
        """A cache of zeros for `batch` requests of up to `seq_len` tokens each, rounded up to whole pages."""
        each = -(-seq_len // args.page_size)
        fp8 = args.cache_dtype == "fp8"
        width = fp8_row_bytes(args.kv_lora_rank, args.qk_rope_head_dim) if fp8 else args.latent_dim
        pages = torch.zeros(batch * each, args.page_size, width, device=device, dtype=torch.uint8 if fp8 else dtype)
        table = torch.arange(batch * each, device=device, dtype=torch.int32).view(batch, each)
        return cls(pages, table, args.kv_lora_rank, dtype, contiguous=True)

    @property
    def batch(self) -> int:
        """Requests there is room for."""
        return self.block_table.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens of a request there is room for."""
        return self.block_table.shape[1] * self.page_size

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.pages.device

    @property
    def is_fp8(self) -> bool:
        """Whether the latent is kept in float8."""
        return self.pages.dtype == torch.uint8

    @property
    def is_whole(self) -> bool:
        """Whether all tokens lie in `pages`, and not some of them elsewhere."""
        return True

    def attend(self, q: torch.Tensor, seq_lens: torch.Tensor, *, softmax_scale: float, causal: bool) -> torch.Tensor:
        """`mla_decode` of absorbed queries [bsz, q_len, heads, latent_dim], the result [bsz, q_len, heads, rank]."""
        table = self.block_table[: q.shape[0]]
        out, _ = mla_decode(
            q,
            self.pages,
            table,
            seq_lens,
            softmax_scale=softmax_scale,
            causal=causal,
            kv_lora_rank=self.kv_lora_rank,
        )
        return out

    def slots(self, start: Start, bsz: int, seqlen: int) -> torch.Tensor:
        """Where the new tokens go, [bsz * seqlen] int64: page * page_size + offset."""
        if self.contiguous:  # by as few kernels as will do: a step of decode feels each
            begin = start if isinstance(start, int) else 0
            first = torch.arange(begin, begin + bsz * self.capacity, self.capacity, device=self.device)
            if isinstance(start, torch.Tensor):
                first = first + start
            return first if seqlen == 1 else (first[:, None] + torch.arange(seqlen, device=self.device)).flatten()
        steps = torch.arange(seqlen, device=self.device)
        positions = (steps + start)[None] if isinstance(start, int) else steps + start.long()[:, None]
        positions = positions.expand(bsz, seqlen)
        pages = self.block_table[:bsz].long().gather(1, positions // self.page_size)
        return (pages * self.page_size + positions % self.page_size).flatten()

    @torch.no_grad()
    def write(self, start: Start, latent: torch.Tensor, k_pe: torch.Tensor, scale_fmt: str | None = None) -> None:
        """Put new tokens, [bsz, seqlen, kv_lora_rank] and [bsz, seqlen, rope], behind those before `start`."""
        bsz, seqlen = latent.shape[:2]
        rows = pack_fp8(latent, k_pe, scale_fmt) if self.is_fp8 else torch.cat((latent, k_pe), dim=-1)
        self.pages.view(-1, self.pages.shape[-1])[self.slots(start, bsz, seqlen)] = rows.flatten(0, 1)
        if isinstance(start, int):
            self.filled = start + seqlen

    def read(self, bsz: int, end: int) -> torch.Tensor:
        """The first `end` tokens of the first `bsz` requests, [bsz, end, latent_dim] in the activations' dtype; a view
        where one will do.
        """
        if self.contiguous:
            rows = self.pages.view(self.batch, self.capacity, -1)[:bsz, :end]
            return unpack_fp8(rows, self.kv_lora_rank, self.dtype) if self.is_fp8 else rows
        return self.gather(bsz, 0, end).view(bsz, end, -1)

    def gather(self, bsz: int, begin: int, end: int) -> torch.Tensor:
        """Tokens `begin` to `end` of the first `bsz` requests, [bsz * (end - begin), latent_dim], contiguous."""
        lengths = torch.full((bsz,), end - begin, device=self.device, dtype=torch.int32)
        starts = torch.full((bsz,), begin, device=self.device, dtype=torch.int32) if begin else None
        return gather_latent(
            self.pages,
            self.block_table[:bsz],
            lengths,
            bsz * (end - begin),
            starts=starts,
            kv_lora_rank=self.kv_lora_rank,
            dtype=self.dtype,
        )


Cache = KVCache | LatentCache


def join_key(k_nope: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    """Keys of all heads, [bsz, seqlen, n_heads, qk_head_dim], from their own part and the one they share."""
    return torch.cat((k_nope, k_pe.expand(-1, -1, k_nope.shape[2], -1)), dim=-1)
