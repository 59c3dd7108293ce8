import pytest
import torch

from mlakit.cache.triton_append import launch_append
from mlakit.cache.triton_gather import launch_gather
from mlakit.testing.offline import TARGETS, offline

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(target, is_fp8):
    kv, weight = torch.empty(64, 576, dtype=torch.bfloat16), torch.empty(512, dtype=torch.bfloat16)
    cache = torch.empty(9, 64, 656, dtype=torch.uint8) if is_fp8 else torch.empty(9, 64, 576, dtype=torch.bfloat16)
    angles, slots = torch.empty(4096, 32), torch.empty(64, dtype=torch.int64)
    table, cu_seqlens = torch.empty(4, 8, dtype=torch.int32), torch.empty(5, dtype=torch.int32)
    with offline(target) as compiled:
        launch_append(kv, weight, angles, angles, cache, slots, slots, eps=1e-6, interleaved=True, ue8m0=False)
        launch_gather(cache, table, cu_seqlens, None, kv, kv_lora_rank=512)
    assert [kernel.name for kernel in compiled] == ["_append_latent_kernel", "_gather_latent_kernel"]
    for kernel in compiled:
        assert kernel.spills == 0
        assert "LDG.E.128" in kernel.sass or is_fp8
        assert "STG.E.128" in kernel.sass
