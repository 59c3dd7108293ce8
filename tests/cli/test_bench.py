import csv
import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest

from mlakit import __version__
from mlakit.bench import runner
from mlakit.bench.results import Record
from mlakit.cli.bench import flags as bench_flags
from mlakit.cli.main import build_parser, main

TINY = ("--model", "tiny", "--num-layers", "1", "--repeats", "1", "--warmup-iters", "0", "--device", "cpu")


def test_seed_command_with_cpu_backends(mlakit, tmp_path):
    """The suite's own example, standard attention, smaller by its flags only."""
    done = mlakit(
        "bench", "--backends", "sdpa", "torch_naive", "--batch-specs", "q64", "8q1s100", "2q64_4q1s100",
        "--num-layers", "2", "--repeats", "2", "--num-q-heads", "4", "--num-kv-heads", "2", "--head-dim", "32",
        "--block-size", "16", "--device", "cpu", "--output-csv", "results.csv",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "standard attention, fp32" in done.stderr
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [(r["batch_spec"], r["backend"]) for r in rows] == [
        (spec, backend) for spec in ("q64", "8q1s100", "2q64_4q1s100") for backend in ("sdpa", "torch_naive")
    ]
    assert all(r["status"] == "ok" and float(r["median_time"]) > 0 and r["samples"] == "4" for r in rows)
    # The table has each batch and both backends, and says where the rest is.
    assert "mixed (decode+prefill)" in done.stdout
    assert done.stdout.count("best") >= 3
    assert "saved: record mlakit-runs/custom-" in done.stderr
    assert "table results.csv" in done.stderr
    (record,) = tmp_path.glob("mlakit-runs/custom-*/record.json")
    assert Record.load(record).complete


def test_every_kind_of_batch_and_a_sweep_of_the_threshold(mlakit, tmp_path):
    done = mlakit(
        "bench", "--backends", "sdpa", "--batch-specs", "3q1s40", "2q4s33", "q20s50", "q24", "q24_2q4s33_3q1s40", *TINY,
        "--sweep-param", "reorder_batch_threshold", "--sweep-values", "1", "8", "auto", "--output-json", "out.json",
        "--scope", "pipeline", "--profile-memory",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = Record.load(tmp_path / "out.json")
    assert len(record.rows) == 15
    assert all(r.success for r in record.rows), [r.error for r in record.rows]
    modes = {(r.config.batch_spec, r.config.reorder_batch_threshold): r.modes for r in record.rows}
    assert modes["2q4s33", 1] == {"prefill": "mha"}
    assert modes["2q4s33", 8] == modes["2q4s33", "auto"] == {"decode": "mqa"}
    assert modes["q24_2q4s33_3q1s40", 8] == {"decode": "mqa", "prefill": "mha"}
    assert all(r.memory_allocated_mb for r in record.rows)
    assert "sdpa_reorder_batch_threshold_8" in done.stdout


def test_quiet_run_without_colour_into_a_pipe(mlakit):
    done = mlakit(
        "bench", "--backend", "torch_absorb", "--batch-specs", "q1s9", *TINY, "--quiet", "--output-json", "o.json"
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "torch_absorb" in done.stdout


def test_failed_rows_do_not_fail_the_run_unless_all_do(mlakit):
    good_and_bad = mlakit(
        "bench", "--backends", "misbehaving:Wrong", "flashmla", "torch_absorb", "--batch-specs", "q1s9", *TINY
    )
    assert good_and_bad.returncode == 0, good_and_bad.stderr
    assert "wrong result" in good_and_bad.stdout
    assert "flashmla on q1s9: not available: needs an NVIDIA GPU of compute capability 9.0" in good_and_bad.stdout
    assert "Traceback" not in good_and_bad.stdout + good_and_bad.stderr
    bad = mlakit("bench", "--backends", "misbehaving:Wrong", "--batch-specs", "q1s9", *TINY)
    assert bad.returncode == 1
    assert "mlakit: no row succeeded" in bad.stderr


def test_second_run_keeps_the_first_record(mlakit, tmp_path):
    run = ("bench", "--backend", "torch_absorb", *TINY, "--output-json", "o.json", "--batch-specs")
    assert mlakit(*run, "q1s9").returncode == 0
    assert mlakit(*run, "q1s10").returncode == 0
    assert Record.load(tmp_path / "o.json").rows[0].config.batch_spec == "q1s10"
    assert Record.load(tmp_path / "o.json.bak").rows[0].config.batch_spec == "q1s9"


def test_resume_without_a_file_finds_the_run_with_these_settings(mlakit, tmp_path):
    run = ("bench", "--backend", "torch_absorb", *TINY, "--batch-specs")
    assert mlakit(*run, "q1s9").returncode == 0
    (first,) = tmp_path.glob("mlakit-runs/*/record.json")
    other = mlakit(*run, "q1s10", "--resume")
    assert other.returncode == 2  # that run measured something else, and must not be mixed with this one
    assert "nothing to resume" in other.stderr
    more = mlakit(*run, "q1s9", "q1s10", "--resume")
    assert more.returncode == 0, more.stderr
    assert "1 of 2 rows are there" in more.stderr
    assert [row.config.batch_spec for row in Record.load(first).rows] == ["q1s9", "q1s10"]


def test_decode_vs_prefill_names_the_crossover(mlakit, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "mode: decode_vs_prefill\nmodel: {name: tiny, num_layers: 1}\nbackend: SDPA\n"
        "batch_spec_ranges:\n  - template: 'q{q_len}s64'\n    q_len: {start: 1, stop: 33, step: 16}\n"
        "benchmark: {repeats: 1, device: cpu}\n"
    )
    done = mlakit("bench", "--config", "mine.yaml", "--repeats", "2", "--output-json", "o.json")
    assert done.returncode == 0, done.stderr
    assert "the command line's benchmark.repeats (2) replaces mine's (1)" in done.stderr
    record = Record.load(tmp_path / "o.json")
    assert {(r.config.title, r.config.scope) for r in record.rows} == {
        ("sdpa_decode", "pipeline"),
        ("sdpa_prefill", "pipeline"),
    }
    assert "sdpa, batch 1, 64 keys: " in done.stdout


def test_on_a_terminal_a_bar_on_stderr_and_a_table_that_fits(tmp_path):
    """A narrow terminal, through a real pseudo-terminal."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "mlakit", "bench", "--backend", "torch_absorb", "--batch-specs", "q1s9", *TINY]
    process = subprocess.Popen(
        command,
        stdout=terminal,
        stderr=terminal,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "48", "TERM": "xterm", "NO_COLOR": "1"},
    )
    os.close(terminal)
    shown = b""
    while chunk := _read(controller):
        shown += chunk
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "\n").splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("batch")) :]
    end = next(i for i, line in enumerate(table) if line.startswith("(left out for want of room"))
    assert end >= 3  # the header, its rule and a row
    assert all(len(line.rstrip()) <= 48 for line in table[: end + 1])
    assert b"\x1b[32m" not in shown  # NO_COLOR
    assert b"0/1" in shown


def _read(controller: int) -> bytes:
    try:
        return os.read(controller, 4096)
    except OSError:  # Linux's way to say that the other end is closed
        return b""


ONE = ("--backend", "sdpa", "--batch-specs", "q1s1k")  # a run that nothing is wrong with
SWEEP = ("--sweep-param", "reorder_batch_threshold")


@pytest.mark.parametrize(
    ("arguments", "words"),
    # Everything that the issue names as bad input, and the mistakes nearest to them. Each ends before a worker starts,
    # but for the two devices.
    [
        (["--backends", "flashmlaa", "--batch-specs", "q1s1k"], ["unknown backend 'flashmlaa'", "'flashmla'"]),
        ([*ONE, "q0"], ['segment 1 ("q0")', "q_len 0"]),
        (["--backend", "sdpa", "--batch-specs", "2q2k_"], ['segment 2 ("")']),
        (["--config", "no/such.yaml"], ["no/such.yaml does not exist"]),
        (["--config", "mla_decod"], ["unknown config 'mla_decod'", "'mla_decode'"]),
        ([*ONE, "--device", "cuda:99"], ["no device cuda:99"]),
        ([*ONE, "--device", "tpu"], ["device must be auto, cpu or cuda:0", "'tpu'"]),
        ([*ONE, "--sweep-param", "num_kv_splits", "--sweep-values", "1"], ["no selected backend has", "num_kv_splits"]),
        ([*ONE, *SWEEP], ["go together"]),
        (["--attention", "mla", *ONE, *SWEEP, "--sweep-values", "x"], ["must be a whole number or auto, got 'x'"]),
        ([*ONE, "--backends", "sdpa"], ["not both"]),
        (["--backend", "sdpa"], ["no batch to measure"]),
        ([], ["no batch to measure"]),
        (["--model", "deepseek", "--batch-specs", "q1s1k"], ["unknown model 'deepseek'", "deepseek-v3"]),
        (["--model", "deepseek-v3", "--head-dim", "128", *ONE], ["head_dim is 576 in MLA", "got 128"]),
        (["--attention", "mla", "--num-kv-heads", "8", *ONE], ["num_kv_heads is 1 in MLA"]),
        (["--attention", "standard", "--model", "deepseek-v3", *ONE], ["has MLA, and standard"]),
        (["--num-q-heads", "5", "--num-kv-heads", "2", *ONE], ["multiple", "5 and 2"]),
        (["--block-size", "48", *ONE], ["block_size must be a power of two, got 48"]),
        (["--repeats", "0", *ONE], ["repeats", "got 0"]),
        (["--repeats", "many"], ["--repeats", "'many'"]),
        (["--l2", "warm"], ["--l2", "'warm'"]),
        (
            ["--batch-spec", "q1s1k"],
            ["unrecognized arguments: --batch-spec", "did you mean --batch-specs?", "mlakit bench --help"],
        ),
        ([*ONE, "--resume", "--device", "cpu"], ["nothing to resume"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("mlakit: error: ")
    for word in words:
        assert word in lines[0]
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []  # and nothing was left behind
    # What was given is said once, in the message itself or behind it.
    assert all(lines[0].count(repr(word)) <= 1 for word in arguments)


# A driver that raises, one that kills the process, one that never answers; in every command that asks a device.
@pytest.mark.parametrize(
    ("import_torch", "words"),
    [
        ("raise RuntimeError('CUDA driver\\nfailed')", ["ended with exit code 1 while starting", "last words: failed"]),
        ("import os; os.abort()", ["killed by SIGABRT"]),
        ("import time; time.sleep(600)", ["no result within 1 s, while starting"]),
    ],
)
def test_a_device_that_does_not_work_is_one_line_and_exit_code_3(import_torch, words, capsys, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text(import_torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    monkeypatch.setattr(runner, "_PROBE_TIMEOUT", 1.0 if "sleep" in import_torch else 60.0)
    monkeypatch.chdir(tmp_path)
    for command in (["bench", *ONE], ["limits"], ["env"], ["backends"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--device", "cuda:0"])
        assert end.value.code == 3
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("mlakit: error: device cuda:0 does not work; ")
        for word in words:
            assert word in lines[0]
        assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_config_with_an_unknown_key(mlakit, tmp_path):
    (tmp_path / "mine.yaml").write_text("backends: [sdpa]\nbatch_specs: [q1s1k]\nbenchmark:\n  repeatz: 3\n")
    done = mlakit("bench", "--config", "mine.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "mlakit: error: mine.yaml:4: unknown key 'repeatz' in benchmark; did you mean 'repeats'?"
    )
    assert done.stderr.count("\n") == 1


def test_record_of_another_device_is_not_resumed(mlakit, tmp_path):
    run = ("bench", "--backend", "torch_absorb", *TINY, "--output-json", "o.json", "--batch-specs", "q1s9")
    assert mlakit(*run).returncode == 0
    content = json.loads((tmp_path / "o.json").read_text())
    content["sessions"][0]["environment"]["device"]["name"] = "an abacus"
    (tmp_path / "o.json").write_text(json.dumps(content))
    done = mlakit(*run, "--resume")
    assert done.returncode == 2
    assert "was measured on an abacus" in done.stderr


def test_other_commands(mlakit):
    listed = mlakit("backends", "--device", "cpu")
    assert listed.returncode == 0
    assert "torch_absorb" in listed.stdout
    assert "no: mlakit has no adapter" in listed.stdout
    assert "metadata batch|call" in listed.stdout
    configs = mlakit("configs")
    for name in (
        "quickstart",
        "mla_decode",
        "mla_mixed_batch",
        "speculative_decode",
        "standard_attention",
        "reorder_threshold",
    ):
        assert name in configs.stdout
    assert mlakit("configs", "--show", "quickstart").stdout.startswith("description: ")
    environment = json.loads(mlakit("env", "--json", "--device", "cpu").stdout)
    assert environment["device"]["kind"] == "cpu"
    assert {"torch", "triton", "commit", "driver", "python"} <= set(environment)
    limits = json.loads(mlakit("limits", "--device", "cpu", "--dtype", "fp32", "--json").stdout)
    assert limits["ceilings"]["fp32"]["flops_per_s"] > 1e8
    assert "fp32 product" in mlakit("limits", "--device", "cpu", "--dtype", "fp32").stdout
    assert mlakit("--version").stdout == f"mlakit {__version__}\n"
    assert "COMMAND" in mlakit().stdout


def test_study_k_concat(mlakit):
    done = mlakit("study", "k-concat", "--device", "cpu", "--batch-sizes", "2", "5", "--dims", "4,8,4")
    assert done.returncode == 0, done.stderr
    assert "Batch Size |" in done.stdout
    assert "Speedup summary" in done.stdout
    bad = mlakit("study", "k-concat", "--device", "cpu", "--dims", "many")
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert mlakit("study").returncode == 2


def test_unknown_command():
    with pytest.raises(SystemExit) as end:
        main(["bensh"])
    assert end.value.code == 2


def test_sweeps_are_pairs_of_flags_and_give_their_product(capsys):
    def read(*flags):
        return bench_flags(build_parser().parse_args(["bench", "--backend", "sdpa", "--batch-specs", "q1", *flags]))

    two = ("--sweep-param", "num_q_heads", "--sweep-values", "4", "2", "--sweep-param", "mode", "--sweep-values", "a")
    found = read(*two)
    assert found["parameter_sweep"] == {"param_name": "num_q_heads", "values": [4, 2]}
    assert found["parameter_sweeps"] == [{"param_name": "mode", "values": ["a"]}]
    assert "parameter_sweep" not in read()
    with pytest.raises(ValueError, match="one of each; given are 2 and 1"):
        read(*two[:-2])
