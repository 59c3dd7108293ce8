"""What holds for every subcommand: exit codes, one line for an error, --version, completion, an unfinished pipe."""

import argparse
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlakit import __version__
from mlakit.bench.process import DeviceError
from mlakit.cli import configs, exit_codes
from mlakit.cli.main import build_parser, main

RESULTS = Path(__file__).parents[2] / "results" / "h200"


def commands(parser: argparse.ArgumentParser, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command that can be typed, studies included."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner and before:
        yield before
    for action in inner:
        for name, subparser in action.choices.items():
            yield from commands(subparser, (*before, name))


COMMANDS = list(commands(build_parser()))


def test_there_are_commands():
    assert {("bench",), ("compare",), ("report",), ("study", "layers"), ("completion",)} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_and_a_flag_that_is_not_there(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == exit_codes.DONE
    captured = capsys.readouterr()
    assert f"usage: mlakit {' '.join(command)}" in captured.out
    assert captured.err == ""
    needed = {"completion": ["bash"]}.get(command[0], [])
    with pytest.raises(SystemExit) as end:
        main([*command, *needed, "--no-such-flag"])
    assert end.value.code == exit_codes.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("mlakit: error: ")
    assert "--no-such-flag" in captured.err


# Those that look for it in this process, and one of those that start another; a start costs seconds.
@pytest.mark.parametrize(
    "command",
    [("env",), *(c for c in COMMANDS if c[0] == "study" and c[1] not in ("reorder-threshold", "num-splits"))],
    ids=" ".join,
)
def test_a_device_that_is_not_there(command, capsys, monkeypatch, tmp_path):
    """Everywhere the same: bad input, in one line."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*command, "--device", "cuda:99"])
    assert end.value.code == exit_codes.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "cuda:99" in captured.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("one\nthing"), exit_codes.BAD_INPUT, "mlakit: error: one thing"),
        (FileNotFoundError(2, "No such file or directory", "x.csv"), exit_codes.BAD_INPUT, "x.csv: No such file"),
        (OSError(28, "No space left on device"), exit_codes.BAD_INPUT, "No space left on device"),
        (DeviceError("device cuda:0 does not work"), exit_codes.BROKEN_DEVICE, "mlakit: error: device cuda:0"),
        (KeyboardInterrupt(), exit_codes.INTERRUPTED, "mlakit: interrupted"),
        (RuntimeError("a bug"), exit_codes.BUG, "Traceback"),
        (KeyError("a bug"), exit_codes.BUG, "Traceback"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_exit_codes(error, code, words, monkeypatch, capsys):
    def fails(args):
        raise error

    monkeypatch.setattr(configs, "run", fails)
    try:
        found = main(["configs"])
    except SystemExit as end:
        found = int(end.code or 0)
    assert found == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert (captured.err.count("\n") == 1) == (code != exit_codes.BUG)


def test_a_terminal_that_lacks_a_letter_gets_another(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["report", str(RESULTS / "quant.json"), "--markdown"]) == exit_codes.DONE
    sys.stdout.flush()
    assert b"| ?s | " in written.getvalue()  # an ASCII terminal has no micro


def test_exit_code_1_is_an_answer(tmp_path):
    """Of compare; that nothing succeeded, or that a result is wrong, is tested with bench and with studies."""
    slower = tmp_path / "slower.json"
    text = (RESULTS / "quant.json").read_text()
    slower.write_text(re.sub(r'("median_s": |"ci95_s": \[\s*|,\s*)(\d\.\d+e-0\d)', _slower, text))
    before = str(RESULTS / "quant.json")
    assert main(["compare", before, str(slower), "--fail-above", "50%"]) == exit_codes.FAILED
    assert main(["compare", before, str(slower)]) == exit_codes.DONE


def _slower(found: re.Match[str]) -> str:
    return f"{found[1]}{2 * float(found[2])!r}"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_tells_the_codes(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    codes = {name: value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert set(codes.values()) == set(exit_codes.MEANINGS)
    for code, meaning in exit_codes.MEANINGS.items():
        assert f" {code} {meaning} " in f"{' '.join(out.split())} "
    assert all(len(line) <= width for line in out.splitlines() if "[-h]" not in line)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == exit_codes.DONE
    assert capsys.readouterr().out == f"mlakit {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_code(shell, capsys):
    assert main(["completion", shell]) == exit_codes.DONE
    captured = capsys.readouterr()
    assert "mlakit" in captured.out
    assert "_ARGCOMPLETE" in captured.out
    assert captured.err == ""  # into a pipe, or eval, goes the code alone


@pytest.fixture
def complete(tmp_path):
    """What a shell is offered for a line, by argcomplete's protocol: in a process of its own, as that takes
    descriptors for itself.
    """
    folder = tmp_path / "here"
    (folder / "runs").mkdir(parents=True)
    for name in ("mine.yaml", "a.json", "notes.txt"):
        (folder / name).touch()

    def ask(line: str) -> set[str]:
        answer = tmp_path / "answer"
        environment = {
            **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_TYPE": "9",
            "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        }  # fmt: skip
        subprocess.run([sys.executable, "-m", "mlakit"], check=True, cwd=folder, env=environment, capture_output=True)
        return set(answer.read_text().split())

    return ask


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("mlakit be", {"bench"}, {"backends"}),
        ("mlakit study ", {"layers", "k-concat", "reorder-threshold"}, {"bench"}),
        ("mlakit study layers --output-", {"--output-dir", "--output-json"}, {"--help"}),
        ("mlakit bench --backends torch", {"torch_naive", "torch_absorb"}, {"sdpa"}),
        ("mlakit bench --backends sdpa fl", {"flashmla", "flash"}, {"sdpa"}),
        ("mlakit bench --model deepseek", {"deepseek-v3", "deepseek-v2-lite"}, {"kimi-k2"}),
        ("mlakit bench --config q", {"quickstart"}, {"mla_decode"}),
        ("mlakit bench --config m", {"mine.yaml", "mla_decode"}, {"a.json"}),
        ("mlakit bench --l2 ", {"cold", "hot", "both"}, set()),
        ("mlakit configs --show r", {"reorder_threshold"}, set()),
        ("mlakit compare ", {"a.json", "runs/"}, {"notes.txt", "mine.yaml"}),
        ("mlakit compare --worktree HEAD --backend cu", {"cudnn", "cutlass_mla"}, {"sdpa"}),
    ],
)
def test_completion(complete, line, offered, not_offered):
    found = complete(line)
    assert offered <= found
    assert not not_offered & found


def test_completion_in_a_real_bash(tmp_path):
    """The code that `mlakit completion bash` prints, in the shell that it is for."""
    command = tmp_path / "mlakit"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlakit "$@"\n')
    command.chmod(0o755)
    script = (
        'eval "$(mlakit completion bash)"\ncomplete -p mlakit\n'
        'COMP_WORDS=(mlakit study fa); COMP_CWORD=2; COMP_LINE="mlakit study fa"; COMP_POINT=15; COMP_TYPE=9\n'
        '_python_argcomplete mlakit fa study\necho "offered: ${COMPREPLY[*]}"\n'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert "complete -o bashdefault" in done.stdout, done.stderr
    assert "offered: fast-path" in done.stdout


def test_a_reader_that_goes_away(tmp_path):
    """`mlakit ... | head -1` is no error."""
    command = f"{sys.executable} -m mlakit configs --show quickstart | head -1; echo codes ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "codes 0"
