"""Ctrl-C in the middle of a bench, as a terminal sends it; and the command that it prints then."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from mlakit.bench.results import Record

SUPPORT = Path(__file__).parents[1] / "support"


def test_ctrl_c_and_on(tmp_path, mlakit):
    """The second row hangs; what goes on has less patience with it, which makes it no other row."""
    command = ["bench", "--backends", "torch_absorb", "misbehaving:Hangs", "--batch-specs", "q1s9", "--model", "tiny",
               "--num-layers", "1", "--repeats", "1", "--device", "cpu", "--output-json",
               "with space.json"]  # fmt: skip
    path = f"{SUPPORT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(
        [sys.executable, "-m", "mlakit", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stderr is not None
    while "[1/2]" not in (line := process.stderr.readline()):
        assert line, "it ended by itself"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "interrupted with 1 of 2 rows done; they are in with space.json" in err
    assert err.endswith("mlakit: interrupted\n")
    record = Record.load(tmp_path / "with space.json")
    assert (record.complete, record.planned, len(record.rows)) == (False, 2, 1)

    again = shlex.split(err.partition("To go on: ")[2].splitlines()[0])
    assert again == ["mlakit", *command, "--resume"]
    done = mlakit(*again[1:], "--timeout", "1")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 rows are there" in done.stderr
    finished = Record.load(tmp_path / "with space.json")
    assert finished.complete
    assert finished.rows[0] == record.rows[0]
    assert finished.rows[1].status == "timeout"
