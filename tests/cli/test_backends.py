"""`mlakit backends` on terminals of any width; what it finds is tested with the backends."""

from typing import Any

import pytest
from rich.console import Console

from mlakit.bench import runner, table
from mlakit.cli.main import main

FOUND: list[dict[str, Any]] = [
    {"name": "sdpa", "kind": "mla and standard", "hardware": "any", "version": "torch 2.13", "parameters": {}},
    {"name": "vllm_triton_mla", "kind": "mla", "hardware": "NVIDIA from Ampere on", "version": None,
     "reason": "needs an NVIDIA GPU of compute capability 8.0 or later, this is a CPU",
     "parameters": {"num_kv_splits": "1..512"}},
]  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 119, 120, 200])
def test_no_word_is_broken(width, monkeypatch, capsys):
    monkeypatch.setattr(runner, "list_backends", lambda device: ("a CPU", FOUND))
    monkeypatch.setattr(table, "make_console", lambda: Console(width=width, highlight=False))
    assert main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines)
    words = {word.strip(",;:") for line in lines for word in line.split()}
    for row in FOUND:
        told = [*(str(row.get(key) or "") for key in ("name", "kind", "hardware", "version", "reason")), "1..512"]
        assert {word.strip(",;:") for value in told for word in value.split()} <= words
    assert any(line.startswith("tokenspeed_mla") for line in lines)
