import pytest
import torch

from mlakit.indexer.config import logits_config, topk_config
from mlakit.indexer.triton_logits import launch_indexer_logits, launch_indexer_logits_paged
from mlakit.indexer.triton_topk import launch_select_topk
from mlakit.testing.offline import _CHIPS, TARGETS, offline

pytestmark = pytest.mark.compiled
F8 = torch.float8_e4m3fn


def _logits(s_q, s_kv, limited, heads=64):
    limit = torch.empty(s_q, dtype=torch.int32) if limited else None
    q, k = torch.empty(s_q, heads, 128, dtype=F8), torch.empty(s_kv, 128, dtype=F8)
    launch_indexer_logits(q, k, torch.empty(s_kv), torch.empty(s_q, heads), limit, limit, torch.empty(s_q, s_kv))


# DeepSeek's heads, of few queries by pointers and of many by TMA where there is TMA; without limits; heads that are
# padded; a speculative decoding step and a plain one.
@pytest.mark.parametrize("target", TARGETS)
def test_default_tiles_of_logits_fit_the_registers(target):
    with offline(target) as compiled:
        _logits(4096, 8192, True)
        _paged(2)
        if target == 90:
            _logits(4096, 8192, False)
            _logits(7, 1000, True, heads=33)
            _paged(1)
    assert [kernel.spills for kernel in compiled] == [0] * len(compiled)
    assert ("UTMALDG" in compiled[0].sass) == (target > 80)
    if target == 90:
        assert all("QGMMA" in kernel.sass for kernel in compiled)
        # Four programs share a multiprocessor: while one sums, the others multiply.
        assert max(kernel.registers for kernel in compiled[:3]) <= 128


def _paged(q_len):
    launch_indexer_logits_paged(
        torch.empty(4, q_len, 64, 128, dtype=F8),
        torch.empty(100, 64, 132, dtype=torch.uint8),
        torch.empty(4, q_len, 64),
        torch.empty(4, 50, dtype=torch.int32),
        torch.empty(4, dtype=torch.int32),
        torch.empty(4 * q_len, 3200),
    )


# DeepSeek's k on each kind of GPU, and the largest: these take a compiler ten seconds each.
@pytest.mark.parametrize(
    ("target", "rows", "columns", "k"),
    [*((target, 4096, 32768, 2048) for target in TARGETS), (90, 4096, 40001, 4096)],
)
def test_selections_fit_the_registers(target, rows, columns, k):
    with offline(target) as compiled:
        launch_select_topk(torch.empty(rows, columns), k, None, torch.empty(rows, k, dtype=torch.int32))
    assert [kernel.spills for kernel in compiled] == [0]


def test_few_queries_are_split_over_the_device():
    chip = _CHIPS[90]
    for s_q, s_kv, q_len in [(1, 131072, None), (64, 32768, None), (4096, 8192, None), (1, 1, None), (64, 32768, 1)]:
        config = logits_config(s_q, s_kv, 64, chip, q_len=q_len)
        programs = -(-s_q // config.block_q) * -(-s_kv // config.split)
        assert config.split % config.block_n == 0
        assert programs >= min(4 * chip.units, s_kv // 1024)


# Room for what the sample asks for of a row of any length, and for its scatter.
@pytest.mark.parametrize("rows", [1, 500, 4096])
@pytest.mark.parametrize("columns", [1, 4097, 8192, 32768, 131072, 262144, 500_000])
@pytest.mark.parametrize("k", [1, 512, 2048, 4096])
def test_candidates_have_room(rows, columns, k):
    config = topk_config(columns, k, rows, _CHIPS[90])
    assert max(config.capacity, config.sample) <= 32 * 32 * config.num_warps  # keys a thread holds
    if columns <= config.capacity:
        return
    share = min(k / columns, 1)
    expected = config.sample * share
    wanted = (expected + 3.5 * (expected * (1 - share)) ** 0.5 + 3) * 17 / 16
    candidates = (wanted + 2 * wanted**0.5) * columns / config.sample
    assert candidates <= config.capacity
