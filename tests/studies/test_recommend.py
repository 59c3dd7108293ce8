import pytest

from mlakit.bench.results import Record
from mlakit.cli.main import main
from mlakit.studies.recommend import scope_for, thresholds_for
from mlakit.studies.recommend_report import Setting
from tests.studies.fake_rows import fake_device, fake_rows

RECOMMEND = ("recommend", "--output-json", "r.json", "--batch-specs")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def findings(tmp_path) -> list[str]:
    return Record.load(tmp_path / "r.json").findings


def test_the_fastest_wins_with_its_margin(monkeypatch, capsys, tmp_path):
    seconds = {"mlakit": 1e-4, "flashmla": 1.2e-4, "flashattn_mla": 1.5e-4}
    unavailable = ("unavailable", "needs something else")
    measured = fake_rows(monkeypatch, lambda c: seconds.get(c.backend, unavailable))
    assert main([*RECOMMEND, "64q1s4k", "--model", "deepseek-v3", "--tp", "8"]) == 0
    out = capsys.readouterr().out
    assert "recommended for deepseek-v3, 16 heads, bf16, on a made-up GPU" in out
    assert findings(tmp_path) == ["64q1s4k: mlakit, 100 µs; 20% faster than flashmla"]
    assert "sdpa: not available: needs something else" in out
    assert {config.scope for config in measured} == {"attention"}
    # The one close to the best tries its settings, the far one does not; the winner runs again on other data.
    assert not any(config.parameters for config in measured if config.backend == "flashattn_mla")
    assert any("num_splits" in config.parameters for config in measured if config.backend == "mlakit")
    assert {config.seed for config in measured if config.backend == "mlakit"} == {0, 1, 2}


def test_a_tie_is_called_a_tie(monkeypatch, capsys, tmp_path):
    def outcome(config):
        # FlashMLA is ahead on the first data by what the noise allows, and behind on the others.
        return {"mlakit": 1e-4, "flashmla": 0.98e-4 if config.seed == 0 else 1.01e-4}.get(config.backend, 2e-4)

    fake_rows(monkeypatch, outcome)
    assert main([*RECOMMEND, "64q1s4k", "--backends", "mlakit", "flashmla", "flashattn_mla", "--no-tune"]) == 0
    (line,) = findings(tmp_path)
    assert line.startswith("64q1s4k: mlakit or flashmla, 100 µs; a tie: ")
    assert line.endswith("; 100% faster than flashattn_mla")
    assert "mlakit or flashmla (tie)" in " ".join(capsys.readouterr().out.split())


def test_settings_that_help_are_named(monkeypatch, tmp_path):
    def outcome(config):
        if config.backend == "flashmla":
            return 1.15e-4
        return 1e-4 if config.parameters.get("num_kv_splits") == 8 else 1.2e-4

    fake_rows(monkeypatch, outcome)
    assert main([*RECOMMEND, "q1s8k", "--backends", "vllm_triton_mla", "flashmla"]) == 0
    (line,) = findings(tmp_path)
    assert line == (
        "q1s8k: vllm_triton_mla (num_kv_splits 8), 100 µs; 15% faster than flashmla; 20% faster than vllm_triton_mla "
        "as it comes"
    )


def test_a_setting_that_ties_with_the_default_is_not_recommended(monkeypatch, tmp_path):
    fake_rows(monkeypatch, lambda c: 0.999e-4 if c.parameters.get("num_splits") == 8 else 1e-4)
    assert main([*RECOMMEND, "q1s8k", "--backends", "mlakit"]) == 0
    assert findings(tmp_path) == ["q1s8k: mlakit, 100 µs"]


def test_thresholds_are_tried_where_they_divide_a_batch_otherwise(monkeypatch, tmp_path):
    def outcome(config):
        return 1e-4 if config.reorder_batch_threshold == 16 else 2e-4

    measured = fake_rows(monkeypatch, outcome)
    assert main([*RECOMMEND, "16q16s1k_8q1s1k", "--backends", "mlakit"]) == 0
    assert findings(tmp_path)[0].startswith("16q16s1k_8q1s1k: mlakit (reorder_batch_threshold 16), 100 µs")
    assert {c.reorder_batch_threshold for c in measured} == {"auto", 0, 16}
    assert {config.scope for config in measured} == {"pipeline"}


def test_one_backend_for_all_and_who_refuses(monkeypatch, tmp_path):
    def outcome(config):
        if config.backend == "cudnn" and config.batch_spec == "q1s8k":
            return "unsupported", "head dims up to 256"
        fast = {"q1s8k": "mlakit", "q1s1k": "flashmla"}[config.batch_spec]
        return 1e-4 if config.backend == fast else 1.1e-4 if config.backend == "mlakit" else 1.5e-4

    fake_rows(monkeypatch, outcome)
    assert main([*RECOMMEND, "q1s8k", "q1s1k", "--backends", "mlakit", "flashmla", "cudnn", "--no-tune"]) == 0
    assert findings(tmp_path) == [
        "q1s8k: mlakit, 100 µs; 50% faster than flashmla",
        "  cudnn: not supported: head dims up to 256",
        "q1s1k: flashmla, 100 µs; 10% faster than mlakit",
        "one backend for all: mlakit, as it comes at most 10% behind the fastest (q1s1k)",
    ]


def test_workloads_of_a_config(monkeypatch, tmp_path):
    fake_rows(monkeypatch, lambda config: 1e-4, device="cpu")
    command = ("recommend", "--output-json", "r.json", "--config", "production_mix", "--no-tune", "--backends", "sdpa")
    assert main(command) == 0
    assert [line.partition(":")[0] for line in findings(tmp_path)[:2]] == ["chat", "chunked prefill"]
    assert Record.load(tmp_path / "r.json").rows[0].config.model == "deepseek-v2-lite"  # as the config has it on a CPU


def test_the_model_of_a_config(monkeypatch, tmp_path):
    measured = fake_rows(monkeypatch, lambda config: 1e-4)
    command = ("recommend", "--output-json", "r.json", "--config", "standard_attention", "--no-tune")
    assert main([*command, "--backends", "sdpa", "flash"]) == 0
    assert {(config.model, config.attention, config.num_kv_heads) for config in measured} == {
        ("llama-3-8b", "standard", 8)
    }


def test_nothing_ran(monkeypatch, capsys):
    fake_rows(monkeypatch, lambda config: ("error", "broken"))
    assert main([*RECOMMEND, "q1s8k", "--backends", "sdpa"]) == 1
    out, err = capsys.readouterr()
    assert "sdpa: failed: broken" in out
    assert "no row succeeded" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give your workloads, as --batch-specs 64q1s4k"),
        (("--batch-specs", "q1", "--config", "quickstart"), "give --batch-specs or --config, not both"),
        (("--batch-specs", "q1x"), 'batch spec "q1x"'),
        (("--config", "nosuch"), "unknown config 'nosuch'"),
        (("--batch-specs", "q1", "--backends", "flash", "--model", "deepseek-v3"), "flash computes no mla attention"),
        (("--batch-specs", "q1", "--resume"), "--resume needs --output-json"),
        (("--batch-specs", "q1", "--tp", "0"), "expected a whole number of at least 1, got '0'"),
    ],
)
def test_mistakes(monkeypatch, capsys, arguments, message):
    measured = fake_rows(monkeypatch, lambda config: 1.0)
    with pytest.raises(SystemExit) as error:
        main(["recommend", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert measured == []


@pytest.mark.parametrize(
    ("backend", "spec", "thresholds"),
    # Plain decode; one pipeline for both; the rule of up to 8 sends both ways, or one; a backend that takes one token.
    [
        ("mlakit", "8q1s1k", []),
        ("torch_absorb", "q4s1k", []),
        ("mlakit", "q4s1k_q1s1k", [0, 1]),
        ("mlakit", "q64s1k_q4s1k", [0, 64]),
        ("mlakit", "q64s1k", [64]),
        ("vllm_triton_mla", "q4s1k_q1s1k", [0, 4]),
    ],
)
def test_thresholds(backend, spec, thresholds):
    assert thresholds_for(backend, spec) == thresholds


def test_scope():
    assert scope_for("8q1s1k", None, "mla") == "attention"
    assert scope_for("8q1s1k_q2s1k", None, "mla") == "pipeline"
    assert scope_for("8q1s1k_q2s1k", None, "standard") == "attention"
    assert scope_for("8q1s1k", "pipeline", "mla") == "pipeline"


def test_a_setting_in_words():
    assert str(Setting("a")) == "a"
    assert str(Setting("a", (("num_splits", 4),), 8)) == "a (num_splits 4, reorder_batch_threshold 8)"


def test_on_a_cpu_for_real(monkeypatch, capsys, tmp_path):
    fake_device(monkeypatch, "cpu")
    assert main([*RECOMMEND, "2q1s33_q4s32", "--model", "tiny", "--repeats", "3", "--backends", "sdpa"]) == 0
    assert "2q1s33_q4s32: sdpa" in capsys.readouterr().out
    assert all(row.check for row in Record.load(tmp_path / "r.json").rows if row.success)
