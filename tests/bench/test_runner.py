import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlakit import run_mla_benchmark
from mlakit.bench import worker
from mlakit.bench.process import Worker, WorkerDiedError, WorkerRefusedError
from mlakit.bench.results import BenchmarkResult, Record
from mlakit.bench.runner import Listener, Meter, Run, list_backends, new_session, probe
from tests.support.command import remember_ceilings

pytestmark = pytest.mark.usefixtures("support")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Segfaults", ["SIGSEGV", "while checking"]),
        ("Exits", ["exit code 7"]),
        ("KilledForMemory", ["SIGKILL", "memory runs out"]),
    ],
)
def test_each_death_has_its_word(run, row, name, words):
    (bad,) = run(row(f"misbehaving:{name}", attention="mla"))
    assert bad.status == "crashed"
    assert bad.timing is None
    for word in words:
        assert word in bad.error
    assert "\n" not in bad.error


@pytest.mark.parametrize(
    ("name", "status", "words"),
    # One backend for each way to go wrong that has a word of its own and that the process survives: measured in ours,
    # as its own would. The next test has three of them in processes of their own.
    [
        ("OutOfMemory", "out_of_memory", ["can't allocate memory"]),
        ("Wrong", "wrong", ["largest error", "(0, 3, ", "2x eager"]),
        ("Unwritten", "unwritten", ["64 of", "never written"]),
        ("FirstLayerOnly", "wrong", ["largest error"]),
        ("WearsOut", "wrong", ["right before timing, not after"]),
        ("ReadsPadding", "wrong", ["NaN"]),
        ("WrongShape", "wrong", ["expected (11, 4, 64), got (11, 1, 64)"]),
        ("WrongLse", "wrong", ["lse error"]),
        ("Raises", "error", ["KeyError", "what the library could not find"]),
        ("NotHere", "unavailable", ["needs compute capability 10.0, this is a CPU"]),
        ("Refuses", "unsupported", ["takes pages of 128 tokens, got 16"]),
        ("Missing", "unavailable", ["no attribute 'Missing'"]),
        ("NoBackend", "unavailable", ["is no subclass of mlakit.backends.Backend"]),
        ("Standard", "unsupported", ["computes standard attention, not mla"]),
    ],
)
def test_each_failure_has_its_word(cpu, row, name, status, words):
    config = row(f"misbehaving:{name}", attention="mla")
    request = {"config": config.model_dump(mode="json"), "ceilings": cpu.ceilings[config.dtype]}
    bad = BenchmarkResult.model_validate(worker._row(request, io.StringIO())["row"])
    assert bad.status == status
    assert bad.timing is None
    assert not bad.success
    for word in words:
        assert word in bad.error
    assert "\n" not in bad.error


def test_each_failure_costs_its_own_row_alone(run, row):
    good = [row(), row("sdpa"), row("torch_naive")]
    bad = [row("misbehaving:Segfaults"), row("misbehaving:Raises"), row("misbehaving:Missing", attention="mla")]
    rows = run(bad[0], good[0], bad[1], good[1], bad[2], good[2])
    assert [r.success for r in rows] == [False, True] * 3
    for result in rows[1::2]:
        assert result.check.max_error <= result.check.max_error_allowed
        assert len(result.timing.samples) == 2


def test_a_hang_ends_at_the_timeout_and_the_next_row_runs(run, row):
    hung, after = run(
        row("misbehaving:Hangs", timeout=15), row("misbehaving:Hangs", check=False, num_layers=1, timeout=1)
    )
    for result in (hung, after):
        assert result.status == "timeout"
        assert "no result within" in result.error
    assert "while checking" in hung.error


def test_a_worker_is_replaced_after_a_crash(run, row):
    first, second = run(row("misbehaving:Segfaults"), row("misbehaving:Segfaults", batch_spec="q1s5"))
    assert first.status == second.status == "crashed"


def test_a_lost_context_is_a_row_that_says_why_and_the_run_goes_on(run, row):
    bad, good, again = run(
        row("misbehaving:LosesItsContext"), row(), row("misbehaving:LosesItsContext", batch_spec="q1s5")
    )
    assert bad.status == again.status == "error"  # the second in a fresh process: the first was unfit to go on
    assert bad.error == (
        "RuntimeError: CUDA error: an illegal memory access was encountered; the cache has more elements than this "
        "library can number"
    )
    assert good.success


def test_rows_on_demand_are_measured_once_and_kept(cpu, row, tmp_path):
    path = tmp_path / "record.json"
    record = Record(name="test", planned=0, sessions=[new_session(cpu, [])])
    with Meter(cpu, record, save=lambda r: r.save(path)) as meter:
        first = meter.row(row(label="one"))
        assert meter.row(row(label="another")) is first
        assert len(Record.load(path).rows) == 1
    with Meter(cpu, Record.load(path)) as meter:
        assert meter.row(row()).timing == first.timing


def test_what_a_backend_prints_disturbs_nothing(run, row):
    (result,) = run(row("misbehaving:Chatty"))
    assert result.success


def test_without_check_a_wrong_result_gets_a_time_and_the_row_says_unchecked(run, row):
    (result,) = run(row("misbehaving:Wrong", check=False))
    assert result.success
    assert result.check is None
    assert not result.config.check


def test_backend_without_adapter_is_a_row(run, row):
    missing, good = run(row("TOKENSPEED_MLA"), row())
    assert missing.status == "unavailable"
    assert "no adapter for tokenspeed_mla" in missing.error
    assert good.success


def test_own_parameter_of_a_backend(run, row):
    (good,) = run(row("misbehaving:Right", parameters={"chunk": 8}))
    assert good.success
    (bad,) = run(row("torch_absorb", parameters={"chunk": 8}))
    assert bad.status == "unsupported"
    assert "no parameter chunk; it has: reorder_batch_threshold" in bad.error


def test_workload_larger_than_memory_is_refused_before_it_is_built(run, row):
    (result,) = run(row(batch_spec="1000q1s1000k", model="deepseek-v3", num_layers=60))
    assert result.status == "out_of_memory"
    assert "GiB are free" in result.error


def test_the_record_is_saved_after_every_row(cpu, row, tmp_path):
    path = tmp_path / "record.json"
    seen = []

    class Watch(Listener):
        def finished(self, result):
            on_disk = Record.load(path)
            seen.append((len(on_disk.rows), on_disk.complete))

    plan = [row(), row("sdpa")]
    record = Record(name="test", planned=2, sessions=[new_session(cpu, [])])
    Run(plan, cpu, record, save=lambda r: r.save(path), listener=Watch()).execute()
    assert seen == [(1, False), (2, True)]


def test_interrupt_keeps_what_was_measured(cpu, row, tmp_path):
    path = tmp_path / "record.json"

    class Interrupt(Listener):
        def started(self, config):
            if config.backend == "sdpa":
                raise KeyboardInterrupt

    plan = [row(), row("sdpa"), row("torch_naive")]
    record = Record(name="test", planned=3, sessions=[new_session(cpu, [])])
    run = Run(plan, cpu, record, save=lambda r: r.save(path), listener=Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    kept = Record.load(path)
    assert [r.config.backend for r in kept.rows] == ["torch_absorb"]
    assert not kept.complete

    finished = Run(plan, cpu, kept, save=lambda r: r.save(path)).execute()
    assert [r.config.backend for r in finished.rows] == ["torch_absorb", "sdpa", "torch_naive"]
    assert Record.load(path).complete


@pytest.mark.skipif(sys.platform != "linux", reason="a worker is tied to its runner's life by Linux's prctl")
def test_sigkill_in_the_middle_then_resume(tmp_path, support):
    """The whole command, killed without a chance to clean up, and run again."""
    output = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "mlakit", "bench", "--backends", "torch_absorb", "sdpa", "torch_naive", "--model", "tiny",
        "--batch-specs", "q1s9", "3q1s40", "2q5s21", "q17", "q9_2q1s30", "--device", "cpu", "--num-layers", "1",
        "--repeats", "1", "--output-json", str(output), "--output-csv", str(tmp_path / "out.csv"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[4/15]"):
            break
    workers = _children(process.pid)
    process.kill()
    process.wait()
    process.stderr.close()
    assert workers, "the kill came too late to leave workers behind"
    killed = Record.load(output)
    assert 4 <= len(killed.rows) < 15
    assert not killed.complete
    _wait_until_gone(workers)

    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{len(killed.rows)} of 15 rows are there" in again.stderr
    record = Record.load(output)
    assert record.complete
    assert len(record.rows) == 15 == len({r.config.key for r in record.rows})
    assert all(r.success for r in record.rows)
    assert [r.model_dump() for r in record.rows[: len(killed.rows)]] == [r.model_dump() for r in killed.rows]
    assert len(record.sessions) == 2
    assert {r.session for r in record.rows} == {0, 1}
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 16


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_until_gone(pids: list[int]) -> None:
    # The kernel kills the workers when their parent dies; pytest's timeout is the limit here.
    while any(
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in pids
    ):
        time.sleep(0.01)


def test_run_mla_benchmark_as_the_seed_shows(support, monkeypatch):
    from mlakit import BenchmarkConfig

    remember_ceilings(monkeypatch)

    config = BenchmarkConfig(
        backend="torch_absorb",
        batch_spec="2q1s128",
        num_layers=2,
        head_dim=576,
        num_q_heads=16,
        num_kv_heads=1,
        block_size=64,
        device="cpu",
        repeats=2,
        warmup_iters=1,
    )
    result = run_mla_benchmark("torch_absorb", config, profile_memory=True)
    assert result.success
    assert result.error is None
    assert result.min_time <= result.median_time <= result.max_time
    assert result.mean_time > 0
    assert result.std_time >= 0
    assert len(result.timing.samples) == 4
    assert result.throughput_tokens_per_sec == pytest.approx(2 / result.median_time)
    assert result.memory_allocated_mb > 0
    assert result.fraction_of_limit > 0
    assert result.to_dict()["mean_time"] == result.mean_time
    assert json.loads(json.dumps(result.to_dict()))["config"]["num_q_heads"] == 16

    split = run_mla_benchmark("sdpa", config, batch_spec="q4s32", reorder_batch_threshold=2)
    assert split.config.backend == "sdpa"
    assert split.modes == {"prefill": "mha"}
    tuned = run_mla_benchmark("misbehaving:Right", config, chunk=4, batch_spec="q1s8")
    assert tuned.config.parameters == {"chunk": 4}


def test_probe_measures_for_the_kind_of_device_it_finds():
    # By kind and not by name: "cuda" and "auto" are found to be "cuda:0".
    assert set(probe("cpu", {"cpu": ["fp32"], "cuda": ["bf16"]}).ceilings) == {"fp32"}


def test_probe_of_a_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"no device cuda:7: PyTorch .* sees"):
        probe("cuda:7", ["bf16"])
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda:0"):
        probe("gpu", ["bf16"])


def test_list_backends():
    device, rows = list_backends("cpu")
    assert device.endswith("(cpu)")
    found = {row["name"]: row for row in rows}
    assert found["sdpa"]["kind"] == "mla and standard"
    assert found["torch_absorb"]["version"].startswith("torch ")
    assert "reorder_batch_threshold" in found["torch_naive"]["parameters"]


def test_worker_reports_how_it_died():
    with Worker() as process:
        os.kill(process._process.pid, signal.SIGTERM)
        with pytest.raises(WorkerDiedError, match="killed by SIGTERM"):
            process.request({"command": "probe", "device": "cpu", "dtypes": []}, timeout=60)
        assert not process.alive


def test_worker_refuses_a_request_and_lives_on():
    with Worker() as process:
        with pytest.raises(WorkerRefusedError, match="device must be"):
            process.request({"command": "probe", "device": "nonsense", "dtypes": []}, timeout=120)
        assert process.request({"command": "probe", "device": "cpu", "dtypes": []}, timeout=120)["device"] == "cpu"


def test_an_interrupt_in_the_middle_of_a_look_at_a_worker_does_not_keep_it_from_ending():
    """Python's `Popen.poll` then leaves a lock taken that a wait without a limit waits for."""
    process = Worker()
    assert process.alive
    assert process._process._waitpid_lock.acquire(blocking=False)  # type: ignore[attr-defined]
    process.close()
    assert not process.alive
    with pytest.raises(ProcessLookupError):
        os.kill(process._process.pid, 0)
