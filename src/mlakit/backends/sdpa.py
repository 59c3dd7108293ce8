"""PyTorch's scaled_dot_product_attention: `sdpa` lets it pick its kernel, `cudnn` insists on cuDNN's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Available, Mode, Unavailable, UnsupportedError
from mlakit.backends.peers import half_only, why_not
from mlakit.backends.torch_common import TorchBackend, hidden_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mlakit.backends.problem import Group, MLAProblem, Problem, StandardProblem
    from mlakit.hardware import DeviceInfo


class SDPA(TorchBackend):
    """One SDPA call for all requests of a shape."""

    name = "sdpa"
    summary = "PyTorch's scaled_dot_product_attention"
    attention = frozenset({"mla", "standard"})
    decode_mode: Mode = "mqa"
    prefill_mode = "mha"

    def prepare_mqa(self, problem: MLAProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Heads become rows of one query, as no SDPA kernel shares a key of 576 among heads without copying it."""
        batch, dims = problem.batch, problem.dims
        rank, heads, scale = dims.kv_lora_rank, dims.num_heads, problem.softmax_scale
        plans = []
        for group in batch.groups:
            visible = _visible(group, problem)
            # Rows are (token, head) pairs: every head of a token sees the same keys.
            mask = None if visible is None else visible.repeat_interleave(heads, dim=0)
            plans.append((group, batch.slots[group.keys], mask))

        def run(q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            tokens = cache.flatten(0, 1)
            for group, slots, mask in plans:
                keys = tokens[slots][:, None]
                rows = q[group.rows].flatten(1, 2)[:, None]
                options = {"attn_mask": mask, "scale": scale}
                found = _call(problem, rows, keys, keys[..., :rank], options)
                out[group.rows] = found.view(*group.rows.shape, heads, rank)
            return out

        return run

    def prepare_mha(self, problem: MLAProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Keys and values arrive ragged, [keys, heads, dim]."""
        plans = [(group, group.keys, _causality(group, problem)) for group in problem.batch.groups]

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            for group, at, causality in plans:
                out[group.rows] = _attend(problem, q[group.rows], k[at], v[at], causality)
            return out

        return run

    def prepare_standard(self, problem: StandardProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Keys and values are gathered from their pages first."""
        slots = problem.batch.slots
        plans = [(group, slots[group.keys], _causality(group, problem)) for group in problem.batch.groups]

        def run(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            k_tokens, v_tokens = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
            for group, at, causality in plans:
                out[group.rows] = _attend(problem, q[group.rows], k_tokens[at], v_tokens[at], causality)
            return out

        return run


class CuDNN(SDPA):
    """SDPA with cuDNN's kernel or none. Its heads may be 256 wide at most, so MLA decodes with expanded keys."""

    name = "cudnn"
    summary = "cuDNN's attention, through PyTorch; decode expands the latent to K and V"
    hardware = "NVIDIA from Ampere on"
    decode_mode = "mha"

    def availability(self, device: DeviceInfo) -> Available | Unavailable:
        """A PyTorch with cuDNN, on a GPU."""
        import torch

        if reason := why_not(device, (8, 0)):
            return Unavailable(reason)
        if not torch.backends.cudnn.is_available():
            return Unavailable(f"PyTorch {torch.__version__} was built without cuDNN")
        return Available(f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")

    def refusal(self, problem: Problem) -> str | None:
        """Half precision."""
        return half_only(problem)

    def prepare_mqa(self, problem: MLAProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Not offered: see the class."""
        raise NotImplementedError

    def prepare_mha(self, problem: MLAProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Keys and values arrive ragged, [keys, heads, dim]."""
        return _by_cudnn(super().prepare_mha(problem))

    def prepare_standard(self, problem: StandardProblem, **parameters: Any) -> Callable[..., torch.Tensor]:
        """Keys and values are gathered from their pages first."""
        return _by_cudnn(super().prepare_standard(problem))


# What SDPA says, and what it says where it is only asked for its choice.
_NO_KERNEL = ("No available kernel", "No viable backend")


def _by_cudnn(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def only(*tensors: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            try:
                return run(*tensors)
            except RuntimeError as error:
                if str(error).startswith(_NO_KERNEL):
                    raise UnsupportedError("PyTorch offers no cuDNN kernel for these shapes and masks") from error
                raise

    return only


def _visible(group: Group, problem: Problem) -> torch.Tensor | None:
    """Mask [q_len, kv_len] of the keys that a query token sees, or None for all."""
    hidden = hidden_keys(group, problem)
    return None if hidden is None else hidden.logical_not()


def _causality(group: Group, problem: Problem) -> dict[str, Any]:
    # SDPA's is_causal aligns top-left: right for a whole prefill only. Anything shorter takes a mask.
    if problem.causal and group.q_len == group.kv_len:
        return {"is_causal": True}
    return {"attn_mask": _visible(group, problem)}


def _attend(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causality: dict[str, Any]
) -> torch.Tensor:
    """Q [n, q_len, heads, dim], k and v [n, kv_len, kv_heads, dim]: [n, q_len, heads, v_dim]."""
    options = {"scale": problem.softmax_scale, "enable_gqa": k.shape[2] != q.shape[2], **causality}
    return _call(problem, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), options).transpose(1, 2)


def _call(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """SDPA; at the first call it is asked which of its kernels it takes."""
    import torch

    if problem.kernel is None:
        problem.kernel = _choice(q, k, v, options)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)


def _choice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> str:
    import torch
    from torch.nn.attention import SDPBackend

    # Private, but the only place where PyTorch tells; its own nested tensors ask there too.
    ask = getattr(torch, "_fused_sdp_choice", None)
    if ask is None:
        return "not told by this PyTorch"
    chosen = SDPBackend(ask(q, k, v, **options))
    return f"torch {torch.__version__}, {chosen.name.lower()}"
