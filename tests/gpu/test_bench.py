"""The bench on a real GPU: what a CPU cannot show."""

import os
from pathlib import Path

import pytest
import torch

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.measure import measure_row
from mlakit.bench.results import Record
from mlakit.bench.runner import Run, new_session, probe
from mlakit.bench.timing import time_calls

pytestmark = pytest.mark.gpu
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def device():
    return probe("auto", ["bf16"])


def _row(backend: str, spec: str = "3q1s700_2q4s333_q200", **fields) -> BenchmarkConfig:
    small = {"attention": "mla", "model": "deepseek-v2-lite", "num_layers": 2, "device": "cuda:0", "repeats": 3}
    return BenchmarkConfig(backend=backend, batch_spec=spec, **{**small, **fields})


def test_probe_measures_this_gpu(device):
    assert device.name == "cuda:0"
    ceilings = device.ceilings["bf16"]
    assert ceilings["read_bytes_per_s"] > 3e11
    assert ceilings["flops_per_s"] > 2e13
    assert device.environment["driver"]


@pytest.mark.parametrize("scope", ["attention", "pipeline"])
@pytest.mark.parametrize("backend", ["torch_naive", "torch_absorb", "sdpa"])
@pytest.mark.parametrize("fields", [{}, {"cuda_graph": True}, {"l2": "hot"}, {"dtype": "fp16"}], ids=str)
def test_backends_are_right(device, backend, scope, fields):
    from mlakit.bench.limits import Ceilings

    result = measure_row(_row(backend, scope=scope, profile_memory=True, **fields), Ceilings(**device.ceilings["bf16"]))
    assert result.success, result.error
    assert result.gpu is not None
    assert result.gpu.sm_clock is None or result.gpu.sm_clock > 100
    assert result.memory_allocated_mb > 0
    assert len(result.timing.samples) == 6


def test_hot_reads_from_l2_and_cold_does_not():
    x = torch.randn(2**22, device="cuda")  # 16 MiB: half of a small L2, and several times what memory gives in a launch
    hot = time_calls([lambda: x.sum()], "cuda", l2="hot", repeats=50)
    cold = time_calls([lambda: x.sum()], "cuda", l2="cold", repeats=50)
    assert hot.median < cold.median


def test_a_slow_host_is_not_measured_as_gpu_time():
    x = torch.randn(2**20, device="cuda")

    def slow():
        x.mul_(1.0)
        sum(range(20000))  # a few hundred microseconds of Python between two kernels
        x.mul_(1.0)

    for l2 in ("hot", "cold"):
        plain = time_calls([lambda: (x.mul_(1.0), x.mul_(1.0))], "cuda", l2=l2, repeats=30)
        delayed = time_calls([slow], "cuda", l2=l2, repeats=30)
        assert delayed.host > 5 * delayed.median
        assert delayed.median < 3 * plain.median


def test_an_illegal_address_costs_one_row(device, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{SUPPORT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(SUPPORT))
    plan = [_row("misbehaving:IllegalAddress"), _row("misbehaving:IllegalAddress", "q1s64"), _row("torch_absorb")]
    record = Record(name="test", planned=3, sessions=[new_session(device, [])])
    bad, again, good = Run(plan, device, record).execute().rows
    assert bad.status == again.status == "error"  # the second in a fresh process: the first was unfit to go on
    assert "CUDA error" in bad.error
    assert good.success


def test_out_of_gpu_memory_is_a_row(device):
    plan = [_row("torch_naive", "128q1s32k", model="deepseek-v3", num_layers=1, check=False), _row("torch_absorb")]
    record = Record(name="test", planned=2, sessions=[new_session(device, [])])
    big, good = Run(plan, device, record).execute().rows
    assert big.status == "out_of_memory"
    assert good.success
