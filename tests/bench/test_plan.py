import subprocess
import sys
from typing import Any

import pytest

from mlakit.backends import registry
from mlakit.bench import config_file
from mlakit.bench.config_schema import ConfigFile
from mlakit.bench.plan import MODEL_PARAMETERS, Plan, attention_of, make_plan, settings_for

ONE: dict[str, Any] = {"batch_specs": ["q4s1k"], "backends": ["sdpa"], "model": {"name": "tiny"}}


def plan(device: str = "cpu", /, **flags: Any) -> Plan:
    """The plan of flags alone."""
    return make_plan(settings_for(None, flags, cpu=device == "cpu"), device)


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def from_text(text: str) -> config_file.LoadedConfig:
        (tmp_path / "mine.yaml").write_text(text)
        return config_file.load("mine.yaml")

    return from_text


# --- flags over a file ---

FILE = """
model: {name: tiny, num_layers: 2, num_q_heads: 8}
batch_specs: [q1s64, q4s64, q8s64, q16s64, q32s64, q64]
batch_sizes: [1, 2]
backend: torch_naive
parameter_sweep: {param_name: reorder_batch_threshold, values: [1, 2], label_format: "t{value}", include_auto: true}
benchmark: {repeats: 5, warmup_iters: 2}
output: {csv: a.csv}
"""


def test_flags_alone():
    settings = settings_for(None, {"batch_specs": ["q1"], "benchmark": {"repeats": 2}}, cpu=True)
    assert (settings.name, settings.notes) == ("custom", [])
    assert (settings.content.specs(), settings.content.benchmark.repeats) == (["q1"], 2)


def test_a_file_alone(load):
    loaded = load(FILE)
    settings = settings_for(loaded, {}, cpu=True)
    assert (settings.name, settings.content, settings.notes) == ("mine", loaded.content, [])


@pytest.mark.parametrize(
    ("flags", "read", "expected", "notes"),
    # One flag of each section over a file that says it too, with the note that tells both values; a long list is cut
    # short; a file's batch sizes go with the batches that they were for.
    [
        (
            {"benchmark": {"repeats": 9}},
            lambda c: (c.benchmark.repeats, c.benchmark.warmup_iters),
            (9, 2),
            ["the command line's benchmark.repeats (9) replaces mine's (5)"],
        ),
        (
            {"model": {"name": "kimi-k2"}},
            lambda c: (c.model.name, c.model.num_layers, c.model.num_q_heads),
            ("kimi-k2", 2, 8),
            ["the command line's model.name (kimi-k2) replaces mine's (tiny)"],
        ),
        (
            {"backends": ["sdpa", "torch_absorb"]},
            lambda c: c.backend_names(),
            ["sdpa", "torch_absorb"],
            ["--backends replaces backend of mine"],
        ),
        (
            {"batch_specs": ["q1", "q2"]},
            lambda c: c.specs(),
            ["q1", "q2"],
            [
                "--batch-specs replaces batch_sizes of mine",
                "the command line's batch_specs (q1 q2) replaces mine's (q1s64 q4s64 q8s64 q16s64 and 2 more)",
            ],
        ),
        (
            {"parameter_sweep": {"param_name": "reorder_batch_threshold", "values": [16]}},
            lambda c: (c.parameter_sweep.all_values(), c.parameter_sweep.label_format),
            (["auto", 16], "t{value}"),
            ["the command line's parameter_sweep.values (16) replaces mine's (1 2)"],
        ),
        (
            {"output": {"csv": "b.csv", "json": "b.json"}},
            lambda c: (c.output.csv, c.output.json_),
            ("b.csv", "b.json"),
            ["the command line's output.csv (b.csv) replaces mine's (a.csv)"],
        ),
    ],
)
def test_flags_win_and_a_note_says_so(load, flags, read, expected, notes):
    settings = settings_for(load(FILE), flags, cpu=False)
    assert read(settings.content) == expected
    assert settings.notes == notes


@pytest.mark.parametrize(
    "flags",
    # What the file says too, and what it does not say at all: nothing is replaced.
    [
        {"benchmark": {"repeats": 5}},
        {"benchmark": {"seed": 3}},
        {"model": {"num_layers": 2}},
        {"output": {"json": "a"}},
    ],
)
def test_no_note_where_nothing_is_replaced(load, flags):
    assert settings_for(load(FILE), flags, cpu=False).notes == []


def test_batch_specs_replace_ranges(load):
    loaded = load("batch_spec_ranges: [{template: 'q{n}', n: {start: 1, stop: 3}}]\n")
    settings = settings_for(loaded, {"batch_specs": ["q7"]}, cpu=False)
    assert settings.content.specs() == ["q7"]
    assert settings.notes == ["--batch-specs replaces batch_spec_ranges of mine"]


def test_on_cpu_counts_on_a_cpu_alone_and_flags_win_over_it(load):
    loaded = load(FILE + "on_cpu:\n  benchmark: {repeats: 1}\n  model: {num_layers: 1}\n")
    gpu = settings_for(loaded, {}, cpu=False)
    assert (gpu.content.benchmark.repeats, gpu.content.model.num_layers, gpu.notes) == (5, 2, [])
    cpu = settings_for(loaded, {"benchmark": {"repeats": 3}}, cpu=True)
    assert (cpu.content.benchmark.repeats, cpu.content.model.num_layers) == (3, 1)
    assert cpu.notes == [
        "on a CPU mine runs smaller: its on_cpu section replaces benchmark, model",
        "the command line's benchmark.repeats (3) replaces mine's (1)",
    ]


def test_flags_are_checked_like_a_file():
    with pytest.raises(ValueError, match="unknown backend 'sdpaa'; did you mean 'sdpa'"):
        settings_for(None, {"backends": ["sdpaa"]}, cpu=True)


# --- what is measured ---


@pytest.mark.parametrize(
    ("config", "expected"),
    # Said outright; by model; by a dimension that only MLA has; by backends, one that does nothing but MLA among them.
    [
        ({"benchmark": {"attention": "standard"}, "backends": ["torch_absorb"]}, "standard"),
        ({"benchmark": {"attention": "mla"}, "backends": ["sdpa"]}, "mla"),
        ({"model": "llama-3-8b", "backends": ["sdpa"]}, "standard"),
        ({"model": "glm-5", "backends": ["sdpa"]}, "mla"),
        ({"model": {"kv_lora_rank": 256}, "backends": ["sdpa"]}, "mla"),
        ({"model": {"v_head_dim": 64}, "backends": ["sdpa"]}, "mla"),
        ({"model": {"head_dim": 64}, "backends": ["sdpa", "flash"]}, "standard"),
        ({"backends": ["sdpa", "torch_absorb"]}, "mla"),
        ({"backends": ["FLASHMLA"]}, "mla"),
        ({"backends": ["flash", "triton", "flashinfer"]}, "standard"),
    ],
)
def test_attention_of(config, expected):
    content = ConfigFile.model_validate(config)
    assert attention_of(content, content.backend_names()) == expected


def test_settings_reach_the_rows():
    (row,) = plan(
        **{**ONE, "model": {"name": "tiny", "num_layers": 3, "block_size": 32, "num_q_heads": 2}},
        benchmark={
            "repeats": 7, "warmup_iters": 1, "profile_memory": True, "cuda_graph": True, "scope": "pipeline",
            "check": False, "timeout": 9, "seed": 5, "l2": "hot", "dtype": "fp16",
        },
    ).rows  # fmt: skip
    assert (row.backend, row.batch_spec, row.attention, row.model) == ("sdpa", "q4s1k", "mla", "tiny")
    assert (row.num_layers, row.block_size, row.num_q_heads, row.head_dim) == (3, 32, 2, 80)
    assert (row.repeats, row.warmup_iters, row.profile_memory, row.cuda_graph) == (7, 1, True, True)
    assert (row.scope, row.check, row.timeout, row.seed, row.l2, row.dtype) == ("pipeline", False, 9, 5, "hot", "fp16")
    assert (row.device, row.label, row.pipeline) == ("cpu", None, "auto")


@pytest.mark.parametrize(
    ("device", "given", "dtype"),
    # bf16 is what GPUs compute fastest and most CPUs slowest; "auto" is the same as saying nothing.
    [
        ("cpu", {}, "fp32"),
        ("cuda:0", {}, "bf16"),
        ("cuda:1", {"dtype": "auto"}, "bf16"),
        ("cpu", {"dtype": "bf16"}, "bf16"),
    ],
)
def test_dtype_follows_from_the_device(device, given, dtype):
    (row,) = plan(device, **ONE, benchmark={"device": "auto", **given}).rows
    assert (row.dtype, row.device) == (dtype, device)


def test_rows_go_batch_by_batch():
    rows = plan(**{**ONE, "backends": ["sdpa", "torch_absorb"], "batch_specs": ["q1s8", "q2s8"]}).rows
    assert [(r.batch_spec, r.backend) for r in rows] == [
        ("q1s8", "sdpa"), ("q1s8", "torch_absorb"), ("q2s8", "sdpa"), ("q2s8", "torch_absorb"),
    ]  # fmt: skip


def test_without_backends_all_that_compute_it_run():
    mla = plan(batch_specs=["q1"], model={"name": "tiny"})
    assert {"torch_naive", "torch_absorb", "sdpa"} <= {r.backend for r in mla.rows}
    assert len(mla.notes) == 1
    assert mla.notes[0].startswith("no backend was named; all that compute mla attention run: ")
    assert all(r.backend in mla.notes[0] for r in mla.rows)
    standard = plan(batch_specs=["q1"], model={"name": "tiny-gqa"})
    assert "torch_absorb" not in {r.backend for r in standard.rows}
    assert {"torch_naive", "sdpa"} <= {r.backend for r in standard.rows}


def test_a_library_without_an_adapter_is_a_row():
    rows = plan(batch_specs=["64q1s1k"], backends=["cutlass_mla", "FLASH_ATTN_MLA", "torch_absorb"]).rows
    assert [r.backend for r in rows] == ["cutlass_mla", "flashattn_mla", "torch_absorb"]
    assert {r.model for r in rows} == {"deepseek-v3"}


def test_backend_parameters_are_each_backends_own():
    rows = plan(
        **{**ONE, "backends": ["sdpa", "torch_absorb", "FLASHMLA"]},
        backend_parameters={"sdpa": {"reorder_batch_threshold": 64}, "FLASHMLA": {"reorder_batch_threshold": "2"}},
    ).rows
    assert [(r.backend, r.reorder_batch_threshold) for r in rows] == [
        ("sdpa", 64), ("torch_absorb", "auto"), ("flashmla", 2),
    ]  # fmt: skip


def test_name_and_output_are_kept(load):
    found = make_plan(settings_for(load("description: x\n" + FILE), {}, cpu=True), "cpu")
    assert (found.name, found.description, found.mode) == ("mine", "x", "compare")
    assert found.output == {"csv": "a.csv", "json": None, "plot": None}


# --- sweeps ---


def test_parameter_sweep_with_auto_and_labels():
    rows = plan(
        **ONE,
        parameter_sweep={
            "param_name": "reorder_batch_threshold", "values": [1, 4], "include_auto": True,
            "label_format": "{backend} {param_name}={value}",
        },
    ).rows  # fmt: skip
    assert [(r.reorder_batch_threshold, r.title) for r in rows] == [
        ("auto", "sdpa reorder_batch_threshold=auto"),
        (1, "sdpa reorder_batch_threshold=1"),
        (4, "sdpa reorder_batch_threshold=4"),
    ]


def test_labels_without_a_format():
    (row,) = plan(**ONE, parameter_sweep={"param_name": "reorder_batch_threshold", "values": [4]}).rows
    assert row.title == "sdpa_reorder_batch_threshold_4"


def test_model_parameter_sweep_simulates_tensor_parallelism():
    rows = plan(
        **{**ONE, "model": {"name": "deepseek-v3"}, "batch_specs": ["q1s8", "q2s8"]},
        model_parameter_sweep={"param_name": "num_q_heads", "values": [128, 16], "label_format": "{backend}_{value}h"},
    ).rows
    # Heads by heads, so that what is compared stands together.
    assert [(r.num_q_heads, r.batch_spec, r.title) for r in rows] == [
        (128, "q1s8", "sdpa_128h"), (128, "q2s8", "sdpa_128h"), (16, "q1s8", "sdpa_16h"), (16, "q2s8", "sdpa_16h"),
    ]  # fmt: skip


def test_both_sweeps_give_the_product():
    rows = plan(
        **ONE,
        model_parameter_sweep={"param_name": "num_q_heads", "values": [4, 2], "label_format": "{value}h"},
        parameter_sweep={"param_name": "reorder_batch_threshold", "values": [1, 8], "label_format": "t{value}"},
    ).rows
    assert [(r.num_q_heads, r.reorder_batch_threshold, r.title) for r in rows] == [
        (4, 1, "4h t1"), (4, 8, "4h t8"), (2, 1, "2h t1"), (2, 8, "2h t8"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", MODEL_PARAMETERS)
def test_every_size_can_be_swept(name):
    # 1 is in MLA the only num_kv_heads, and 80 (64 + 16) the tiny model's only head_dim; the rest are free.
    value = {"num_kv_heads": 1, "head_dim": 80}.get(name, 2)
    for sweep in ("model_parameter_sweep", "parameter_sweep"):
        (row,) = plan(**ONE, **{sweep: {"param_name": name, "values": [value]}}).rows
        assert getattr(row, name) == value


def test_auto_leaves_a_size_as_the_model_has_it():
    rows = plan(**ONE, model_parameter_sweep={"param_name": "num_q_heads", "values": [2], "include_auto": True}).rows
    assert [r.num_q_heads for r in rows] == [4, 2]


def test_a_backend_without_the_swept_parameter_runs_once(tmp_path, monkeypatch):
    (tmp_path / "mlakit_test_swept.py").write_text(
        "from mlakit.backends.base import Backend, Parameter\n"
        "class Swept(Backend):\n"
        "    name = 'swept'\n"
        "    attention = frozenset({'mla'})\n"
        "    extra_parameters = (Parameter('num_kv_splits', int, 'pieces', minimum=1, maximum=8),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    swept = "mlakit_test_swept:Swept"
    try:
        flags = {**ONE, "backends": [swept, "torch_absorb"]}
        sweep = {"param_name": "num_kv_splits", "values": ["2", 4], "include_auto": True, "label_format": "s{value}"}
        rows = plan(**flags, parameter_sweep=sweep).rows
        assert [(r.backend, r.parameters, r.title) for r in rows] == [
            (swept, {"num_kv_splits": "auto"}, "sauto"),
            (swept, {"num_kv_splits": 2}, "s2"),
            (swept, {"num_kv_splits": 4}, "s4"),
            ("torch_absorb", {}, "torch_absorb"),
        ]
        with pytest.raises(ValueError, match="num_kv_splits must be a whole number from 1 to 8, got 9"):
            plan(**flags, parameter_sweep={**sweep, "values": [9]})
        with pytest.raises(ValueError, match="no selected backend has a parameter 'num_splits'") as error:
            plan(**flags, parameter_sweep={**sweep, "param_name": "num_splits"})
        assert "mlakit_test_swept:Swept has reorder_batch_threshold, num_kv_splits" in str(error.value)
    finally:
        sys.modules.pop("mlakit_test_swept", None)


# --- variants ---


def test_l2_both_measures_cold_and_hot():
    rows = plan(**{**ONE, "backends": ["sdpa", "torch_absorb"]}, benchmark={"l2": "both"}).rows
    assert [(r.backend, r.l2, r.title) for r in rows] == [
        ("sdpa", "cold", "sdpa"),
        ("sdpa", "hot", "sdpa hot"),
        ("torch_absorb", "cold", "torch_absorb"),
        ("torch_absorb", "hot", "torch_absorb hot"),
    ]


def test_l2_both_keeps_a_sweeps_labels():
    sweep = {"param_name": "reorder_batch_threshold", "values": [4], "label_format": "t{value}"}
    rows = plan(**ONE, benchmark={"l2": "both"}, parameter_sweep=sweep).rows
    assert [(r.l2, r.title) for r in rows] == [("cold", "t4"), ("hot", "t4 hot")]


def test_decode_vs_prefill_pairs_every_batch():
    found = plan(**{**ONE, "batch_specs": ["q1s8", "q4s8"]}, mode="decode_vs_prefill")
    assert found.mode == "decode_vs_prefill"
    assert [(r.batch_spec, r.pipeline, r.title, r.scope) for r in found.rows] == [
        ("q1s8", "decode", "sdpa_decode", "pipeline"),
        ("q1s8", "prefill", "sdpa_prefill", "pipeline"),
        ("q4s8", "decode", "sdpa_decode", "pipeline"),
        ("q4s8", "prefill", "sdpa_prefill", "pipeline"),
    ]


def test_decode_vs_prefill_with_what_else_varies():
    rows = plan(**ONE, mode="decode_vs_prefill", benchmark={"l2": "both", "scope": "attention"}).rows
    assert [(r.l2, r.pipeline, r.title, r.scope) for r in rows] == [
        ("cold", "decode", "sdpa_decode", "attention"),
        ("cold", "prefill", "sdpa_prefill", "attention"),
        ("hot", "decode", "sdpa hot_decode", "attention"),
        ("hot", "prefill", "sdpa hot_prefill", "attention"),
    ]


def test_a_row_that_comes_up_twice_is_measured_once():
    rows = plan(**ONE, model_parameter_sweep={"param_name": "num_q_heads", "values": [4, 4], "include_auto": True}).rows
    assert [r.num_q_heads for r in rows] == [4]


# --- what cannot be planned ---


@pytest.mark.parametrize(
    ("flags", "message"),
    # Nothing to measure; names that nobody has, with the nearest; sizes and modes that contradict each other.
    [
        ({"backends": ["sdpa"]}, "no batch to measure: give --batch-specs or a --config"),
        (
            {**ONE, "parameter_sweep": {"param_name": "num_kv_splitz", "values": [1]}},
            "no selected backend has a parameter 'num_kv_splitz' (sdpa has reorder_batch_threshold); a sweep may also "
            "vary num_q_heads, ",
        ),
        (
            {**ONE, "model_parameter_sweep": {"param_name": "num_heads", "values": [1]}},
            "model_parameter_sweep of unknown 'num_heads'; did you mean 'num_q_heads'? valid: block_size, ",
        ),
        (
            {**ONE, "model_parameter_sweep": {"param_name": "reorder_batch_threshold", "values": [1]}},
            "model_parameter_sweep of unknown 'reorder_batch_threshold'; valid: block_size, ",
        ),
        (
            {**ONE, "parameter_sweep": {"param_name": "reorder_batch_threshold", "values": [-1]}},
            "reorder_batch_threshold must be a whole number from 0, got -1",
        ),
        (
            {**ONE, "parameter_sweep": {"param_name": "reorder_batch_threshold", "values": ["many"]}},
            "reorder_batch_threshold must be a whole number or auto, got 'many'",
        ),
        (
            {
                **ONE,
                "model_parameter_sweep": {"param_name": "num_q_heads", "values": [4]},
                "parameter_sweep": {"param_name": "num_q_heads", "values": [2]},
            },
            "a parameter is swept twice: num_q_heads",
        ),
        (
            {**ONE, "backend_parameters": {"sdpa": {"reorder_batch_treshold": 1}}},
            "sdpa has no parameter 'reorder_batch_treshold'; did you mean 'reorder_batch_threshold'?",
        ),
        (
            {**ONE, "model": {"name": "llama-3-8b"}, "mode": "decode_vs_prefill"},
            "mode decode_vs_prefill compares MLA's two pipelines; what is measured is standard attention",
        ),
        ({**ONE, "model": {"name": "tiny", "num_kv_heads": 3}}, "num_kv_heads is 1 in MLA"),
        ({**ONE, "model": {"name": "llama-3-8b", "kv_lora_rank": 8}}, "kv_lora_rank belongs to MLA"),
        ({**ONE, "benchmark": {"attention": "standard"}}, "model 'tiny' has MLA, and standard was asked for"),
        ({**ONE, "model": {"name": "tiny-gqa", "num_q_heads": 3}}, "must be a multiple of num_kv_heads, got 3 and 2"),
        ({**ONE, "model": {"name": "tiny", "block_size": 24}}, "block_size must be a power of two, got 24"),
    ],
)
def test_what_cannot_be_planned(flags, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is what is tested
        plan(**flags)
    assert message in str(error.value)


# --- the configs that come with it ---


@pytest.mark.parametrize("name", sorted(config_file.packaged()))
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_packaged_config_plans(name, device):
    loaded = config_file.load(name)
    content = loaded.on_cpu if device == "cpu" else loaded.content
    found = make_plan(settings_for(loaded, {}, cpu=device == "cpu"), device)
    points = [s.all_values() if s else [None] for s in (content.parameter_sweep, content.model_parameter_sweep)]
    assert content.parameter_sweeps == []
    pipelines = 2 if content.mode == "decode_vs_prefill" else 1
    count = len(content.specs()) * len(content.backend_names()) * len(points[0]) * len(points[1]) * pipelines
    assert len(found.rows) == count
    assert len({row.key for row in found.rows}) == count
    assert {row.device for row in found.rows} == {device}
    assert {row.dtype for row in found.rows} == {"fp32" if device == "cpu" else "bf16"}
    assert {row.attention for row in found.rows} == {"standard" if name == "standard_attention" else "mla"}
    assert {row.backend for row in found.rows} <= set(registry.names())
    assert any("runs smaller" in note for note in found.notes) == (device == "cpu")
    # Told apart in a table: rows of one batch on one model never share a title.
    titles = [(row.batch_spec, row.num_q_heads, row.title) for row in found.rows]
    assert len(set(titles)) == len(titles)


def test_planning_imports_no_torch():
    code = (
        "import sys; from mlakit.bench import config_file; from mlakit.bench.plan import make_plan, settings_for; "
        "import mlakit.bench.results, mlakit.bench.formatter, mlakit.bench.table, mlakit.bench.work; "
        "make_plan(settings_for(config_file.load('quickstart'), {}, cpu=True), 'cpu'); "
        "print([m for m in ('torch', 'triton', 'matplotlib') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_libraries_without_an_adapter_take_any_parameter():
    """The suite's own sweep of CUTLASS MLA: rows that say what is missing, and no refusal of the whole run."""
    flags = {
        "backends": ["cutlass_mla"],
        "batch_specs": ["64q1s1k"],
        "parameter_sweep": {"param_name": "num_kv_splits", "values": [1, 2]},
    }
    rows = make_plan(settings_for(None, flags, cpu=True), "cpu").rows
    assert [row.parameters for row in rows] == [{"num_kv_splits": 1}, {"num_kv_splits": 2}]


def test_without_model_or_backend_mla_is_measured():
    made = make_plan(settings_for(None, {"batch_specs": ["q1s1k"]}, cpu=True), "cpu")
    assert {row.attention for row in made.rows} == {"mla"}
    assert {row.backend for row in made.rows} >= {"torch_naive", "torch_absorb", "sdpa"}


def test_another_sweep_on_the_command_line_brings_its_own_labels():
    loaded = config_file.load("speculative_decode")
    flags = {"parameter_sweep": {"param_name": "num_q_heads", "values": [16]}, "batch_specs": ["q4s64"]}
    rows = make_plan(settings_for(loaded, flags, cpu=True), "cpu").rows
    assert {row.label for row in rows} == {"sdpa_num_q_heads_16"}


@pytest.mark.parametrize("value", ["abc", 1.5, True])
def test_a_size_that_is_no_number(value):
    flags = {"backends": ["sdpa"], "batch_specs": ["q1"], "model": {"name": "tiny"}, "benchmark": {"attention": "mla"}}
    sweep = {"param_name": "kv_lora_rank", "values": [value]}
    with pytest.raises(ValueError, match=r"kv_lora_rank|whole number"):
        make_plan(settings_for(None, {**flags, "parameter_sweep": sweep}, cpu=True), "cpu")


def test_sweeps_on_the_command_line_give_their_product_sizes_outermost():
    flags = {
        **ONE,
        "parameter_sweep": {"param_name": "reorder_batch_threshold", "values": [1, 8]},
        "parameter_sweeps": [{"param_name": "num_q_heads", "values": [4, 2]}],
    }
    assert [(r.num_q_heads, r.reorder_batch_threshold, r.title) for r in plan(**flags).rows] == [
        (4, 1, "sdpa_num_q_heads_4 reorder_batch_threshold_1"),
        (4, 8, "sdpa_num_q_heads_4 reorder_batch_threshold_8"),
        (2, 1, "sdpa_num_q_heads_2 reorder_batch_threshold_1"),
        (2, 8, "sdpa_num_q_heads_2 reorder_batch_threshold_8"),
    ]


def test_sweeps_of_the_command_line_replace_those_of_a_file(load):
    loaded = load(FILE + "parameter_sweeps: [{param_name: block_size, values: [16, 32]}]\n")
    assert len(make_plan(settings_for(loaded, {}, cpu=True), "cpu").rows) == 12 * 3 * 2
    flags = {"parameter_sweep": {"param_name": "num_q_heads", "values": [4]}}
    settings = settings_for(loaded, flags, cpu=True)
    assert "--sweep-param replaces parameter_sweeps of mine" in settings.notes
    assert len(make_plan(settings, "cpu").rows) == 12


def test_a_mix_is_a_row_with_a_name():
    mix = {"name": "chat", "parts": [{"requests": 3, "context": {"median": 20, "sigma": 1.0, "max": 99}}]}
    (one,) = plan(backends=["sdpa"], model={"name": "tiny"}, batch_mixes=[mix]).rows
    assert one.batch_title == one.batch_name == "chat"
    assert len(one.requests()) == 3
    unnamed = one.model_copy(update={"batch_name": None})
    assert unnamed.key == one.key
    assert unnamed.batch_title == one.batch_spec
