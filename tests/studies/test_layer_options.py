import subprocess
import sys

import pytest

from mlakit.cli.main import main
from mlakit.dims import MLA_PRESETS
from mlakit.nn import ATTN_IMPLS, Args
from mlakit.studies import correctness, fast_path, layer_options, layers

CPU = ["--device", "cpu"]
STUDIES = {"layers": layers, "correctness": correctness, "fast-path": fast_path}


def _options(*flags: str) -> layer_options.Options:
    import argparse

    parser = argparse.ArgumentParser()
    layers.add_arguments(parser)
    return layer_options.parse_common(parser.parse_args([*CPU, *flags]))


def test_names_are_those_of_the_layer():
    assert layer_options.IMPLEMENTATIONS == ATTN_IMPLS
    assert set(layer_options.MODELS) == set(MLA_PRESETS)


# What each model's published config says of its attention.
@pytest.mark.parametrize(
    ("model", "dim", "heads", "q_rank", "qk", "v"),
    [
        ("deepseek-v3", 7168, 128, 1536, 192, 128),
        ("deepseek-v2", 5120, 128, 1536, 192, 128),
        ("deepseek-v2-lite", 2048, 16, 0, 192, 128),
        ("kimi-k2", 7168, 64, 1536, 192, 128),
        ("glm-5", 6144, 64, 2048, 256, 256),
    ],
)
def test_a_model_gives_the_layers_dimensions(model, dim, heads, q_rank, qk, v):
    (shape,) = _options("--model", model).shapes
    args = Args(**shape.fields())
    assert (args.dim, args.n_heads, args.q_lora_rank, args.qk_head_dim, args.v_head_dim) == (dim, heads, q_rank, qk, v)
    assert args.kv_lora_rank == 512


def test_flags_override_a_model_and_lists_are_combined():
    found = _options("--model", "deepseek-v3", "--heads", "16", "8", "--rope-dims", "32", "--v-dims", "64", "96").shapes
    assert [(s.dims.num_heads, s.dims.qk_rope_head_dim, s.dims.v_head_dim) for s in found] == [
        (16, 32, 64),
        (16, 32, 96),
        (8, 32, 64),
        (8, 32, 96),
    ]
    assert {s.dim for s in found} == {7168}
    assert len({s.slug for s in found}) == 4


def test_the_tolerance_is_the_seeds_unless_activations_or_cache_are_float8():
    assert _options().tolerance == 1.5e-2
    assert _options("--dtype", "fp8").tolerance == 1.5e-2
    assert _options("--cache-dtype", "fp8").tolerance > 1.5e-2
    assert _options("--dtype", "fp8", "--gemm-impl", "fp8", "--tolerance", "0.02").tolerance == 0.02


@pytest.mark.parametrize(
    ("study", "flags", "message"),
    [
        ("layers", ["--implementations", "naive", "flash"], "valid: absorb, fused, naive, naive+flash"),
        ("correctness", ["--implementations", "absorbed"], "did you mean 'absorb'?"),
        ("layers", ["--batch-sizes", "0"], "--batch-sizes: expected a whole number of at least 1, got '0'"),
        ("layers", ["--seq-lengths", "many"], "--seq-lengths: expected a whole number of at least 1, got 'many'"),
        ("layers", ["--dtype", "fp9"], "--dtype: unknown name 'fp9'; did you mean 'fp8'?"),
        ("layers", ["--gemm-impl", "fp8"], "--gemm-impl: fp8 needs fp8 weights"),
        ("layers", ["--model", "deepseek-v4"], "--model: unknown model 'deepseek-v4'; did you mean"),
        ("layers", ["--rope-dims", "64", "63"], "--rope-dims: expected even numbers, as rope turns pairs, got 63"),
        ("layers", ["--heads", "-1"], "--heads: expected a whole number of at least 1, got '-1'"),
        ("layers", ["--cache-dtype", "fp8", "--kv-lora-rank", "96"], "kv_lora_rank that is a multiple of 128, got 96"),
        ("correctness", ["--cache-dtype", "fp8", "--implementations", "naive"], "is for absorb and fused"),
        ("layers", ["--trials", "0"], "--trials: expected a whole number of at least 1, got '0'"),
        ("layers", ["--warmup", "-2"], "--warmup: expected a whole number of at least 0, got '-2'"),
        ("layers", ["--device", "cuda:99"], "no device cuda:99"),
        ("layers", ["--device", "gpu"], "--device: expected cuda:0, cpu or auto, got 'gpu'"),
        ("layers", ["--phase", "training"], "argument --phase: invalid choice: 'training'"),
        ("correctness", ["--tolerance", "none"], "--tolerance: expected a number above 0, got 'none'"),
        ("correctness", ["--min-seq-len", "9", "--max-seq-len", "8"], "--max-seq-len: expected at least --min-seq-len"),
        ("correctness", ["--max-seq-len", "1000000", "--seq-len-step", "1"], "--seq-len-step: expected at most 4096"),
        ("correctness", ["--decode-steps", "x"], "--decode-steps: expected a whole number of at least 0, got 'x'"),
        ("fast-path", ["--baseline", "theirs"], "--baseline: expected ours or MODULE:NAME, got 'theirs'"),
        ("fast-path", ["--baseline", "no.such:Layer"], "--baseline: cannot import 'no.such:Layer'"),
        ("fast-path", ["--baseline", "math:pi"], "--baseline: 'math:pi' is no function or class"),
        ("fast-path", ["--batch-size", "0"], "--batch-size: expected a whole number of at least 1, got '0'"),
        ("fast-path", ["--heads", "2", "3"], "unrecognized arguments: 3"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(study, flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    device = [] if "--device" in flags else CPU
    with pytest.raises(SystemExit) as stopped:
        main(["study", study, *device, *flags])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("study", "flag"), [("layers", "--output-dir"), ("correctness", "--output"), ("fast-path", "--output-json")]
)
def test_a_place_that_cannot_be_written_to_is_told_before_work_starts(study, flag, capsys, tmp_path, small):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    path = {"layers": "file", "correctness": "folder", "fast-path": "folder"}[study]
    with pytest.raises(SystemExit) as stopped:
        main(["study", study, *small, flag, str(tmp_path / path)])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert flag in err
    assert out == ""


@pytest.mark.parametrize("name", STUDIES)
def test_each_runs_as_a_module_too_and_says_what_is_wrong(name, capsys):
    assert STUDIES[name].main([*CPU, "--seed", "-1"]) == 2
    assert capsys.readouterr().err == f"{name}: error: --seed: expected a whole number of at least 0, got '-1'\n"
    with pytest.raises(SystemExit) as stopped:
        STUDIES[name].main(["--nonsense", "3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{name}: error: unrecognized arguments: --nonsense 3 (see --help)\n"


def test_help_loads_nothing_slow():
    script = """
import sys
from mlakit.cli.main import main
for study in ("layers", "correctness", "fast-path"):
    try:
        main(["study", study, "--help"])
    except SystemExit:
        pass
print({"torch", "triton", "numpy", "pydantic", "rich", "matplotlib"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
