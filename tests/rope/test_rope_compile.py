import re

import pytest
import torch

from mlakit.rope.triton_rope import launch_rope
from mlakit.testing.offline import TARGETS, offline

pytestmark = pytest.mark.compiled


# Queries of DeepSeek-V3 in a prefill and in a decode step (another configuration), and the shared key, out of wider
# rows into wider rows, with the parts of a complex table.
@pytest.mark.parametrize(("tokens", "heads"), [(4096, 128), (32, 128), (4096, 1)])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_wide_accesses_and_no_spills(target, interleaved, tokens, heads):
    q = torch.empty(tokens, heads, 192, dtype=torch.bfloat16)
    table = torch.empty(tokens, 32, dtype=torch.complex64)
    room = torch.empty(tokens, heads, 576, dtype=torch.bfloat16)
    with offline(target) as compiled:
        launch_rope(q[..., 128:], table.real, table.imag, None, room[..., 512:], interleaved=interleaved)
    (kernel,) = compiled
    assert kernel.spills == 0
    for access in re.findall(r"\bSTG[.\w]*", kernel.sass):
        assert access.endswith(".128"), f"{access} is not a 16-byte access"
    assert re.search(r"\bLDG[.\w]*\.128\b", kernel.sass)
