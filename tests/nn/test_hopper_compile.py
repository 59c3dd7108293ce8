"""The kernels of a fused layer's step, compiled for a Hopper that is not there."""

import pytest
import torch

from mlakit.hopper_linear import _work, launch_by_head, launch_linear, linear_config, why_not_linear
from mlakit.nn.hopper_query import launch_query
from mlakit.testing.offline import CompiledKernel, offline

pytestmark = pytest.mark.compiled
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
LEAST = 1 << 14  # bytes a multiprocessor must have on their way for the memory to be busy, as Little's law has it


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def scales(*shapes: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(shape) for shape in shapes)


def check(kernel: CompiledKernel, products: str) -> None:
    assert kernel.spills == 0
    assert kernel.shared_bytes <= 227 * 1024
    assert kernel.sass.count("UTMALDG") > 0
    assert kernel.sass.count(products) > 0


# DeepSeek-V3's down-projections, two weights in one launch and tiles in parts; its output's projection; float8.
def test_products_of_few_rows():
    with offline(90) as compiled:
        launch_linear(empty(32, 7168), (empty(1536, 7168), empty(576, 7168)), (empty(32, 1536), empty(32, 576)))
        launch_linear(empty(5, 16384, dtype=FP16), (empty(7168, 16384, dtype=FP16),), (empty(5, 7168, dtype=FP16),))
        launch_linear(
            empty(32, 16384, dtype=FP8),
            (empty(7168, 16384, dtype=FP8),),
            (empty(32, 7168),),
            scales((32, 128), (56, 128)),
            overlap=True,
        )
    for kernel, products in zip(compiled, ("HGMMA", "HGMMA", "QGMMA"), strict=True):
        check(kernel, products)


def test_the_query_and_the_values():
    up = empty(128, 256, 512)
    cos, sin = torch.view_as_real(torch.empty((256, 32), dtype=torch.complex64)).unbind(-1)
    with offline(90) as compiled:
        launch_by_head(empty(32, 128, 512), up[:, 128:], empty(32, 128, 128), overlap=True)
        for tokens, positions in ((32, torch.empty(32, dtype=torch.int64)), (3, None)):
            launch_query(
                empty(tokens, 1536), empty(1536), empty(24576, 1536), up[:, :128], cos, sin, positions,
                empty(tokens, 128, 576), q_len=1, eps=1e-6,
            )  # fmt: skip
    assert len(compiled) == 3
    for kernel in compiled:
        check(kernel, "HGMMA")


# Weights of every size that a layer has, and small ones: a tile's parts are added in registers, 8 of them at most.
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("n", "k"), [(2112, 7168), (1536, 7168), (576, 7168), (24576, 1536), (7168, 16384), (64, 64), (129280, 7168)]
)
def test_a_tile_is_in_few_parts(n, k, bits):
    config = linear_config(n, k, bits, 132)
    assert _work((n, 0), k, config).parts <= 8
    assert config.stages * config.block_n * config.block_k * bits // 8 >= LEAST


def test_why_not():
    x, w = empty(32, 256), empty(64, 256)
    assert why_not_linear(x, w) is None
    assert "1 to 32 rows, got 33" in str(why_not_linear(empty(33, 256), w))
    assert "got torch.float32" in str(why_not_linear(x.float(), w.float()))
    assert "begin at multiples of 16 bytes, got torch.float16" in str(why_not_linear(x, w.half()))
    assert "strides [257, 1]" in str(why_not_linear(x, empty(64, 257)[:, :256]))
    assert "strides [1, 64]" in str(why_not_linear(x, empty(256, 64).T))
    assert "fewer than 2**33 elements" in str(why_not_linear(x[:, :64], empty(1, 64).expand(2**28, 64)))
