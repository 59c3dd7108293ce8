"""README and docs are run, not believed: every block of code, on a CPU, at a size of seconds (how:
tests/support/documents.py).
"""

import os
import sys

import pytest

from tests.support.documents import DOCUMENTS, ROOT, Runner, blocks


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path)], ids=lambda path: path.name)
def test_every_block_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "results").symlink_to(ROOT / "results")
    runner = Runner(tmp_path, monkeypatch)
    for block in blocks(path):
        runner.block(block)
    sys.modules.pop("mine", None)


def test_readme_opens_with_the_two_commands():
    first = blocks(ROOT / "README.md")[0]
    assert [words[:2] for words in first.commands()] == [["make", "demo"], ["make", "test"]]
