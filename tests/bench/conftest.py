import os
from pathlib import Path

import pytest

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import Record
from mlakit.bench.runner import Device, Run, new_session

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def support(monkeypatch):
    """The test-only backends, importable here and in workers."""
    monkeypatch.syspath_prepend(str(SUPPORT))
    monkeypatch.setenv("PYTHONPATH", f"{SUPPORT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture
def cpu() -> Device:
    """A CPU whose ceilings nobody measured: for tests that do not look at them."""
    rates = {"copy_bytes_per_s": 1e10, "read_bytes_per_s": 1e10, "flops_per_s": 1e11}
    ceilings = {name: {"device": "a CPU", "dtype": name, **rates} for name in ("bf16", "fp16", "fp32")}
    environment = {"device": {"name": "a CPU", "kind": "cpu"}}
    return Device("cpu", environment, ceilings)


@pytest.fixture
def row():
    """Makes a config that is measured in milliseconds."""

    def make(backend: str = "torch_absorb", batch_spec: str = "3q1s70_2q4s33", **fields) -> BenchmarkConfig:
        small = {"model": "tiny", "num_layers": 2, "block_size": 16, "dtype": "fp32", "device": "cpu", "repeats": 1}
        return BenchmarkConfig(
            backend=backend, batch_spec=batch_spec, **{**small, "warmup_iters": 1, "l2": "hot", **fields}
        )

    return make


@pytest.fixture
def run(cpu):
    """Runs rows and returns them."""

    def execute(*plan: BenchmarkConfig):
        record = Record(name="test", planned=len(plan), sessions=[new_session(cpu, [])])
        return Run(plan, cpu, record).execute().rows

    return execute
