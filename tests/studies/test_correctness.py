import csv
import io
import json
from itertools import combinations

import pytest
import torch

from mlakit.cli.main import main
from mlakit.studies import correctness
from mlakit.studies.correctness_report import FLOAT64, Pair, verdict
from mlakit.studies.layer_difference import Difference
from mlakit.studies.layer_options import IMPLEMENTATIONS


def _table(path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def _run(small, folder, *flags: str) -> int:
    sizes = ["--min-seq-len", "9", "--max-seq-len", "9", "--batch-sizes", "2", "--output", str(folder / "c")]
    return main(["study", "correctness", *small, *sizes, *flags])


def test_the_seeds_command(mlakit, tmp_path, small):
    """The seed's correctness benchmark at a small size."""
    done = mlakit(
        "study", "correctness", "--dtype", "bf16", "--min-seq-len", "8", "--max-seq-len", "24", "--seq-len-step", "16",
        "--batch-sizes", "1", "4", "--output", "results/correctness", *small,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results"
    names = {f"correctness{suffix}" for suffix in (".png", ".csv", "_pairs.csv", ".json")}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "correctness.png").read_bytes()[:4] == b"\x89PNG"
    runs = _table(folder / "correctness.csv")
    assert [(r["batch"], r["seq_len"], r["implementation"]) for r in runs] == [
        (batch, seq, name) for batch in ("1", "4") for seq in ("8", "24") for name in IMPLEMENTATIONS
    ]
    for run in runs:
        assert float(run["prefill_ms"]) > 0
        assert float(run["decode_ms"]) > 0
        assert 0 < float(run["prefill_relative"]) <= 0.015
        assert run["decode_agrees"] == "True"
    pairs = _table(folder / "correctness_pairs.csv")
    # Every pair and each against float64, in both phases, at each of four sizes.
    assert len(pairs) == (6 + 4) * 2 * 4
    assert all(pair["agrees"] == "True" for pair in pairs)
    for one, other in [*combinations(IMPLEMENTATIONS, 2), *((name, FLOAT64) for name in IMPLEMENTATIONS)]:
        assert f"  {one} / {other} " in done.stdout
    assert "batch 4, 24 tokens, then 4 decode steps" in done.stdout
    assert "All 80 comparisons at 4 sizes agree within 0.015." in done.stdout
    assert "Largest relative difference from float64: " in done.stdout
    record = json.loads((folder / "correctness.json").read_text())
    assert record["schema"] == correctness.SCHEMA
    assert record["complete"] is True
    assert len(record["pairs"]) == 80
    assert record["environment"]["torch"] == torch.__version__
    assert done.stderr.count("\n") == 1


def test_a_prefill_alone_in_float8(small, tmp_path, capsys):
    flags = ["--dtype", "fp8", "--decode-steps", "0", "--implementations", "absorb", "fused"]
    assert _run(small, tmp_path, *flags) == 0
    assert "All 3 comparisons at 1 sizes agree" in capsys.readouterr().out


def test_a_pair_that_disagrees_is_named_and_ends_with_1(small, tmp_path, replace_attend, capsys):
    replace_attend("absorb", lambda attend: lambda layer, x, step: attend(layer, x, step) * 1.05)
    assert _run(small, tmp_path) == 1
    out = capsys.readouterr().out
    # absorb against float64 and against each of the three others, in both phases.
    assert "8 of 20 comparisons disagree by more than 0.015:" in out
    assert "  absorb / float64, prefill, batch 2, 9 tokens: off by 0.0494" in out
    line = next(line for line in out.splitlines() if line.startswith("  naive / absorb "))
    assert line.endswith("DISAGREE in prefill and decode")
    line = next(line for line in out.splitlines() if line.startswith("  naive / fused "))
    assert "DISAGREE" not in line


def test_a_wide_tolerance_lets_it_pass(small, tmp_path, replace_attend):
    replace_attend("absorb", lambda attend: lambda layer, x, step: attend(layer, x, step) * 1.05)
    assert _run(small, tmp_path, "--tolerance", "0.1") == 0


def test_an_error_in_decode_alone_shows(small, tmp_path, replace_attend, capsys):
    """A cache that loses a token: right in every prefill."""

    def spoil(attend):
        def run(layer, x, step):
            if not step.begins:
                step.cache.k[:, 3] = 0
            return attend(layer, x, step)

        return run

    replace_attend("naive", spoil)
    assert _run(small, tmp_path, "--implementations", "naive") == 1
    out = capsys.readouterr().out
    assert "1 of 2 comparisons disagree" in out
    assert "DISAGREE in decode" in out


def test_running_out_of_memory_costs_one_implementation(small, tmp_path, replace_attend, capsys):
    def spoil(attend):
        def run(layer, x, step):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    replace_attend("naive+flash", spoil)
    assert _run(small, tmp_path) == 0
    out = capsys.readouterr().out
    assert "naive+flash                out of memory" in out
    assert "All 12 comparisons" in out
    reasons = {r["implementation"]: r["reason"] for r in _table(tmp_path / "c.csv")}
    assert reasons == {"naive": "", "absorb": "", "naive+flash": "out of memory", "fused": ""}


def test_without_memory_for_float64_the_pairs_are_compared(small, tmp_path, monkeypatch, capsys):
    def reference(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mlakit.studies.layer_steps.Layers.reference", reference)
    assert _run(small, tmp_path) == 0
    out = capsys.readouterr().out
    assert "float64                    out of memory" in out
    assert "All 12 comparisons" in out
    assert "from float64" not in out


def test_nothing_to_compare_ends_with_1(small, tmp_path, monkeypatch, capsys):
    def inputs(self, batch, seq_len):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mlakit.studies.layer_steps.Layers.inputs", inputs)
    assert _run(small, tmp_path) == 1
    out = capsys.readouterr().out
    assert "Nothing could be compared." in out
    assert out.count("  out of memory") == len(IMPLEMENTATIONS)


@pytest.mark.parametrize(("low", "high", "step", "lengths"), [("8", "24", "8", [8, 16, 24]), ("5", "11", "4", [5, 9])])
def test_lengths_end_with_the_longest_that_a_step_reaches(low, high, step, lengths):
    import argparse

    from mlakit.studies.layer_options import parse_common

    parser = argparse.ArgumentParser()
    correctness.add_arguments(parser)
    flags = ["--min-seq-len", low, "--max-seq-len", high, "--seq-len-step", step, "--device", "cpu"]
    args = parser.parse_args(flags)
    assert list(correctness.parse_sizes(args, parse_common(args)).seq_lens) == lengths


def test_the_verdict_names_the_furthest_apart():
    def pair(one, other, relative):
        return Pair(one, other, "prefill", 1, 8, Difference(1.0, 0.5, relative, relative, 1.0), 0.015)

    lines = list(
        verdict([pair("naive", FLOAT64, 0.004), pair("fused", FLOAT64, 0.003), pair("naive", "fused", 0.006)], 0.015)
    )
    assert lines == [
        "All 3 comparisons at 1 sizes agree within 0.015.",
        "Largest relative difference from float64: fused 0.0030, naive 0.0040",
        "Furthest apart: naive and fused, 0.0060 (prefill)",
    ]
