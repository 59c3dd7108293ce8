import re

import pytest
import torch

from mlakit.concat.triton_concat import launch_concat
from mlakit.testing.offline import TARGETS, offline

pytestmark = pytest.mark.compiled


# The two dtypes of the study, at a batch that fills the chip and at one that does not (another configuration), with
# keys sliced from [key, value] heads as the layer hands them over.
@pytest.mark.parametrize("batch", [32, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("target", TARGETS)
def test_wide_accesses_and_no_spills(target, dtype, batch):
    k_nope = torch.empty(batch, 128, 256, dtype=dtype)[..., :128]
    k_pe = torch.empty(batch, 1, 576, dtype=dtype)[..., 512:]
    with offline(target) as compiled:
        launch_concat(k_nope, k_pe, torch.empty(batch, 128, 192, dtype=dtype))
    (kernel,) = compiled
    assert kernel.spills == 0
    assert kernel.shared_bytes == 0  # nothing changes hands between threads
    for access in re.findall(r"\b(?:LDG|STG)[.\w]*", kernel.sass):
        assert access.endswith(".128"), f"{access} is not a 16-byte access"
