"""Which calls of a fused layer its Hopper kernels can run."""

from typing import TYPE_CHECKING

import torch

from mlakit.dispatch import unobserved
from mlakit.hardware import capability
from mlakit.nn.caches import LatentCache
from mlakit.nn.step import Step

if TYPE_CHECKING:
    from mlakit.nn.mla import MultiheadLatentAttention

# With fewer heads too few multiprocessors would have a head's query to make.
LEAST_HEADS = 96
MOST_TOKENS = 32  # as many rows as `hopper_linear` takes
_DIMS = (128, 64, 128, 512)


def suits(layer: "MultiheadLatentAttention", x: torch.Tensor, step: Step) -> bool:
    """Whether the kernels can run a call that attends in MQA mode. Who wants a gradient, or looks at single operations
    (a compiler, a dispatch mode), gets them from PyTorch.
    """
    args = layer.args
    if torch.compiler.is_compiling() or not (
        x.is_cuda
        and x.shape[0] * x.shape[1] <= MOST_TOKENS
        and x.dtype in (torch.bfloat16, torch.float16)
        and (args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim, args.kv_lora_rank) == _DIMS
        and args.n_heads >= LEAST_HEADS
        and args.dim % 8 == 0
        and args.q_lora_rank > 256
        and args.q_lora_rank % 8 == 0
        and type(step.cache) is LatentCache
        and (step.cos.dtype, step.cos.stride(1)) == (torch.float32, 2)  # of a complex table
        and capability(str(x.device)) == (9, 0)
    ):
        return False
    if layer.wkv_a.is_fp8 and not (args.gemm_impl == "fp8" and args.dim % 128 == args.q_lora_rank % 128 == 0):
        return False
    weights = [linear.weight for linear in (layer.wq_a, layer.wq_b, layer.wkv_a, layer.wkv_b, layer.wo)]
    return unobserved(x, *weights, layer.q_norm.weight, layer.kv_norm.weight) and all(
        weight.is_contiguous() and weight.data_ptr() % 16 == 0 for weight in weights
    )
