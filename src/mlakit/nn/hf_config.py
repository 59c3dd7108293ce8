"""`Args` from the config.json that a Hugging Face checkpoint comes with."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlakit.dims import nearest
from mlakit.nn.args import FIELDS, Args, yarn_mscale

# Args' name -> the config's.
_DIMS = {
    "dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
# What some models of the family switch on and this layer has not.
_NOT_SUPPORTED = {
    "attention_bias": "projections with a bias",
    "mla_scale_q_lora": "a factor on the query's latent",
    "mla_scale_kv_lora": "a factor on the keys' latent",
    "mla_use_nope": "attention without rope",
}


def args_from_hf_config(config: Mapping[str, Any] | str | Path, **overrides: Any) -> Args:
    """The `Args` of a layer of a model that a Hugging Face config describes (DeepSeek-V2 and V3, Kimi K2, GLM-5, ...).

    Args:
        config: the content of a config.json, the file, its folder, or a transformers config object. Rope settings may
            be spelled the old way (`rope_theta` and `rope_scaling` with `type`) or the new (`rope_parameters` with
            `rope_type`). A model whose language part is a `text_config` is looked into.
        overrides: fields of `Args` that are to differ: `max_batch_size`, `max_seq_len` (max_position_embeddings
            otherwise, 163,840 for DeepSeek-V3), `attn_impl`, `dtype` ("fp8" otherwise where the config says that the
            weights are quantized in blocks), and so on.

    Returns:
        Args whose rope table and softmax scale are those of transformers: YaRN is applied if and only if the config
        has it, whatever the length. `eps` is 1e-6, which transformers and DeepSeek use in attention whatever
        `rms_norm_eps` says.

    Raises:
        ValueError: something is missing, is not supported (another kind of rope scaling, biases, another kind of
            quantization), or is out of range; all of it in one message.
        FileNotFoundError: no such file.
    """
    known = _read(config)
    if unknown := [name for name in overrides if name not in FIELDS]:
        raise ValueError(f"unknown field of Args {unknown[0]!r}; {nearest(unknown[0], FIELDS)}")
    missing = [theirs for theirs in _DIMS.values() if known.get(theirs) is None]
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    problems += [f"{name}: {what} are not supported" for name, what in _NOT_SUPPORTED.items() if known.get(name)]
    fields: dict[str, Any] = {ours: known.get(theirs) for ours, theirs in _DIMS.items()}
    fields["q_lora_rank"] = known.get("q_lora_rank") or 0
    fields["max_seq_len"] = known.get("max_position_embeddings") or Args.max_seq_len
    try:
        fields |= _rope(known, fields["max_seq_len"])
    except ValueError as error:
        problems.append(str(error))
    if "dtype" not in overrides:
        try:
            fields |= _quantization(known.get("quantization_config"))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"config of no MLA layer that can be built: {'; '.join(problems)}")
    return Args(**(fields | overrides))


def _read(config: Any) -> Mapping[str, Any]:
    if isinstance(config, str | Path):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a mapping, a path or a config object, got {type(config).__name__}")
    inner = config.get("text_config")
    return inner if "kv_lora_rank" not in config and isinstance(inner, Mapping) else config


def _rope(config: Mapping[str, Any], max_seq_len: int) -> dict[str, Any]:
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = found.get("rope_theta") or config.get("rope_theta") or Args.rope_theta
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == "default":
        return {"rope_theta": float(theta), "yarn": False}
    if kind != "yarn":
        raise ValueError(f"rope type must be default or yarn, got {kind!r}")
    if not found.get("truncate", True):
        raise ValueError("truncate: YaRN's range of frequencies is always of whole ones, expected true, got false")
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor must be 1, got {found['partial_rotary_factor']}")
    original = found.get("original_max_position_embeddings") or max_seq_len
    factor = float(found.get("factor") or max_seq_len / original)
    mscale, mscale_all_dim = _mscales(found, factor)
    return {
        "rope_theta": float(theta),
        "rope_factor": factor,
        "beta_fast": found.get("beta_fast") or 32,
        "beta_slow": found.get("beta_slow") or 1,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
        "original_seq_len": original,
        "yarn": True,
    }


def _mscales(rope: Mapping[str, Any], factor: float) -> tuple[float, float]:
    """(mscale, mscale_all_dim) of Args. The second corrects the softmax scale, and not at all if absent; the rope table
    is multiplied by `attention_factor`, which follows from both, or from the factor alone if one of them is absent.
    """
    mscale, everywhere = rope.get("mscale"), rope.get("mscale_all_dim") or 0.0
    amplitude = rope.get("attention_factor")
    if amplitude is None:
        if mscale and everywhere:
            return float(mscale), float(everywhere)
        if not everywhere:
            return 1.0, 0.0
        amplitude = yarn_mscale(factor, 1.0)
    if factor <= 1:
        if amplitude != 1:
            raise ValueError(f"attention_factor must be 1 where factor is at most 1, got {amplitude}")
        return 1.0, float(everywhere)
    # The mscale for which Args.rope_amplitude comes out as that.
    wanted = (amplitude * yarn_mscale(factor, everywhere) - 1) / (0.1 * math.log(factor))
    return wanted, float(everywhere)


def _quantization(found: Mapping[str, Any] | None) -> dict[str, Any]:
    if not found:
        return {}
    method, block = found.get("quant_method"), found.get("weight_block_size")
    if method != "fp8" or block is None or list(block) != [128, 128]:
        raise ValueError(
            f"quantization_config must be fp8 in blocks of [128, 128], got {method} in {block} "
            "(dtype='bf16' is for a checkpoint that was dequantized)"
        )
    return {"dtype": "fp8", "scale_fmt": found.get("scale_fmt") if found.get("scale_fmt") == "ue8m0" else None}
