"""The kernel of a fused layer's query, compiled for a Hopper that is not there."""

import pytest
import torch

from mlakit.nn.hopper_query import launch_query
from mlakit.testing.offline import offline

pytestmark = pytest.mark.compiled


# As many tokens as there may be, each with its position; a few in order, of a low rank that is no multiple of a step.
@pytest.mark.parametrize(
    ("tokens", "rank", "positions"), [(32, 1536, torch.empty(32, dtype=torch.int64)), (3, 448, None)], ids=["32", "3"]
)
def test_nothing_spills(tokens, rank, positions):
    up = torch.empty(128, 256, 512, dtype=torch.bfloat16)
    x, gain, wq_b, out = (
        torch.empty(shape, dtype=torch.bfloat16)
        for shape in ((tokens, rank), (rank,), (24576, rank), (tokens, 128, 576))
    )
    cos, sin = torch.view_as_real(torch.empty((256, 32), dtype=torch.complex64)).unbind(-1)
    with offline(90) as compiled:
        launch_query(x, gain, wq_b, up[:, :128], cos, sin, positions, out, q_len=1, eps=1e-6)
    (kernel,) = compiled
    assert kernel.spills == 0
    assert kernel.shared_bytes <= 227 * 1024
    assert "UTMALDG" in kernel.sass
    assert "HGMMA" in kernel.sass
