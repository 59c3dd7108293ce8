"""What a Hugging Face config says of attention arrives in Args, however it is spelled."""

import json
import math
import re
from typing import Any

import pytest

from mlakit.nn import Args
from mlakit.nn.checkpoint import args_from_hf_config

# DeepSeek-V3's published config.json, as far as attention is concerned.
V3: dict[str, Any] = {
    "attention_bias": False,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "v_head_dim": 128,
}


def _new_spelling(config):
    rope = {**config["rope_scaling"], "rope_theta": config["rope_theta"], "rope_type": config["rope_scaling"]["type"]}
    del rope["type"]
    rest = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_theta")}
    return rest | {"rope_parameters": rope}


@pytest.mark.parametrize("spelling", [dict, _new_spelling, lambda config: {"text_config": config, "hidden_size": 5}])
def test_deepseek_v3(spelling):
    args = args_from_hf_config(spelling(V3), max_batch_size=2, max_seq_len=8192)
    assert args == Args(
        max_batch_size=2, max_seq_len=8192, dtype="fp8", dim=7168, n_heads=128, q_lora_rank=1536, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, rope_theta=10000.0, rope_factor=40.0, beta_fast=32,
        beta_slow=1, mscale=1.0, mscale_all_dim=1.0, original_seq_len=4096, yarn=True, eps=1e-6,
    )  # fmt: skip
    # As DeepSeek's own code, which has no mscale_all_dim, has it.
    assert args.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert args.rope_amplitude == 1


def test_from_a_file_a_folder_and_an_object(tmp_path):
    class Config:
        def to_dict(self):
            return V3

    (tmp_path / "config.json").write_text(json.dumps(V3))
    expected = args_from_hf_config(V3)
    assert expected.max_seq_len == 163840
    for config in (tmp_path, str(tmp_path / "config.json"), Config()):
        assert args_from_hf_config(config) == expected
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        args_from_hf_config(tmp_path)
    with pytest.raises(FileNotFoundError):
        args_from_hf_config(tmp_path / "other.json")
    with pytest.raises(ValueError, match="must be a mapping, a path or a config object, got int"):
        args_from_hf_config(3)


def test_without_yarn_and_without_a_low_rank():
    config = {**V3, "rope_scaling": None, "q_lora_rank": None, "quantization_config": None, "rope_theta": 50000.0}
    args = args_from_hf_config(config)
    assert (args.yarn, args.uses_yarn) == (False, False)  # though 163840 is more than 4096
    assert (args.rope_theta, args.q_lora_rank, args.dtype) == (50000.0, 0, "bf16")
    assert args.softmax_scale == pytest.approx(192**-0.5)


def test_yarn_is_applied_to_short_contexts_too():
    assert args_from_hf_config(V3, max_seq_len=1024).uses_yarn


# What of the two corrections is given, and what follows: (mscale, mscale_all_dim, attention_factor, table, softmax).
# `f` is the correction of strength 1.
@pytest.mark.parametrize(
    ("given", "amplitude", "softmax"),
    [
        ({"mscale": 0.5, "mscale_all_dim": 0.5}, lambda f: 1, lambda f: (f + 1) / 2),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, lambda f: f / ((f + 1) / 2), lambda f: (f + 1) / 2),
        ({}, lambda f: f, lambda f: 1),
        ({"mscale": 0.5}, lambda f: f, lambda f: 1),
        ({"mscale_all_dim": 1.0}, lambda f: f, lambda f: f),
        ({"mscale_all_dim": 1.0, "attention_factor": 1.2}, lambda f: 1.2, lambda f: f),
        ({"attention_factor": 0.8}, lambda f: 0.8, lambda f: 1),
    ],
)
def test_corrections_of_yarn(given, amplitude, softmax):
    rope = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, **given}
    args = args_from_hf_config({**V3, "rope_scaling": rope})
    full = 0.1 * math.log(40) + 1
    assert args.rope_amplitude == pytest.approx(amplitude(full))
    assert args.softmax_scale == pytest.approx(192**-0.5 * softmax(full) ** 2)


def test_a_factor_that_is_not_given_follows_from_the_lengths():
    rope = {"type": "yarn", "original_max_position_embeddings": 4096}
    assert args_from_hf_config({**V3, "rope_scaling": rope}).rope_factor == 40


def test_scales_that_are_powers_of_two():
    config = {**V3, "quantization_config": {**V3["quantization_config"], "scale_fmt": "ue8m0"}}
    assert args_from_hf_config(config).scale_fmt == "ue8m0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": None, "v_head_dim": None}, "missing: kv_lora_rank, v_head_dim"),
        ({"attention_bias": True}, "attention_bias: projections with a bias are not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type must be default or yarn, got 'linear'"),
        ({"rope_scaling": {**V3["rope_scaling"], "truncate": False}}, "truncate"),
        ({"rope_scaling": {**V3["rope_scaling"], "factor": 1, "attention_factor": 2}}, "attention_factor must be 1"),
        ({"quantization_config": {"quant_method": "awq"}}, "must be fp8 in blocks of [128, 128], got awq in None"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even"),
    ],
)
def test_refuses_what_the_layer_is_not(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        args_from_hf_config({**V3, **change})


def test_all_problems_in_one_message_and_unknown_fields():
    with pytest.raises(ValueError, match=r"missing: hidden_size; attention_bias: .*; rope type must be .*'dynamic'"):
        args_from_hf_config({**V3, "hidden_size": None, "attention_bias": True, "rope_scaling": {"type": "dynamic"}})
    with pytest.raises(ValueError, match="unknown field of Args 'max_seqlen'; did you mean 'max_seq_len'"):
        args_from_hf_config(V3, max_seqlen=3)
    assert args_from_hf_config({**V3, "quantization_config": {"quant_method": "awq"}}, dtype="bf16").dtype == "bf16"
