from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.bench import config_file
from mlakit.bench.batch_spec import parse_batch_spec
from mlakit.bench.config_schema import BatchMix, ConfigFile, RangeVariable, SpecRange, Sweep


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a config from its text; the file is called mine.yaml."""
    monkeypatch.chdir(tmp_path)

    def from_text(text: str) -> config_file.LoadedConfig:
        (tmp_path / "mine.yaml").write_text(text)
        return config_file.load("mine.yaml")

    return from_text


@pytest.fixture
def refusal(load):
    """The message with which a config is refused."""

    def of(text: str) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is what is tested
            load(text)
        assert "\n" not in str(error.value)
        return str(error.value)

    return of


# --- what a config may say ---


def test_every_section(load):
    content = load(
        """
description: everything at once
mode: compare
model: {name: tiny, num_layers: 3, num_q_heads: 8, kv_lora_rank: 32, block_size: 16}
batch_specs: ["q1s1k", "2q2k_32q1s1k"]
backends: [sdpa, torch_absorb]
backend_parameters: {sdpa: {reorder_batch_threshold: 4}}
parameter_sweep: {param_name: reorder_batch_threshold, values: [1, 16], include_auto: true}
model_parameter_sweep: {param_name: num_q_heads, values: [8, 4], label_format: "{backend}_{value}h"}
benchmark: {attention: mla, device: cpu, dtype: fp32, repeats: 3, warmup_iters: 0, profile_memory: true, l2: both,
            cuda_graph: false, scope: pipeline, check: false, timeout: 12.5, seed: 7}
output: {csv: a.csv, json: a.json, plot: a.png}
"""
    ).content
    assert content.description == "everything at once"
    assert (content.model.name, content.model.num_layers, content.model.num_q_heads) == ("tiny", 3, 8)
    assert (content.model.kv_lora_rank, content.model.block_size, content.model.head_dim) == (32, 16, None)
    assert content.specs() == ["q1s1k", "2q2k_32q1s1k"]
    assert content.backend_names() == ["sdpa", "torch_absorb"]
    assert content.backend_parameters == {"sdpa": {"reorder_batch_threshold": 4}}
    assert content.parameter_sweep
    assert content.parameter_sweep.all_values() == ["auto", 1, 16]
    assert content.model_parameter_sweep
    assert content.model_parameter_sweep.all_values() == [8, 4]
    assert content.benchmark.model_dump() == {
        "attention": "mla",
        "device": "cpu",
        "dtype": "fp32",
        "repeats": 3,
        "warmup_iters": 0,
        "profile_memory": True,
        "l2": "both",
        "cuda_graph": False,
        "scope": "pipeline",
        "check": False,
        "timeout": 12.5,
        "seed": 7,
    }
    assert content.output.model_dump(by_alias=True) == {"csv": "a.csv", "json": "a.json", "plot": "a.png"}


def test_vllms_own_shape(load):
    # As vLLM's suite writes its MLA configs: capitals, benchmark settings and backends' sections at the top.
    content = load(
        """
model:
  name: "deepseek-v3"
  num_layers: 60
  num_q_heads: 128
  num_kv_heads: 1
  head_dim: 576
  block_size: 128
batch_specs: ["16q1s512"]
backends:
  - CUTLASS_MLA
  - FLASH_ATTN_MLA
  - FLASHMLA
device: "cuda:0"
repeats: 100
warmup_iters: 10
profile_memory: true
FLASH_ATTN_MLA:
  reorder_batch_threshold: 512
FLASHMLA:
  reorder_batch_threshold: 1
"""
    ).content
    assert content.backend_names() == ["cutlass_mla", "flashattn_mla", "flashmla"]
    assert content.backend_parameters == {
        "flashattn_mla": {"reorder_batch_threshold": 512},
        "flashmla": {"reorder_batch_threshold": 1},
    }
    given = content.benchmark
    assert (given.device, given.repeats, given.warmup_iters, given.profile_memory) == ("cuda:0", 100, 10, True)


def test_backend_sections_at_the_top_join_backend_parameters(load):
    content = load(
        "batch_specs: [q1]\nFLASHMLA: {reorder_batch_threshold: 1}\n"
        "backend_parameters: {sdpa: {reorder_batch_threshold: 2}}\n"
    ).content
    assert content.backend_parameters == {
        "sdpa": {"reorder_batch_threshold": 2},
        "flashmla": {"reorder_batch_threshold": 1},
    }


def test_model_as_a_mere_name(load):
    assert load("model: kimi-k2\nbatch_specs: [q1]\n").content.model.name == "kimi-k2"


def test_backend_and_backends_name_each_once(load):
    assert load("backend: FLASHMLA\nbatch_specs: [q1]\n").content.backend_names() == ["flashmla"]
    several = load("backends: [sdpa, FLASHMLA, TORCH_SDPA, flashmla]\nbatch_specs: [q1]\n").content
    assert several.backend_names() == ["sdpa", "flashmla"]
    assert load("batch_specs: [q1]\n").content.backend_names() == []


# --- ranges and batch sizes ---


@pytest.mark.parametrize(
    ("variable", "values"),
    # The end belongs to a range unless it says otherwise; a step that jumps over it; a single value; nothing.
    [
        ({"start": 1, "stop": 4}, [1, 2, 3, 4]),
        ({"start": 1, "stop": 4, "end_inclusive": False}, [1, 2, 3]),
        ({"start": 16, "stop": 64, "step": 16}, [16, 32, 48, 64]),
        ({"start": 16, "stop": 64, "step": 16, "end_inclusive": False}, [16, 32, 48]),
        ({"start": 1, "stop": 10, "step": 4}, [1, 5, 9]),
        ({"start": 3, "stop": 3}, [3]),
        ({"start": 3, "stop": 3, "end_inclusive": False}, []),
    ],
)
def test_range_values(variable, values):
    assert RangeVariable(**variable).values() == values


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 20), st.booleans())
def test_range_values_by_definition(start, stop, step, end):
    found = RangeVariable(start=start, stop=stop, step=step, end_inclusive=end).values()
    assert found == [
        n for n in range(100) if start <= n and (n - start) % step == 0 and (n < stop or (end and n == stop))
    ]


def test_several_variables_give_the_product_the_last_fastest():
    found = SpecRange.model_validate(
        {
            "template": "{count}q{q_len}s{kv}k",
            "count": {"start": 1, "stop": 2},
            "q_len": {"start": 1, "stop": 9, "step": 4, "end_inclusive": False},
            "kv": {"start": 1, "stop": 3, "step": 2},
        }
    ).specs()
    assert found == [
        "1q1s1k", "1q1s3k", "1q5s1k", "1q5s3k",
        "2q1s1k", "2q1s3k", "2q5s1k", "2q5s3k",
    ]  # fmt: skip


def test_a_variable_may_stand_twice_in_a_template():
    assert SpecRange.model_validate({"template": "q{n}_{n}q1s1k", "n": {"start": 2, "stop": 3}}).specs() == [
        "q2_2q1s1k",
        "q3_3q1s1k",
    ]


def test_specs_are_lists_and_ranges_times_sizes_without_repeats(load):
    content = load(
        """
batch_specs: ["q4s1k", "q1s1k_2q8"]
batch_spec_ranges:
  - template: "q{n}s1k"
    n: {start: 2, stop: 4, step: 2}
  - template: "q{n}s1k"
    n: {start: 4, stop: 5}
"""
    ).content
    once = ["q4s1k", "q1s1k_2q8", "q2s1k", "q5s1k"]
    assert content.specs() == once
    sized = content.model_copy(update={"batch_sizes": [1, 3]})
    assert sized.specs() == [*once, "3q4s1k", "3q1s1k_6q8", "3q2s1k", "3q5s1k"]


# --- sweeps ---


@pytest.mark.parametrize(
    ("fields", "values"),
    # Auto comes first and once, wherever it is from; values from a command line may be words.
    [
        ({"values": [4, 1]}, [4, 1]),
        ({"values": [4, 1], "include_auto": True}, ["auto", 4, 1]),
        ({"values": [4, "auto"], "include_auto": True}, [4, "auto"]),
        ({"values": [4, "auto"]}, [4, "auto"]),
        ({"values": ["nhd", "hnd"]}, ["nhd", "hnd"]),
    ],
)
def test_sweep_values(fields, values):
    assert Sweep(param_name="x", **fields).all_values() == values


def test_several_sweeps():
    one, two = ({"param_name": name, "values": [1]} for name in ("a", "b"))
    content = ConfigFile.model_validate({"parameter_sweep": one, "parameter_sweeps": [two]})
    assert [sweep.param_name for sweep in content.sweeps()] == ["a", "b"]
    with pytest.raises(ValueError, match="a parameter is swept twice: a, a"):
        ConfigFile.model_validate({"parameter_sweep": one, "parameter_sweeps": [one]})


# --- mixes ---


def _mix(**part):
    return BatchMix.model_validate({"name": "m", "seed": 3, "parts": [{"requests": 400, **part}]})


def test_a_mix_is_the_same_batch_everywhere():
    mix = {"name": "m", "seed": 3, "parts": [
        {"requests": 3, "context": {"median": 1000, "sigma": 1, "max": 9000}},
        {"requests": 2, "q_len": {"distribution": "uniform", "min": 2, "max": 9}, "context": 7},
        {"requests": 2, "q_len": 5},
    ]}  # fmt: skip
    # Random() and NormalDist.inv_cdf alone are used, whose numbers Python promises.
    assert BatchMix.model_validate(mix).spec() == "q1s1119_q1s1302_q1s222_q2s9_q4s11_2q5"
    content = ConfigFile.model_validate({"batch_specs": ["q1"], "batch_sizes": [2], "batch_mixes": [mix]})
    assert content.specs() == ["2q1", BatchMix.model_validate(mix).spec()]  # sizes are not for mixes
    assert list(content.mix_names().values()) == ["m"]


@pytest.mark.parametrize(
    ("lengths", "median", "spread"),
    # Half of 400 draws lie below the median, some 68% within a deviation of it; what is cut off piles up at its bound.
    [
        ({"median": 1000, "sigma": 0.5, "max": 10**6}, 1000, (1000 * exp(-0.5), 1000 * exp(0.5))),
        ({"distribution": "normal", "mean": 1000, "std": 100, "max": 10**6}, 1000, (900, 1100)),
        ({"distribution": "uniform", "min": 500, "max": 1500}, 1000, (660, 1340)),
    ],
)
def test_lengths_follow_their_distribution(lengths, median, spread):
    drawn = sorted(r.context_len for r in parse_batch_spec(_mix(context=lengths).spec()))
    assert drawn[200] == pytest.approx(median, rel=0.1)
    assert sum(spread[0] <= n <= spread[1] for n in drawn) / 400 == pytest.approx(0.68, abs=0.07)


def test_lengths_stay_within_their_bounds():
    drawn = {
        r.context_len for r in parse_batch_spec(_mix(context={"median": 50, "sigma": 3, "min": 40, "max": 60}).spec())
    }
    assert min(drawn) == 40
    assert max(drawn) == 60


# --- a CPU runs smaller ---


def test_on_cpu_is_laid_over_the_rest(load):
    found = load(
        """
description: big
model: {name: deepseek-v3, num_layers: 4}
batch_specs: ["q8k"]
batch_spec_ranges: [{template: "q{n}s8k", n: {start: 1, stop: 2}}]
backends: [sdpa, torch_naive]
parameter_sweep: {param_name: reorder_batch_threshold, values: [1, 2, 4], label_format: "t{value}"}
benchmark: {repeats: 20, warmup_iters: 5}
on_cpu:
  model: {num_layers: 1}
  batch_specs: ["q64"]
  parameter_sweep: {values: [1]}
  benchmark: {repeats: 2}
"""
    )
    big, small = found.content, found.on_cpu
    assert big.specs() == ["q8k", "q1s8k", "q2s8k"]
    assert small.specs() == ["q64"]  # the ranges go with the list that they stood beside
    assert (small.model.name, small.model.num_layers) == ("deepseek-v3", 1)
    assert (big.model.name, big.model.num_layers) == ("deepseek-v3", 4)
    assert small.parameter_sweep
    assert (small.parameter_sweep.values, small.parameter_sweep.label_format) == ([1], "t{value}")
    assert (small.benchmark.repeats, small.benchmark.warmup_iters) == (2, 5)
    assert (small.description, small.backend_names()) == ("big", ["sdpa", "torch_naive"])
    assert found.cpu_changes == ["batch_specs", "benchmark", "model", "parameter_sweep"]


def test_on_cpu_ranges_replace_the_list_too(load):
    found = load(
        "batch_specs: [q8k]\nbatch_sizes: [1, 2]\n"
        "on_cpu:\n  batch_spec_ranges: [{template: 'q{n}s64', n: {start: 1, stop: 2}}]\n"
    )
    assert found.on_cpu.specs() == ["q1s64", "q2s64", "2q1s64", "2q2s64"]


def test_without_on_cpu_both_are_the_same(load):
    found = load("batch_specs: [q1]\n")
    assert found.on_cpu == found.content
    assert found.cpu_changes == []


# --- what it may not say ---


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    # A misspelled key in each kind of section and at each depth: at the top, nested, in a flow mapping, in a list's
    # item, in a range's variable, in what a CPU changes; and a setting that another section has.
    [
        ("batch_specs: [q1]\n\nbenchmrk: {repeats: 1}\n", 3, ["'benchmrk';", "'benchmark'?", "model_parameter_sweep"]),
        ("model:\n  name: tiny\n  num_head: 3\n", 3, ["'num_head' in model", "valid: block_size, head_dim"]),
        ("batch_specs: [q1]\nmodel: {naem: tiny}\n", 2, ["'naem' in model", "did you mean 'name'?"]),
        ("benchmark:\n  warmup_iter: 3\n", 2, ["'warmup_iter' in benchmark", "did you mean 'warmup_iters'?"]),
        ("benchmark:\n  num_layers: 3\n", 2, ["'num_layers' in benchmark", "valid: attention, check"]),
        ("output:\n  csv: a\n  jsn: b\n", 3, ["'jsn' in output", "did you mean 'json'?", "valid: csv, json, plot"]),
        (
            "parameter_sweep:\n  param_name: x\n  values: [1]\n  include_autos: true\n",
            4,
            ["'include_autos' in parameter_sweep", "did you mean 'include_auto'?"],
        ),
        (
            "model_parameter_sweep:\n  label: x\n  param_name: x\n  values: [1]\n",
            2,
            ["'label' in model_parameter_sweep", "label_format"],
        ),
        (
            "batch_spec_ranges:\n  - template: q{n}\n    n: {start: 1, stop: 2}\n  - template: q{n}\n    n:\n"
            "      start: 1\n      stop: 2\n      end_inclusiv: false\n",
            8,
            ["'end_inclusiv' in batch_spec_ranges.1.n", "did you mean 'end_inclusive'?"],
        ),
        ("batch_specs: [q1]\non_cpu:\n  batch_spec: [q1]\n", 3, ["'batch_spec'", "did you mean 'batch_specs'?"]),
        (
            "benchmark:\n  repeats: 3\non_cpu:\n  benchmark:\n    repeat: 1\n",
            5,
            ["'repeat' in benchmark", "did you mean 'repeats'?"],
        ),
        ("batch_specs: [q1]\nflashmlaa: {x: 1}\n", 2, ["'flashmlaa'", "backend_parameters"]),
    ],
)
def test_unknown_key(refusal, text, line, parts):
    message = refusal(text)
    assert message.startswith(f"mine.yaml:{line}: unknown key ")
    for part in parts:
        assert part in message


def test_unknown_keys_are_counted(refusal):
    assert refusal("batch_specs: [q1]\none: 1\ntwo: 2\nthree: 3\n").endswith("(and 2 more)")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    # A value that cannot be meant, by every validator there is: name, number, choice, spec, template, label, shape.
    [
        ("batch_specs:\n  - q1\n  - q0\n", 3, 'batch_specs.1: batch spec "q0": segment 1 ("q0") has q_len 0'),
        ("batch_specs: q1\n", 1, "batch_specs: input should be a valid list, got 'q1'"),
        (
            "backends:\n  - sdpa\n  - FLASHMLAA\n",
            3,
            "backends.1: unknown backend 'FLASHMLAA'; did you mean 'flashmla'?",
        ),
        ("description: x\nbackend: sdp\n", 2, "backend: unknown backend 'sdp'; did you mean 'sdpa'?"),
        ("description: x\nmodel: tinny\n", 2, "model.name: unknown model 'tinny'; did you mean 'tiny'?"),
        ("model:\n  num_layers: 1\n  name: tinny\n", 3, "model.name: unknown model 'tinny'; did you mean 'tiny'?"),
        ("model:\n  num_layers: four\n", 2, "model.num_layers: input should be a valid integer"),
        ("description: x\nmode: fast\n", 2, "mode: input should be 'compare' or 'decode_vs_prefill', got 'fast'"),
        ("benchmark:\n  l2: warm\n", 2, "benchmark.l2: input should be 'cold', 'hot' or 'both', got 'warm'"),
        ("benchmark:\n  repeats: 0\n", 2, "benchmark.repeats: input should be greater than or equal to 1, got 0"),
        ("benchmark:\n  timeout: -1\n", 2, "benchmark.timeout: input should be greater than 0, got -1"),
        ("description: x\nbenchmark: 3\n", 2, "benchmark: input should be a valid dictionary"),
        ("backend_parameters:\n  nosuch: {a: 1}\n", 2, "unknown backend 'nosuch'"),
        ("parameter_sweep:\n  param_name: a\n  values: []\n", 3, "parameter_sweep.values: list should have at least 1"),
        ("description: x\nparameter_sweep:\n  values: [1]\n", 2, "parameter_sweep.param_name: field required"),
        (
            "parameter_sweep:\n  param_name: a\n  values: [1]\n  label_format: '{name}'\n",
            1,
            "parameter_sweep: label_format may use {backend}, {param_name} and {value}, got '{name}'",
        ),
        (
            "batch_spec_ranges:\n  - template: 'q{n}s{m}'\n    n: {start: 1, stop: 2}\n",
            2,
            "batch_spec_ranges.0: template 'q{n}s{m}' has the variables m, n; given are n",
        ),
        (
            "batch_spec_ranges:\n  - template: 'q{n}'\n    n:\n      start: 1\n      stop: 2\n      step: 0\n",
            6,
            "batch_spec_ranges.0.n.step: input should be greater than or equal to 1, got 0",
        ),
        (
            "batch_spec_ranges:\n  - template: 'q{n}'\n    n: {start: 1}\n",
            3,
            "batch_spec_ranges.0.n.stop: field required",
        ),
        ("on_cpu:\n  benchmark:\n    repeats: 0\n", 3, "benchmark.repeats: input should be greater than or equal to 1"),
        ("on_cpu:\n  batch_specs: [q1, q0]\n", 2, 'segment 1 ("q0") has q_len 0'),
    ],
)
def test_wrong_value(refusal, text, line, message):
    found = refusal(text)
    assert found.startswith(f"mine.yaml:{line}: ")
    assert message in found


@pytest.mark.parametrize(
    ("text", "line", "key"),
    # YAML forbids what PyYAML takes: at the top, nested, in a list's item, in a flow mapping.
    [
        ("batch_specs: [q1]\nbackend: sdpa\nbatch_specs: [q2]\n", 3, "batch_specs"),
        ("benchmark:\n  repeats: 1\n  seed: 1\n  repeats: 2\n", 4, "repeats"),
        ("batch_spec_ranges:\n  - template: q1\n    template: q2\n", 3, "template"),
        ("batch_specs: [q1]\nmodel: {name: tiny, name: kimi-k2}\n", 2, "name"),
        ("on_cpu:\n  batch_specs: [q1]\n  batch_specs: [q2]\n", 3, "batch_specs"),
    ],
)
def test_a_key_twice(refusal, text, line, key):
    assert refusal(text) == f"mine.yaml:{line}: key '{key}' is there twice"


@pytest.mark.parametrize(
    ("text", "message"),
    # Two ways to say a thing, both used; the line is that of the file's first key.
    [
        ("backend: sdpa\nbackends: [sdpa]\n", "give backend or backends, not both"),
        ("repeats: 3\nbenchmark: {repeats: 4}\n", "repeats is given twice: at the top and in benchmark"),
    ],
)
def test_said_twice(refusal, text, message):
    assert refusal(text) == f"mine.yaml:1: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    # YAML that does not parse, with the line where it stops making sense; YAML that is no mapping.
    [
        ("batch_specs: [q1]\nmodel: {name: tiny\nbackend: sdpa\n", "mine.yaml:3: no YAML: "),
        ("batch_specs:\n\t- q1\n", "mine.yaml:2: no YAML: "),
        ("model: &a {name: tiny}\nbenchmark: *b\n", "mine.yaml:2: no YAML: "),
        ("- q1\n- q2\n", "mine.yaml: a config is a mapping of keys such as batch_specs and backends, got list"),
        ("q1s1k\n", "mine.yaml: a config is a mapping of keys such as batch_specs and backends, got str"),
        ("", "mine.yaml: a config is a mapping of keys such as batch_specs and backends, got NoneType"),
        ("batch_specs: [q1]\n---\nbatch_specs: [q2]\n", "mine.yaml:2: no YAML: "),
    ],
)
def test_no_config(refusal, text, message):
    assert refusal(text).startswith(message)


def test_not_text(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00description")
    with pytest.raises(ValueError, match=r"binary\.yaml: cannot be read"):
        config_file.load(str(path))


# --- finding ---


def test_packaged_are_the_promised_ones():
    promised = {
        "quickstart",
        "mla_decode",
        "mla_mixed_batch",
        "speculative_decode",
        "standard_attention",
        "reorder_threshold",
    }
    assert promised <= set(config_file.packaged())


@pytest.mark.parametrize("name", sorted(config_file.packaged()))
def test_every_packaged_config_loads(name):
    found = config_file.load(name)
    assert found.name == name
    assert found.content.description
    assert found.content.specs()
    assert found.content.backend_names()
    assert 0 < len(found.on_cpu.specs()) <= len(found.content.specs())


@pytest.mark.parametrize("written", ["mla_decode", "configs/mla_decode.yaml", "mla_decode.yaml"])
def test_find_a_packaged_config(written, tmp_path, monkeypatch):
    # By name, and as other suites' documentation writes the path.
    monkeypatch.chdir(tmp_path)
    if written == "mla_decode.yaml":
        with pytest.raises(ValueError, match=r"config file mla_decode\.yaml does not exist"):
            config_file.find(written)
    else:
        assert config_file.find(written) == config_file.packaged()["mla_decode"]


def test_a_file_here_wins_over_a_packaged_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    mine = tmp_path / "configs" / "mla_decode.yaml"
    mine.write_text("batch_specs: [q1]\n")
    assert config_file.find("configs/mla_decode.yaml").resolve() == mine
    assert config_file.load("configs/mla_decode.yaml").content.specs() == ["q1"]


@pytest.mark.parametrize(
    ("written", "message"),
    # A name is met with the nearest name, a path with the path.
    [
        ("mla_decod", "unknown config 'mla_decod'; did you mean 'mla_decode'? valid: "),
        ("quick", "unknown config 'quick'; "),
        ("nowhere.yaml", "config file nowhere.yaml does not exist"),
        ("some/where", "config file some/where does not exist"),
        ("other/mla_decode.yaml", "config file other/mla_decode.yaml does not exist"),
    ],
)
def test_find_nothing(written, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is what is tested
        config_file.find(written)
    assert str(error.value).startswith(message)


def test_a_config_survives_a_dump(load):
    # What flags are laid over is a dump: a range's variables and an alias must be in it.
    content = load(
        "batch_spec_ranges: [{template: 'q{n}', n: {start: 1, stop: 2}}]\noutput: {json: a.json}\nrepeats: 3\n"
    ).content
    again = ConfigFile.model_validate(content.model_dump(exclude_unset=True, by_alias=True))
    assert again == content
    assert again.specs() == ["q1", "q2"]
    assert (again.output.json_, again.benchmark.repeats) == ("a.json", 3)


def _load(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return config_file.load(str(path))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    # Each is a place where the line or the key once came out wrong: vLLM's spelling at the top, a misspelled required
    # key, flow style inside on_cpu, values that only a whole range shows to be bad.
    [
        ("description: x\nbatch_specs: [q1]\nrepeats: 0\n", 3, "benchmark.repeats"),
        ("batch_specs: [q1]\nbackends: [sdpa]\nflashmla: 5\n", 3, "flashmla"),
        ("batch_specs: [q1]\nparameter_sweep: {param_name: a, valuess: [1]}\n", 2, "did you mean 'values'"),
        ("batch_specs: [q1]\nbackends: [sdpa]\non_cpu: {foo: 1}\n", 3, "unknown key 'foo'"),
        ("batch_specs: [q1]\nbenchmark: {dtype: bf16}\non_cpu: {benchmark: {repeats: 0}}\n", 3, "repeats"),
        ("batch_specs: [q1]\nbackends: [sdpa]\nbatch_sizes:\n  - 1\n  - 0\n", 5, "batch_sizes.1"),
        ("batch_spec_ranges:\n  - template: 'q{n}s2'\n    n: {start: 1, stop: 3}\n", 2, "shorter than"),
        ("batch_spec_ranges:\n  - template: 'q{n}'\n    n: {start: 5, stop: 2}\n", 2, "hold no value"),
        ("batch_specs: [q1]\nparameter_sweep:\n  param_name: a\n  values:\n    - 1.5\n", 5, "whole number or text"),
        ("batch_specs: [q1]\nparameter_sweep: {param_name: a, values: [true]}\n", 2, "whole number or text"),
        ("batch_specs: [q1]\nparameter_sweep: {param_name: a, values: [1], label_format: '{backend.x}'}\n",
         2, "may use"),
        ("batch_specs: [q1]\nFLASHMLA: {a: 1}\nflashmla: {b: 1}\n", 1, "flashmla are given twice"),
        ("batch_mixes:\n  - name: m\n    parts:\n      - {requests: 1, contxt: 3}\n", 4, "did you mean 'context'"),
        ("batch_mixes:\n  - name: m\n    parts:\n      - {requests: 1, q_len: 0}\n", 4,
         "q_len must be at least 1, got 0"),
        ("batch_mixes:\n  - name: m\n    parts:\n      - requests: 1\n        context: {median: 3, max: 9}\n", 5,
         "lognormal wants median and sigma; given are median"),
        ("batch_mixes:\n  - name: m\n    parts:\n      - requests: 1\n"
         "        context: {median: 3, sigma: 1, min: 9, max: 1}\n",
         5, "min must not be above max, got 9 and 1"),
        ("batch_mixes:\n  - {name: m, parts: [{requests: 1}]}\n  - {name: m, parts: [{requests: 2}]}\n",
         1, "twice: m, m"),
        ("batch_specs: [q1]\nparameter_sweeps:\n  - {param_name: a, valuess: [1]}\n", 3, "did you mean 'values'"),
        ("a: &a [*a]\n", 1, "alias refers to what it is part of"),
    ],
)  # fmt: skip
def test_mistakes_are_found_where_they_are(tmp_path, text, line, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is what is tested
        _load(tmp_path, text)
    assert f"mine.yaml:{line}: " in str(error.value)
    assert words in str(error.value)
    assert "and 1 more" not in str(error.value) or "valuess" in text


def test_an_empty_backend_section_changes_nothing(tmp_path):
    assert _load(
        tmp_path, "batch_specs: [q1]\nbackends: [FLASHINFER_MLA]\nFLASHINFER_MLA:\n"
    ).content.backend_parameters == {"flashinfer_mla": {}}


def test_on_cpu_understands_every_spelling(tmp_path):
    loaded = _load(
        tmp_path,
        "model: deepseek-v2-lite\nbatch_specs: [q1]\nbackend: sdpa\nrepeats: 5\n"
        "on_cpu: {model: {num_layers: 1}, benchmark: {repeats: 1}, backends: [torch_naive]}\n",
    )
    assert (loaded.on_cpu.model.name, loaded.on_cpu.model.num_layers) == ("deepseek-v2-lite", 1)
    assert (loaded.content.benchmark.repeats, loaded.on_cpu.benchmark.repeats) == (5, 1)
    assert (loaded.content.backend_names(), loaded.on_cpu.backend_names()) == (["sdpa"], ["torch_naive"])
