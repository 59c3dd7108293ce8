import re

import pytest
import torch

from mlakit.rope.triton_rope import launch_rope
from mlakit.testing.offline import TARGETS, offline

pytestmark = pytest.mark.compiled


# Queries of DeepSeek-V3 in a prefill and in a decode step (another configuration), and the shared key, out of wider
# rows into wider rows, with the parts of a complex table.
@pytest.mark.parametrize(("tokens", "heads"), [(4096, 128), (32, 128), (4096, 1)])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("target", TARGETS)
def test_wide_accesses_and_no_spills(target, layout, tokens, heads):
    q = torch.empty(tokens, heads, 192, dtype=torch.bfloat16)
    table = torch.empty(tokens, 32, dtype=torch.complex64)
    room = torch.empty(tokens, heads, 576, dtype=torch.bfloat16)
    with offline(target) as compiled:
        launch_rope(q[..., 128:], table.real, table.imag, None, room[..., 512:], layout=layout)
    (kernel,) = compiled
    assert kernel.spills == 0
    # The halves of a row are stored apart; a thread of a small program has 8 bytes of each.
    wide = (".128",) if layout == "interleaved" else (".128", ".64")
    for access in re.findall(r"\bSTG[.\w]*", kernel.sass):
        assert access.endswith(wide), f"{access} is not a wide access"
