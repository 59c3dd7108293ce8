"""`make bench-h200` without its GPU: what happens to records when scripts succeed, fail and hang; and the records."""

import argparse
import importlib.util
import json
import shlex
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mlakit.bench import config_file
from mlakit.bench.plan import make_plan, settings_for
from mlakit.bench.timing import Timing
from mlakit.cli import bench, recommend
from mlakit.cli.study import add_parser as add_studies

ROOT = Path(__file__).parent.parent
RECORDS = sorted((ROOT / "results" / "h200").glob("*.json"))
STAMP = {"environment": {"torch": "2"}, "ceilings": {"copy_bytes_per_s": 1.0}, "peers": {}}


def _script(name: str) -> ModuleType:
    """A script of benchmarks/h200 as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "h200" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_all() -> ModuleType:
    return _script("run_all")


@pytest.fixture(scope="module")
def anchors() -> ModuleType:
    return _script("anchors")


@pytest.fixture(scope="module")
def common() -> ModuleType:
    return _script("common")


@pytest.fixture
def step(run_all, tmp_path):
    """Makes a step whose script is the given source; `out` is the path that it must write."""

    def make(name: str, source: str, limit_s: float = 60.0):
        script = tmp_path / f"{name}_script.py"
        script.write_text(f"import json, sys, time, os\nout = sys.argv[1]\n{source}\n")
        return run_all.Step(name, (sys.executable, str(script)), limit_s)

    return make


def test_rows_are_stamped(run_all, step, tmp_path, capfd):
    good = step("concat", "json.dump([{'impl': 'triton', 'median_s': 1e-3}], open(out, 'w'))")
    assert run_all.refresh([good], tmp_path / "new" / "folder", STAMP) == []
    record = json.loads((tmp_path / "new" / "folder" / "concat.json").read_text())
    assert list(record) == ["schema", "operation", "started", "environment", "ceilings", "peers", "rows"]
    assert record["schema"] == "mlakit.speed/1"
    assert record["operation"] == "concat"
    assert record["rows"] == [{"impl": "triton", "median_s": 1e-3}]
    assert record["environment"] == STAMP["environment"]


# Every way a script can disappoint: it fails, fails after having written, dies of a signal, writes nothing, no rows,
# something that is no list, half a file, and takes too long.
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("sys.exit(3)", "exit code 3"),
        ("json.dump([{'impl': 'x'}], open(out, 'w')); sys.exit(1)", "exit code 1"),
        ("os.kill(os.getpid(), 9)", "exit code -9"),
        ("pass", "no JSON written"),
        ("json.dump([], open(out, 'w'))", "no rows written"),
        ("json.dump({'rows': [{}]}, open(out, 'w'))", "no rows written"),
        ("open(out, 'w').write('[{')", "no JSON written"),
        ("json.dump([{'impl': 'x'}], open(out, 'w')); time.sleep(600)", "took longer than 2 s"),
    ],
)
def test_a_failure_costs_its_own_record_only(run_all, step, tmp_path, capfd, source, reason):
    (tmp_path / "decode.json").write_text("the old one")
    bad = step("decode", source, limit_s=2.0 if "sleep" in source else 60.0)
    good = step("quant", "json.dump([{'impl': 'triton'}], open(out, 'w'))")
    assert run_all.refresh([bad, good], tmp_path, STAMP) == ["decode"]
    assert (tmp_path / "decode.json").read_text() == "the old one"
    assert json.loads((tmp_path / "quant.json").read_text())["operation"] == "quant"
    assert f"decode: {reason}" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.part"))


def test_a_record_of_the_bench_is_kept_as_it_is_if_complete(run_all, step, tmp_path, capfd):
    source = "json.dump({'record_schema': 's', 'complete': %s, 'rows': [{}]}, open(out, 'w'))"
    assert run_all.refresh([step("quickstart", source % True)], tmp_path, STAMP) == []
    whole = {"record_schema": "s", "complete": True, "rows": [{}]}
    assert json.loads((tmp_path / "quickstart.json").read_text()) == whole
    assert run_all.refresh([step("quickstart", source % False)], tmp_path, STAMP) == ["quickstart"]
    assert json.loads((tmp_path / "quickstart.json").read_text()) == whole


def test_scripts_find_what_a_relative_pythonpath_names(run_all, step, tmp_path, monkeypatch, capfd):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "their_module.py").write_text("ROWS = [{'impl': 'x'}]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib")
    source = "import their_module; assert os.sep not in out; json.dump(their_module.ROWS, open(out, 'w'))"
    assert run_all.refresh([step("concat", source)], tmp_path, STAMP) == []


# One candidate alone, an even and an odd number, and as many as a sweep has.
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_each_candidate_follows_each_other_one_equally_often(common, count):
    turns = count * (1 + count % 2)
    orders = [common.order_of_turn(count, turn) for turn in range(turns)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert Counter(order[0] for order in orders) == dict.fromkeys(range(count), turns // count)
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert pairs == {(a, b): turns // count for a in range(count) for b in range(count) if a != b}


def test_candidates_go_round_and_what_fails_is_left_out(common, monkeypatch, capsys):
    ran = []

    def time_calls(calls, device, *, repeats):
        calls[0]()
        return Timing((float(len(ran)),) * repeats)

    def candidate(name):
        def call():
            ran.append(name)
            if name == "broken":
                raise RuntimeError("no such kernel")
            return (torch.zeros(2),)

        return name, call

    monkeypatch.setattr(common, "time_calls", time_calls)
    job = common.Job("op", "job", {}, 1.0, 1.0, lambda found: "", [candidate(x) for x in ("a", "broken", "b", "c")])
    found = common.measure(job, 6)
    assert {name: len(timing.samples) for name, timing in found.items()} == {"a": 8, "b": 8, "c": 8}
    assert "RuntimeError: no such kernel" in capsys.readouterr().out
    assert ran.count("broken") == 1
    assert ran[-9:] == ["b", "a", "c", "c", "a", "b", "a", "c", "b"]


def test_every_step_has_its_script(run_all):
    known = run_all.steps()
    names = [
        "cold_code",
        "concat",
        "dense_decode",
        "dsa",
        "indexer",
        "layer",
        "prefill",
        "quant",
        "rope",
        "sparse",
        "timing",
    ]
    studies = ["k_concat", "sparse_prefill", "fast_path", "layers", "correctness", "num_splits", "reorder_threshold"]
    assert [step.name for step in known] == [*names, *studies, "recommend", *run_all.BENCHES]
    for step in known:
        assert step.stamped == (step.name in names)
        if step.stamped:
            assert Path(step.command[-1]).is_file()


def test_every_study_takes_its_options(run_all):
    parser = argparse.ArgumentParser()
    add_studies(parser.add_subparsers())
    for step in run_all.steps():
        if step.command[3:4] == ("study",):
            parsed = parser.parse_args([*step.command[3:], "record.json"])
            assert str(parsed.output_json) == "record.json"


def test_recommend_takes_its_options(run_all):
    parser = argparse.ArgumentParser()
    recommend.add_parser(parser.add_subparsers())
    command = next(step.command for step in run_all.steps() if step.name == "recommend")
    assert str(parser.parse_args([*command[3:], "record.json"]).output_json) == "record.json"


def test_every_bench_takes_its_options(run_all, tmp_path, monkeypatch):
    """Planned as on a GPU; configs are found in the folder that a step runs in."""
    monkeypatch.chdir(ROOT / "benchmarks" / "h200")
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    for name, options in run_all.BENCHES.items():
        args = parser.parse_args(["bench", *options, "--output-json", "record.json"])
        loaded = config_file.load(args.config) if args.config else None
        assert make_plan(settings_for(loaded, bench.flags(args), cpu=False), "cuda:0").rows, name


def test_the_commands_of_the_suites_documentation_can_be_run():
    text = (ROOT / "benchmarks" / "h200" / "seed_commands.sh").read_text()
    commands = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line.startswith("mlakit bench")]
    assert len(commands) == 10
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    for command in commands:
        args = parser.parse_args(command[1:])
        loaded = config_file.load(args.config) if args.config else None
        assert make_plan(settings_for(loaded, bench.flags(args), cpu=False), "cuda:0").rows, command


def test_a_library_that_is_not_here_is_a_record_too(run_all, step, tmp_path):
    source = "json.dump({'complete': True, 'rows': [{}]}, open(out, 'w')); sys.exit(1)"
    made = step("backends_cutlass", source)
    assert run_all.refresh([made], tmp_path, STAMP) == ["backends_cutlass"]
    assert run_all.refresh([replace(made, codes=(0, 1))], tmp_path, STAMP) == []


def test_peers_beside_what_others_measured(anchors, tmp_path, capsys):
    def row(backend, microseconds, heads=16):
        timing = {"median": microseconds * 1e-6} if microseconds else None
        return {"config": {"backend": backend, "batch_spec": "64q1s4k", "num_q_heads": heads}, "timing": timing}

    rows = [row("flashmla", 110.0), row("flashinfer_mla", None), row("flashattn_mla", 49.0), row("mlakit", 90.0),
            row("flashmla", 139.6, heads=128), row("flashmla", 1.0, heads=7)]  # fmt: skip
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"rows": rows}))
    assert anchors.main([str(path)]) == 1
    found = capsys.readouterr()
    assert "| `64q1s4k` | 16 | 110.0 (1.02) |  | 49.0 (0.50) |" in found.out
    assert "| `64q1s4k` | 128 | 139.6 (1.00) |  |  |" in found.out
    assert found.err == "flashattn_mla on 64q1s4k with 16 heads: 49.0 us, anchor 98.0\n"


def test_the_document_has_the_records_table(anchors):
    table = anchors.table(json.loads(anchors.RECORD.read_text()))
    assert table in (ROOT / "docs" / "backends.md").read_text()


def test_without_a_gpu_it_refuses_in_one_line(run_all, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_all.main(["--out", str(tmp_path / "out")]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert "needs an NVIDIA GPU" in found.err
    assert not (tmp_path / "out").exists()


def test_exit_code_says_that_something_was_not_refreshed(run_all, monkeypatch, capsys, tmp_path):
    from mlakit.bench.limits import Ceilings

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(run_all, "measure_ceilings", lambda device: Ceilings("GPU", "bfloat16", 4e12, 4e12, 8e14))
    monkeypatch.setattr(run_all, "device_info", lambda device: None)
    monkeypatch.setattr(run_all, "describe_environment", lambda info: {})
    ran = []

    def refresh(chosen, out, stamp):
        ran.extend(step.name for step in chosen)
        assert stamp["ceilings"]["flops_per_s"] == 8e14
        return ["quant"] if "quant" in ran else []

    monkeypatch.setattr(run_all, "refresh", refresh)
    assert run_all.main(["--only", "dense_decode", "prefill"]) == 0
    assert ran == ["dense_decode", "prefill"]
    assert run_all.main([]) == 1
    assert "not refreshed: quant" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_committed_records_say_where_they_come_from(path):
    record = json.loads(path.read_text())
    if "sessions" in record:  # the bench's own
        assert record["complete"]
        environments = [session["environment"] for session in record["sessions"]]
    else:
        assert record["schema"] in ("mlakit.speed/1", f"mlakit.{path.stem}/1")  # a speed script's, or a study's own
        assert record.get("operation", path.stem) == path.stem
        assert min(record["ceilings"][key] for key in ("copy_bytes_per_s", "read_bytes_per_s", "flops_per_s")) > 0
        environments = [record["environment"]]
    assert record["rows"]
    for environment in environments:
        assert environment["device"]["kind"] == "cuda"
        for value in (environment["device"]["name"], *(environment[key] for key in ("torch", "triton", "commit"))):
            assert value
            assert isinstance(value, str)
