from typing import Any

import pytest
from pydantic import ValidationError

from mlakit.backends.base import Attention
from mlakit.bench.config import BenchmarkConfig, infer_attention
from mlakit.dims import MLADims, StandardDims


def make(**fields: Any) -> BenchmarkConfig:
    return BenchmarkConfig(**fields)


MLA: frozenset[Attention] = frozenset({"mla"})
STANDARD: frozenset[Attention] = frozenset({"standard"})
BOTH = MLA | STANDARD


def test_the_suites_own_example():
    config = make(
        backend="cutlass_mla",
        batch_spec="64q1s4k",
        num_layers=10,
        head_dim=576,
        num_q_heads=128,
        num_kv_heads=1,
        block_size=128,
        device="cuda:0",
        repeats=5,
        warmup_iters=3,
    )
    assert config.attention == "mla"
    assert config.dims() == MLADims(128, 512, 128, 64, 128)
    assert [r.as_tuple() for r in config.requests()] == [(1, 4096)] * 64
    assert (config.num_layers, config.block_size, config.device) == (10, 128, "cuda:0")
    assert (config.repeats, config.warmup_iters) == (5, 3)


@pytest.mark.parametrize(
    ("fields", "attention", "model", "dims"),
    # Model by preset, by default, changed by what is beside it; standard attention by its backend, by its model, said
    # outright; a peer's spelling.
    [
        ({"backend": "torch_absorb"}, "mla", "deepseek-v3", MLADims(128)),
        ({"backend": "FLASH_ATTN_MLA"}, "mla", "deepseek-v3", MLADims(128)),
        ({"backend": "torch_absorb", "num_q_heads": 16}, "mla", "deepseek-v3", MLADims(16)),
        ({"backend": "sdpa", "model": "kimi-k2"}, "mla", "kimi-k2", MLADims(64)),
        ({"backend": "sdpa", "model": "tiny", "kv_lora_rank": 32}, "mla", "tiny", MLADims(4, 32, 32, 16, 32)),
        ({"backend": "sdpa", "attention": "mla"}, "mla", "deepseek-v3", MLADims(128)),
        ({"backend": "flash"}, "standard", None, StandardDims(32, 8, 128)),
        ({"backend": "sdpa", "model": "tiny-gqa"}, "standard", "tiny-gqa", StandardDims(4, 2, 32)),
        (
            {"backend": "sdpa", "attention": "standard", "num_kv_heads": 4, "head_dim": 64},
            "standard",
            None,
            StandardDims(32, 4, 64),
        ),
    ],
)
def test_dimensions_follow_from_model_and_backend(fields, attention, model, dims):
    config = make(batch_spec="q1s1k", **fields)
    assert (config.attention, config.model, config.dims()) == (attention, model, dims)
    if isinstance(dims, MLADims):
        assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (dims.num_heads, 1, dims.latent_dim)
    else:
        assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (
            dims.num_q_heads,
            dims.num_kv_heads,
            dims.head_dim,
        )
        assert config.kv_lora_rank is None


@pytest.mark.parametrize(
    ("model", "kinds", "expected"),
    # The model has the word; else one backend that can do nothing but MLA; else what every backend can do.
    [
        ("kimi-k2", [STANDARD], "mla"),
        ("llama-3-8b", [MLA], "standard"),
        (None, [MLA], "mla"),
        (None, [BOTH, MLA], "mla"),
        (None, [STANDARD, MLA], "mla"),
        (None, [STANDARD], "standard"),
        (None, [STANDARD, BOTH], "standard"),
    ],
)
def test_infer_attention(model, kinds, expected):
    assert infer_attention(model, kinds) == expected


def test_infer_attention_of_an_unknown_model():
    with pytest.raises(ValueError, match="unknown model 'kimi-k1'; did you mean 'kimi-k2'"):
        infer_attention("kimi-k1", [MLA])


@pytest.mark.parametrize(
    ("fields", "message"),
    # Everything that a field can say and not mean: our own words where fields contradict each other or name something,
    # and the name of the field where a type or a bound is enough.
    [
        ({"backend": "sdpaa"}, "unknown backend 'sdpaa'; did you mean 'sdpa'"),
        ({"batch_spec": "q0"}, 'segment 1 ("q0") has q_len 0'),
        ({"model": "tinny"}, "unknown model 'tinny'; did you mean 'tiny'"),
        ({"model": "llama-3-8b", "attention": "mla"}, "model 'llama-3-8b' has standard attention, and mla was asked"),
        ({"model": "tiny", "attention": "standard"}, "model 'tiny' has MLA, and standard was asked for"),
        ({"model": "tiny-gqa", "v_head_dim": 8}, "v_head_dim belongs to MLA"),
        ({"model": "tiny", "num_kv_heads": 2}, "num_kv_heads is 1 in MLA (all heads share one latent key), got 2"),
        ({"model": "tiny", "head_dim": 64}, "head_dim is 80 in MLA (kv_lora_rank + qk_rope_head_dim), got 64"),
        ({"model": "tiny", "qk_rope_head_dim": 15}, "qk_rope_head_dim must be even"),
        ({"model": "tiny", "kv_lora_rank": 0}, "kv_lora_rank must be a whole number of at least 1, got 0"),
        ({"model": "tiny-gqa", "num_q_heads": 5}, "num_q_heads must be a multiple of num_kv_heads, got 5 and 2"),
        ({"block_size": 48}, "block_size must be a power of two, got 48"),
        ({"block_size": 0}, "block_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_q_heads": 0}, "num_q_heads"),
        ({"repeats": 0}, "repeats"),
        ({"warmup_iters": -1}, "warmup_iters"),
        ({"timeout": 0}, "timeout"),
        ({"dtype": "float8"}, "dtype"),
        ({"l2": "both"}, "l2"),
        ({"scope": "layer"}, "scope"),
        ({"pipeline": "both"}, "pipeline"),
        ({"reorder_batch_threshold": "often"}, "reorder_batch_threshold"),
        ({"batch_size": 3}, "batch_size"),
    ],
)
def test_what_cannot_be_meant(fields, message):
    with pytest.raises(ValidationError) as error:  # which is a ValueError
        make(**{"backend": "torch_naive", "batch_spec": "q1s1k", **fields})
    first = error.value.errors()[0]
    assert message in (first["msg"] if " " in message else first["loc"])


@pytest.mark.parametrize("missing", ["backend", "batch_spec"])
def test_what_is_required(missing):
    fields: dict[str, Any] = {"backend": "sdpa", "batch_spec": "q1s1k"}
    del fields[missing]
    with pytest.raises(ValidationError) as error:
        BenchmarkConfig(**fields)
    assert {"type": "missing", "loc": (missing,)}.items() <= error.value.errors()[0].items()


def test_frozen():
    config = make(backend="sdpa", batch_spec="q1s1k")
    with pytest.raises(ValidationError):
        config.repeats = 3


def test_title():
    config = make(backend="sdpa", batch_spec="q1s1k")
    assert config.title == "sdpa"
    assert config.model_copy(update={"label": "sdpa_16h"}).title == "sdpa_16h"


# Another value for each field there is: a new field must be added here, and to the key or to what it leaves out.
OTHER = {
    "backend": "torch_naive",
    "batch_spec": "q1s2k",
    "batch_name": "a mix",
    "attention": "standard",
    "model": "deepseek-r1",
    "num_q_heads": 64,
    "num_kv_heads": 2,
    "head_dim": 64,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "num_layers": 5,
    "block_size": 128,
    "dtype": "fp16",
    "device": "cuda:1",
    "repeats": 7,
    "warmup_iters": 4,
    "profile_memory": True,
    "l2": "hot",
    "cuda_graph": True,
    "scope": "pipeline",
    "pipeline": "decode",
    "reorder_batch_threshold": 4,
    "parameters": {"num_kv_splits": 2},
    "check": False,
    "seed": 1,
    "timeout": 10.0,
    "label": "another",
}
NOT_MEASURED = {"timeout", "label", "batch_name"}


def test_every_field_has_another_value_here():
    base = make(backend="torch_absorb", batch_spec="q1s1k")
    assert set(OTHER) == set(BenchmarkConfig.model_fields)
    assert [name for name, value in OTHER.items() if getattr(base, name) == value] == []


@pytest.mark.parametrize("field", OTHER)
def test_key_tells_apart_what_is_measured(field):
    base = make(backend="torch_absorb", batch_spec="q1s1k")
    changed = base.model_copy(update={field: OTHER[field]})
    assert (changed.key == base.key) == (field in NOT_MEASURED)


def test_keys_of_all_single_changes_differ():
    base = make(backend="torch_absorb", batch_spec="q1s1k")
    keys = [base.model_copy(update={f: v}).key for f, v in OTHER.items() if f not in NOT_MEASURED]
    assert len({base.key, *keys}) == len(keys) + 1


@pytest.mark.parametrize(
    "spelled",
    # What is left to the defaults, said outright; another spelling of the backend; after a trip through a file.
    [
        {"model": "deepseek-v3"},
        {"attention": "mla", "num_q_heads": 128, "num_kv_heads": 1, "head_dim": 576},
        {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        {"backend": "TORCH_ABSORB"},
        {"timeout": 7, "label": "mine"},
        {"reorder_batch_threshold": "auto", "parameters": {}},
    ],
)
def test_key_does_not_depend_on_the_spelling(spelled):
    base = make(backend="torch_absorb", batch_spec="q1s1k")
    same = make(**{"backend": "torch_absorb", "batch_spec": "q1s1k", **spelled})
    assert same.key == base.key
    assert BenchmarkConfig.model_validate_json(same.model_dump_json()).key == base.key


def test_key_does_not_depend_on_the_order_of_parameters():
    one, other = (
        make(backend="sdpa", batch_spec="q1s1k", parameters=dict(items))
        for items in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)])
    )
    assert one.key == other.key
    assert one.key != one.model_copy(update={"parameters": {"a": 2, "b": 1}}).key
