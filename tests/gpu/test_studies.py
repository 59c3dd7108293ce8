"""The studies of the layer on a GPU: rows from CUDA graphs, mlakit's kernels compared, memory that runs out."""

import csv
import io
import json

import pytest
import torch

from mlakit.cli.main import main

pytestmark = pytest.mark.gpu

# Widths that the kernels are made for, with few heads.
SMALL = ["--dim", "256", "--heads", "4", "--q-lora-rank", "64", "--trials", "2"]


def _rows(path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_layers_times_decode_eagerly_and_from_a_graph(dtype, tmp_path, capsys):
    sizes = ["--batch-sizes", "1", "3", "--seq-lengths", "65", "300", "--output-dir", str(tmp_path)]
    assert main(["study", "layers", *SMALL, *sizes, "--dtype", dtype]) == 0
    rows = _rows(tmp_path / "details.csv")
    assert len(rows) == 2 * 2 * 4 * 3
    assert [row["reason"] for row in rows] == [""] * len(rows), [row["reason"] for row in rows]
    assert {(row["phase"], row["mode"]) for row in rows} == {
        ("prefill", "eager"),
        ("decode", "eager"),
        ("decode", "graph"),
    }
    assert all(float(row["host"]) > 0 for row in rows if row["mode"] == "eager")
    assert "For decode, CUDA graph: " in capsys.readouterr().out
    assert (tmp_path / "latency.png").exists()


def test_memory_that_runs_out_is_a_row(tmp_path):
    """As much memory as the fused layer needs many times over, and naive's scores (2 GiB and more) do not fit in."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved()  # what the tests before it in this process still hold
    torch.cuda.set_per_process_memory_fraction((2 * 2**30 + taken) / total)
    try:
        sizes = ["--batch-sizes", "4", "--seq-lengths", "8192", "--phase", "prefill", "--no-check"]
        names = ["--implementations", "naive", "fused"]
        code = main(["study", "layers", *SMALL, *sizes, *names, "--output-dir", str(tmp_path)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    naive, fused = _rows(tmp_path / "details.csv")
    assert (code, naive["reason"], fused["reason"]) == (0, "out of memory", "")
    assert float(fused["median"]) > 0


@pytest.mark.parametrize(
    "flags", [[], ["--dtype", "fp8"], ["--cache-dtype", "fp8", "--implementations", "absorb", "fused"]]
)
def test_correctness(flags, tmp_path, capsys):
    sizes = ["--min-seq-len", "100", "--max-seq-len", "300", "--seq-len-step", "200", "--batch-sizes", "1", "3"]
    code = main(["study", "correctness", *SMALL, *sizes, "--output", str(tmp_path / "c"), *flags])
    out = capsys.readouterr().out
    assert code == 0, out
    assert f"All {24 if 'absorb' in flags else 80} comparisons at 4 sizes agree" in out


def test_fast_path(tmp_path, capsys):
    path = tmp_path / "fast.json"
    assert main(["study", "fast-path", *SMALL, "--batch-size", "3", "--output-json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["seq_len"] for row in rows] == [64, 128, 256, 512]
    assert all(variant["ms"] > 0 for row in rows for variant in row["variants"].values()), capsys.readouterr().out
