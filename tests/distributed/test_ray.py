"""`mlakit bench --executor ray` on a cluster of two nodes with a CPU each, all of them on this machine."""

import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlakit.bench.progress import Progress
from mlakit.bench.results import Record
from mlakit.cli.main import main
from mlakit.distributed.ray_crew import Crew

SPECS = ("q1s9", "3q1s40", "q17", "2q5s21")
VALUES = ("1", "8", "auto")  # rows of one comparison
ROWS = len(SPECS) * len(VALUES)
RUN = (
    "bench", "--executor", "ray", "--backend", "torch_absorb", "--batch-specs", *SPECS, "--model", "tiny", "--device",
    "cpu", "--num-layers", "1", "--repeats", "1", "--warmup-iters", "0", "--sweep-param", "reorder_batch_threshold",
    "--sweep-values", *VALUES, "--output-json", "out.json",
)  # fmt: skip


@pytest.fixture
def cluster(monkeypatch):
    """A head without a CPU, and the nodes "a" and "b"."""
    # Sockets' paths must be short, and pytest's folders are not.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        os.mkdir(f"{folder}/ray")
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        # It takes Ray half a minute otherwise until it calls a node lost.
        for name, value in (("initial_delay_ms", 500), ("period_ms", 500), ("failure_threshold", 2)):
            monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
        from ray.cluster_utils import Cluster

        small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        try:
            nodes = {name: made.add_node(num_cpus=1, node_name=name, wait=False, **small) for name in "ab"}
            made.wait_for_nodes()
            yield SimpleNamespace(address=made.address, nodes=nodes, remove=made.remove_node)
        finally:
            made.shutdown()


def on_row(monkeypatch, node, number, act):
    """Call `act` when the worker on a node has just been given its first, second, ... row."""
    measure, given = Crew.measure, []

    def watched(crew, member, config):
        measure(crew, member, config)
        if member.node.name == node:
            given.append(config)
            if len(given) == number:
                assert {c.comparison for c in given} == {config.comparison}
                act()

    monkeypatch.setattr(Crew, "measure", watched)


def interrupt_after_a_second_attempt(monkeypatch):
    """A Ctrl-C while the run waits for its workers."""
    finished = Progress.finished

    def watched(progress, row):
        finished(progress, row)
        if row.place.attempt == 2:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(Progress, "finished", watched)


def processes(parent, command):
    """Children of a process that run a command, by their numbers."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if command in Path(f"/proc/{pid}/cmdline").read_text()]


def workers(cluster, node):
    """The processes of a node that hold a device."""
    (raylet,) = cluster.nodes[node].all_processes["raylet"]
    return processes(raylet.process.pid, "RowWorker")


def kill_worker(cluster, node):
    (pid,) = workers(cluster, node)
    os.kill(pid, signal.SIGKILL)


def check_places(record):
    """Each comparison on one node, and each row of a session on its node, with ceilings of that node."""
    homes: dict[str, set[str]] = {}
    for row in record.rows:
        homes.setdefault(row.config.batch_spec, set()).add(row.place.node)
        session = record.sessions[row.session]
        assert session.environment["place"] == {"node": row.place.node, "gpu": None}
        assert session.ceilings["fp32"]["flops_per_s"] > 0
    assert all(len(nodes) == 1 for nodes in homes.values())
    assert record.one_gpu_a_comparison
    return {node for nodes in homes.values() for node in nodes}


def test_a_killed_worker_an_interrupt_and_a_lost_node(cluster, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = [*RUN, "--ray-address", cluster.address]

    # The worker of one node is killed while it measures. Another takes its place, on the same device.
    with monkeypatch.context() as patches:
        on_row(patches, "a", 2, lambda: kill_worker(cluster, "a"))
        interrupt_after_a_second_attempt(patches)
        assert main(run) == 130
    said = capfd.readouterr()
    assert said.out == ""
    headline, *lines = said.err.splitlines()
    assert " on 2x " in headline
    assert f"2 nodes of the Ray cluster at {cluster.address}; measured ceilings" in headline
    assert any(line.startswith("note: the worker on node a is lost: ") for line in lines)
    assert "measured again" not in said.err
    assert lines[-2].startswith("interrupted with ")
    assert lines[-2].endswith(" --resume")
    assert lines[-1] == "mlakit: interrupted"
    assert not [line for line in lines[:-2] if not line.startswith(("note: the worker on node a", "["))]
    before = Record.load(tmp_path / "out.json")
    assert 2 <= len(before.rows) < ROWS
    assert not before.complete
    assert check_places(before) == {"a", "b"}
    assert sorted(row.place.attempt for row in before.rows) == [*[1] * (len(before.rows) - 1), 2]
    while workers(cluster, "a") + workers(cluster, "b"):
        time.sleep(0.01)  # an interrupted run leaves none behind; pytest's timeout is the limit

    # It goes on where it was, and one node is lost in the middle of a comparison: all of that is measured elsewhere.
    with monkeypatch.context() as patches:
        on_row(patches, "a", 1, lambda: cluster.remove(cluster.nodes["a"], allow_graceful=False))
        assert main([*run, "--resume"]) == 0
    said = capfd.readouterr()
    assert said.out.startswith("batch ")
    assert f"{len(before.rows)} of {ROWS} rows are there" in said.err
    assert "note: the worker on node a is lost: " in said.err
    assert "measured again: their comparison is measured on another GPU now" in said.err
    record = Record.load(tmp_path / "out.json")
    assert record.complete
    assert [(r.config.batch_spec, r.config.reorder_batch_threshold) for r in record.rows] == [
        (spec, value) for spec in SPECS for value in (1, 8, "auto")
    ]
    assert all(row.success for row in record.rows)
    check_places(record)
    stayed = [row for row in before.rows if row.place.node == "b"]
    assert stayed
    assert all(row in record.rows for row in stayed)
    moved = {row.config.key for row in before.rows} - {row.config.key for row in stayed}
    assert {row.place.node for row in record.rows if row.config.key in moved} == {"b"}
    assert "RayTaskError" not in said.err + said.out
    assert "Traceback" not in said.err + said.out
