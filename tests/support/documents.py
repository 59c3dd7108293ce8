"""Running the code in README and docs on a CPU, at a size of seconds (tests/test_docs.py).

A block is Python (executed), shell or console (every command executed with smaller sizes), YAML (read as a config of
the bench), TOML (parsed) or text (output, or another program's words: nothing to run). Above one that cannot run here
stands

    <!-- needs a GPU -->    its commands are parsed and planned for a GPU, its Python compiled and its imports resolved
    <!-- takes minutes -->  the same, planned for a CPU too

A document's blocks run in their order in one folder, so that a later one may use what an earlier one wrote.
"""

import ast
import importlib
import re
import shlex
import sys
import tomllib
from contextlib import redirect_stdout
from dataclasses import dataclass
from glob import glob
from io import StringIO
from pathlib import Path

import pytest

from mlakit.bench import config_file
from mlakit.bench.plan import make_plan, settings_for
from mlakit.cli.bench import flags
from mlakit.cli.main import build_parser, main
from tests.support.command import remember_ceilings

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "mlakit"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKERS = {"needs a GPU": ("cuda:0",), "takes minutes": ("cuda:0", "cpu")}

# Documents whose commands are run, not parsed and planned alone: what a bench or a study prints is the business of
# their own tests, and each process that imports torch takes two seconds.
RUN = {"README.md": "bench", "adding-a-backend.md": "bench", "layer.md": "study", "seeds.md": "study"}

# What makes a command take seconds; the last value of a flag counts.
SMALLER = {
    "bench": "--device cpu --num-layers 1 --repeats 1 --warmup-iters 0",
    "bench --config": "--batch-specs q1s64 --backends torch_absorb --device cpu --num-layers 1 --repeats 1",
    "study k-concat": "--device cpu --batch-sizes 32 --num-iters 2 --num-warmup 1",
    "study sparse-prefill": "--device cpu --configs 8,128,16 --warmup 1 --rep 1",
    "study layers": "--device cpu --seq-lengths 32 --batch-sizes 1 --trials 1 --warmup 1",
    "study correctness": "--device cpu --min-seq-len 32 --max-seq-len 32 --seq-len-step 32 --batch-sizes 1 --trials 1",
    "study fast-path": "--device cpu --seq-lengths 32 --batch-size 1 --trials 1 --warmup 1",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of code, the line it starts at, and the marker above it."""

    where: str
    language: str
    text: str
    marker: str

    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":  # commands after a prompt, and what they print
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(path: Path) -> list[Block]:
    text = path.read_text()
    found = []
    pattern = r"(?:^<!-- ([^\n]*) -->\n+)?^```([^\n]*)\n(.*?)^```"
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(f"{path.name}:{line}", match[2], match[3], match[1] if match[1] in MARKERS else ""))
    return found


def smaller(words: list[str]) -> list[str]:
    name = " ".join(words[:2]) if words[0] == "study" else words[0]
    if name == "bench" and "--config" in words:
        name = "bench --config"
    return [*words, *SMALLER.get(name, "").split()]


def plan(words: list[str], devices: tuple[str, ...]) -> None:
    """Everything short of running a command of mlakit's."""
    args = build_parser().parse_args(words)
    if args.command == "bench":
        config = config_file.load(args.config) if args.config else None
        for device in devices:
            assert make_plan(settings_for(config, flags(args), cpu=device == "cpu"), device).rows


class Runner:
    """Runs a document's blocks in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        remember_ceilings(monkeypatch)
        self.ran: set[str] = set()  # studies; the second time a document shows one it is parsed

    def block(self, block: Block) -> None:
        if block.language == "python":
            self._python(block)
        elif block.language in ("sh", "console"):
            for words in block.commands():
                self._command(words, block)
        elif block.language == "yaml":
            (self.folder / "config.yaml").write_text(block.text)
            for cpu, device in ((True, "cpu"), (False, "cuda:0")):
                assert make_plan(settings_for(config_file.load("config.yaml"), {}, cpu=cpu), device).rows
        elif block.language == "toml":
            tomllib.loads(block.text)
        else:
            assert block.language in ("text", "markdown"), f"{block.where}: a block of {block.language or 'nothing'}"

    def _python(self, block: Block) -> None:
        code = compile(block.text, block.where, "exec")
        if not block.marker:
            (self.folder / "mine.py").write_text(block.text)  # docs/adding-a-backend.md calls its file so
            exec(code, {"__name__": "__main__"})
            return
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mlakit"):
                assert all(resolve(f"{node.module}.{name.name}") for name in node.names)

    def _command(self, words: list[str], block: Block) -> None:
        """Run a command, or check it as far as it can be; one that no rule covers is an error."""
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[0] == "torchrun":  # the command it launches is what can be wrong
            words = words[words.index("-m") + 1 :]
        if words[0] == "make":
            targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= set(targets)
        elif words[:2] == ["pip", "install"]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert {
                name for found in re.findall(r"\[([a-z,]+)\]", " ".join(words)) for name in found.split(",")
            } <= set(extras)
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words[1]
        elif words[0].removeprefix(".venv/bin/") == "mlakit":
            self._mlakit(words[1:], block)
        else:
            raise AssertionError(f"{block.where}: no rule here for {shlex.join(words)}")

    def _mlakit(self, words: list[str], block: Block) -> None:
        words, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
        words = [found for word in words for found in (sorted(glob(word)) if "*" in word else [word])]
        plan(words, MARKERS.get(block.marker, ("cuda:0", "cpu")))
        name = " ".join(words[:2])
        document = block.where.partition(":")[0]
        if block.marker or name in self.ran or (words[0] in ("bench", "study") and RUN.get(document) != words[0]):
            return
        if words[0] == "study":
            self.ran.add(name)
        words, printed = smaller(words), StringIO()
        self.monkeypatch.setattr(sys, "argv", ["mlakit", *words])
        with redirect_stdout(printed):
            try:
                code: object = main(words)
            except SystemExit as end:
                code = end.code
        assert code in (0, None), f"{block.where}: mlakit {shlex.join(words)}: exit code {code}"
        if target:
            (self.folder / target).write_text(printed.getvalue())


def resolve(name: str) -> object:
    """What a dotted name stands for: a module, or something in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return getattr(resolve(module), last)
