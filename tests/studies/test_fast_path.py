import csv
import io
import json

import pytest
import torch

from mlakit.cli.main import main
from mlakit.studies import fast_path
from mlakit.studies.fast_path_report import Row, Variant, cells, conclusion, table


def _row(seq_len, original, optimized, fused=None, memory=(100.0, 80.0, 50.0)) -> Row:
    row = Row(seq_len, 32, threshold=256)
    for name, ms, size in zip(("original", "optimized", "fused"), (original, optimized, fused), memory, strict=True):
        interval = (ms * 0.99, ms * 1.01) if ms else None
        row.variants[name] = Variant(ms, interval, temporary_mib=size, reason="" if ms else "out of memory")
    return row


def test_the_seeds_table(mlakit, tmp_path, small):
    """Rows of 64, 128, 256 and 512 tokens; the batch is smaller than the seed's 32."""
    done = mlakit(
        "study", "fast-path", *small, "--batch-size", "2", "--output-json", "out/fast.json", "--output-csv", "fast.csv"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    columns = [cell.strip() for cell in next(line for line in lines if "Sequence Length" in line).split("|")]
    assert columns == [
        "Sequence Length",
        "Batch Size",
        "Original (ms)",
        "Optimized (ms)",
        "Speedup",
        "Memory Reduction",
        "Fused (ms)",
        "Fused Speedup",
    ]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.count("|") == 7][1:]
    assert [row[:2] for row in cells] == [[n, "2"] for n in ("64", "128", "256", "512")]
    assert all(float(row[2]) > 0 and row[4].endswith("x") and row[5].endswith("%") for row in cells)
    record = json.loads((tmp_path / "out" / "fast.json").read_text())
    assert record["schema"] == fast_path.SCHEMA
    assert record["complete"] is True
    assert [row["seq_len"] for row in record["rows"]] == [64, 128, 256, 512]
    for row in record["rows"]:
        assert set(row["variants"]) == {"original", "optimized", "fused"}
        assert row["variants"]["optimized"]["speedup"] == pytest.approx(
            row["variants"]["original"]["ms"] / row["variants"]["optimized"]["ms"]
        )
        assert all(0 < variant["relative"] < 0.015 for variant in row["variants"].values())
    saved = list(csv.DictReader(io.StringIO((tmp_path / "fast.csv").read_text())))
    assert [row["seq_len"] for row in saved] == ["64", "128", "256", "512"]
    assert "Beyond 256 tokens both take the standard path: 512 tokens" in done.stdout
    assert done.stderr == "saved: out/fast.json, fast.csv\n"


def test_original_and_optimized_take_the_paths_they_stand_for(small, monkeypatch, capsys):
    """Optimized takes the short path up to the threshold and no further, original never; with and without a mask."""
    from mlakit.nn import naive

    taken = []
    attend = naive.attend_to_new

    def spy(layer, x, step):
        taken.append((layer.args.fast_path_tokens, x.shape[1], step.causal))
        return attend(layer, x, step)

    monkeypatch.setattr(naive, "attend_to_new", spy)
    flags = [*small, "--batch-size", "1", "--seq-lengths", "9", "256", "257"]
    assert main(["study", "fast-path", *flags]) == 0
    assert main(["study", "fast-path", *flags, "--mask", "none"]) == 0
    assert set(taken) == {(256, seq_len, causal) for seq_len in (9, 256) for causal in (True, False)}


def test_deepseeks_own_layer_as_the_baseline(mlakit, small):
    flags = [*small, "--batch-size", "2", "--seq-lengths", "16"]
    done = mlakit("study", "fast-path", *flags, "--baseline", "tests.support.baselines:deepseek")
    assert done.returncode == 0, done.stderr
    assert "original: tests.support.baselines:deepseek" in done.stdout
    assert "wrong" not in done.stdout


def test_a_wrong_baseline_gets_no_time(small, capsys):
    flags = ["--batch-size", "2", "--seq-lengths", "16", "--baseline", "tests.support.baselines:forgetful"]
    assert main(["study", "fast-path", *small, *flags]) == 1
    assert "16 tokens, original: wrong result: off by" in capsys.readouterr().out


def test_a_wrong_short_path_gets_no_time(small, replace_attend, capsys):
    def spoil(attend):
        def run(layer, x, step):
            return attend(layer, x, step) * (1.05 if layer.args.fast_path_tokens else 1)

        return run

    replace_attend("naive", spoil)
    assert main(["study", "fast-path", *small, "--batch-size", "1", "--seq-lengths", "16"]) == 1
    out = capsys.readouterr().out
    assert "16 tokens, optimized: wrong result: off by 0.0" in out
    assert "Original and optimized were nowhere both measured" in out


def test_a_float8_cache_is_fuseds_alone(small, capsys):
    flags = ["--cache-dtype", "fp8", "--kv-lora-rank", "128", "--batch-size", "1", "--seq-lengths", "16"]
    assert main(["study", "fast-path", *small, *flags]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("16 |")]
    assert all(float(cell) > 0 for cell in (line.split("|")[i] for i in (2, 3, 6)))


def test_running_out_of_memory_is_a_cell(small, replace_attend, capsys):
    def spoil(attend):
        def run(layer, x, step):
            if not layer.args.fast_path_tokens and x.shape[1] == 32 and x.dtype != torch.float64:
                raise MemoryError
            return attend(layer, x, step)

        return run

    replace_attend("naive", spoil)
    assert main(["study", "fast-path", *small, "--batch-size", "1", "--seq-lengths", "16", "32"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.strip().startswith("32 |")]
    assert [cell.strip() for cell in line.split("|")][2] == "out of memory"
    assert [cell.strip() for cell in line.split("|")][4:6] == ["-", "-"]


def test_a_line_of_the_table():
    titles = [cell.strip() for cell in next(table().head()).split("|")]
    line = table().line(cells(_row(64, 3.0, 2.0, 1.0)))
    assert dict(zip(titles, [cell.strip() for cell in line.split("|")], strict=True)) == {
        "Sequence Length": "64",
        "Batch Size": "32",
        "Original (ms)": "3.0000",
        "Optimized (ms)": "2.0000",
        "Speedup": "1.50x",
        "Memory Reduction": "20.0%",
        "Fused (ms)": "1.0000",
        "Fused Speedup": "3.00x",
    }


def test_the_conclusion_is_of_what_was_measured():
    rows = [_row(64, 3.0, 2.0, 1.0), _row(256, 9.0, 3.0, 2.0), _row(512, 20.0, 20.1, 4.0, (100.0, 100.0, 10.0))]
    text = "\n".join(conclusion(rows))
    assert "The short path is faster at every length it takes: 1.50x to 3.00x" in text
    assert "Reduction of temporary memory: 64 tokens 20.0%, 256 tokens 20.0%" in text
    assert "Beyond 256 tokens both take the standard path: 512 tokens 1.00x" in text
    assert "The fused layer: 3.00x to 5.00x over the original, 50.0% to 90.0% less temporary memory" in text


def test_the_conclusion_does_not_claim_what_was_not_measured():
    mixed = "\n".join(conclusion([_row(64, 1.0, 2.0), _row(128, 2.0, 1.0)]))
    assert "The short path is faster at 128 tokens" in mixed
    assert "The short path is slower at 64 tokens (0.50x)" in mixed
    assert "fused layer" not in mixed
    lost = "\n".join(conclusion([_row(64, 1.0, 2.0)]))
    assert "faster at no length measured" in lost
    same = "\n".join(conclusion([_row(64, 1.0, 1.01)]))
    assert "cannot be told from the standard path's" in same
    strange = "\n".join(conclusion([_row(512, 2.0, 1.0)]))
    assert "512 tokens 2.00x, and still their times differ" in strange
    theirs = "\n".join(conclusion([_row(512, 2.0, 1.0)], ours=False))
    assert "Beyond 256 tokens optimized takes the standard path: 512 tokens 2.00x\n" in theirs + "\n"
    nothing = "\n".join(conclusion([_row(64, None, 1.0)]))
    assert "Original and optimized were nowhere both measured" in nothing
    assert "64 tokens, original: out of memory" in nothing
