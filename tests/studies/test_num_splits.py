import pytest

from mlakit.bench.results import Record
from mlakit.cli.main import main
from mlakit.studies.num_splits import measure_until_worse, splits_parameter, values_for
from tests.studies.fake_rows import fake_rows

STUDY = ("study", "num-splits", "--output-json", "r.json")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pieces(config) -> int | str:
    """What a row's config asks for."""
    (value,) = (config.parameters.get(name) for name in ("num_splits", "num_kv_splits") if name in config.parameters)
    return value


def times(config):
    """FA3: auto is as good as its best, 4. vLLM: auto is half as fast as its best, 16. Ours: auto beats any number.
    CUTLASS: not here.
    """
    if config.backend == "cutlass_mla":
        return "unavailable", "needs compute capability 10.0"
    best = {"flashattn_mla": 4, "vllm_triton_mla": 16, "mlakit": 2, "mlakit_triton": 2}[config.backend]
    value = pieces(config)
    if value == "auto":
        return {"flashattn_mla": 1e-4, "vllm_triton_mla": 2e-4}.get(config.backend, 0.9e-4)
    return 1e-4 * max(best / int(value), int(value) / best)


def test_the_study(monkeypatch, capsys, tmp_path):
    measured = fake_rows(monkeypatch, times)
    assert main([*STUDY, "--batch-specs", "q1s8k", "4q1s64", "--tp", "8"]) == 0
    out, _ = capsys.readouterr()
    assert "cutlass_mla: not available: needs compute capability 10.0" in out
    findings = Record.load(tmp_path / "r.json").findings
    found = {line.partition(":")[0]: line for line in findings if not line.startswith(" ")}
    assert set(found) == {"mlakit", "mlakit_triton", "flashattn_mla", "vllm_triton_mla"}
    assert found["flashattn_mla"].startswith("flashattn_mla: leave num_splits at auto; it is as fast")
    assert found["mlakit"].startswith("mlakit: leave num_splits at auto")
    # With 64 keys there is one piece to try, which is far slower; 8192 keys show the best.
    assert "auto costs at most 100% (q1s8k, where num_kv_splits 16 is best)" in found["vllm_triton_mla"]
    assert "as fast as the best on 1 of 2 batches" in found["vllm_triton_mla"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    by_backend = {}
    for config in measured:
        by_backend.setdefault((config.backend, config.batch_spec), []).append((pieces(config), config.seed))
    # Ascending, until two in a row are far slower; what is better than auto is measured again on other data.
    assert by_backend["flashattn_mla", "q1s8k"] == [("auto", 0), *((n, 0) for n in (1, 2, 4, 8, 16))]
    assert by_backend["vllm_triton_mla", "q1s8k"] == [
        ("auto", 0), *((2**i, 0) for i in range(7)), ("auto", 1), (16, 1),
    ]  # fmt: skip
    assert by_backend["vllm_triton_mla", "4q1s64"] == [("auto", 0), (1, 0)]
    assert by_backend["cutlass_mla", "q1s8k"] == [("auto", 0)]


def test_a_lucky_row_is_not_taken_for_a_good_number(monkeypatch, capsys):
    def outcome(config):
        lucky = pieces(config) == 2 and config.seed == 0
        return 0.8e-4 if lucky else 1e-4

    fake_rows(monkeypatch, outcome)
    assert main([*STUDY, "--backends", "FLASH_ATTN_MLA", "--batch-specs", "q1s8k", "--values", "4", "2"]) == 0
    out = capsys.readouterr().out
    assert "nothing (tie)" in out
    assert "leave num_splits at auto" in out


def test_standard_attention_and_failures(monkeypatch, capsys, tmp_path):
    fake_rows(monkeypatch, lambda config: 1e-4 if pieces(config) == "auto" else ("wrong", "off by 3"))
    assert main([*STUDY, "--model", "llama-3-8b", "--batch-specs", "q1s8k"]) == 1
    out, err = capsys.readouterr()
    assert "flash: nothing to compare" in out
    assert "no row succeeded" in err
    assert {row.config.attention for row in Record.load(tmp_path / "r.json").rows} == {"standard"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--backends", "flashmla"), "flashmla declares no num_kv_splits or num_splits; these do: "),
        (("--backends", "nosuch"), "unknown backend 'nosuch'"),
        (("--batch-specs", "q1s"), 'batch spec "q1s"'),
        (("--values", "0"), "expected a whole number of at least 1, got '0'"),
        (("--resume",), "nothing to resume: r.json does not exist"),
    ],
)
def test_mistakes(monkeypatch, capsys, flags, message):
    fake_rows(monkeypatch, lambda config: 1.0)
    with pytest.raises(SystemExit) as error:
        main([*STUDY, *flags])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_which_backends_declare_it():
    assert splits_parameter("cutlass_mla") == "num_kv_splits"
    assert splits_parameter("mlakit") == "num_splits"
    assert splits_parameter("sdpa") is None


@pytest.mark.parametrize(
    ("backend", "spec", "asked", "values"),
    # A page of keys for each piece at least; the backend's bounds; what was asked for, as far as they allow.
    [
        ("cutlass_mla", "q1s1k", None, [1, 2, 4, 8, 16]),
        ("mlakit", "q1s200", None, [1, 2, 3]),
        ("mlakit", "8q1s64_q1s512", None, [1, 2, 4, 8]),
        ("vllm_triton_mla", "q1s128k", None, [2**i for i in range(10)]),
        ("cutlass_mla", "q1s64", [3, 16, 17, 3], [3, 16]),
    ],
)
def test_values(backend, spec, asked, values):
    assert values_for(backend, spec, asked) == values


def test_failures_between_do_not_stop_the_search(monkeypatch):
    from mlakit.bench.config import BenchmarkConfig
    from mlakit.bench.results import BenchmarkResult
    from tests.studies.fake_rows import timing

    config = BenchmarkConfig(backend="sdpa", batch_spec="q1", model="tiny")
    seconds = {1: 5.0, 2: None, 4: 1.0, 8: 1.3, 16: None, 32: 1.4, 64: 0.1}

    def measure(n):
        time = seconds[n]
        if time is None:
            return BenchmarkResult(config=config, status="error", error="")
        return BenchmarkResult(config=config, timing=timing(time, 0.0))

    assert len(measure_until_worse(measure, seconds, None)) == 6
