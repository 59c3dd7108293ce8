"""Products of few rows on Hopper, compiled for one that is not there, and how they are shared out."""

import pytest
import torch

from mlakit.hopper_linear import MOST_ROWS, _work, launch_by_head, launch_linear, linear_config
from mlakit.nn import hopper_step
from mlakit.quant import hopper_gemm
from mlakit.testing.offline import offline

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
LEAST = 1 << 14  # bytes a multiprocessor must have on their way for the memory to be busy, as Little's law has it


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def scales(*shapes: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(shape) for shape in shapes)


# DeepSeek-V3's down-projections, two weights in one launch and tiles in parts; its output's projection; float8; values.
@pytest.mark.compiled
def test_nothing_spills():
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
        launch_by_head(empty(32, 128, 512), empty(128, 256, 512)[:, 128:], empty(32, 128, 128), overlap=True)
    assert len(compiled) == 4
    for kernel, product in zip(compiled, ("HGMMA", "HGMMA", "QGMMA", "HGMMA"), strict=True):
        assert kernel.spills == 0
        assert kernel.shared_bytes <= 227 * 1024
        assert "UTMALDG" in kernel.sass
        assert product in kernel.sass
    assert compiled[3].shared_bytes <= 227 * 1024 / 2  # two programs a multiprocessor


# Weights of every size that a layer has, and small ones: a tile's parts are added in registers, 8 of them at most.
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("n", "k"), [(2112, 7168), (1536, 7168), (576, 7168), (24576, 1536), (7168, 16384), (64, 64), (129280, 7168)]
)
def test_a_tile_is_in_few_parts(n, k, bits):
    config = linear_config(n, k, bits, 132)
    assert _work((n, 0), k, config).parts <= 8
    assert config.stages * config.block_n * config.block_k * bits // 8 >= LEAST


def test_every_unit_is_somebodys_and_parts_are_found_again():
    """The kernel's arithmetic of who has which unit, in Python."""
    for units, steps, programs in ((33 * 56, 56, 132), (9 * 28, 28, 63), (112 * 64, 64, 132), (5 * 3, 3, 7)):
        begins = [program * units // programs for program in range(programs + 1)]
        for unit in range(units):
            owner = ((unit + 1) * programs - 1) // units
            assert begins[owner] <= unit < begins[owner + 1]
        for first in range(0, units, steps):
            low, high = ((first + 1) * programs - 1) // units, ((first + steps) * programs - 1) // units
            touching = [p for p in range(programs) if begins[p] < first + steps and begins[p + 1] > first]
            assert touching == list(range(low, high + 1))


def test_all_mean_the_same_few_rows():
    assert MOST_ROWS == hopper_step.MOST_TOKENS == hopper_gemm.MOST_ROWS
