"""Records that were really measured: of a backend of somebody's own, as it was and as it is now, 20 ms slower."""

import os
from pathlib import Path

import pytest

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import Record
from mlakit.bench.runner import Device, Run, new_session
from mlakit.cli.main import main

SUPPORT = Path(__file__).parents[1] / "support"
RATES = {"device": "a CPU", "dtype": "fp32", "copy_bytes_per_s": 1e10, "read_bytes_per_s": 1e10, "flops_per_s": 1e11}


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Measures a backend, so much slower than it is, in a worker of its own; returns the record's file."""
    monkeypatch.syspath_prepend(str(SUPPORT))
    monkeypatch.setenv("PYTHONPATH", f"{SUPPORT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def run(name: str, slower_by: float) -> str:
        monkeypatch.setenv("SLOWER_BY", str(slower_by))
        config = BenchmarkConfig(
            backend="misbehaving:Slower", batch_spec="3q1s70", attention="mla", model="tiny", num_layers=1,
            dtype="fp32", device="cpu", repeats=8, l2="hot",
        )  # fmt: skip
        device = Device("cpu", {"device": {"name": "a CPU", "kind": "cpu"}}, {"fp32": RATES})
        record = Record(name=name, planned=1, sessions=[new_session(device, [])])
        Run([config], device, record).execute().save(tmp_path / f"{name}.json")
        return str(tmp_path / f"{name}.json")

    return run


def test_a_slower_backend_fails_the_gate_and_a_faster_one_does_not(measure, capsys):
    before, after = measure("before", 0.0), measure("after", 0.02)
    assert main(["compare", before, after, "--fail-above", "5%"]) == 1
    captured = capsys.readouterr()
    assert "1 pair: 1 slower" in captured.out
    assert "mlakit: regression: 3q1s70, misbehaving:Slower: takes " in captured.err
    assert main(["compare", after, before, "--fail-above", "5%"]) == 0
    assert "1 pair: 1 faster" in capsys.readouterr().out
