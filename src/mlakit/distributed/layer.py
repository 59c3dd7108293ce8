"""`ParallelMLA`: the layer with its heads divided over ranks, and if one likes its cache too."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mlakit.distributed.cache import ShardedLatentCache
from mlakit.nn import Args, get_mla, load_checkpoint
from mlakit.nn.caches import Cache, Start
from mlakit.nn.checkpoint_names import cut_of
from mlakit.nn.project import wants_grad
from mlakit.nn.step import Mask

DIMENSIONS = ("tp", "cp")


class ParallelMLA(nn.Module):
    """A layer of `mlakit.nn` whose ranks compute together; every rank gets the same tokens and the same result.

    - Tensor parallel (dimension "tp" of the mesh): a rank has some of the heads, their rows of `wq` or `wq_b` and
      `wkv_b` and their columns of `wo`; the projections that heads share are on every rank. All ranks' outputs are
      added up by one all-reduce. Any implementation of the layer.
    - Context parallel (dimension "cp"): the latent cache is dealt out by page (`ShardedLatentCache`); needs "fused".
    - Both: ranks with the same "tp" coordinate attend to the same heads and share the pages of one cache.

    Args:
        args: of the whole layer.
        mesh: dimensions named "tp", "cp" or both.
        attn_impl: None takes `args.attn_impl`.
        gather_query: what the ranks of a "cp" group, who attend to the same heads, do about their weights. True: each
            has a share of them too, and queries are gathered before attention and results given back after it. False:
            each has the weights of all heads of the group: no gathering, and more to read.

    Raises:
        ValueError: other dimensions, heads that cannot be divided, or an implementation that cannot be context
            parallel.
    """

    def __init__(
        self, args: Args, mesh: DeviceMesh, attn_impl: str | None = None, *, gather_query: bool = True
    ) -> None:
        super().__init__()
        names = mesh.mesh_dim_names
        if names is None or not set(names) <= set(DIMENSIONS):
            raise ValueError(f"mesh must have dimensions named 'tp', 'cp' or both, got {names}")
        attn_impl = args.attn_impl if attn_impl is None else attn_impl
        with torch.device("cpu"):  # a mesh is described by small tensors, wherever the weights are to go
            self._take_place(mesh, gather_query)
        if self.context is not None and attn_impl != "fused":
            raise ValueError(f"a context parallel layer must be 'fused', which decodes from pages, got {attn_impl!r}")
        if self.context is not None and args.cache_dtype == "fp8":
            raise ValueError("a context parallel cache must be cache_dtype='bf16', got 'fp8'")
        if args.n_heads % self.part[1]:
            raise ValueError(f"{args.n_heads} heads cannot be divided over {self.part[1]} ranks")
        self.args = args
        self.layer = get_mla(attn_impl, replace(args, n_heads=args.n_heads // self.part[1]))
        self._own_cache: Cache | None = None

    def _take_place(self, mesh: DeviceMesh, gather_query: bool) -> None:
        """Which heads this rank has, with whom it shares a cache, and with whom it adds up outputs."""
        names = mesh.mesh_dim_names or ()
        tp, cp = (mesh[name] if name in names else None for name in DIMENSIONS)
        tp_rank, tp_size = (0, 1) if tp is None else (tp.get_local_rank(), tp.size())
        cp_rank, cp_size = (0, 1) if cp is None else (cp.get_local_rank(), cp.size())
        self.context = cp if cp_size > 1 else None
        self.heads = "own" if gather_query else "all"
        self.part = (tp_rank * cp_size + cp_rank, tp_size * cp_size) if gather_query else (tp_rank, tp_size)
        holders: DeviceMesh | None = None  # of parts of one output
        if tp_size > 1 and (cp_size == 1 or not gather_query):
            holders = tp
        elif self.part[1] > 1:
            holders = cp if tp_size == 1 else mesh._flatten("tp_cp")
        self.reduced: dist.ProcessGroup | None = None if holders is None else holders.get_group()

    def forward(
        self,
        x: torch.Tensor,
        start_pos: Start,
        freqs_cis: torch.Tensor,
        mask: Mask = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """As `MultiheadLatentAttention.forward`, on every rank. Inference alone.

        Raises:
            ValueError: as there, or a gradient is wanted.
            RuntimeError: a collective failed.
        """
        if wants_grad(x, *self.parameters()):
            raise ValueError("a parallel layer has no gradient; call it under torch.no_grad()")
        if cache is None:
            if self._own_cache is None:
                self._own_cache = self.make_cache(dtype=x.dtype)
            cache = self._own_cache
        out = self.layer(x, start_pos, freqs_cis, mask, cache)
        if self.reduced is not None:
            dist.all_reduce(out, group=self.reduced)
        return out

    def precompute_freqs_cis(self, args: Args | None = None) -> torch.Tensor:
        """The rotations of all positions, as the layer's."""
        return self.layer.precompute_freqs_cis(args)

    def make_cache(
        self, batch_size: int | None = None, max_seq_len: int | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        """This rank's part of a cache for `batch_size` requests of `max_seq_len` tokens; the rest as the layer's."""
        if self.context is None:
            return self.layer.make_cache(batch_size, max_seq_len, dtype)
        batch = self.args.max_batch_size if batch_size is None else batch_size
        tokens = self.args.max_seq_len if max_seq_len is None else max_seq_len
        if batch < 1 or tokens < 1:
            raise ValueError(f"a cache has at least one request of one token, got {batch} of {tokens}")
        weight = self.layer.wkv_a.weight
        if dtype is None:
            dtype = torch.bfloat16 if self.layer.wkv_a.is_fp8 else weight.dtype
        return ShardedLatentCache.for_mesh(
            self.args, batch, tokens, weight.device, dtype, mesh=self.context, heads=self.heads
        )

    def load_checkpoint(
        self, path: str | Path, *, layer: int | None = None, rope_interleave: bool | None = None
    ) -> dict[str, str]:
        """As `mlakit.nn.load_checkpoint`; of weights that heads do not share only this rank's part is read."""
        return load_checkpoint(self.layer, path, layer=layer, rope_interleave=rope_interleave, part=self.part)

    def load_whole(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's part of a whole layer's `state_dict`."""
        mine = {}
        for name, tensor in tensors.items():
            cut = cut_of(name, self.args, self.part)
            mine[name] = tensor if cut is None else tensor.narrow(cut[0], cut[1], cut[2] - cut[1])
        self.layer.load_state_dict(mine)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        index, parts = self.part
        context = 1 if self.context is None else self.context.size()
        return f"heads: part {index} of {parts}, context over {context} ranks"
