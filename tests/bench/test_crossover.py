import pytest

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.crossover import Curve, find_curves, recommend_thresholds
from mlakit.bench.results import BenchmarkResult, TimingRow


def row(spec: str, pipeline: str, median: float | None, backend: str = "sdpa", half: float = 0.0) -> BenchmarkResult:
    """A row whose 95% interval is `half` wide on either side of the median."""
    config = BenchmarkConfig.model_validate(
        {"backend": backend, "batch_spec": spec, "model": "tiny", "pipeline": pipeline}
    )
    if median is None:
        return BenchmarkResult(config=config, status="timeout", error="too slow")
    timing = TimingRow(
        median=median, mean=median, std=0, min=median, max=median, p20=median, p80=median,
        ci95=(median - half, median + half), samples=[median],
    )  # fmt: skip
    return BenchmarkResult(config=config, timing=timing)


def rows_of(
    times: dict[int, tuple[float | None, float | None]],
    template: str = "q{}s1k",
    backend: str = "sdpa",
    half: float = 0.0,
) -> list[BenchmarkResult]:
    """Rows from {q_len: (decode, prefill)}."""
    return [
        row(template.format(q), name, median, backend, half)
        for q, both in times.items()
        for name, median in zip(("decode", "prefill"), both, strict=True)
    ]


def curve(*args, **options) -> Curve:
    (found,) = find_curves(rows_of(*args, **options))
    return found


@pytest.mark.parametrize(
    ("times", "threshold", "next_q_len", "said"),
    # The rule; decode throughout; prefill from the start; a tie, which is not slower; a curve that crosses back,
    # where only what comes before the first loss counts; out of order; one point.
    [
        ({1: (1, 9), 4: (2, 9), 16: (9, 8)}, 4, 16, "decode is faster up to q_len 4, prefill from 16 on"),
        ({1: (1, 9), 4: (2, 9)}, 4, None, "decode is faster up to q_len 4, the longest measured"),
        ({2: (9, 1), 4: (9, 1)}, 0, 2, "prefill is faster from q_len 2 on, the shortest measured"),
        ({1: (3, 3), 4: (4, 3)}, 1, 4, "decode is faster up to q_len 1, prefill from 4 on"),
        ({1: (1, 9), 4: (9, 8), 8: (1, 9)}, 1, 4, "decode is faster up to q_len 1, prefill from 4 on"),
        ({16: (9, 8), 1: (1, 9), 4: (2, 9)}, 4, 16, "decode is faster up to q_len 4, prefill from 16 on"),
        ({8: (1, 2)}, 8, None, "decode is faster up to q_len 8, the longest measured"),
    ],
)
def test_where_prefill_wins(times, threshold, next_q_len, said):
    found = curve(times)
    assert (found.backend, found.batch_size, found.kv_len) == ("sdpa", 1, 1024)
    assert (found.threshold, found.next_q_len) == (threshold, next_q_len)
    assert [point.q_len for point in found.points] == sorted(times)
    assert str(found).startswith(f"sdpa, batch 1, 1024 keys: {said}")


@pytest.mark.parametrize(
    ("times", "half", "sure", "crossings", "said"),
    # Known on both sides; a tie in between, which belongs to neither; ties at the start; nothing but ties; to and fro;
    # prefill first, then decode; a pipeline that cannot run has lost.
    [
        ({1: (1, 2), 4: (4, 3)}, 0.1, (1, 4), 1, "noise: decode up to 1 (by 100%), prefill from 4 on (by 33%)"),
        ({1: (1, 2), 4: (3, 3), 16: (4, 3)}, 0.1, (1, 16), 1, "decode up to 1 (by 100%), prefill from 16 on (by 33%)"),
        ({1: (2, 2), 4: (4, 3)}, 0.1, (None, 4), 0, "beyond the noise: prefill from 4 on (by 33%)"),
        ({1: (2.1, 2), 4: (3, 3)}, 0.1, (None, None), 0, "; nowhere can the two be told apart"),
        ({1: (1, 2), 4: (2, 1), 16: (1, 2)}, 0.1, (1, None), 2, "the faster one changes 2 times along the curve"),
        ({1: (2, 1), 4: (1, 2)}, 0.1, (None, None), 1, "changes from prefill to decode along the curve"),
        ({1: (1, 2), 4: (None, 3)}, 0.1, (1, 4), 1, "prefill from 4 on (the other cannot run)"),
    ],
)  # fmt: skip
def test_how_sure_it_is(times, half, sure, crossings, said):
    found = curve(times, half=half)
    edges = tuple(point.q_len if point else None for point in (found.sure_decode, found.sure_prefill))
    assert (edges, found.crossings) == (sure, crossings)
    assert said in str(found)
    assert found.is_simple == ("along the curve" not in said)


def test_each_backend_batch_size_and_length_has_its_own():
    rows = [
        *rows_of({1: (1, 2), 4: (2, 1)}),
        *rows_of({1: (1, 2), 4: (1, 2)}, "8q{}s1k"),
        *rows_of({1: (2, 1), 4: (2, 1)}, "q{}s2k"),
        *rows_of({1: (1, 2), 4: (1, 2)}, backend="torch_naive"),
    ]
    assert [(c.backend, c.batch_size, c.kv_len, c.threshold) for c in find_curves(rows)] == [
        ("sdpa", 1, 1024, 1),
        ("sdpa", 8, 1024, 4),
        ("sdpa", 1, 2048, 0),
        ("torch_naive", 1, 1024, 4),
    ]


def test_a_q_len_at_which_neither_pipeline_ran_is_left_out():
    found = curve({1: (1, 2), 2: (None, None), 8: (2, 1)})
    assert [point.q_len for point in found.points] == [1, 8]


@pytest.mark.parametrize(
    "rows",
    # Nothing; a pipeline without its partner; rows of an ordinary run; requests of two kinds; nothing but failures.
    [
        [],
        [row("q4s1k", "decode", 1.0)],
        [row("q4s1k", "auto", 1.0), row("q8s1k", "auto", 1.0)],
        rows_of({4: (1, 2)}, "q{}s1k_q1s1k"),
        rows_of({4: (None, None)}),
    ],
    ids=["empty", "unpaired", "auto", "mixed", "failed"],
)
def test_nothing_to_compare(rows):
    assert find_curves(rows) == []
    assert recommend_thresholds([]) == []


def test_rows_that_differ_in_anything_else_are_curves_of_their_own():
    def rows(heads, decode, prefill):
        for pipeline, median in (("decode", decode), ("prefill", prefill)):
            config = BenchmarkConfig(
                backend="sdpa",
                batch_spec="q4s64",
                model="tiny",
                num_q_heads=heads,
                pipeline=pipeline,
                label=f"sdpa_{heads}h_{pipeline}",
            )
            timing = TimingRow(median=median, mean=1, std=0, min=1, max=1, p20=1, p80=1, ci95=(1, 1), samples=[1])
            yield BenchmarkResult(config=config, timing=timing)

    found = find_curves([*rows(8, 1.0, 2.0), *rows(4, 2.0, 1.0)])
    assert [(c.backend, c.threshold, c.next_q_len) for c in found] == [("sdpa_8h", 4, None), ("sdpa_4h", 0, 4)]


# --- one threshold for all ---


def recommended(*curves: dict[int, tuple[float | None, float | None]]) -> tuple[int, str]:
    rows = [r for size, times in enumerate(curves, start=1) for r in rows_of(times, f"{size}q{{}}s1k")]
    (found,) = recommend_thresholds(find_curves(rows))
    return found.threshold, str(found)


def test_the_threshold_that_is_right_everywhere():
    found = recommended({1: (1, 2), 4: (1, 2), 16: (2, 1)}, {1: (1, 4), 16: (4, 1)})
    assert found == (4, "sdpa: reorder_batch_threshold 4; it picks the faster pipeline everywhere")


def test_the_threshold_that_costs_least_where_curves_disagree():
    # Batch 1 crosses beyond 16, batch 2 before 4. Up to 4 costs batch 2 5% and batch 1 4%, up to 16 costs batch 2 50%,
    # and up to 1 costs batch 1 100%.
    found = recommended({1: (1, 2), 4: (1, 2), 16: (1, 1.04)}, {1: (1, 2), 4: (1.05, 1), 16: (1.5, 1)})
    assert found == (4, "sdpa: reorder_batch_threshold 4; it costs at most 5.0% (batch 2, q_len 4)")


def test_curves_count_where_only_others_were_measured():
    # Batch 1 was not measured at 8, where decode would cost it twice prefill's time: half-way in logarithms to four
    # times at 16. By the measured points alone 8 would cost nothing; up to 4 costs batch 2 50% there.
    found = recommended({4: (1, 1), 16: (4, 1)}, {4: (1, 8), 8: (1, 1.5), 16: (2, 1)})
    assert found == (4, "sdpa: reorder_batch_threshold 4; it costs at most 50% (batch 2, q_len 8)")


def test_prefill_throughout_and_a_pipeline_that_cannot_run():
    assert recommended({1: (2, 1), 4: (2, 1)})[0] == 0
    assert recommended({1: (1, 2), 4: (None, 1)}, {1: (1, 2), 4: (1, 2)})[0] == 1
    disagree = recommended({1: (None, 2), 4: (1, None)})
    assert disagree[1].endswith("the pipeline it picks cannot run")
