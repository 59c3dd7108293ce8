"""What `mla_prefill` is measured beside: FlashAttention-3 (vLLM's build, which has no backward), PyTorch's SDPA,
of whose kernels cuDNN's alone takes keys wider than values, and PyTorch's FlexAttention.
"""

import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from common import Candidate, Tensors
from torch.nn.attention import SDPBackend, sdpa_kernel


@functools.cache
def _fa3() -> ModuleType | None:
    try:
        return importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    except (ImportError, OSError) as error:
        print(f"no FlashAttention-3: {error}", file=sys.stderr)
        return None


def flash_attention_3(inputs: Tensors, tokens: int, causal: bool, scale: float) -> Iterator[Candidate]:
    """q, k, v [rows, heads, dim] and the bounds of sequences of `tokens` rows each."""
    module = _fa3()
    if module is None:
        return
    q, k, v, bounds = inputs

    def call() -> Tensors:
        out, lse = module.flash_attn_varlen_func(
            q, k, v, max_seqlen_q=tokens, cu_seqlens_q=bounds, max_seqlen_k=tokens, cu_seqlens_k=bounds,
            softmax_scale=scale, causal=causal, return_softmax_lse=True, fa_version=3,
        )[:2]  # fmt: skip
        return out, lse.T  # [heads, tokens]

    yield "fa3", call


def _padded(x: torch.Tensor, tokens: int) -> torch.Tensor:
    return x.unflatten(0, (-1, tokens)).transpose(1, 2)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def sdpa_forward(inputs: Tensors, tokens: int, causal: bool, scale: float) -> Iterator[Candidate]:
    q, k, v = (_padded(x, tokens) for x in inputs[:3])
    yield "sdpa cudnn", lambda: (_sdpa(q, k, v, causal, scale).transpose(1, 2),)


def sdpa_backward(inputs: Tensors, seed: torch.Tensor, tokens: int, causal: bool, scale: float) -> Iterator[Candidate]:
    """The backward pass alone; `seed` is the gradient of the output."""
    q, k, v = leaves = [_padded(x, tokens).detach().requires_grad_() for x in inputs[:3]]
    seed = _padded(seed, tokens)
    forward = functools.cache(lambda: _sdpa(q, k, v, causal, scale))  # where a failure is caught

    def call() -> Tensors:
        return tuple(x.transpose(1, 2) for x in torch.autograd.grad(forward(), leaves, seed, retain_graph=True))

    yield "sdpa cudnn", call


def flex_backward(inputs: Tensors, seed: torch.Tensor, tokens: int, causal: bool, scale: float) -> Iterator[Candidate]:
    """The same of FlexAttention, compiled; whole blocks that nobody sees are left out."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = leaves = [_padded(x, tokens).detach().requires_grad_() for x in inputs[:3]]
    seed = _padded(seed, tokens)

    @functools.cache
    def forward() -> torch.Tensor:
        mask = None
        if causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=q.device.type)
        return torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=mask, scale=scale)

    def call() -> Tensors:
        return tuple(x.transpose(1, 2) for x in torch.autograd.grad(forward(), leaves, seed, retain_graph=True))

    yield "flex", call
