import re

import pytest
import torch

from mlakit.quant.triton_gemm import launch_fp8_gemm
from mlakit.quant.triton_quant import launch_act_quant, launch_weight_dequant
from mlakit.testing.offline import TARGETS, offline

pytestmark = pytest.mark.compiled
F8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", TARGETS)
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


# One m for each tile the launcher knows; a K with a ragged last block compiles to another kernel, and one whose rows
# start anywhere to a third.
@pytest.mark.parametrize("k", [7168, 7120, 7100])
@pytest.mark.parametrize("target", TARGETS)
def test_every_default_tile_of_the_product_fits_the_registers(target, k):
    b, blocks = torch.empty(7168, k, dtype=F8), -(-k // 128)
    with offline(target) as compiled:
        for m in (1, 20, 64, 4096):
            a = torch.empty(m, k, dtype=F8)
            out = torch.empty(m, 7168, dtype=torch.bfloat16)
            launch_fp8_gemm(a, torch.empty(m, blocks), b, torch.empty(56, blocks), out)
    assert len(compiled) == 4
    for kernel in compiled:
        assert kernel.spills == 0
    if target == 90 and k % 16 == 0:
        assert "QGMMA" in compiled[-1].sass  # Hopper's float8 product, not one of widened operands
