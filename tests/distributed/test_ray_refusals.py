"""What keeps a sweep on Ray from starting: one line each, and no wait."""

import socket
import subprocess
import sys

import pytest

from mlakit.cli.main import main

RUN = ("bench", "--backend", "sdpa", "--batch-specs", "q1s9", "--model", "tiny")
RAY = (*RUN, "--executor", "ray")


@pytest.fixture
def nobody():
    """An address where nothing listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


def ends(arguments, code, capsys):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*RUN, "--ray-address", "auto"], "--ray-address goes with --executor ray"),
        ([*RAY, "--device", "cuda:3"], "the device is cuda, cpu or auto, got 'cuda:3'"),
        ([*RAY, "--ray-address", "there"], "must be auto, local or HOST:PORT, got 'there'"),
        ([*RAY, "--ray-address", "http://there:8265"], "must be auto, local or HOST:PORT"),
        ([*RAY, "--ray-address", "there:99999"], "must be auto, local or HOST:PORT"),
        ([*RAY, "--ray-address", "ray://there:10001"], "Ray Client is not supported"),
        ([*RUN, "--executor", "slurm"], "invalid choice: 'slurm'"),
        ([*RAY, "--batch-specs", "q0"], "q_len 0"),  # before anything is started
    ],
)
def test_bad_input(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in ends(arguments, 2, capsys)


def test_ray_that_is_not_installed(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "--executor ray needs Ray: pip install 'mlakit[distributed]'" in ends(RAY, 2, capsys)


def test_no_cluster(nobody, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert f"no Ray cluster answers at {nobody}: " in ends([*RAY, "--ray-address", nobody], 3, capsys)
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    assert f"no Ray cluster answers at {nobody}: " in ends(RAY, 3, capsys)


def test_ray_is_imported_only_when_it_is_used():
    code = (
        "import sys\nimport mlakit.cli.bench_run, mlakit.bench.executor, mlakit.distributed.ray_executor\n"
        "assert not {'ray', 'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
