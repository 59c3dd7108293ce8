import csv
import io
import json
import subprocess
import sys

import pytest
import torch

from mlakit.studies import sparse_prefill
from mlakit.studies import sparse_prefill_methods as methods
from mlakit.studies.method_rows import MethodResult
from mlakit.studies.sparse_prefill_options import CONFIGS
from mlakit.studies.sparse_prefill_report import (
    DENSE,
    DENSE_MHA,
    FLASH_MLA,
    NAIVE,
    SPARSE,
    Row,
    complexity,
    csv_text,
    findings,
    footer,
    header,
    method_line,
    summary,
)

QUICK = ["--device", "cpu", "--heads", "2", "--warmup", "0", "--rep", "1", "--configs"]


def _row(s_kv: int = 65536, **times: float | None) -> Row:
    row = Row(4096, s_kv, 2048, 128, 576, 512, naive_chunk=100)
    for name, mean in times.items():
        row.methods[name] = MethodResult(mean=mean, reason="" if mean else "out of memory")
    return row


def test_the_data_is_the_demonstrations():
    q, kv, indices = sparse_prefill.generate_sparse_test_data(2, 50, 40000, 64, 4, 1, 24, device="cpu")
    assert (q.shape, kv.shape, indices.shape) == ((2, 50, 4, 24), (2, 40000, 1, 24), (2, 50, 1, 64))
    assert (q.dtype, indices.dtype) == (torch.bfloat16, torch.int32)
    assert 0.09 < float(q.float().std()) < 0.11
    assert int(indices.min()) >= 0
    assert int(indices.max()) < 40000
    # 31 of 32 among the newest 20000, and half of the others, which lie anywhere.
    near = float((indices >= 20000).float().mean())
    assert abs(near - (31 / 32 + 1 / 64)) < 0.01
    again = sparse_prefill.generate_sparse_test_data(2, 50, 40000, 64, 4, 1, 24, device="cpu")
    assert torch.equal(indices, again[2])
    assert torch.equal(kv, again[1])


def test_rows_longer_than_the_keys_are_padded_in_random_places():
    _, _, indices = sparse_prefill.generate_sparse_test_data(1, 30, 10, 16, 1, 1, 8, device="cpu")
    padding = indices == methods.FAR
    assert (padding.sum(-1) == 6).all()
    assert (indices[~padding] < 10).all()
    assert not padding[..., -6:].all(dim=-1).all()


def test_dense_data_has_keys_for_every_head():
    q, k, v = sparse_prefill.generate_dense_test_data(1, 3, 5, 4, 24, 16, device="cpu")
    assert (q.shape, k.shape, v.shape) == ((1, 3, 4, 24), (1, 5, 4, 24), (1, 5, 4, 16))


# Ignored indices of every kind, a duplicate, a row of nothing; a query at a time and all at once; two heads of keys.
def test_naive_attention_is_attention_over_the_selected():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 6, 24, dtype=torch.float64, generator=generator)
    kv = torch.randn(20, 2, 24, dtype=torch.float64, generator=generator)
    indices = torch.randint(0, 20, (4, 2, 7), generator=generator)
    indices[0, 0] = torch.tensor([-1, 20, methods.FAR, 3, 3, 4, 5])
    indices[1] = -1
    out = sparse_prefill.naive_sparse_attention(q, kv, indices, 0.3, 16)
    assert torch.equal(out, sparse_prefill.naive_sparse_attention(q, kv, indices, 0.3, 16, chunk=1))
    for token in range(4):
        for head in range(6):
            chosen = [int(i) for i in indices[token, head // 3] if 0 <= i < 20]
            keys = kv[chosen, head // 3]
            weights = torch.softmax(keys @ q[token, head] * 0.3, dim=0)
            expected = weights @ keys[:, :16] if chosen else torch.zeros(16, dtype=torch.float64)
            torch.testing.assert_close(out[token, head], expected)
    found = sparse_prefill.sparse_mla_attention(q, kv, indices.int(), 0.3, 16)
    torch.testing.assert_close(found, out)


def test_dense_attention_is_the_sparse_one_with_every_index():
    q, kv, _ = sparse_prefill.generate_sparse_test_data(1, 3, 9, 2, 4, 1, 24, device="cpu")
    every = torch.arange(9).expand(3, 1, 9)
    expected = sparse_prefill.naive_sparse_attention(q[0].double(), kv[0].double(), every, 0.2, 16)
    out = sparse_prefill.dense_mla_attention(q.double(), kv.double(), kv[..., :16].double(), 0.2)
    torch.testing.assert_close(out[0], expected)


def test_a_function_can_be_timed():
    calls = []
    assert sparse_prefill.benchmark_function(lambda: calls.append(1), warmup=2, rep=3, device="cpu") > 0
    assert len(calls) >= 5
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sparse_prefill.nonsense  # noqa: B018 - the access is what is tested


def test_the_lines_are_the_demonstrations():
    row = _row(naive=24e-3, dense=200e-3, dense_mha=50e-3, sparse=4e-3, flash_mla=None)
    lines = list(header(row))
    assert lines[1:] == [
        "=" * 70,
        "Testing: s_q=4096, s_kv=65536, topk=2048",
        "Sparsity: 3.12% of tokens attended",
        "Architecture: 128 query heads, 1 kv heads (MQA)",
    ]
    assert method_line(row, SPARSE) == "Sparse MLA (DSA/MQA):        4.00 ms"
    assert method_line(row, NAIVE) == "Naive PyTorch (Sparse):     24.00 ms  (100 queries at a time, to fit the memory)"
    assert method_line(row, FLASH_MLA).split()[-3:] == ["out", "of", "memory"]
    text = "\n".join(footer(row))
    assert "→ Speedup vs Naive:      6.00x" in text
    assert "→ Speedup vs Dense:      50.00x" in text
    assert "→ Speedup vs MHA mode:   12.50x" in text
    # 2 * 128 * 4096 * 2048 * 1088 operations in 4 ms
    assert "→ Throughput (Sparse):   584.12 TFLOPs" in text


def test_the_summary_averages_what_was_measured():
    rows = [_row(16384, naive=8e-3, dense=4e-3, sparse=4e-3), _row(32768, naive=None, dense=16e-3, sparse=4e-3)]
    text = "\n".join(summary(rows))
    assert "PERFORMANCE SUMMARY" in text
    head = next(line for line in text.splitlines() if line.startswith(" s_q"))
    assert head.split() == ["s_q", "s_kv", "topk", "sparsity_%", "naive_ms", "dense_ms", "sparse_ms"]
    averages = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.startswith("Average")]
    assert [factor for _, factor in averages] == ["2.00x", "2.50x"]
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [cells["naive_ms"] for cells in read] == ["8", ""]


def test_the_complexity_is_of_the_configuration():
    text = "\n".join(complexity([_row(65536, dense=128e-3, sparse=8e-3)]))
    assert "Dense FLOPs (MHA):         74766.79 GFLOPs" in text
    assert "Sparse FLOPs (MQA):         2336.46 GFLOPs" in text
    assert "Theoretical speedup:          32.00x" in text
    assert "3.1% (only 2048/65536 tokens)" in text
    assert "Measured speedup:             16.00x" in text


def test_findings_claim_what_was_measured():
    won = [_row(16384, dense=20e-3, sparse=4e-3), _row(65536, dense=80e-3, sparse=5e-3)]
    text = "\n".join(findings(won))
    assert "Sparse is 5.00x to 16.00x as fast as the dense MHA 576/512" in text
    assert "With 4x the keys (16384 to 65536)" in text
    assert "grows 3.20x and sparse takes 1.25x the time" in text
    assert "the operations promise 32.0x" in text
    assert "naive" not in text
    lost = [_row(16384, dense_mha=3e-3, sparse=4e-3), _row(65536, dense_mha=8e-3, sparse=4e-3)]
    text = "\n".join(findings(lost))
    assert "not faster than dense in MHA mode 192/128 at s_kv=16384 (0.75x); elsewhere up to 2.00x" in text
    assert list(findings([_row(16384, dense=3e-3, sparse=None)])) == []


def test_runs_on_a_cpu_from_end_to_end(tmp_path, capsys):
    saved, table, drawn = tmp_path / "s.json", tmp_path / "s.csv", tmp_path / "s.png"
    outputs = ["--output-json", str(saved), "--output-csv", str(table), "--plot", str(drawn)]
    assert sparse_prefill.main([*QUICK, "3,20,4", "2,5,8", *outputs]) == 0
    out = capsys.readouterr().out
    assert "mlakit's kernels need a GPU" in out
    assert "FlashMLA (DSA/MQA):       needs a GPU" in out
    assert out.count("Speedup vs Dense") == 2
    record = json.loads(saved.read_text())
    assert record["schema"] == sparse_prefill.SCHEMA
    assert [(row["s_q"], row["s_kv"], row["topk"]) for row in record["rows"]] == [(3, 20, 4), (2, 5, 8)]
    for row in record["rows"]:
        for name in (NAIVE, DENSE, DENSE_MHA, SPARSE):
            assert row["methods"][name]["mean"] > 0
    assert table.read_text().count("\n") == 3
    assert drawn.read_bytes()[:4] == b"\x89PNG"


def test_says_that_a_cpu_gets_smaller_configurations(monkeypatch, capsys):
    def measure(options, config):
        yield _row(config[1], sparse=1e-3)

    monkeypatch.setattr(sparse_prefill, "measure", measure)
    assert sparse_prefill.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"scaled down: up to (32, 4096, 64) (s_q, s_kv, topk) instead of {CONFIGS[-1]}" in out
    assert "and 8 query heads instead of 128" in out


def test_a_wrong_result_gets_no_time(monkeypatch, capsys):
    monkeypatch.setattr(methods, "sparse_mla_attention", lambda q, kv, i, scale, d_v: q[..., :d_v] * 0)
    assert sparse_prefill.main([*QUICK, "3,20,4", "--no-dense"]) == 1
    found = capsys.readouterr()
    assert "WRONG RESULT" in found.out
    assert "Dense MLA Prefill" not in found.out
    assert "wrong result: " in found.err


def test_running_out_of_memory_costs_a_line(monkeypatch, capsys):
    def fails(q, k, v, scale):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(methods, "dense_mla_attention", fails)
    assert sparse_prefill.main([*QUICK, "3,20,4"]) == 0
    out = capsys.readouterr().out
    assert out.count("out of memory") == 3
    assert "Throughput (Sparse)" in out


def test_what_cannot_fit_is_not_tried(monkeypatch, capsys):
    monkeypatch.setattr("mlakit.bench.memory.available_bytes", lambda device: 1000)
    assert sparse_prefill.main([*QUICK, "3,20,4"]) == 0
    assert "GiB are free" in capsys.readouterr().out


def test_an_output_that_nobody_wrote_is_wrong(monkeypatch, capsys):
    right = methods.sparse_mla_attention
    answers = []

    def lazy(*arguments):
        # Answers the first time, and later hands out the same memory.
        answers.append(answers[0] if answers else right(*arguments))
        return answers[-1]

    monkeypatch.setattr(methods, "sparse_mla_attention", lazy)
    assert sparse_prefill.main([*QUICK, "3,20,4", "--no-dense"]) == 1
    assert "WRONG RESULT" in capsys.readouterr().out


def test_flash_mla_is_found_or_not_with_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_mla", None)
    monkeypatch.setitem(sys.modules, "vllm.third_party.flashmla.flash_mla_interface", None)
    assert methods.find_flash_mla() == "not installed"
    module = type(sys)("flash_mla")
    vars(module)["flash_mla_sparse_fwd"] = lambda q, kv, indices, scale, d_v: (q[..., :d_v], None, None)
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    kernel = methods.find_flash_mla()
    assert callable(kernel)
    q = torch.ones(1, 2, 24)
    assert methods.flash_mla_attention(kernel, q, q, torch.zeros(1, 1, 3), 1.0, 16).shape == (1, 2, 16)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--configs", "1024,4096"], "--configs: expected three numbers S_Q,S_KV,TOPK, got '1024,4096'"),
        (["--configs", "1024,0,512"], "--configs: expected a whole number of at least 1, got '0'"),
        (["--heads", "many"], "--heads: expected a whole number of at least 1, got 'many'"),
        (["--device", "gpu"], "--device: expected cuda:0, cpu or auto, got 'gpu'"),
        (["--rep", "0"], "--rep: expected a whole number of at least 1, got '0'"),
        (["--output-csv", "/proc/x.csv"], "--output-csv: cannot write into '/proc'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys):
    assert sparse_prefill.main(["--device", "cpu", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_help_loads_no_torch():
    script = """
import sys
from mlakit.studies import sparse_prefill
try:
    sparse_prefill.main(["--help"])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
