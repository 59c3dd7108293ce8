import json
import subprocess
import sys

import pytest
import torch

from mlakit.studies import k_concat
from mlakit.studies.k_concat_report import (
    StudyRow,
    banner,
    cells,
    conclusion,
    memory_table,
    summary,
    table,
)
from mlakit.studies.method_rows import MethodResult

QUICK = ["--device", "cpu", "--dims", "2,8,4", "--num-iters", "2", "--num-warmup", "0"]


def _row(
    batch: int, cat: float | None, direct: float | None, triton: float | None = None, peak: float = 0.0
) -> StudyRow:
    row = StudyRow("bfloat16", batch, 2, 128, 128, 64, copy_bytes_per_s=4e12 if triton else None)
    row.methods["cat"] = MethodResult(mean=cat, peak_mib=row.output_bytes / 2**20 + peak)
    row.methods["direct_copy"] = MethodResult(mean=direct, reason="" if direct else "out of memory")
    if triton:
        row.methods["triton"] = MethodResult(mean=triton)
    return row


def test_the_methods_of_the_seed_agree_and_can_be_timed():
    k_nope, k_pe = torch.randn(4, 3, 8), torch.randn(4, 1, 4)
    assert torch.equal(k_concat.cat_method(k_nope, k_pe), k_concat.direct_copy_method(k_nope, k_pe))
    calls = []

    def method(one, other):
        calls.append((one, other))
        return one

    assert k_concat.benchmark_method(method, k_nope, k_pe, num_warmup=3, num_iters=4) > 0
    assert len(calls) == 7
    assert (k_concat.NUM_HEADS, k_concat.QK_NOPE_HEAD_DIM, k_concat.PE_DIM) == (128, 128, 64)


def test_the_table_has_the_seeds_banner_and_columns():
    lines = [*banner("bfloat16", 128, 128, 64), *table(with_triton=False).head()]
    assert lines[0] == lines[2] == "=" * 80
    assert lines[1] == "Benchmark: torch.cat vs direct copy for MLA k_nope/k_pe concatenation"
    assert lines[3:5] == ["Tensor shapes: k_nope=[B, 128, 128], k_pe=[B, 1, 64]", "dtype: bfloat16"]
    columns = [cell.strip() for cell in lines[6].split("|")]
    assert columns == ["Batch Size", "cat (ms)", "direct (ms)", "Speedup", "Reduction"]
    assert lines[7] == "-" * 70
    line = table(with_triton=False).line(cells(_row(64, 3e-3, 2e-3)))
    assert [cell.strip() for cell in line.split("|")] == ["64", "3.0000", "2.0000", "1.50x", "33.3%"]


def test_the_kernels_columns():
    # 64 tokens move 64 * (128 * 128 + 64 + 128 * 192) * 2 bytes = 5.25 MB: in 2.5 us that is 2.1 TB/s of 4.
    shown = table(with_triton=True)
    lines = next(shown.head()), shown.line(cells(_row(64, 5e-6, 4e-6, 2.5e-6)))
    titles, found = ([cell.strip() for cell in line.split("|")] for line in lines)
    assert dict(zip(titles[5:], found[5:], strict=True)) == {
        "mlakit (ms)": "0.0025",
        "Over cat": "2.00x",
        "TB/s": "2.10",
        "Of copy": "0.53",
    }


def test_a_method_without_a_time_says_why():
    assert cells(_row(64, 3e-3, None))[:5] == ["64", "3.0000", "out of memory", "-", "-"]


def test_the_summary_is_of_what_was_measured():
    text = "\n".join(summary([_row(32, 1e-3, 2e-3), _row(64, 3e-3, 1e-3), _row(128, 1e-3, None)]))
    assert "Min:  0.50x" in text
    assert "Max:  3.00x" in text
    assert "Mean: 1.75x" in text


def test_the_conclusion_tells_a_crossover_and_where_it_loses():
    text = "\n".join(conclusion([_row(32, 8e-6, 10e-6), _row(128, 3e-3, 2e-3), _row(512, 4e-3, 2e-3)]))
    assert "becomes beneficial at batch size >= 128" in text
    assert "not faster at batch size 32 (0.80x)" in text
    assert "For batch sizes >= 512: avg speedup = 2.00x" in text
    assert "direct copy is effective there" in text


def test_the_conclusion_does_not_claim_what_was_not_measured():
    lost = "\n".join(conclusion([_row(32, 1e-3, 2e-3), _row(512, 1e-3, 2e-3)]))
    assert "not faster than torch.cat at any batch size" in lost
    assert "does not pay there" in lost
    assert "beneficial" not in lost
    # Losing at the largest batch: no batch size from which on it wins.
    mixed = "\n".join(conclusion([_row(32, 2e-3, 1e-3), _row(64, 1e-3, 2e-3)]))
    assert "beneficial" not in mixed
    assert ">= 512" not in mixed
    assert list(conclusion([_row(32, None, None)])) == []


def test_the_conclusion_about_the_kernel_compares_with_the_better_method():
    faster = "\n".join(conclusion([_row(32, 9e-6, 10e-6, 4.5e-6), _row(64, 12e-6, 10e-6, 5e-6)]))
    assert "mlakit's kernel is 2.00x faster than the better of the two" in faster
    slower = "\n".join(conclusion([_row(32, 9e-6, 10e-6, 10e-6)]))
    assert "slower than the better of the two at batch size 32 (0.90x)" in slower


def test_the_conclusion_about_memory_is_what_the_allocator_saw():
    expanded = 512 * 128 * 64 * 2 / 2**20
    none = "\n".join(conclusion([_row(512, 2e-3, 1e-3, peak=0.0)]))
    made = "\n".join(conclusion([_row(512, 2e-3, 1e-3, peak=expanded)]))
    assert "took 0 MiB beyond its result; k_pe repeated for every head would be 8.00 MiB: no such intermediate" in none
    assert "that intermediate is made" in made
    assert "24.0" in "\n".join(memory_table([_row(512, 2e-3, 1e-3)]))


def test_runs_on_a_cpu_from_end_to_end(tmp_path, capsys):
    saved, drawn = tmp_path / "study.json", tmp_path / "study.png"
    flags = [*QUICK, "--batch-sizes", "3", "1", "3", "--dtypes", "bf16", "fp8", "float32"]
    assert k_concat.main([*flags, "--output-json", str(saved), "--plot", str(drawn)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("dtype: ")] == [
        "dtype: bfloat16",
        "dtype: float8_e4m3fn",
        "dtype: float32",
    ]
    assert "mlakit's kernel needs a GPU" in out
    record = json.loads(saved.read_text())
    assert record["schema"] == k_concat.SCHEMA
    assert [(row["dtype"], row["batch"]) for row in record["rows"]][:2] == [("bfloat16", 1), ("bfloat16", 3)]
    for row in record["rows"]:
        assert set(row["methods"]) == {"cat", "direct_copy"}
        assert all(result["mean"] > 0 and result["peak_mib"] >= 0 for result in row["methods"].values())
    assert record["environment"]["torch"] == torch.__version__
    assert drawn.read_bytes()[:4] == b"\x89PNG"


def test_says_that_a_cpu_gets_a_shorter_list(monkeypatch, capsys):
    monkeypatch.setattr(k_concat, "measure", lambda options, dtype, batch, rate: _row(batch, 2e-3, 1e-3))
    assert k_concat.main([*QUICK, "--dtypes", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "the batch list is scaled down: 32 to 512 instead of 32 to 65536" in out
    assert "        512 |" in out
    assert "       1024 |" not in out


def test_a_wrong_method_gets_no_time(monkeypatch, capsys):
    monkeypatch.setitem(k_concat.METHODS, "direct_copy", lambda a, b: torch.zeros(a.shape[0], 2, 12).to(a.dtype))
    assert k_concat.main([*QUICK, "--batch-sizes", "2", "--dtypes", "fp32"]) == 1
    assert "wrong result" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-sizes", "0"], "--batch-sizes: expected a whole number of at least 1, got '0'"),
        (["--batch-sizes", "many"], "--batch-sizes: expected a whole number of at least 1, got 'many'"),
        (["--dims", "128,64"], "--dims: expected three numbers H,DN,DR, got '128,64'"),
        (["--dims", "deepseek-v4"], "--dims: unknown model 'deepseek-v4'; did you mean"),
        (["--dtypes", "fp9"], "--dtypes: unknown dtype 'fp9'; did you mean"),
        (["--device", "cuda:99"], "no device cuda:99"),
        (["--device", "gpu"], "--device: expected cuda:0, cpu or auto, got 'gpu'"),
        (["--num-iters", "0"], "--num-iters: expected a whole number of at least 1, got '0'"),
        (["--output-json", "/proc/x.json"], "--output-json: cannot write into '/proc'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys):
    assert k_concat.main(flags) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_flag_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        k_concat.main(["--batches", "3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "k-concat: error: unrecognized arguments: --batches 3 (see --help)\n"


def test_help_loads_no_torch():
    script = """
import sys
from mlakit.studies import k_concat
try:
    k_concat.main(["--help"])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
