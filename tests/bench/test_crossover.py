import pytest

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.crossover import Crossover, find_crossovers
from mlakit.bench.results import BenchmarkResult, TimingRow


def row(spec: str, pipeline: str, median: float | None, backend: str = "sdpa") -> BenchmarkResult:
    config = BenchmarkConfig.model_validate(
        {"backend": backend, "batch_spec": spec, "model": "tiny", "pipeline": pipeline}
    )
    if median is None:
        return BenchmarkResult(config=config, status="timeout", error="too slow")
    timing = TimingRow(
        median=median, mean=median, std=0, min=median, max=median, p20=median, p80=median, ci95=(median, median),
        samples=[median],
    )  # fmt: skip
    return BenchmarkResult(config=config, timing=timing)


def curve(
    times: dict[int, tuple[float | None, float | None]], template: str = "q{}s1k", backend: str = "sdpa"
) -> list[BenchmarkResult]:
    """Rows from {q_len: (decode, prefill)}."""
    return [
        row(template.format(q), name, median, backend)
        for q, both in times.items()
        for name, median in zip(("decode", "prefill"), both, strict=True)
    ]


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
    (found,) = find_crossovers(curve(times))
    assert found == Crossover("sdpa", 1, 1024, threshold, next_q_len, tuple(sorted(times)))
    assert str(found) == f"sdpa, batch 1, 1024 keys: {said}"


def test_each_backend_batch_size_and_length_has_its_own():
    rows = [
        *curve({1: (1, 2), 4: (2, 1)}),
        *curve({1: (1, 2), 4: (1, 2)}, "8q{}s1k"),
        *curve({1: (2, 1), 4: (2, 1)}, "q{}s2k"),
        *curve({1: (1, 2), 4: (1, 2)}, backend="torch_naive"),
    ]
    assert [(c.backend, c.batch_size, c.kv_len, c.threshold) for c in find_crossovers(rows)] == [
        ("sdpa", 1, 1024, 1),
        ("sdpa", 8, 1024, 4),
        ("sdpa", 1, 2048, 0),
        ("torch_naive", 1, 1024, 4),
    ]


def test_a_q_len_of_which_one_pipeline_failed_is_left_out():
    (found,) = find_crossovers(curve({1: (1, 2), 2: (1, None), 4: (None, 1), 8: (2, 1)}))
    assert (found.threshold, found.next_q_len, found.measured) == (1, 8, (1, 8))


@pytest.mark.parametrize(
    "rows",
    # Nothing; a pipeline without its partner; rows of an ordinary run; requests of two kinds; nothing but failures.
    [
        [],
        [row("q4s1k", "decode", 1.0)],
        [row("q4s1k", "auto", 1.0), row("q8s1k", "auto", 1.0)],
        curve({4: (1, 2)}, "q{}s1k_q1s1k"),
        curve({4: (None, None)}),
    ],
    ids=["empty", "unpaired", "auto", "mixed", "failed"],
)
def test_nothing_to_compare(rows):
    assert find_crossovers(rows) == []


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

    found = find_crossovers([*rows(8, 1.0, 2.0), *rows(4, 2.0, 1.0)])
    assert [(c.backend, c.threshold, c.next_q_len) for c in found] == [("sdpa_8h", 4, None), ("sdpa_4h", 0, 4)]
