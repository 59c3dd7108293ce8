"""Which row goes to which GPU, without Ray."""

from pathlib import Path

import pytest

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.record_file import open_record
from mlakit.bench.results import BenchmarkResult, Place, Record, Session, TimingRow
from mlakit.bench.table import group_rows
from mlakit.distributed.ray_comparisons import MOST_ATTEMPTS, Comparisons

A, B = Place(node="one", gpu="GPU-a"), Place(node="two", gpu="GPU-b")
BOTH = {"GPU-a", "GPU-b"}
TIMING = TimingRow(median=1.0, mean=1.0, std=0.0, min=1.0, max=1.0, p20=1.0, p80=1.0, ci95=(1.0, 1.0), samples=[1.0])


def config(spec="q8", backend="sdpa", **fields):
    return BenchmarkConfig(backend=backend, batch_spec=spec, model="tiny", device="cuda:0", **fields)


def result(config, **fields):
    return BenchmarkResult(config=config, **{"timing": TIMING, **fields})


def failed(config):
    return result(config, timing=None, status="crashed", error="it did")


def record(*rows):
    session = Session(started="", environment={"device": {"name": "a GPU"}})
    return Record(name="test", planned=1, sessions=[session], executor="ray", rows=list(rows))


# Two comparisons of two backends each, and a row that nothing is compared with.
PLAN = [config("q8"), config("q8", "torch_naive"), config("q9"), config("q9", "torch_naive"), config("q10")]


def run(comparisons, gpus, *, lose=None):
    """Measure everything on GPUs that take turns; `lose` is one that vanishes once it has measured a row."""
    alive = {place.gpu: place for place in gpus}
    while comparisons.missing():
        for gpu, place in list(alive.items()):
            taken = comparisons.take(gpu, alive)
            if taken is not None:
                comparisons.put(result(taken), place)
            if gpu == lose:
                del alive[gpu]


def homes(record):
    found = {}
    for row in record.rows:
        found.setdefault(row.config.batch_spec, []).append(row.place.gpu)
    return found


def test_comparisons_are_spread_and_each_stays_on_one_gpu():
    ours = record()
    run(Comparisons(PLAN, ours, BOTH), [A, B])
    assert homes(ours) == {"q8": ["GPU-a"] * 2, "q9": ["GPU-b"] * 2, "q10": ["GPU-a"]}
    assert [row.config for row in ours.rows] == PLAN  # whichever GPU was first
    assert ours.one_gpu_a_comparison
    assert ours.complete


def test_a_lost_gpus_comparison_is_measured_anew_as_a_whole():
    ours = record()
    run(Comparisons(PLAN, ours, BOTH), [A, B], lose="GPU-a")
    assert homes(ours) == {"q8": ["GPU-b"] * 2, "q9": ["GPU-b"] * 2, "q10": ["GPU-b"]}
    assert [row.config for row in ours.rows] == PLAN
    assert ours.one_gpu_a_comparison


def test_until_then_the_record_keeps_its_rows_and_takes_no_ratio_across_gpus():
    ours = record()
    comparisons = Comparisons(PLAN[:2], ours, BOTH)
    for place in (A, B):  # "GPU-a" is lost when it has measured the first
        comparisons.put(result(comparisons.take(place.gpu, {place.gpu})), place)
    assert [row.place.gpu for row in ours.rows] == ["GPU-b"]
    comparisons = Comparisons(PLAN[:2], ours := record(), BOTH)
    comparisons.put(result(comparisons.take("GPU-a", BOTH)), A)
    taken = comparisons.take("GPU-a", BOTH)
    assert comparisons.lost(taken, A, "gone") is None
    assert comparisons.take("GPU-b", {"GPU-b"}) == PLAN[0]
    assert [row.place.gpu for row in ours.rows] == ["GPU-a"]
    assert comparisons.take("GPU-b", {"GPU-b"}) == PLAN[1]
    comparisons.put(result(PLAN[1]), B)
    assert [row.place.gpu for row in ours.rows] == ["GPU-a", "GPU-b"]
    assert ours.one_gpu_a_comparison is False
    assert len(group_rows(ours.rows)) == 2
    assert not ours.complete
    comparisons.put(result(PLAN[0]), B)
    assert ours.one_gpu_a_comparison
    assert len(group_rows(ours.rows)) == 1
    assert ours.complete


def test_a_comparison_waits_for_a_gpu_that_may_come_back():
    comparisons = Comparisons(PLAN[:2], record(), BOTH)
    comparisons.put(result(comparisons.take("GPU-a", BOTH)), A)
    assert comparisons.take("GPU-b", BOTH) is None
    assert comparisons.take("GPU-a", BOTH) == PLAN[1]
    assert comparisons.take("GPU-a", BOTH) is None  # all are done or at work


def test_a_row_that_takes_its_workers_along_is_not_tried_for_ever():
    ours = record()
    comparisons = Comparisons(PLAN[:1], ours, BOTH)
    for attempt in range(1, MOST_ATTEMPTS + 1):
        taken = comparisons.take("GPU-a", BOTH)
        row = comparisons.lost(taken, A, "the node is gone")
        assert (row is None) == (attempt < MOST_ATTEMPTS)
    assert ours.rows == [row]
    assert (row.status, row.place.attempt) == ("crashed", MOST_ATTEMPTS)
    assert "lost 3 times, the last time on node one: the node is gone" in row.error
    assert comparisons.missing() == []


def test_attempts_are_counted():
    ours = record()
    comparisons = Comparisons(PLAN[:1], ours, BOTH)
    comparisons.lost(comparisons.take("GPU-a", BOTH), A, "gone")
    comparisons.put(result(comparisons.take("GPU-b", {"GPU-b"})), B)
    assert ours.rows[0].place == B.model_copy(update={"attempt": 2})


@pytest.mark.parametrize(
    ("rows", "missing"),
    # What a resumed record may hold of a comparison: nothing, rows of a GPU that is here, of one that is not, of two.
    [
        ([], PLAN[:2]),
        ([result(PLAN[0], place=A)], [PLAN[1]]),
        ([result(PLAN[0], place=Place(node="three", gpu="GPU-c"))], PLAN[:2]),
        ([result(PLAN[0], place=Place(node="three", gpu="GPU-c")), result(PLAN[1], place=B)], [PLAN[0]]),
        ([failed(PLAN[0])], [PLAN[1]]),  # a row without a time is done, wherever that was
        ([result(PLAN[0], place=A), result(PLAN[1], place=A)], []),
    ],
    ids=["nothing", "here", "gone", "both", "failed", "all"],
)
def test_resuming(rows, missing):
    ours = record(*rows)
    comparisons = Comparisons(PLAN[:2], ours, BOTH)
    assert comparisons.missing() == missing
    assert ours.rows == rows  # until there are others
    assert ours.complete == (not missing and bool(rows))
    for expected in missing:
        (place, taken), *others = [(p, c) for p in (A, B) if (c := comparisons.take(p.gpu, BOTH)) is not None]
        assert (taken, others) == (expected, [])
        comparisons.put(result(taken), place)
    assert [row.config for row in ours.rows] == PLAN[:2]
    assert ours.one_gpu_a_comparison
    assert ours.complete
    assert [row in rows for row in ours.rows] == [config not in missing for config in PLAN[:2]]


def test_a_record_of_the_other_executor_is_not_resumed(tmp_path):
    ours = record()
    ours.save(tmp_path / "r.json")
    fresh = record()
    fresh.executor = "local"
    with pytest.raises(
        ValueError, match=r"r\.json was measured with --executor ray; with local rows may be on another"
    ):
        open_record(tmp_path / "r.json", fresh, resume=True)
    assert open_record(tmp_path / "r.json", record(), resume=True).executor == "ray"


def test_the_committed_record():
    """Four GPUs, one worker killed in the middle: every row is there once, its comparison on one GPU, one row measured
    twice; and every GPU has its ceilings.
    """
    record = Record.load(Path(__file__).parents[2] / "results" / "h200x4" / "ray.json")
    assert record.complete
    assert record.one_gpu_a_comparison
    assert len(record.rows) == record.planned == len({row.config.key for row in record.rows}) == 24
    assert all(row.success and row.place.gpu for row in record.rows)
    assert sorted(row.place.attempt for row in record.rows) == [*[1] * 23, 2]
    homes: dict[str, set[str]] = {}
    for row in record.rows:
        homes.setdefault(row.config.batch_spec, set()).add(row.place.gpu)
    assert all(len(gpus) == 1 for gpus in homes.values())
    assert len(set.union(*homes.values())) == 4
    for row in record.rows:
        session = record.sessions[row.session]
        assert session.environment["place"]["gpu"] == row.place.gpu
        assert session.ceilings["bf16"]["flops_per_s"] > 7e14
