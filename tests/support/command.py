"""The command run within the test's own process, which has paid for its imports already."""

import copy
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from mlakit.bench import runner
from mlakit.cli.main import main

SUPPORT = Path(__file__).parent
_ask = runner._ask
_probed: dict[str, Any] = {}


def run_command(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`mlakit ...` in a folder, with the test-only backends importable; workers are processes, as ever."""
    out, err = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patches, redirect_stdout(out), redirect_stderr(err):
        patches.chdir(folder)
        patches.setattr(sys, "argv", ["mlakit", *arguments])
        patches.syspath_prepend(str(SUPPORT))
        patches.setenv("PYTHONPATH", f"{SUPPORT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        remember_ceilings(patches)
        try:
            code: Any = main(arguments)
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def remember_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure this machine's ceilings once, and not, at five CPU seconds, for each command whose test is of
    something else.
    """

    def ask(request: dict[str, Any], listener: runner.Listener) -> dict[str, Any]:
        if request["command"] != "probe":
            return _ask(request, listener)
        key = json.dumps(request, sort_keys=True)
        if key not in _probed:
            _probed[key] = _ask(request, listener)
        return copy.deepcopy(_probed[key])

    monkeypatch.setattr(runner, "_ask", ask)
