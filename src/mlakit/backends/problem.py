"""What a backend is handed: the shape of a batch, its tables, and the tensors of one layer."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Literal

import torch

from mlakit.dims import MLADims, StandardDims
from mlakit.testing import poison_


@dataclass(frozen=True)
class Group:
    """The requests of one shape; `rows` are their query tokens and `keys` their keys, both [requests, length] int64
    (ragged order).
    """

    q_len: int
    kv_len: int
    rows: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class Run:
    """Neighbouring requests of one q_len: `rows` are their query tokens, `requests` their place in the batch."""

    q_len: int
    rows: slice
    requests: slice

    @property
    def size(self) -> int:
        """Number of requests."""
        return self.requests.stop - self.requests.start


@dataclass(frozen=True)
class Ragged:
    """A batch of requests laid end to end, with the tables that paged kernels take. All tables are on the device,
    lengths int32.

    `slots` [total keys] int64 is the flat cache slot (page * page_size + offset) of each key, requests in order.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor

    @property
    def size(self) -> int:
        """Number of requests."""
        return len(self.q_lens)

    @property
    def tokens(self) -> int:
        """Number of query tokens."""
        return sum(self.q_lens)

    @property
    def keys(self) -> int:
        """Number of keys."""
        return sum(self.kv_lens)

    @property
    def max_q_len(self) -> int:
        """Most query tokens of a request."""
        return max(self.q_lens)

    @property
    def max_kv_len(self) -> int:
        """Most keys of a request."""
        return max(self.kv_lens)

    @cached_property
    def runs(self) -> list[Run]:
        """Neighbouring requests with equally many new tokens: one call of a kernel that takes [batch, q_len, ...]."""
        runs, row, request = [], 0, 0
        for q_len, members in groupby(self.q_lens):
            count = len(list(members))
            runs.append(Run(q_len, slice(row, row + count * q_len), slice(request, request + count)))
            row, request = row + count * q_len, request + count
        return runs

    @property
    def page_counts(self) -> list[int]:
        """Pages that each request's keys take."""
        return [-(-n // self.page_size) for n in self.kv_lens]

    @cached_property
    def groups(self) -> list[Group]:
        """Requests of equal shape together: what batched PyTorch operations want."""
        members = defaultdict(list)
        for i, shape in enumerate(zip(self.q_lens, self.kv_lens, strict=True)):
            members[shape].append(i)
        device = self.seq_lens.device
        groups = []
        for (q_len, kv_len), indices in members.items():
            index = torch.tensor(indices, device=device)
            rows = self.cu_seqlens_q[index].long()[:, None] + torch.arange(q_len, device=device)
            keys = self.cu_seqlens_k[index].long()[:, None] + torch.arange(kv_len, device=device)
            groups.append(Group(q_len, kv_len, rows, keys))
        return groups


@dataclass
class Problem:
    """What every problem has. `out` buffers are made once and poisoned by whoever checks.

    `kernel` names what really runs, in the library's own words; the backend sets it where there is a choice.
    """

    batch: Ragged
    dtype: torch.dtype
    device: torch.device
    softmax_scale: float
    causal: bool = True
    kernel: str | None = None
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def buffer(self, name: str, *shape: int) -> torch.Tensor:
        """An output buffer that is the same tensor at each call; it starts as poison."""
        if name not in self._buffers:
            self._buffers[name] = poison_(torch.empty(shape, dtype=self.dtype, device=self.device))
        return self._buffers[name]

    def poison(self) -> None:
        """Overwrite every output buffer with poison."""
        for tensor in self._buffers.values():
            poison_(tensor)


@dataclass
class MLAProblem(Problem):
    """Multi-head Latent Attention of one pipeline's requests.

    In the scope "attention" the decode pipeline starts from the paged latent cache, the prefill pipeline from keys and
    values already expanded, and the query is given in whichever form the mode wants. In the scope "pipeline" both start
    from the plain query and the paged latent cache and end at [tokens, heads, v_head_dim], so that the projections that
    tell the modes apart are counted.
    """

    dims: MLADims = field(kw_only=True)
    pipeline: Literal["decode", "prefill"] = field(kw_only=True)
    scope: Literal["attention", "pipeline"] = field(kw_only=True)

    @property
    def out_latent(self) -> torch.Tensor:
        """Buffer [tokens, heads, kv_lora_rank]."""
        return self.buffer("out_latent", self.batch.tokens, self.dims.num_heads, self.dims.kv_lora_rank)

    @property
    def out(self) -> torch.Tensor:
        """Buffer [tokens, heads, v_head_dim]."""
        return self.buffer("out", self.batch.tokens, self.dims.num_heads, self.dims.v_head_dim)


@dataclass
class StandardProblem(Problem):
    """Standard attention over a paged cache."""

    dims: StandardDims = field(kw_only=True)

    @property
    def out(self) -> torch.Tensor:
        """Buffer [tokens, num_q_heads, head_dim]."""
        return self.buffer("out", self.batch.tokens, self.dims.num_q_heads, self.dims.head_dim)


@dataclass(frozen=True)
class MLALayer:
    """One layer's tensors.

    q [tokens, heads, qk_head_dim] (rope applied), q_latent [tokens, heads, latent_dim] the same with the key projection
    absorbed, cache [pages, page_size, latent_dim], w_uk [heads, qk_nope_head_dim, kv_lora_rank], w_uv [heads,
    kv_lora_rank, v_head_dim]; k [keys, heads, qk_head_dim] and v [keys, heads, v_head_dim] where the problem starts
    from them.
    """

    q: torch.Tensor
    q_latent: torch.Tensor
    cache: torch.Tensor
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None


@dataclass(frozen=True)
class StandardLayer:
    """One layer's tensors: q [tokens, num_q_heads, head_dim], caches [pages, page_size, num_kv_heads, head_dim]."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
