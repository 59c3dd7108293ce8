import re

import pytest
import torch

from mlakit.merge.triton_merge import _launch_merge_separate, _launch_merge_stacked
from mlakit.testing.offline import TARGETS, offline

pytestmark = pytest.mark.compiled


# The value widths of MHA and MQA mode, in the dtype of a model and in that of partial results.
@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.bfloat16), (512, torch.bfloat16), (512, torch.float32)])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_wide_loads_and_no_spills(target, separate, dim, dtype):
    outs, lses = torch.empty(3, 32, 16, dim, dtype=dtype), torch.empty(3, 32, 16)
    out, lse = torch.empty(32, 16, dim, dtype=dtype), torch.empty(32, 16)
    with offline(target) as compiled:
        if separate:
            _launch_merge_separate(list(outs), list(lses), out, lse)
        else:
            _launch_merge_stacked(outs, lses, out, lse)
    (kernel,) = compiled
    assert kernel.spills == 0
    assert re.search(r"LDG\S*\.128", kernel.sass)
    assert re.search(r"STG\S*\.128", kernel.sass)
