"""Studies that are interrupted and gone on with: by Ctrl-C in their second piece of work, and the command that is
printed then.
"""

import json
import shlex
import sys

import pytest

from mlakit.cli.main import main
from mlakit.studies import correctness, fast_path, k_concat, layers, sparse_prefill
from mlakit.studies.checkpoint import go_on, resumable

LAYER = ("--model", "tiny", "--device", "cpu", "--trials", "1", "--warmup", "0")
# Study, its module, the function that does one piece of work, flags for three pieces, and where the record is.
STUDIES = {
    "layers": (layers, "measure_size", [*LAYER, "--batch-sizes", "1", "--seq-lengths", "4", "8", "12", "--phase",
               "prefill", "--implementations", "naive"], "--output-dir out", "out/record.json"),
    "correctness": (correctness, "compare_size", [*LAYER, "--batch-sizes", "1", "--min-seq-len", "4", "--max-seq-len",
                    "12", "--seq-len-step", "4", "--implementations", "naive", "absorb", "--decode-steps", "1"],
                    "--output out/c", "out/c.json"),
    "fast-path": (fast_path, "measure_length", [*LAYER, "--seq-lengths", "4", "8", "12", "--batch-size", "1"],
                  "--output-json r.json", "r.json"),
    "k-concat": (k_concat, "measure", ["--device", "cpu", "--dims", "2,8,4", "--batch-sizes", "1", "2", "3", "--dtypes",
                 "bfloat16", "--num-iters", "1"], "--output-json r.json", "r.json"),
    "sparse-prefill": (sparse_prefill, "measure", ["--device", "cpu", "--configs", "4,8,2", "4,16,2", "4,32,2",
                       "--heads", "2", "--rep", "1", "--warmup", "0", "--no-dense"], "--output-json r.json", "r.json"),
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run_(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["mlakit", *words])
        try:
            return main(words)
        except SystemExit as end:
            return int(end.code or 0)

    return run_


@pytest.fixture
def count(monkeypatch):
    """Counts calls of a function, and interrupts one of them."""

    def count_(module, name: str, interrupted: int | None) -> list[object]:
        calls: list[object] = []
        real = getattr(module, name)

        def watched(*args, **kwargs):
            calls.append(args)
            if len(calls) == interrupted:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)
        return calls

    return count_


@pytest.mark.parametrize("study", STUDIES)
def test_interrupted_and_gone_on_with(study, run, count, tmp_path, capsys, monkeypatch):
    module, name, flags, where, record = STUDIES[study]
    command = ["study", study, *flags, *where.split()]
    with monkeypatch.context() as patch:
        real = getattr(module, name)
        count(module, name, 2)
        assert run(*command) == 130
        patch.setattr(module, name, real)
    before = json.loads((tmp_path / record).read_text())
    assert before["complete"] is False
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("interrupted; what is done is in ")]
    again = shlex.split(line.partition("To go on: ")[2])
    assert again == ["mlakit", *command, "--resume"]

    calls = count(module, name, None)
    assert run(*again[1:]) in (0, 1)  # 1: times of one sample may come to nothing, and that is not what is tested
    assert len(calls) == 2  # of three: the first is there
    after = json.loads((tmp_path / record).read_text())
    assert after["complete"] is True
    assert after["rows"][: len(before["rows"])] == before["rows"]
    assert len(after["rows"]) == 3 * len(before["rows"])
    assert len(after.get("pairs", [])) == 3 * len(before.get("pairs", []))

    # With other options it is another measurement; what is there stays.
    capsys.readouterr()
    assert run(*again[1:], *(["--seed", "5"] if "--trials" in flags else ["--heads", "4"] if study != "k-concat" else
               ["--num-warmup", "7"])) == 2  # fmt: skip
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "it cannot be gone on with" in err
    assert json.loads((tmp_path / record).read_text()) == after


def test_a_new_run_keeps_the_earlier_record(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("measured yesterday")
    assert go_on(None, path, {}) == {"rows": []}
    assert (tmp_path / "r.json.bak").read_text() == "measured yesterday"
    assert not path.exists()


def test_a_study_that_is_run_as_a_module_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/somewhere/mlakit/studies/k_concat.py", "--dims", "2,8,4"])
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt), resumable(path):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted before anything was done\n"  # there is no record to go on with
    path.write_text("{}")
    with pytest.raises(KeyboardInterrupt), resumable(path):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.endswith("To go on: python -m mlakit.studies.k_concat --dims 2,8,4 --resume\n")
    with pytest.raises(KeyboardInterrupt), resumable(None):
        raise KeyboardInterrupt
    assert "nothing is saved, as --output-json FILE was not given" in capsys.readouterr().err


def test_quiet_studies_say_nothing_of_themselves(run, capsys):
    _, _, flags, where, _ = STUDIES["k-concat"]
    assert run("study", "k-concat", *flags, *where.split(), "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "Speedup summary" in captured.out


@pytest.mark.parametrize("study", STUDIES)
def test_nothing_to_go_on_with(study, run, capsys, tmp_path):
    _, _, flags, where, record = STUDIES[study]
    assert run("study", study, *flags, "--resume") == 2
    assert "--resume needs --output" in capsys.readouterr().err
    assert run("study", study, *flags, *where.split(), "--resume") == 2
    captured = capsys.readouterr()
    assert captured.err == f"mlakit: error: nothing to resume: {record} does not exist\n"
    assert captured.out == ""
    (tmp_path / record).parent.mkdir(exist_ok=True)
    for content, words in (("{", "is no JSON"), ('{"schema": "other/1"}', "is no record of this study")):
        (tmp_path / record).write_text(content)
        assert run("study", study, *flags, *where.split(), "--resume") == 2
        assert words in capsys.readouterr().err
