"""README and docs are run, not believed: every Python block and every command, on a CPU, at a size of seconds."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = ["--device", "cpu", "--num-layers", "1", "--repeats", "1", "--warmup-iters", "0"]


def _blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        found += [(path.name, block) for block in re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)]
    return found


def _run(command: list[str], folder: Path) -> None:
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(("document", "code"), _blocks("python"), ids=lambda value: value[:16])
def test_python_blocks_run(document, code, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    _run([sys.executable, "mine.py"], tmp_path)


COMMANDS = [
    (document, line)
    for document, block in _blocks("sh")
    for line in block.splitlines()
    if "mlakit" in line.split("#")[0]
]


@pytest.mark.parametrize(("document", "line"), COMMANDS, ids=lambda value: value[-30:])
def test_commands_run(document, line, tmp_path):
    (tmp_path / "mine.py").write_text(dict(_blocks("python"))["adding-a-backend.md"])
    words = shlex.split(line, comments=True)
    assert words[0] in ("mlakit", ".venv/bin/mlakit")
    extra = SMALLER if words[1] == "bench" and "quickstart" not in words else []
    if "quickstart" in words:  # make demo runs it in full; here its config is read and its smallest batch measured
        extra = [*SMALLER, "--batch-specs", "q1s64"]
    _run([sys.executable, "-m", "mlakit", *words[1:], *extra], tmp_path)


def test_makefile_has_what_readme_opens_with():
    head = (ROOT / "README.md").read_text().split("```")[1]
    targets = re.findall(r"^make (\w+)", head, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_commands_named_in_readme_exist():
    from mlakit.cli.main import build_parser

    help_text = build_parser().format_help()
    for name in re.findall(r"^\| `mlakit (\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^\s+{name}\b", help_text, re.MULTILINE), name
