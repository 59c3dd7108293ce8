"""What the study `parallel` runs: one decode batch, divided over ranks by heads, by keys or both, as a whole and in
parts that can be timed alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mlakit.decode import mla_decode, mla_decode_reference
from mlakit.distributed import ParallelMLA, ShardedLatentCache, context_parallel_decode, local_lengths
from mlakit.distributed.context import attend_locally, swaps_first
from mlakit.distributed.exchange import Messages, gather_heads, message_bytes
from mlakit.distributed.group import Ranks
from mlakit.nn import Args, LatentCache, MultiheadLatentAttention, get_mla, precompute_freqs_cis
from mlakit.studies.parallel_options import Options, requests_of
from mlakit.studies.parallel_report import Plan

DTYPE = torch.bfloat16
Call = Callable[[], object]


@cache
def mesh_of(kind: str, tp: int, cp: int) -> DeviceMesh:
    """All ranks, as `tp` groups of `cp`; every rank must ask."""
    return DeviceMesh(kind, torch.arange(tp * cp).view(tp, cp), mesh_dim_names=("tp", "cp"))


class Batch:
    """A decode batch: the same queries, keys and lengths on every rank that makes it."""

    def __init__(self, spec: str, options: Options, device: torch.device) -> None:
        requests = requests_of(spec)
        self.spec, self.options, self.device = spec, options, device
        self.q_len = requests[0].q_len
        self.lengths = [request.kv_len for request in requests]
        self.size, self.tokens = len(requests), len(requests) * self.q_len
        self.dims = options.dims
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.picked = sorted({0, self.size - 1})  # of all requests, those compared with float64
        self.q = self._random(0, self.size, self.q_len, self.dims.num_heads, self.dims.latent_dim)

    def _random(self, stream: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(1000 * self.options.seed + stream)
        return torch.randn(*shape, device=self.device, generator=generator, dtype=DTYPE)

    def keys(self, request: int) -> torch.Tensor:
        """A request's latents, [kv_len, latent_dim]."""
        return self._random(2 + request, self.lengths[request], self.dims.latent_dim)

    def hidden(self) -> torch.Tensor:
        """The new tokens' hidden states, [batch, q_len, dim]."""
        return self._random(1, self.size, self.q_len, self.options.hidden.dim)

    def shard(self, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Every `ranks`-th page of each request, in shuffled places, with NaN behind its last token; and the table."""
        size = self.options.page_size
        held = [len(range(rank, -(-length // size), ranks)) for length in self.lengths]
        columns = -(-max(self.lengths) // (size * ranks))  # as many on every rank
        pages = torch.zeros(sum(held) + 1, size, self.dims.latent_dim, dtype=DTYPE, device=self.device)
        order = torch.randperm(sum(held), generator=torch.Generator().manual_seed(self.options.seed)).to(self.device)
        table = torch.full((self.size, columns), sum(held), dtype=torch.int32, device=self.device)
        used = 0
        for request, count in enumerate(held):
            keys = self.keys(request)
            filler = keys.new_full((-len(keys) % size, keys.shape[1]), torch.nan)
            mine = order[used : used + count]
            pages[mine] = torch.cat((keys, filler)).view(-1, size, keys.shape[1])[rank::ranks]
            table[request, :count] = mine
            used += count
        return pages, table

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the picked requests and all heads: attention in float64, and as eager PyTorch gives it in bfloat16."""
        found = []
        for dtype in (torch.float64, DTYPE):
            outs = []
            for request in self.picked:
                keys = self.keys(request).to(dtype)[None]
                table = torch.zeros(1, 1, dtype=torch.int32, device=self.device)
                one = slice(request, request + 1)
                out, _ = mla_decode_reference(
                    self.q[one].to(dtype), keys, table, self.seq_lens[one], softmax_scale=self.scale,
                    kv_lora_rank=self.dims.kv_lora_rank,
                )  # fmt: skip
                outs.append(out)
                del keys
            found.append(torch.cat(outs))
        return found[0], found[1]

    @property
    def scale(self) -> float:
        """1/sqrt of a query head's width."""
        return self.dims.qk_head_dim**-0.5


@dataclass(frozen=True)
class Parts:
    """What can be timed alone of a job; None where it has no such part."""

    attention: Call
    merge: Call | None
    communication: Call | None


class Attention:
    """Attention of one rank under a plan, as `mla_decode` or `context_parallel_decode` runs it.

    Without a mesh it stands for rank 0 of the plan's ranks, whose parts can be timed though the others are not there.
    """

    def __init__(self, batch: Batch, plan: Plan, here: Ranks | None) -> None:
        heads = batch.dims.num_heads
        self.batch, self.plan = batch, plan
        self.mesh: DeviceMesh | None = None
        tp_rank = cp_rank = 0
        if here is not None and plan.ranks > 1:
            whole = mesh_of(here.device.type, plan.tp, plan.cp)
            self.mesh, tp_rank, cp_rank = whole["cp"], whole["tp"].get_local_rank(), whole["cp"].get_local_rank()
        self.group = heads // plan.tp  # heads that the ranks of a context group attend to together
        self.own = self.group // plan.cp
        first = tp_rank * self.group
        self.group_q = batch.q[:, :, first : first + self.group].contiguous()
        self.heads = slice(first, first + self.group)
        self.q = self.group_q
        if plan.own:
            self.heads = slice(first + cp_rank * self.own, first + (cp_rank + 1) * self.own)
        if plan.gather:
            self.q = batch.q[:, :, self.heads].contiguous()
        self.pages, self.table = batch.shard(cp_rank, plan.cp)
        self.local = local_lengths(
            batch.seq_lens, page_size=batch.options.page_size, rank=cp_rank, ranks=plan.cp, q_len=batch.q_len
        )
        self._options: dict[str, Any] = {"softmax_scale": batch.scale, "kv_lora_rank": batch.dims.kv_lora_rank}
        self._out: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        """The whole operation; `last` keeps the result for the heads `self.heads`."""
        if self.plan.cp == 1:
            out, _ = mla_decode(self.q, self.pages, self.table, self.batch.seq_lens, **self._options)
        else:
            assert self.mesh is not None
            given, wanted = ("own" if one else "all" for one in (self.plan.gather, self.plan.own))
            out, _ = context_parallel_decode(
                self.q, self.pages, self.table, self.local, mesh=self.mesh, query_heads=given, out_heads=wanted,
                **self._options,
            )  # fmt: skip
        self._out = out
        return out

    @property
    def last(self) -> torch.Tensor:
        """The result of the last call, or of the last replay of the graph that captured it."""
        assert self._out is not None
        return self._out

    def parts(self) -> Parts:
        """Attention to what this rank holds; merging; and what travels."""
        batch, plan = self.batch, self.plan

        def attend() -> object:
            return attend_locally(self.group_q, self.pages, self.table, self.local, **self._options)

        if plan.cp == 1:
            return Parts(
                lambda: mla_decode(self.q, self.pages, self.table, batch.seq_lens, **self._options), None, None
            )
        swaps = swaps_of(plan, batch)
        heads = self.own if swaps else self.group
        states = self._messages(plan.cp, heads)
        wanted = slice(0, self.own if plan.own else heads)

        def merge() -> object:
            return states.merge(wanted)

        if self.mesh is None:
            return Parts(attend, merge, None)
        mesh = self.mesh
        sent = states if swaps else self._messages(1, heads)
        merged = self._messages(1, self.own) if swaps and not plan.own else None

        def communicate() -> None:
            if plan.gather:
                gather_heads(self.q, mesh)
            _ = sent.swapped(mesh) if swaps else sent.gathered(mesh)
            if merged is not None:
                merged.gathered(mesh)

        return Parts(attend, merge, communicate)

    def _messages(self, ranks: int, heads: int) -> Messages:
        made = Messages.allocate(self.q, torch.float32, ranks, self.batch.tokens, heads, self.batch.dims.kv_lora_rank)
        made.buffer.zero_()
        made.out.normal_()
        made.lse.normal_()
        return made


class LayerStep:
    """A decode step of the layer on one rank under a plan, as `ParallelMLA` runs it."""

    def __init__(self, batch: Batch, plan: Plan, here: Ranks, whole: MultiheadLatentAttention) -> None:
        args, device = whole.args, here.device
        pages, table = batch.shard(0, 1) if plan.cp == 1 else (torch.empty(0), torch.empty(0))
        rank = args.kv_lora_rank
        self._reduced: dist.ProcessGroup | None = None
        self._model: torch.nn.Module = whole
        self._cache = LatentCache(pages, table, rank, DTYPE) if plan.cp == 1 else None
        if plan.ranks > 1:
            mesh = mesh_of(device.type, plan.tp, plan.cp)
            with torch.device(device):
                model = ParallelMLA(args, mesh, "fused", gather_query=plan.gather).eval().requires_grad_(False)
            model.load_whole(whole.state_dict())
            self._model, self._reduced = model, model.reduced
            if plan.cp > 1:
                context = mesh["cp"]
                pages, table = batch.shard(context.get_local_rank(), plan.cp)
                self._cache = ShardedLatentCache(pages, table, rank, DTYPE, mesh=context, heads=model.heads)
        self._x = batch.hidden()
        self._start = (batch.seq_lens - batch.q_len).to(torch.int32)
        self._freqs = rotations(args, device)
        self._mask = "causal" if batch.q_len > 1 else None
        self._attention = Attention(batch, plan, here).parts()
        self._out: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        """The step."""
        self._out = self._model(self._x, self._start, self._freqs, self._mask, self._cache)
        return self._out

    @property
    def last(self) -> torch.Tensor:
        """As `Attention.last`, [batch, q_len, dim]."""
        assert self._out is not None
        return self._out

    def parts(self) -> Parts:
        """Those of the attention, with the all-reduce of the layer's output beside what the attention sends."""
        found, output = self._attention, torch.zeros_like(self._x)
        if self._reduced is None:
            return found

        def communicate() -> None:
            if found.communication is not None:
                found.communication()
            dist.all_reduce(output, group=self._reduced)

        return Parts(found.attention, found.merge, communicate)


def layer_args(options: Options, batch: Batch) -> Args:
    """The whole layer's configuration."""
    dims, hidden = options.dims, options.hidden
    page = options.page_size
    return Args(
        max_batch_size=batch.size, max_seq_len=-(-max(batch.lengths) // page) * page, dim=hidden.dim,
        n_heads=dims.num_heads, q_lora_rank=hidden.q_lora_rank, kv_lora_rank=dims.kv_lora_rank,
        qk_nope_head_dim=dims.qk_nope_head_dim, qk_rope_head_dim=dims.qk_rope_head_dim, v_head_dim=dims.v_head_dim,
        page_size=page, attn_impl="fused", **hidden.rope,
    )  # fmt: skip


def whole_layer(args: Args, here: Ranks, seed: int) -> MultiheadLatentAttention:
    """The layer of one rank, with rank 0's weights."""
    with torch.device(here.device):
        torch.manual_seed(seed)
        layer = get_mla("fused", args).eval().requires_grad_(False)
    if here.size > 1:
        for parameter in layer.parameters():
            dist.broadcast(parameter.data.view(torch.uint8), 0)
    return layer


@cache
def rotations(args: Args, device: torch.device) -> torch.Tensor:
    """The rope table of all positions, on the device."""
    return precompute_freqs_cis(args, device)


def expected_of_layer(batch: Batch, whole: MultiheadLatentAttention) -> torch.Tensor:
    """Of the picked requests, the layer's output in float64: [picked, q_len, dim]."""
    with torch.device(batch.device):
        layer = get_mla("absorb", whole.args).double().eval().requires_grad_(False)
    layer.load_state_dict(whole.state_dict())
    outs = []
    for request in batch.picked:
        keys = batch.keys(request).double()[None]
        length = batch.lengths[request]
        start = length - batch.q_len
        table = torch.zeros(1, 1, dtype=torch.int32, device=batch.device)
        # One page of any size; contiguous, so that nothing is gathered.
        kept = LatentCache(keys, table, whole.args.kv_lora_rank, torch.float64, contiguous=True, filled=length)
        freqs = rotations(whole.args, batch.device)[start:length]
        new = batch.hidden()[request : request + 1].double()
        outs.append(layer(new, start, freqs, "causal" if batch.q_len > 1 else None, kept))
    return torch.cat(outs)


def traffic(plan: Plan, batch: Batch, *, layer: bool) -> Sequence[tuple[str, int]]:
    """The collectives of a plan in turn, each with the bytes that leave a rank."""
    dims, size, others = batch.dims, DTYPE.itemsize, plan.cp - 1
    own = dims.num_heads // plan.ranks
    found: list[tuple[str, int]] = []
    if plan.cp > 1:
        if plan.gather:
            found.append(("all_gather", others * batch.tokens * own * dims.latent_dim * size))
        if swaps_of(plan, batch):
            sent = others * _message_bytes(batch, own)
            found.append(("all_to_all", sent))
            if not plan.own:
                found.append(("all_gather", sent))
        else:
            found.append(("all_gather", others * _message_bytes(batch, dims.num_heads // plan.tp)))
    parts = plan.ranks if plan.gather else plan.tp
    if layer and parts > 1:
        found.append(("all_reduce", 2 * (parts - 1) * batch.tokens * batch.options.hidden.dim * size // parts))
    return found


def swaps_of(plan: Plan, batch: Batch) -> bool:
    """Whether ranks send one another their own heads' results, or all of them to all."""
    group = batch.dims.num_heads // plan.tp
    return swaps_first(_message_bytes(batch, group), group, plan.cp, "own" if plan.own else "all")


def _message_bytes(batch: Batch, heads: int) -> int:
    return message_bytes(DTYPE, torch.float32, batch.tokens, heads, batch.dims.kv_lora_rank)
