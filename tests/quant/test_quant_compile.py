import re

import pytest
import torch

from mlakit.quant.triton_gemm import gemm_config, launch_fp8_gemm
from mlakit.quant.triton_quant import launch_act_quant, launch_weight_dequant
from mlakit.testing.offline import TARGETS, offline

pytestmark = pytest.mark.compiled
F8 = torch.float8_e4m3fn


@pytest.mark.parametrize(("target", "dtype"), [*((t, torch.bfloat16) for t in TARGETS), (90, torch.float32)])
def test_quantizing_moves_16_bytes_at_a_time(target, dtype):
    wide, codes = torch.empty(512, 7168, dtype=dtype), torch.empty(512, 7168, dtype=F8)
    with offline(target) as compiled:
        launch_act_quant(wide, codes, torch.empty(512, 56), block_size=128, ue8m0=True)
        launch_weight_dequant(codes, torch.empty(4, 56), wide, block_size=128)
    act_quant, weight_dequant = compiled
    assert (act_quant.spills, weight_dequant.spills) == (0, 0)
    assert re.search(r"\bLDG\.E[.\w]*\.128", act_quant.sass)
    for kernel in compiled:
        assert re.search(r"\bSTG\.E[.\w]*\.128", kernel.sass)
    if dtype == torch.bfloat16:
        assert weight_dequant.shared_bytes == 0  # a thread writes what it read


# One m for each tile the launcher knows.
@pytest.mark.parametrize("target", TARGETS)
def test_every_default_tile_of_the_product_fits_the_registers(target):
    compiled = _products(target, [(1, 7168), (20, 7168), (64, 7168), (4096, 7168)])
    assert [kernel.spills for kernel in compiled] == [0] * 4
    assert ["UTMALDG" in kernel.sass for kernel in compiled] == [False, False, target > 80, target > 80]
    if target == 90:
        assert "QGMMA" in compiled[-1].sass  # Hopper's float8 product, not one of widened operands


# A K with a ragged last block compiles to another kernel where there is no TMA, one whose rows start anywhere to a
# third.
@pytest.mark.parametrize("target", [80, 90])
def test_ragged_products_fit_the_registers(target):
    compiled = _products(target, [(20, 7120), (4096, 7120), (4096, 7100)])
    assert [kernel.spills for kernel in compiled] == [0] * 3


def _products(target, sizes):
    with offline(target) as compiled:
        for m, k in sizes:
            a, b, blocks = torch.empty(m, k, dtype=F8), torch.empty(7168, k, dtype=F8), -(-k // 128)
            out = torch.empty(m, 7168, dtype=torch.bfloat16)
            launch_fp8_gemm(a, torch.empty(m, blocks), b, torch.empty(56, blocks), out)
    assert len(compiled) == len(sizes)
    return compiled


# A shape that 128 x 128 tiles fill evenly, one that they do not, one with few tiles; a GPU of each kind of loading and
# of shared memory.
@pytest.mark.parametrize(
    ("m", "n", "found", "tile", "descriptors"),
    [
        (4096, 7168, (9, 0), (128, 128), True),
        (4096, 576, (9, 0), (64, 128), True),
        (128, 7168, (9, 0), (64, 64), True),
        (4096, 7168, (10, 0), (128, 128), True),
        (4096, 7168, (12, 0), (64, 128), False),
        (4096, 7168, (8, 9), (64, 128), False),
        (4096, 7168, (8, 0), (32, 64), False),
        (16, 7168, (9, 0), (16, 32), False),
    ],
)
def test_the_tile_suits_shape_and_device(m, n, found, tile, descriptors):
    config = gemm_config(m, n, 7168, 132, found)
    assert ((config.block_m, config.block_n), config.descriptors) == (tile, descriptors)


def test_an_address_that_tma_cannot_read_is_read_by_pointers():
    room = torch.empty(256 * 7168 + 16, dtype=F8)
    a = room[room.data_ptr() % 16 ^ 8 :][: 256 * 7168].view(256, 7168)
    b, out = torch.empty(7168, 7168, dtype=F8), torch.empty(256, 7168, dtype=torch.bfloat16)
    assert a.data_ptr() % 16
    with offline(90) as compiled:
        launch_fp8_gemm(a, torch.empty(256, 56), b, torch.empty(56, 56), out)
    assert "UTMALDG" not in compiled[0].sass
