import pytest
import torch
from test_indexer import _rows, _rows_that_differ

from mlakit.indexer.hopper_config import HopperTopkConfig, why_not_device
from mlakit.indexer.hopper_launch import launch_select_topk_hopper
from mlakit.indexer.reference import select_topk_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_not_device("cuda:0") is not None, reason="kernels for Hopper"),
]


def _more_rows(columns):
    """Ranges that floats do not resolve, overflow, or lose in denormal numbers; one value that stretches all bins."""
    normal = torch.randn(columns, device="cuda")
    outlier = normal.clone()
    outlier[columns // 2] = 1e6
    rows = [normal + 1e6, normal * 1e38, torch.where(normal > 1, normal * 1e38, normal), normal * 1e-30, outlier]
    return torch.cat([_rows(columns), torch.stack(rows)])


# Rows that are held, of every number of values a thread, down to one column; candidates of a sample as large as the
# row and smaller; the longest row; either number of threads; k of 1, odd, DeepSeek's, more than there are columns.
@pytest.mark.parametrize(
    ("columns", "k", "config"),
    [
        (1, 1, None), (63, 64, None), (1000, 2048, None), (2048, 2048, None), (4099, 127, None), (8191, 1, None),
        (8192, 2048, None), (16384, 2048, HopperTopkConfig(1024, 16, 0)), (9000, 2048, None), (33333, 100, None),
        (33333, 2048, HopperTopkConfig(512, 8, 2048, ahead=True)), (131072, 2048, None), (163840, 512, None),
        (40000, 1, HopperTopkConfig(1024, 4, 8192)), (5000, 1000, HopperTopkConfig(512, 4, 4096)),
    ],
)  # fmt: skip
def test_selection_is_exact(columns, k, config):
    logits = _more_rows(columns)
    out = torch.full((logits.shape[0], k), -7, device="cuda", dtype=torch.int32)
    launch_select_topk_hopper(logits, k, None, out, config)
    assert _rows_that_differ(out, select_topk_reference(logits, k)) == []
    lengths = torch.randint(-5, columns + 5, (logits.shape[0],), device="cuda", dtype=torch.int32)
    behind = torch.arange(columns, device="cuda") >= lengths[:, None]
    out.fill_(-7)
    launch_select_topk_hopper(logits.masked_fill(behind, torch.nan), k, lengths, out, config)
    assert _rows_that_differ(out, select_topk_reference(logits, k, lengths)) == []


# More rows than there is room for at once, rows apart from one another, lengths of all sizes; the same at every call.
@pytest.mark.parametrize("columns", [9000, 5000])
def test_selection_of_many_rows(columns):
    logits = torch.randn(2001, 2 * columns, device="cuda")[:, 1 : columns + 1]
    lengths = (torch.arange(2001, device="cuda") * 4 + 900).int().clamp(max=columns)
    out = torch.full((2001, 1000), -7, device="cuda", dtype=torch.int32)
    launch_select_topk_hopper(logits, 1000, lengths, out)
    assert torch.equal(out, select_topk_reference(logits, 1000, lengths))
    again = torch.full_like(out, -7)
    launch_select_topk_hopper(logits, 1000, lengths, again)
    assert torch.equal(out, again)
