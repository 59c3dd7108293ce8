"""README and docs leave nothing out and name nothing that is not there; the site builds."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from types import ModuleType

import pytest

from mlakit.cli import exit_codes
from mlakit.cli.main import build_parser
from mlakit.report.documents import update_documents
from tests.support.documents import DOCUMENTS, ROOT, SOURCE, plan, resolve

# Folders of operations: those with a torch.library schema.
OPERATIONS = sorted(path.parent.name for path in SOURCE.glob("*/ops.py"))


def test_commands_and_names_within_sentences_exist():
    for path in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`(mlakit[ .][^`]+)`", text):
            if re.fullmatch(r"mlakit(\.\w+)+", span):
                resolve(span)
            elif span.startswith("mlakit ") and not re.search(r"\b[A-Z]{2,}\b|\.\.\.|--help", span):
                words = shlex.split(span)[1:]
                while words[-1].startswith("-"):  # named, not spelled out: `mlakit report --update`
                    assert words.pop() in run_help(words)
                if len(words) == 1 or words == ["study"]:
                    assert words[0] in _commands()[0], span
                else:
                    plan(words, ("cuda:0", "cpu"))


def run_help(words: list[str]) -> str:
    with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit):
        build_parser().parse_args([*words, "--help"])
    return printed.getvalue()


def test_tables_and_plots_are_the_records():
    """`make tables` makes them anew."""
    assert update_documents(DOCUMENTS, check=True) == []


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def _commands() -> tuple[list[str], list[str]]:
    """Names of all subcommands and studies."""

    def inner(parser):
        return next(action.choices for action in parser._actions if hasattr(action, "choices") and action.dest in names)

    names = ("command", "study")
    commands = inner(build_parser())
    return list(commands), list(inner(commands["study"]))


def test_every_command_and_study_is_documented():
    readme = (ROOT / "README.md").read_text()
    commands, studies = _commands()
    for name in commands:
        assert re.search(rf"^\| `mlakit {name}`", readme, re.MULTILINE), f"README's table of commands lacks {name}"
    assert set(re.findall(r"^\| `mlakit ([\w-]+)`", readme, re.MULTILINE)) == set(commands)
    everything = "".join(path.read_text() for path in DOCUMENTS)
    for name in studies:
        assert f"mlakit study {name}" in everything, f"no document shows mlakit study {name}"


def test_the_table_of_operations_is_complete():
    import mlakit

    operations = {
        name for name, module in mlakit._PUBLIC.items() if (SOURCE / module.split(".")[1] / "ops.py").exists()
    }
    page = (ROOT / "docs" / "operations.md").read_text()
    said = {}
    for names, fastest in re.findall(r"^\| (`[^|]*`) \|[^|]*\| `(\w+)`[^|]*\|", page, re.MULTILINE):
        said.update(dict.fromkeys(re.findall(r"`(\w+)`", names), fastest))
    assert set(said) == operations
    for name, fastest in said.items():
        folder = SOURCE / mlakit._PUBLIC[name].split(".")[1]
        assert fastest == ("hopper" if '"hopper"' in (folder / "api.py").read_text() else "triton"), name


def test_exit_codes_are_documented():
    page = (ROOT / "docs" / "bench.md").read_text()
    for code, meaning in exit_codes.MEANINGS.items():
        assert f"| {code} | {meaning} |" in page


def test_architecture_names_every_folder():
    page = (ROOT / "docs" / "architecture.md").read_text()
    inside = [path for path in SOURCE.iterdir() if path.name[0] not in "_."]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in inside if path.suffix != ".typed"]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_every_public_name_is_in_the_reference():
    import mlakit
    import mlakit.distributed

    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE)}
    public = {*mlakit.__all__, *mlakit.distributed.__all__}
    for folder in (*OPERATIONS, "nn", "testing"):  # what their __init__ hands on
        module = importlib.import_module(f"mlakit.{folder}")
        public |= {name for name, value in vars(module).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert public - documented - {"__version__", "ATTN_IMPLS"} == set()


def test_the_site_builds_without_a_warning(tmp_path):
    """`make docs`: broken links, pages that no menu names, docstrings that do not match their function."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "softmax_scale" in (tmp_path / "api" / "operations" / "index.html").read_text()
    assert "--batch-specs" in (tmp_path / "commands" / "index.html").read_text()
