import re

import pytest
import torch

from mlakit.hardware import capability
from mlakit.prefill.config import backward_configs, forward_config
from mlakit.prefill.triton_backward import _launch_backward
from mlakit.prefill.triton_forward import _launch_forward
from mlakit.testing.offline import TARGETS, offline

pytestmark = pytest.mark.compiled

# What a tensor core instruction is called on each in PTX; ptxas has but one instruction to make of it.
MATRIX = {80: r"\bmma\.sync\.", 90: r"\bwgmma\.mma_async\.", 100: r"\btcgen05\.mma\."}


def inputs(dims: tuple[int, int], kv_heads: int) -> tuple[torch.Tensor, ...]:
    qk_dim, v_dim = dims

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    bounds = torch.tensor([0, 100, 256], dtype=torch.int32)
    return empty(256, 16, qk_dim), empty(256, kv_heads, qk_dim), empty(256, kv_heads, v_dim), bounds, bounds


# DeepSeek's dims, GLM-5's, the usual ones and 576/512; short sequences have tiles of their own. What is not causal is
# the same loop with less in it: once for the dims that are cut in two.
@pytest.mark.parametrize(
    ("dims", "rows", "causal"),
    [
        ((192, 128), 4096, True),
        ((192, 128), 4096, False),
        ((192, 128), 16, True),
        ((256, 256), 4096, True),
        ((256, 256), 16, True),
        ((128, 128), 4096, True),
        ((576, 512), 4096, True),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_forward_does_not_spill(target, dims, rows, causal):
    q, k, v, cu_q, cu_k = inputs(dims, kv_heads=1 if dims[0] == 576 else 16)
    out, lse = torch.empty(256, 16, dims[1], dtype=torch.bfloat16), torch.empty(256, 16)
    with offline(target) as compiled:
        config = forward_config(dims[0], dims[1], capability("cuda") or (0, 0), rows)
        _launch_forward(q, k, v, cu_q, cu_k, out, lse, softmax_scale=0.1, causal=causal, config=config)
    (kernel,) = compiled
    assert kernel.spills == 0
    # Tiles of fewer than 64 rows have only the instruction of Ampere.
    assert re.search(MATRIX[target if config.block_m >= 64 else 80], kernel.ptx)
    assert ("cp.async.bulk.tensor" in kernel.ptx) == config.tma


@pytest.mark.parametrize(
    ("dims", "causal"), [((192, 128), True), ((192, 128), False), ((256, 256), True), ((128, 128), True)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_backward_does_not_spill(target, dims, causal):
    q, k, v, cu_q, cu_k = inputs(dims, kv_heads=16)
    out, lse = torch.empty(256, 16, dims[1], dtype=torch.bfloat16), torch.empty(256, 16)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    with offline(target) as compiled:
        config_kv, config_q = backward_configs(dims[0], dims[1], capability("cuda") or (0, 0))
        _launch_backward(
            q,
            k,
            v,
            out,
            lse,
            out,
            lse,
            cu_q,
            cu_k,
            *grads,
            softmax_scale=0.1,
            causal=causal,
            config_kv=config_kv,
            config_q=config_q,
        )
    assert [kernel.name for kernel in compiled] == [
        "_prefill_delta_kernel",
        "_prefill_backward_kv_kernel",
        "_prefill_backward_q_kernel",
    ]
    for kernel in compiled:
        assert kernel.spills == 0, kernel.name
    for kernel in compiled[1:]:
        assert re.search(MATRIX[target], kernel.ptx)


def test_a_new_length_does_not_recompile():
    from mlakit.prefill.triton_forward import _prefill_forward_kernel

    def launch(tokens, batch):
        q = torch.empty(tokens, 2, 192, dtype=torch.bfloat16)
        v = torch.empty(tokens, 2, 128, dtype=torch.bfloat16)
        bounds = torch.zeros(batch + 1, dtype=torch.int32)
        config = forward_config(192, 128, (9, 0), tokens // batch)
        _launch_forward(
            q, q, v, bounds, bounds, v, torch.empty(tokens, 2), softmax_scale=0.1, causal=True, config=config
        )

    def variants():
        return len(_prefill_forward_kernel.device_caches[90][0])

    with offline(90):
        launch(256, 1)
        before = variants()
        for tokens, batch in ((333, 1), (1024, 3), (1001, 7), (65, 1)):
            launch(tokens, batch)
        assert variants() == before
