"""The notebooks run from end to end, cell by cell, at the size of the machine they are on; they are kept without
outputs, which would go out of date.
"""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, capsys):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), namespace)
    assert capsys.readouterr().out


def test_there_are_notebooks():
    assert "sparse_mla_demo.ipynb" in [path.name for path in NOTEBOOKS]
