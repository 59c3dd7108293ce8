"""Which workers a run takes, with nodes and workers that are made up."""

from types import SimpleNamespace

import pytest
from ray import exceptions

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.process import DeviceError
from mlakit.distributed import ray_crew, ray_executor
from mlakit.distributed.ray_connection import Node
from mlakit.distributed.ray_crew import Crew


def found(name="H200", uuid="GPU-a", **software):
    """What a worker answers when it is asked for its device."""
    versions = dict.fromkeys(ray_crew._SOFTWARE, "1") | software
    return {
        "name": "cuda:0",
        "environment": {"device": {"name": name, "uuid": uuid}, **versions},
        "ceilings": {"bf16": {"flops_per_s": 1e15}},
    }


def _id(name):
    return name.encode().hex().ljust(56, "0")  # Ray takes no other


def _name(node_id):
    return bytes.fromhex(node_id).decode().rstrip("\0")


class Reference:
    """To an answer, as Ray's: told apart by what it is, not by what it refers to."""

    def __init__(self, answer):
        self.answer = answer


class FakeRay:
    """Workers that answer at once: for each node, in turn, what is in `answers`; None never answers."""

    exceptions = exceptions

    def __init__(self, answers):
        self.answers = {node: list(given) for node, given in answers.items()}
        self.stopped, self.killed = [], []

    def remote(self, **_):
        return lambda cls: self

    def options(self, *, scheduling_strategy, **asked):
        self.asked = asked
        return SimpleNamespace(remote=lambda folder: self._actor(_name(scheduling_strategy.node_id)))

    def _actor(self, node):
        actor = SimpleNamespace(node=node)
        actor.probe = SimpleNamespace(remote=lambda *_: Reference(self.answers[node].pop(0)))
        stop = SimpleNamespace(remote=lambda: self.stopped.append(node))
        actor.stop = SimpleNamespace(options=lambda concurrency_group: stop)
        return actor

    def wait(self, references, num_returns=1, timeout=None):
        return [r for r in references if r is None or r.answer is not None], []

    def get(self, reference):
        if isinstance(reference.answer, Exception):
            raise reference.answer
        return reference.answer

    def kill(self, actor):
        self.killed.append(actor.node)


@pytest.fixture
def crew():
    """Makes a crew on nodes of given GPUs, whose workers answer as given."""

    def make(**answers):
        nodes = [Node(_id(name), name, 8, gpus=len(given)) for name, given in answers.items()]
        ray = FakeRay({name: [*given] * 3 for name, given in answers.items()})
        notes: list[str] = []
        crew = Crew(SimpleNamespace(ray=ray, nodes=lambda: nodes), "cuda", {"cuda": ["bf16"]}, notes.append)
        return SimpleNamespace(crew=crew, ray=ray, notes=notes)

    return make


def settle(crew):
    for _ in range(ray_crew._MOST_FAILURES + 1):
        crew._looked = float("-inf")
        crew.recruit()
        list(crew.wait(0))


def raised(error):
    """As Ray passes on what a worker raised."""
    return exceptions.RayTaskError("probe", "Traceback ...", error)


def test_one_worker_a_gpu_each_alone_on_it(crew):
    made = crew(one=[found(uuid="GPU-a"), found(uuid="GPU-b")], two=[found(uuid="GPU-c")], none=[])
    settle(made.crew)
    made.crew.agree()
    assert [(m.place.node, m.place.gpu) for m in made.crew.ready()] == [
        ("one", "GPU-a"), ("one", "GPU-b"), ("two", "GPU-c"),
    ]  # fmt: skip
    assert made.ray.asked == {"num_gpus": 1, "num_cpus": 1, "max_restarts": 0}
    assert made.crew.ready()[2].device.environment["place"] == {"node": "two", "gpu": "GPU-c"}
    assert made.notes == []
    made.crew.close()
    assert made.ray.stopped == made.ray.killed == ["one", "one", "two"]


def test_devices_of_one_model_only(crew):
    made = crew(one=[found("A100", "GPU-a")], two=[found(uuid="GPU-b")], three=[found(uuid="GPU-c")])
    settle(made.crew)
    made.crew.agree()
    assert {m.gpu for m in made.crew.ready()} == {"GPU-b", "GPU-c"}
    assert made.ray.killed == ["one"]
    (note,) = made.notes
    assert "differ (1x A100, 2x H200); only H200 is used" in note
    settle(made.crew)  # nor later
    assert {m.gpu for m in made.crew.ready()} == {"GPU-b", "GPU-c"}


def test_nodes_that_differ_in_software_are_named(crew):
    made = crew(one=[found(uuid="GPU-a", torch="2.11")], two=[found(uuid="GPU-b", torch="2.13")])
    settle(made.crew)
    made.crew.agree()
    assert len(made.crew.ready()) == 2
    (note,) = made.notes
    assert "differ in torch: 2.11 on one, 2.13 on two" in note


@pytest.mark.parametrize(
    ("error", "words"),
    # What a node may lack: our version, a device, mlakit itself; and one that dies each time.
    [
        (raised(ValueError("it has mlakit 9, and the command is of 1")), "it has mlakit 9, and the command is of 1"),
        (raised(DeviceError("device cuda:0 does not work; no")), "device cuda:0 does not work; no"),
        (
            exceptions.RaySystemError("failed to import:\n  File ...\nModuleNotFoundError: No module named 'mlakit'"),
            "ModuleNotFoundError: No module named 'mlakit'",
        ),
        (exceptions.ActorDiedError(), "The actor died unexpectedly before finishing this task"),
    ],
)
def test_a_node_that_cannot_measure_is_left_out(crew, error, words):
    made = crew(one=[error], two=[found()])
    settle(made.crew)
    assert [m.place.node for m in made.crew.members] == ["two"]
    assert made.notes == [f"node one gets no (further) worker: {words}"]


def test_a_gpu_that_stays_busy_is_not_waited_for(crew, monkeypatch):
    monkeypatch.setattr(ray_crew, "_START_SECONDS", -1.0)
    made = crew(one=[None], two=[found()])
    settle(made.crew)
    assert [m.place.node for m in made.crew.members] == ["two"]
    assert "none started within" in made.notes[0]


def test_no_worker_at_all_is_an_error_with_the_reasons(crew, monkeypatch):
    made = crew(one=[raised(ValueError("it has mlakit 9"))])
    connection = SimpleNamespace(
        **vars(made.crew.connection), address="there:1", started_here=False, close=lambda: None
    )
    monkeypatch.setattr(ray_executor, "Connection", lambda address: connection)
    listener = SimpleNamespace(stage=lambda _: None, note=made.notes.append)
    with (
        ray_executor.RayExecutor("there:1") as executor,
        pytest.raises(DeviceError, match=r"no worker of the Ray cluster came up: node one .* it has mlakit 9"),
    ):
        executor.probe("cuda", {"cuda": ["bf16"]}, listener)


def test_no_gpu_to_give_out(crew, monkeypatch):
    made = crew(one=[])
    connection = SimpleNamespace(
        **vars(made.crew.connection), address="there:1", started_here=False, close=lambda: None
    )
    monkeypatch.setattr(ray_executor, "Connection", lambda address: connection)
    with (
        ray_executor.RayExecutor() as executor,
        pytest.raises(ValueError, match="device cuda: the Ray cluster at there:1 has no GPU that Ray could give out"),
    ):
        executor.probe("cuda", {"cuda": ["bf16"]}, SimpleNamespace(stage=lambda _: None, note=made.notes.append))


def test_a_row_without_an_answer_loses_its_worker(crew):
    made = crew(one=[found()])
    settle(made.crew)
    (member,) = made.crew.ready()
    config = BenchmarkConfig(backend="sdpa", batch_spec="q8", model="tiny", timeout=1)
    member.actor.measure = SimpleNamespace(remote=lambda _: Reference(None))
    made.crew.measure(member, config)
    assert list(made.crew.wait(0)) == []
    member.deadline = 0.0
    assert list(made.crew.wait(0)) == [(member, config, "it does not answer")]
    assert made.notes == ["the worker on node one, GPU-a is lost: it does not answer"]
    assert made.ray.killed == ["one"]
    assert made.crew.alive() == set()
    made.crew.recruit()  # its node starts another
    assert made.crew.alive() == {"GPU-a"}
