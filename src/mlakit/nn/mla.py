"""`MultiheadLatentAttention`: one set of parameters, four ways to compute with them."""

import torch
from torch import nn

from mlakit.dims import nearest
from mlakit.hardware import capability
from mlakit.nn import absorb, flash, fused, naive
from mlakit.nn.args import ATTN_IMPLS, Args
from mlakit.nn.caches import Cache, KVCache, LatentCache, Start
from mlakit.nn.linear import Linear
from mlakit.nn.norm import RMSNorm
from mlakit.nn.project import wants_grad
from mlakit.nn.rope import precompute_freqs_cis
from mlakit.nn.step import Mask, Step, positions_from, resolve_mask, rope_rows

_ATTEND = {"naive": naive.attend, "absorb": absorb.attend, "naive+flash": flash.attend}


class MultiheadLatentAttention(nn.Module):
    """Multi-head Latent Attention, from hidden state to hidden state.

    All implementations have the same parameters, named as in DeepSeek's inference checkpoints (`wq`, or `wq_a`,
    `q_norm` and `wq_b`; `wkv_a`, `kv_norm`, `wkv_b`, `wo`), and the same results up to rounding:

    - "naive": expands keys and values of every head, keeps them, and attends in plain PyTorch. Short sequences
      (`Args.fast_path_tokens`) are attended to without a tensor of scores.
    - "absorb": keeps the latent alone, and attends to it with the up-projections absorbed, in plain PyTorch.
    - "naive+flash": keeps keys and values, and attends by `mla_prefill` (PyTorch's SDPA on a CPU).
    - "fused": keeps the latent in pages; normalizes, rotates and writes it by one kernel, decodes by `mla_decode`,
      prefills by `mla_prefill` without ever concatenating keys.

    Args:
        args: dimensions and options.
        attn_impl: one of the four; None takes `args.attn_impl`.

    Raises:
        ValueError: an unknown implementation; the message lists the valid ones.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1; DeepSeek-V3, inference/model.py.
    """

    def __init__(self, args: Args, attn_impl: str | None = None) -> None:
        super().__init__()
        self.args = args
        self.attn_impl = args.attn_impl if attn_impl is None else attn_impl
        if self.attn_impl not in ATTN_IMPLS:
            raise ValueError(f"unknown attn_impl {self.attn_impl!r}; {nearest(str(self.attn_impl), ATTN_IMPLS)}")
        self.softmax_scale = args.softmax_scale
        heads, rank = args.n_heads, args.kv_lora_rank

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, dtype=args.dtype, gemm_impl=args.gemm_impl, scale_fmt=args.scale_fmt)

        if args.q_lora_rank == 0:
            self.wq = linear(args.dim, heads * args.qk_head_dim)
        else:
            self.wq_a = linear(args.dim, args.q_lora_rank)
            self.q_norm = RMSNorm(args.q_lora_rank, args.eps)
            self.wq_b = linear(args.q_lora_rank, heads * args.qk_head_dim)
        self.wkv_a = linear(args.dim, args.latent_dim)
        self.kv_norm = RMSNorm(rank, args.eps)
        self.wkv_b = linear(rank, heads * (args.qk_nope_head_dim + args.v_head_dim))
        self.wo = linear(heads * args.v_head_dim, args.dim)
        self._own_cache: Cache | None = None
        self._up: tuple[tuple[object, ...], torch.Tensor] | None = None

    def forward(
        self,
        x: torch.Tensor,
        start_pos: Start,
        freqs_cis: torch.Tensor,
        mask: Mask = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Attend from new tokens to themselves and to those before them.

        Args:
            x: [bsz, seqlen, dim] in the weights' dtype (any floating one where the weights are float8).
            start_pos: tokens before x's: one number for all requests, or an int32 or int64 tensor [bsz] on x's device,
                which may change between replays of a CUDA graph (start_pos + seqlen beyond the cache's room is then
                the caller's to avoid: the host does not look).
            freqs_cis: of `precompute_freqs_cis`: [seqlen, qk_rope_head_dim / 2], the new tokens' rows, or the whole
                table where start_pos is a tensor.
            mask: None lets every token see every key, as in DeepSeek's code; "causal" lets it see those up to its own,
                and needs no tensor; or an additive tensor [seqlen, seqlen] (of the new tokens; all see what came
                before), [seqlen, end] or [bsz, seqlen, end]. A causal tensor is recognised. naive+flash and fused take
                no mask that is not causal.
            cache: of `make_cache`; None takes the layer's own, made when first needed with `args.max_batch_size` and
                `args.max_seq_len`. While training (self.training, a gradient wanted, start_pos 0, none given) no cache
                is written.

        Returns:
            [bsz, seqlen, dim] in x's dtype. Gradients flow to x and the weights; what a cache holds is constant.

        Raises:
            ValueError: a wrong shape, dtype, device, mask or cache, or more tokens than the cache has room for.
        """
        step = self._step(x, start_pos, freqs_cis, mask, cache)
        if self.attn_impl == "fused":
            return fused.forward(self, x, step)
        return self.wo(_ATTEND[self.attn_impl](self, x, step))

    def precompute_freqs_cis(self, args: Args | None = None) -> torch.Tensor:
        """The rotations of all positions, complex64 [max_seq_len, qk_rope_head_dim / 2], on the layer's device."""
        return precompute_freqs_cis(self.args if args is None else args, self.wkv_a.weight.device)

    def make_cache(
        self, batch_size: int | None = None, max_seq_len: int | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        """A cache of the kind that this implementation keeps, on the layer's device.

        Args:
            batch_size: requests; None is `args.max_batch_size`.
            max_seq_len: tokens of each; None is `args.max_seq_len`.
            dtype: of the activations; None is the weights' dtype (bfloat16 for float8 weights).
        """
        args = self.args
        batch_size = args.max_batch_size if batch_size is None else batch_size
        max_seq_len = args.max_seq_len if max_seq_len is None else max_seq_len
        if batch_size < 1 or max_seq_len < 1:
            raise ValueError(f"a cache has at least one request of one token, got {batch_size} of {max_seq_len}")
        if dtype is None:
            dtype = torch.bfloat16 if self.wkv_a.is_fp8 else self.wkv_a.weight.dtype
        kind = KVCache if self._keeps_kv else LatentCache
        return kind.allocate(args, batch_size, max_seq_len, self.wkv_a.weight.device, dtype)

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """Project to queries, not yet rotated: [bsz, seqlen, dim] to [bsz, seqlen, n_heads, qk_head_dim]."""
        q = self.wq(x) if self.args.q_lora_rank == 0 else self.wq_b(self.q_norm(self.wq_a(x)))
        return q.unflatten(-1, (self.args.n_heads, self.args.qk_head_dim))

    def expand(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project a normalized latent [..., kv_lora_rank] up to keys without rope and values of every head, views
        [..., n_heads, qk_nope_head_dim] and [..., n_heads, v_head_dim] of one tensor.
        """
        args = self.args
        kv = self.wkv_b(latent).unflatten(-1, (args.n_heads, args.qk_nope_head_dim + args.v_head_dim))
        k_nope, v = kv.split((args.qk_nope_head_dim, args.v_head_dim), dim=-1)
        return k_nope, v

    def up_projections(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of `expand`, by head: [n_heads, qk_nope_head_dim, kv_lora_rank] for keys and [n_heads,
        v_head_dim, kv_lora_rank] for values.

        A float8 weight is dequantized once and kept until it changes.
        """
        args = self.args
        per_head = self._dequantized_up(dtype).unflatten(0, (args.n_heads, -1))
        up_k, up_v = per_head.split((args.qk_nope_head_dim, args.v_head_dim), dim=1)
        return up_k, up_v

    def _dequantized_up(self, dtype: torch.dtype) -> torch.Tensor:
        linear = self.wkv_b
        if not linear.is_fp8 or torch.compiler.is_compiling():
            return linear.dequantized(dtype)
        tensors = (linear.weight, linear.scale)
        key = (dtype, *[(t.data_ptr(), t.device, 0 if t.is_inference() else t._version) for t in tensors])
        if self._up is None or self._up[0] != key:
            self._up = key, linear.dequantized(dtype)
        return self._up[1]

    @property
    def _keeps_kv(self) -> bool:
        return self.attn_impl in ("naive", "naive+flash")

    def _step(self, x: torch.Tensor, start: Start, freqs_cis: torch.Tensor, mask: Mask, cache: Cache | None) -> Step:
        bsz, seqlen = self._check_input(x)
        self._check_start(start, bsz, x.device)
        self._check_freqs(freqs_cis, start, seqlen, x.device)
        cache = self._cache(x, start, cache)
        if cache is not None:
            self._check_cache(cache, start, x, bsz, seqlen)
        if isinstance(start, int):
            end = start + seqlen
        else:
            assert cache is not None
            end = cache.capacity
        causal, other = resolve_mask(mask, bsz, seqlen, end)
        if other is not None and isinstance(start, torch.Tensor):
            raise ValueError("a start_pos that is a tensor takes mask None or 'causal', got another mask")
        if other is not None and other.device != x.device:
            raise ValueError(f"mask must be on {x.device} like x, got {other.device}")
        cos, sin = rope_rows(freqs_cis)
        return Step(bsz, seqlen, start, end, cos, sin, positions_from(start, seqlen), causal, other, cache)

    def _check_input(self, x: torch.Tensor) -> tuple[int, int]:
        args, weight = self.args, self.wkv_a.weight
        if x.ndim != 3 or x.shape[2] != args.dim or x.shape[0] < 1 or x.shape[1] < 1:
            raise ValueError(f"x must have shape [bsz, seqlen, {args.dim}], none of them 0, got {list(x.shape)}")
        if self.wkv_a.is_fp8:
            if not x.is_floating_point() or x.element_size() < 2:
                raise ValueError(f"x must be of a floating dtype of at least 16 bits, got {x.dtype}")
        elif x.dtype != weight.dtype:
            raise ValueError(f"x must be {weight.dtype} like the weights, got {x.dtype}")
        if x.device != weight.device:
            raise ValueError(f"x must be on {weight.device} like the weights, got {x.device}")
        if x.is_cuda and x.dtype == torch.bfloat16:
            found = capability(str(x.device))
            if found is not None and found < (8, 0):
                raise ValueError(f"bfloat16 needs compute capability 8.0 or more, this device has {found}")
        return x.shape[0], x.shape[1]

    @staticmethod
    def _check_start(start: Start, bsz: int, device: torch.device) -> None:
        if isinstance(start, torch.Tensor):
            if start.shape != (bsz,) or start.dtype not in (torch.int32, torch.int64) or start.device != device:
                raise ValueError(
                    f"start_pos must be an int32 or int64 tensor [{bsz}] on {device}, "
                    f"got {start.dtype} {list(start.shape)} on {start.device}"
                )
        elif isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"start_pos must be a whole number of at least 0 or a tensor, got {start!r}")

    def _check_freqs(self, freqs_cis: torch.Tensor, start: Start, seqlen: int, device: torch.device) -> None:
        half = self.args.qk_rope_head_dim // 2
        rows = seqlen if isinstance(start, int) else "max_seq_len"
        shape = list(freqs_cis.shape)
        if len(shape) != 2 or shape[1] != half or (isinstance(start, int) and shape[0] != seqlen):
            raise ValueError(f"freqs_cis must have shape [{rows}, {half}] (a row a new token), got {shape}")
        if not freqs_cis.is_complex() or freqs_cis.device != device:
            raise ValueError(f"freqs_cis must be complex and on {device}, got {freqs_cis.dtype} on {freqs_cis.device}")

    def _cache(self, x: torch.Tensor, start: Start, cache: Cache | None) -> Cache | None:
        if cache is not None:
            return cache
        begins = isinstance(start, int) and start == 0
        if begins and self.training and wants_grad(x, *self.parameters()):
            return None
        own = self._own_cache
        if own is None or ((own.device, own.dtype) != (x.device, x.dtype) and begins):
            if not begins:
                raise ValueError(
                    f"no earlier tokens are kept, got start_pos={start}: a layer in training mode keeps none of its "
                    "own; call eval(), or torch.no_grad(), or pass a cache"
                )
            own = self._own_cache = self.make_cache(dtype=x.dtype)
        return own

    def _check_cache(self, cache: Cache, start: Start, x: torch.Tensor, bsz: int, seqlen: int) -> None:
        kind = KVCache if self._keeps_kv else LatentCache
        if not isinstance(cache, kind):
            raise ValueError(f"{self.attn_impl} keeps a {kind.__name__}, got a {type(cache).__name__}")
        if isinstance(cache, KVCache):
            widths: tuple[int, ...] = (self.args.n_heads, self.args.qk_head_dim, self.args.v_head_dim)
            actual: tuple[int, ...] = (cache.k.shape[2], cache.k.shape[3], cache.v.shape[3])
        else:
            widths = (self.args.kv_lora_rank, self.args.latent_dim)
            actual = (cache.kv_lora_rank, widths[1] if cache.is_fp8 else cache.pages.shape[2])
        if widths != actual:
            raise ValueError(f"the cache must be of heads and widths {widths}, got {actual}")
        if (cache.device, cache.dtype) != (x.device, x.dtype):
            raise ValueError(f"the cache must be {x.dtype} on {x.device} like x, got {cache.dtype} on {cache.device}")
        if bsz > cache.batch:
            raise ValueError(f"the cache has room for {cache.batch} requests (max_batch_size), got {bsz}")
        if not isinstance(start, int):
            return
        if start + seqlen > cache.capacity:
            raise ValueError(
                f"the cache has room for {cache.capacity} tokens a request (max_seq_len), "
                f"got start_pos {start} + {seqlen} new ones"
            )
        if start > cache.filled:
            raise ValueError(f"the cache holds {cache.filled} tokens, got start_pos={start}")

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"attn_impl={self.attn_impl}, n_heads={self.args.n_heads}, softmax_scale={self.softmax_scale:.6g}"


def get_mla(attn_impl: str, args: Args) -> MultiheadLatentAttention:
    """A layer of the named implementation: "naive", "absorb", "naive+flash" or "fused".

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
    """
    return MultiheadLatentAttention(args, attn_impl)
