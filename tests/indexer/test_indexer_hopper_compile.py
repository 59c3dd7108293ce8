"""The indexer's Gluon kernels, compiled for a Hopper that is not there."""

import re

import pytest
import torch

from mlakit.indexer.hopper_launch import launch_indexer_logits_paged_hopper, launch_select_topk_hopper
from mlakit.testing.offline import CompiledKernel, offline

pytestmark = pytest.mark.compiled
F8 = torch.float8_e4m3fn


def paged_kernel(q_len: int, heads: int) -> CompiledKernel:
    with offline(90) as compiled:
        launch_indexer_logits_paged_hopper(
            torch.empty(4, q_len, heads, 128, dtype=F8),
            torch.empty(100, 64, 132, dtype=torch.uint8),
            torch.empty(4, q_len, heads),
            torch.empty(4, 50, dtype=torch.int32),
            torch.empty(4, dtype=torch.int32),
            torch.empty(4 * q_len, 3200),
        )
    (kernel,) = compiled
    return kernel


# DeepSeek's heads of a speculative step and of a plain one; twice as many. Programs that share a multiprocessor.
@pytest.mark.parametrize(("q_len", "heads", "resident"), [(2, 64, 2), (1, 64, 4), (1, 128, 2)])
def test_products_of_logits_overlap_with_sums(q_len, heads, resident):
    """Nothing spills; a tile's four products are started together and waited for
    together, and before the next ones are started nobody works on their result.
    """
    kernel = paged_kernel(q_len, heads)
    assert kernel.spills == 0
    assert kernel.registers * 128 * resident <= 65536
    names = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)[ .;]", kernel.sass, re.MULTILINE)
    events = "".join({"QGMMA": "P", "FMNMX": "m"}.get(name, "") for name in names)
    waits = len(re.findall(r"WARPGROUP\.DEPBAR", kernel.sass))
    assert waits == 3  # two in the loop, one behind it
    assert re.fullmatch(r"PPPP(?:PPPPm+){2}m+", events), events


# A held row of DeepSeek's k, candidates of many rows and of few. Three programs of 16 warps have 40 registers a thread,
# which costs a spill of two in the loop over a row, of 170 instructions, and was faster than without.
@pytest.mark.parametrize(
    ("rows", "columns", "resident", "spills"), [(4096, 8192, 2, 0), (4096, 32768, 3, 4), (64, 131072, 1, 0)]
)
def test_selections_fit_the_registers(rows, columns, resident, spills):
    with offline(90) as compiled:
        launch_select_topk_hopper(torch.empty(rows, columns), 2048, None, torch.empty(rows, 2048, dtype=torch.int32))
    (kernel,) = compiled
    assert kernel.spills <= spills
    threads = 1024 if rows == 64 else 512
    assert kernel.registers * threads * resident <= 65536
    assert "ATOMS.POPC.INC" in kernel.sass  # what counts without a conflict
