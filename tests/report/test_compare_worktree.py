"""Two revisions in turn: of a repository made here, whose package answers as a worker does; and once for real."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mlakit
from mlakit.bench.results import Record
from mlakit.cli.compare_run import with_batches
from mlakit.cli.main import main
from mlakit.report import compare_rounds
from mlakit.report.compare_worktree import checked_out

WORKER = Path(__file__).parents[1] / "support" / "fake_worker.py"
REPOSITORY = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout whose second commit takes 1.3 times as long as its first; mlakit seems to run from it."""
    package = tmp_path / "repo" / "src" / "mlakit"
    (package / "bench").mkdir(parents=True)
    (package / "bench" / "__init__.py").touch()
    (package / "bench" / "worker.py").write_text(WORKER.read_text())
    git(tmp_path / "repo", "init", "--quiet")
    for slowness in (1.0, 1.3):
        (package / "__init__.py").write_text(f"SLOWNESS = {slowness}\n")
        git(package, "add", ".")
        git(package, "commit", "--quiet", "-m", f"takes {slowness}")
    monkeypatch.setattr(mlakit, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(compare_rounds, "OWN_SOURCE", package.parent)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "repo"


COMMAND = ("compare", "--worktree", "HEAD~1", "--backend", "sdpa", "--model", "tiny", "--num-layers", "1",
           "--device", "cpu")  # fmt: skip


def left_behind(repository: Path) -> list[str]:
    trees = git(repository, "worktree", "list").splitlines()[1:]
    return trees + [path.name for path in (repository.parent / "temporary").iterdir()]


def test_both_sides_in_turn(repository, capsys, tmp_path):
    code = main([*COMMAND, "--batch-specs", "q64", "--fail-above", "20%", "--output-json", "c.json"])
    captured = capsys.readouterr()
    assert code == 1, captured.err
    assert "mlakit: regression: q64, sdpa: takes" in captured.err
    assert "warning" not in captured.err
    (pair,) = json.loads((tmp_path / "c.json").read_text())["pairs"]
    # The machine got 3 times as slow meanwhile, and the ratio shows none of it: sides take turns to go first.
    assert pair["ratio"] == pytest.approx(1.3, rel=0.03)
    assert pair["interval"][0] > 1.2
    assert pair["basis"] == "rounds"
    asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    sides = [row["side"] for row in asked]
    assert sides[:2] == [1.0, 1.3]  # each is checked first
    assert sides[2:] == [1.0, 1.3, 1.3, 1.0] * 6  # 12 rounds
    assert [row.get("check", True) for row in asked] == [True] * 2 + [False] * 24
    before, after = (Record.load(path) for path in sorted(tmp_path.glob("mlakit-runs/*/*.json"), reverse=True))
    assert (before.name, after.name) == ("HEAD~1", "the checkout")
    assert before.complete
    assert len(before.rows[0].timing.samples) == len(after.rows[0].timing.samples) == 12 * 40
    assert before.rows[0].timing.ci95[0] < before.rows[0].timing.median < before.rows[0].timing.ci95[1]
    assert before.rows[0].config.repeats is None  # what was asked, not what a round took
    assert before.sessions[0].environment["slowness"] == 1.0
    assert left_behind(repository) == []


def test_a_row_that_fails_on_one_side(repository, capsys):
    assert main([*COMMAND, "--batch-specs", "q13", "q64", "--rounds", "6", "--repeats", "3"]) == 0
    captured = capsys.readouterr()
    assert "sdpa: no time in B, crashed: an unlucky number" in captured.out
    assert "[1/2] sdpa on q13: ok in A and crashed in B" in captured.err
    assert "2 pairs: 1 slower, 1 lost their time" in captured.out


def test_what_is_not_committed_is_measured(repository, tmp_path):
    (repository / "src" / "mlakit" / "__init__.py").write_text("SLOWNESS = 0.5\n")
    assert main([*COMMAND[:2], "HEAD", *COMMAND[3:], "--batch-specs", "q64", "--output-json", "c.json"]) == 0
    (pair,) = json.loads((tmp_path / "c.json").read_text())["pairs"]
    assert pair["ratio"] == pytest.approx(0.5 / 1.3, rel=0.03)


def test_a_revision_that_measures_something_else(repository, capsys, monkeypatch):
    """Another default in the other revision must not pass for a difference in speed."""
    changed = WORKER.read_text().replace('answer = {"row": row(request["config"])}',
                                         'answer = {"row": row({**request["config"], "num_layers": 9})}')  # fmt: skip
    worker = repository / "src" / "mlakit" / "bench" / "worker.py"
    worker.write_text(changed)
    git(repository, "commit", "--quiet", "-am", "other defaults")
    worker.write_text(WORKER.read_text())
    assert main([*COMMAND[:2], "HEAD", *COMMAND[3:], "--batch-specs", "q64"]) == 0
    assert "HEAD measures something else: num_layers 9, not 1" in capsys.readouterr().out


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError("a bug"), SystemExit(3)], ids=str)
def test_the_worktree_goes_however_it_ends(repository, end):
    with pytest.raises(type(end) if isinstance(end, BaseException) else end):  # noqa: PT012, SIM117
        with checked_out("HEAD~1") as revision:
            assert (revision.source / "mlakit" / "bench" / "worker.py").exists()
            assert revision.subject == "takes 1.0"
            assert len(left_behind(repository)) == 2
            raise end
    assert left_behind(repository) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_leave_the_rows_that_are_done(repository, tmp_path, number):
    """A process of its own, interrupted in its second row, for which its worker waits forever."""
    script = (
        "import sys, mlakit, pathlib\n"
        "from mlakit.report import compare_rounds\n"
        "from mlakit.cli.main import main\n"
        f"package = pathlib.Path({str(repository / 'src' / 'mlakit')!r})\n"
        "mlakit.__file__, compare_rounds.OWN_SOURCE = str(package / '__init__.py'), package.parent\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-c", script, *COMMAND, "--batch-specs", "q64", "q65", "--rounds", "6"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    while "[1/2]" not in (line := process.stderr.readline()):
        assert line, "it ended by itself"
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "interrupted with 1 of 2 rows compared; for the others: mlakit compare --worktree 'HEAD~1'" in err
    assert "--rounds 6 --batch-specs q65\n" in err
    assert "1 pair: 1 slower" in out
    assert left_behind(repository) == []


def test_the_command_for_what_is_left():
    for given in (["--batch-specs", "q1s9", "q8", "--rounds", "6"], ["--batch-specs=q8", "--rounds", "6"]):
        found = with_batches(["mlakit", "compare", "--worktree", "main", *given], ["q8", "q9"])
        assert found == ["mlakit", "compare", "--worktree", "main", "--rounds", "6", "--batch-specs", "q8", "q9"]


def test_without_a_checkout(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlakit, "__file__", str(tmp_path / "site-packages" / "mlakit" / "__init__.py"))
    (tmp_path / "site-packages" / "mlakit").mkdir(parents=True)
    with pytest.raises(ValueError, match="must run from a git checkout"), checked_out("HEAD"):
        pass


def test_a_revision_from_before_the_bench(repository):
    git(repository, "rm", "--quiet", "-r", "src/mlakit/bench")
    git(repository, "commit", "--quiet", "-m", "no bench")
    with (
        pytest.raises(ValueError, match=r"HEAD has no src/mlakit/bench/worker.py to measure with"),
        checked_out("HEAD"),
    ):
        pass
