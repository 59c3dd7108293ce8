"""`mlakit report` as a user types it."""

import json
import shutil
from pathlib import Path

import pytest

from mlakit.cli.main import main
from tests.support.reports import RESULTS, data_of

DECODE = str(RESULTS / "dense_decode.json")


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns exit code, standard output and the lines of standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, list[str]]:
        try:
            code = main(["report", *arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def test_a_page(report, tmp_path):
    assert report(DECODE) == (0, "", ["saved: report.html"])
    assert report(DECODE, "-o", "deep/er.html", "--baseline", "fa3", "--title", "Mine")[0] == 0
    text = (tmp_path / "deep" / "er.html").read_text()
    assert "<title>Mine</title>" in text
    assert data_of(text)["baseline"] == "fa3"
    shown = [row["time"] for row in data_of((tmp_path / "report.html").read_text())["rows"]]
    assert sorted(shown) == sorted(row["median_s"] for row in json.loads(Path(DECODE).read_text())["rows"])


def test_a_run_s_folder_stands_for_its_record(report, tmp_path):
    (tmp_path / "quickstart-now").mkdir()
    shutil.copy(RESULTS / "quickstart.json", tmp_path / "quickstart-now" / "record.json")
    code, out, err = report("quickstart-now", "--markdown")
    assert (code, err) == (0, [])
    assert "| 32q1s4k |" in out
    assert not Path("report.html").exists()  # asked for tables, it writes no page


def test_plots(report, tmp_path):
    code, out, err = report(str(RESULTS / "quickstart.json"), "--plot", "plots")
    assert (code, out) == (0, "")
    written = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert written == sorted(line.removeprefix("saved: plots/") for line in err)
    assert "quickstart-attention-times.png" in written
    assert not Path("report.html").exists()


def test_documents(report, tmp_path):
    shutil.copy(DECODE, tmp_path / "decode.json")
    marker = "<!-- mlakit report\nrecord: decode.json\njobs: 64x128x4096\n-->\n"
    document = tmp_path / "README.md"
    document.write_text(f"# Speed\n\n{marker}old\n<!-- mlakit end -->\n")
    assert report("--update", "README.md", "--check") == (1, "", ["stale: README.md"])
    assert "\nold\n" in document.read_text()
    assert report("--update", "README.md") == (0, "", ["rewritten: README.md"])
    assert "| 64x128x4096 |" in document.read_text()
    assert report("--update", "README.md", "--check") == (0, "", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected at least one record (a .json that mlakit bench or a study wrote), got none"),
        (["gone.json"], "gone.json: No such file or directory"),
        (["here"], "here/record.json: No such file or directory"),
        (["future.json"], "future.json: its schema is 'mlakit.speed/2', and this mlakit reads: mlakit.bench/1, "),
        ([DECODE, "--baseline", "flashmla"], "--baseline: no row of 'flashmla'; the records have: "),
        ([DECODE, "-o", "here"], "-o: 'here' is a folder; expected a file to write to"),
        ([DECODE, "-o", "out.json"], "-o: 'out.json' would be taken for a record; expected a page"),
        ([DECODE, "-o", "future.json/x.html"], "-o: cannot make the folder 'future.json'"),
        ([DECODE, "--plot", "future.json"], "--plot: cannot make the folder 'future.json'"),
        ([DECODE, "--markdown", "--title", "x"], "--title is the page's: it goes with -o FILE"),
        ([DECODE, "--check"], "--check goes with --update DOCUMENT"),
        (["--update", "README.md", "-o", "x.html"], "--update takes all else from the documents' markers"),
        ([DECODE, "--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_what_cannot_be_meant_is_one_line(report, tmp_path, arguments, message):
    (tmp_path / "here").mkdir()
    (tmp_path / "future.json").write_text('{"schema": "mlakit.speed/2"}')
    code, out, err = report(*arguments)
    assert (code, out) == (2, "")
    (line,) = err
    assert line.startswith(f"mlakit: error: {message}")
