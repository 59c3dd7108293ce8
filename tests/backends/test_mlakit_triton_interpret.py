"""mlakit's own kernels behind the bench's interface, in Triton's interpreter: every kind of batch, checked as the bench
checks.
"""

import pytest

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.limits import Ceilings
from mlakit.bench.measure import measure_row

pytestmark = pytest.mark.interpret
CEILINGS = Ceilings("a CPU", "float16", 1e10, 1e10, 1e11)


# Decode, several new tokens beside one, and all pipelines together; lengths around the ends of pages of 16.
@pytest.mark.parametrize("spec", ["2q1s33_q1", "q2s17_2q1s16_q2s9", "q20_q17s33_2q1s20"])
@pytest.mark.parametrize("fields", [{}, {"scope": "pipeline"}, {"parameters": {"num_splits": 3}}], ids=str)
def test_mla(spec, fields):
    config = BenchmarkConfig(
        backend="mlakit_triton", batch_spec=spec, model="tiny", num_layers=1, block_size=16, dtype="fp16", device="cpu",
        repeats=1, warmup_iters=0, l2="hot", **fields,
    )  # fmt: skip
    result = measure_row(config, CEILINGS)
    assert result.success, result.error
    assert all(kernel.endswith(", triton") for kernel in result.kernels.values())
    assert (result.check.lse_error is not None) == (fields.get("scope") != "pipeline")


def test_mlakit_takes_the_fastest_there_is_and_says_which():
    # On a CPU that is the reference; the kernels of a GPU are tests/gpu/test_backends.py's.
    config = BenchmarkConfig(
        backend="mlakit", batch_spec="q20_2q1s20", model="tiny", num_layers=1, block_size=16, dtype="fp16",
        device="cpu", repeats=1, warmup_iters=0, l2="hot", check=False,
    )  # fmt: skip
    result = measure_row(config, CEILINGS)
    assert result.kernels == {"decode": "mla_decode, reference", "prefill": "mla_prefill, reference"}


@pytest.mark.parametrize("spec", ["2q1s33", "q20_q9s30_q1s17"])
def test_standard(spec):
    config = BenchmarkConfig(
        backend="triton", batch_spec=spec, model="tiny-gqa", num_layers=1, block_size=16, dtype="fp16", device="cpu",
        repeats=1, warmup_iters=0, l2="hot",
    )  # fmt: skip
    result = measure_row(config, CEILINGS)
    assert result.success, result.error


def test_float32_is_a_reason():
    config = BenchmarkConfig(
        backend="mlakit_triton", batch_spec="q1s5", model="tiny", num_layers=1, dtype="fp32", device="cpu"
    )
    result = measure_row(config, CEILINGS)
    assert (result.status, result.error) == ("unsupported", "takes bf16 and fp16, got float32")
