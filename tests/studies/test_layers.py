import csv
import io
import json
import os
import pty
import subprocess
import sys

import pytest
import torch

from mlakit.cli.main import main
from mlakit.studies import layers
from mlakit.studies.layer_options import IMPLEMENTATIONS
from mlakit.studies.layers_report import Row, csv_text, table
from mlakit.studies.layers_summary import findings, leaders, markdown, recommendations


def _row(shape, name, median, *, phase="prefill", mode="eager", batch=1, seq=256, host=None, temp=None, cache=None):
    row = Row(shape, name, phase, mode, batch, seq, "bf16", reason="" if median else "out of memory")
    row.median, row.host, row.temporary_mib, row.cache_mib = median, host, temp, cache
    if median:
        row.ci95 = (median * 0.99, median * 1.01)
    return row


@pytest.fixture
def shape():
    from mlakit.dims import MLADims
    from mlakit.studies.layer_options import Shape

    return Shape(64, 0, MLADims(2, 16, 16, 8, 16))


def _rows(folder) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "details.csv").read_text())))


def test_the_seeds_command(mlakit, tmp_path, small):
    """The seed's performance benchmark, with fused beside its three, at a small size."""
    done = mlakit(
        "study", "layers", "--dtype", "bf16", "--implementations", "naive", "absorb", "naive+flash", "fused",
        "--batch-sizes", "1", "4", "--seq-lengths", "8", "24", "--output-dir", "benchmark_results", *small,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "benchmark_results"
    names = {"details.csv", "record.json", "summary.md", "latency.png", "throughput.png", "memory.png"}
    assert {path.name for path in folder.iterdir()} == names
    for name in ("latency.png", "throughput.png", "memory.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    rows = _rows(folder)
    assert [(r["batch"], r["seq_len"], r["phase"], r["implementation"]) for r in rows] == [
        (batch, seq, phase, name)
        for batch in ("1", "4")
        for seq in ("8", "24")
        for phase in ("prefill", "decode")
        for name in IMPLEMENTATIONS
    ]
    for row in rows:
        assert row["reason"] == ""
        assert float(row["median"]) > 0
        assert 0 < float(row["relative"]) <= 0.015
        assert (row["mode"], row["dtype"], row["n_heads"], row["dim"]) == ("eager", "bf16", "2", "32")
        tokens = int(row["batch"]) * (int(row["seq_len"]) if row["phase"] == "prefill" else 1)
        assert float(row["tokens_per_s"]) == pytest.approx(tokens / float(row["median"]))
    # A token's keys and values of two heads against its latent, in bf16 (in whole pages of 64).
    caches = {
        r["implementation"]: float(r["cache_mib"]) * 2**20 for r in rows if (r["batch"], r["seq_len"]) == ("4", "24")
    }
    assert caches["naive"] == caches["naive+flash"] == 4 * 24 * 2 * (24 + 16) * 2
    assert caches["absorb"] == caches["fused"] >= 4 * 64 * 24 * 2
    record = json.loads((folder / "record.json").read_text())
    assert record["schema"] == layers.SCHEMA
    assert record["complete"] is True
    assert record["environment"]["torch"] == torch.__version__
    assert len(record["rows"]) == len(rows)
    assert record["options"]["seq_lens"] == [8, 24]
    summary = (folder / "summary.md").read_text()
    assert "the fastest" in summary
    assert "## Recommendations\n\n- For prefill: " in summary
    assert "- For decode: " in summary
    assert "its times say nothing of a GPU's" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr.startswith("saved in benchmark_results: record.json, ")
    assert done.stderr.count("\n") == 1


def test_lists_of_head_dimensions_and_a_phase_alone(small, tmp_path, capsys):
    flags = [*small, "--heads", "2", "3", "--implementations", "naive", "fused", "--phase", "decode"]
    sizes = ["--batch-sizes", "2", "--seq-lengths", "1", "9"]
    assert main(["study", "layers", *flags, *sizes, "--output-dir", str(tmp_path / "a" / "b")]) == 0
    rows = _rows(tmp_path / "a" / "b")
    assert [(r["n_heads"], r["phase"], r["seq_len"]) for r in rows[::2]] == [
        (heads, "decode", seq) for heads in ("2", "3") for seq in ("1", "9")
    ]
    assert len(list((tmp_path / "a" / "b").glob("latency_h*_nope16_rope8_v16.png"))) == 2
    out = capsys.readouterr().out
    assert "h3_nope16_rope8_v16: Decode: " in out


def test_float8_weights_and_what_float8_caches_are_not_for(small, tmp_path, capsys):
    flags = [*small, "--kv-lora-rank", "128", "--implementations", "naive", "absorb", "--phase", "prefill"]
    sizes = ["--batch-sizes", "1", "--seq-lengths", "9", "--output-dir", str(tmp_path)]
    assert main(["study", "layers", *flags, *sizes, "--dtype", "fp8", "--cache-dtype", "fp8"]) == 0
    naive, absorb = _rows(tmp_path)
    assert naive["reason"] == "cache_dtype='fp8' is for absorb and fused, got attn_impl='naive'"
    assert float(absorb["median"]) > 0
    assert "naive          cache_dtype='fp8' is for absorb and fused" in capsys.readouterr().out


def test_running_out_of_memory_is_a_row_and_not_the_end(small, tmp_path, replace_attend, capsys):
    def spoil(attend):
        def run(layer, x, step):
            if x.shape[1] == 16:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")
            return attend(layer, x, step)

        return run

    replace_attend("naive", spoil)
    flags = [*small, "--implementations", "naive", "absorb", "--phase", "prefill", "--no-check"]
    sizes = ["--batch-sizes", "1", "--seq-lengths", "16", "24", "--output-dir", str(tmp_path)]
    assert main(["study", "layers", *flags, *sizes]) == 0
    assert [(r["implementation"], r["reason"], bool(r["median"])) for r in _rows(tmp_path)] == [
        ("naive", "out of memory", False),
        ("absorb", "", True),
        ("naive", "", True),
        ("absorb", "", True),
    ]
    out = capsys.readouterr().out
    assert "No time, out of memory: naive prefill 1 x 16" in out
    assert "results were not checked" in out
    assert "| 1 x 16 | out of memory |" in (tmp_path / "summary.md").read_text()


def test_no_memory_for_float64_is_told(small, tmp_path, monkeypatch):
    def reference(self, x):
        raise MemoryError

    monkeypatch.setattr("mlakit.studies.layer_steps.Layers.reference", reference)
    flags = [*small, "--implementations", "naive", "--phase", "prefill", "--batch-sizes", "1", "--seq-lengths", "9"]
    assert main(["study", "layers", *flags, "--output-dir", str(tmp_path)]) == 1
    (row,) = _rows(tmp_path)
    assert row["reason"] == "out of memory, in the float64 run to compare with (--no-check does without)"


# Wrong at once, and wrong only after a while, as state that wears out would be.
@pytest.mark.parametrize(("good_calls", "when"), [(0, ""), (1, ", right before timing")])
def test_a_wrong_implementation_gets_no_time(good_calls, when, small, tmp_path, replace_attend, capsys):
    calls = []

    def spoil(attend):
        def run(layer, x, step):
            calls.append(x)
            return attend(layer, x, step) * (1 if len(calls) <= good_calls else 1.05)

        return run

    replace_attend("absorb", spoil)
    flags = [*small, "--implementations", "naive", "absorb", "--phase", "prefill"]
    sizes = ["--batch-sizes", "3", "--seq-lengths", "16", "--output-dir", str(tmp_path)]
    assert main(["study", "layers", *flags, *sizes]) == 1
    naive, absorb = _rows(tmp_path)
    assert naive["median"]
    assert absorb["median"] == ""
    assert absorb["wrong"] == "True"
    assert f"absorb         wrong result{when}: off by 0.049" in capsys.readouterr().out


def test_an_interrupted_study_leaves_what_it_has(small, tmp_path, replace_attend):
    def spoil(attend):
        def run(layer, x, step):
            if x.shape[1] == 24:
                raise KeyboardInterrupt
            return attend(layer, x, step)

        return run

    replace_attend("absorb", spoil)
    flags = [*small, "--implementations", "naive", "absorb", "--phase", "prefill"]
    sizes = ["--batch-sizes", "1", "--seq-lengths", "16", "24", "--output-dir", str(tmp_path)]
    record = tmp_path / "records" / "layers.json"
    assert main(["study", "layers", *flags, *sizes, "--output-json", str(record)]) == 130
    assert [row["implementation"] for row in _rows(tmp_path)] == ["naive", "absorb"]
    assert json.loads(record.read_text())["complete"] is False
    assert not (tmp_path / "record.json").exists()


def test_a_bar_on_a_terminal_stays_out_of_the_output(tmp_path, small):
    ours, theirs = pty.openpty()
    flags = [*small, "--implementations", "naive", "--batch-sizes", "1", "--seq-lengths", "8", "--output-dir", "out"]
    command = [sys.executable, "-m", "mlakit", "study", "layers", *flags]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # how a terminal whose other end has closed reads on Linux
        pass
    out = process.stdout.read()
    assert process.wait() == 0
    assert b"naive" in out
    assert b"\x1b" not in out
    assert b"\x1b" in shown
    assert b"1 x 8 decode: naive" in shown


def test_rows_of_a_size_as_a_table(shape):
    rows = [
        _row(shape, "naive", 3e-3, host=1e-3, temp=2.0, cache=1.0),
        _row(shape, "absorb", 1e-3, host=1.5e-3, temp=2048.0, cache=0.5),
        _row(shape, "fused", None),
    ]
    rows[0].relative = 0.0051234
    first, second, third = (" ".join(line.split()) for line in table(rows))
    assert first == "prefill 1 256 naive 3.00 ms 1.00 ms 85.3 k 2.00 MiB 1.00 MiB 0.0051 1.00x"
    # The host takes longer than the GPU: that is what counts for throughput and speed-up.
    assert second == "prefill 1 256 absorb 1.00 ms 1.50 ms 171 k 2.00 GiB 0.500 MiB - 2.00x fastest"
    assert third == "prefill 1 256 fused out of memory"
    assert csv_text(rows).splitlines()[3].startswith("fused,prefill,eager,1,256,bf16,out of memory,,")


def test_findings_tell_who_wins_where(shape):
    rows = []
    for seq, times in {256: (2e-3, 1e-3, 3e-3), 512: (4e-3, 4.01e-3, 2e-3), 1024: (9e-3, 9e-3, 3e-3)}.items():
        rows += [_row(shape, n, t, seq=seq) for n, t in zip(("naive", "absorb", "fused"), times, strict=True)]
    text = "\n".join(findings(rows))
    assert "Prefill: fused is the fastest in 2 of 3 sizes, absorb in 1 (1 x 256)" in text
    assert "Prefill: absorb is 1.00x to 2.00x as fast as naive (geometric mean 1.26x over 3 sizes)" in text
    assert "Prefill: fused is 0.67x to 3.00x as fast as naive" in text
    advice = "\n".join(recommendations(rows))
    assert advice == (
        "For prefill: fused, on average 1.44x the time of the best at each size; "
        "not at 1 x 256 (absorb is 3.00x as fast)"
    )


def test_findings_do_not_tell_apart_what_is_within_the_noise(shape):
    rows = [_row(shape, "naive", 1.00e-3), _row(shape, "fused", 1.01e-3), _row(shape, "absorb", 1.1e-3)]
    assert leaders(rows) == ["naive", "fused"]
    assert "not to be told apart: 1 x 256 (naive and fused)" in "\n".join(findings(rows))
    assert recommendations(rows) == ["For prefill: naive, the fastest or as fast as any at every size measured"]


def test_findings_do_not_claim_what_was_not_measured(shape):
    assert findings([_row(shape, "fused", 1e-3)]) == []
    assert recommendations([_row(shape, "fused", 1e-3)]) == []
    lost = [_row(shape, "naive", None), _row(shape, "fused", 1e-3)]
    assert findings(lost) == ["No time, out of memory: naive prefill 1 x 256"]
    assert recommendations(lost) == []
    stamp = {"started": "2026-01-02T03:04:05", "environment": {"mlakit": "1", "torch": "2", "triton": "3"}}
    report = markdown(lost, "a device", stamp, ["A note."])
    assert "None: no two implementations were measured." in report
    assert "| 1 x 256 | out of memory | **1.00** |" in report


def test_an_implementation_without_a_time_somewhere_is_not_recommended_before_one_with_all(shape):
    rows = [
        *(_row(shape, n, t, seq=256) for n, t in (("naive", 1e-3), ("absorb", 2e-3), ("fused", 3e-3))),
        *(_row(shape, n, t, seq=512) for n, t in (("naive", None), ("absorb", 2e-3), ("fused", 3e-3))),
    ]
    (advice,) = recommendations(rows)
    assert advice.startswith("For prefill: absorb, on average 1.41x")
    assert "not at 1 x 256 (naive is 2.00x as fast)" in advice


def test_findings_about_memory(shape):
    rows = [
        _row(shape, "naive", 1e-3, temp=29 * 1024.0, cache=20.0),
        _row(shape, "fused", 2e-3, temp=900.0, cache=2.0),
    ]
    text = "\n".join(findings(rows))
    assert "a prefill of 1 x 256 takes on top of weights, inputs and cache: fused 900 MiB, naive 29.0 GiB" in text
    assert "fused 8,192, naive 81,920: 10.0x apart" in text
    advice = recommendations(rows)[1]
    assert advice == (
        "For prefill: where memory is short, fused: cache and temporaries of naive are 32.9x as large, "
        "and fused takes 2.00x its time"
    )


def test_findings_about_launching_and_graphs(shape):
    step = {"phase": "decode", "batch": 8}
    rows = [
        _row(shape, "naive", 4e-4, host=3e-4, **step),
        _row(shape, "fused", 1e-4, host=5e-4, **step),
        _row(shape, "naive", 4e-4, mode="graph", **step),
        _row(shape, "fused", 1e-4, mode="graph", **step),
    ]
    text = "\n".join(findings(rows))
    assert "Decode: naive is the fastest" in text
    assert "Decode, CUDA graph: fused is the fastest" in text
    assert "in 1 of 2 eager decode rows the host takes longer than the GPU, at most 500 µs for 100 µs of work" in text
    assert "a CUDA graph makes fused's decode 5.00x as fast" in text
    assert "Decode with fused from a CUDA graph: 5.00x on average" in recommendations(rows)
    assert "For decode, CUDA graph: fused, the fastest" in "\n".join(recommendations(rows))
    assert rows[1].tokens_per_s == pytest.approx(8 / 5e-4)
    assert rows[3].tokens_per_s == pytest.approx(8 / 1e-4)
