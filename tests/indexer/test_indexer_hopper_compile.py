"""The indexer's Gluon kernels, compiled for a Hopper that is not there."""

import re

import pytest
import torch

from mlakit.indexer.hopper_launch import (
    launch_indexer_logits_hopper,
    launch_indexer_logits_paged_hopper,
    launch_select_topk_hopper,
)
from mlakit.testing.offline import CompiledKernel, offline

pytestmark = pytest.mark.compiled
F8 = torch.float8_e4m3fn


def logits_kernel(s_q: int, s_kv: int, heads: int, limited: bool) -> CompiledKernel:
    limit = torch.empty(s_q, dtype=torch.int32) if limited else None
    q, k = torch.empty(s_q, heads, 128, dtype=F8), torch.empty(s_kv, 128, dtype=F8)
    weights, out = torch.empty(s_q, heads), torch.empty(s_q, s_kv)
    with offline(90) as compiled:
        launch_indexer_logits_hopper(q, k, torch.empty(s_kv), weights, limit, limit, out)
    (kernel,) = compiled
    return kernel


def paged_kernel(q_len: int) -> CompiledKernel:
    with offline(90) as compiled:
        launch_indexer_logits_paged_hopper(
            torch.empty(4, q_len, 64, 128, dtype=F8),
            torch.empty(100, 64, 132, dtype=torch.uint8),
            torch.empty(4, q_len, 64),
            torch.empty(4, 50, dtype=torch.int32),
            torch.empty(4, dtype=torch.int32),
            torch.empty(4 * q_len, 3200),
        )
    (kernel,) = compiled
    return kernel


def check_products(kernel: CompiledKernel) -> None:
    """Nothing spills; two programs share a multiprocessor; a tile's four products are started together and waited for
    together, and before the next ones are started nobody works on their result.
    """
    assert kernel.spills == 0
    assert kernel.registers <= 65536 // 256
    names = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)[ .;]", kernel.sass, re.MULTILINE)
    events = "".join({"QGMMA": "P", "FMNMX": "m"}.get(name, "") for name in names)
    waits = len(re.findall(r"WARPGROUP\.DEPBAR", kernel.sass))
    assert waits == 3  # two in the loop, one behind it
    assert re.fullmatch(r"PPPP(?:PPPPm+){2}m+", events), events


# DeepSeek's heads without limits, and twice as many with them.
@pytest.mark.parametrize(("heads", "limited"), [(64, False), (128, True)])
def test_logits(heads, limited):
    check_products(logits_kernel(4096, 8192, heads, limited))


def test_logits_from_pages():
    check_products(paged_kernel(2))
    check_products(paged_kernel(1))


# A held row of DeepSeek's k, candidates of many rows and of few.
@pytest.mark.parametrize(("rows", "columns", "resident"), [(4096, 8192, 2), (4096, 32768, 3), (64, 131072, 1)])
def test_selections_fit_the_registers(rows, columns, resident):
    with offline(90) as compiled:
        launch_select_topk_hopper(torch.empty(rows, columns), 2048, None, torch.empty(rows, 2048, dtype=torch.int32))
    (kernel,) = compiled
    assert kernel.spills == 0
    threads = 1024 if rows == 64 else 512
    assert kernel.registers * threads * resident <= 65536
    assert "ATOMS.POPC.INC" in kernel.sass  # what counts without a conflict
