import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlakit.dims import MLA_PRESETS, STANDARD_PRESETS, MLADims, StandardDims, nearest, preset


@pytest.mark.parametrize(
    ("name", "expected"),
    # From each model's published config.json: heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim.
    [
        ("deepseek-v2", (128, 512, 128, 64, 128)),
        ("deepseek-v2-lite", (16, 512, 128, 64, 128)),
        ("deepseek-v3", (128, 512, 128, 64, 128)),
        ("deepseek-r1", (128, 512, 128, 64, 128)),
        ("deepseek-v3.2", (128, 512, 128, 64, 128)),
        ("kimi-k2", (64, 512, 128, 64, 128)),
        ("glm-5", (64, 512, 192, 64, 256)),
    ],
)
def test_mla_presets(name, expected):
    dims = preset(name)
    assert isinstance(dims, MLADims)
    sizes = (dims.num_heads, dims.kv_lora_rank, dims.qk_nope_head_dim, dims.qk_rope_head_dim, dims.v_head_dim)
    assert sizes == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    # From each model's published config.json: query heads, key-value heads, head dimension.
    [("llama-3-8b", (32, 8, 128)), ("llama-3-70b", (64, 8, 128)), ("qwen3-32b", (64, 8, 128))],
)
def test_standard_presets(name, expected):
    dims = preset(name)
    assert isinstance(dims, StandardDims)
    assert (dims.num_q_heads, dims.num_kv_heads, dims.head_dim) == expected


def test_no_name_means_two_models():
    assert not set(MLA_PRESETS) & set(STANDARD_PRESETS)
    assert {name: preset(name) for name in (*MLA_PRESETS, *STANDARD_PRESETS)} == {**MLA_PRESETS, **STANDARD_PRESETS}


def test_derived_sizes():
    dims = preset("deepseek-v3")
    assert isinstance(dims, MLADims)
    assert (dims.latent_dim, dims.qk_head_dim) == (576, 192)
    # The scale of the model even in the latent space, where keys are 576 wide.
    assert dims.softmax_scale == pytest.approx(1 / 192**0.5)
    assert StandardDims(4, 2, 64).softmax_scale == pytest.approx(1 / 8)


@pytest.mark.parametrize("field", ["num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"])
# Zero and below, what looks like a number and is none, and a fraction.
@pytest.mark.parametrize("value", [0, -128, "128", 128.0, None])
def test_mla_sizes_are_positive_whole_numbers(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a whole number of at least 1, got {value!r}"):
        MLADims(**{"num_heads": 16, field: value})


@pytest.mark.parametrize("field", ["num_q_heads", "num_kv_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_standard_sizes_are_positive_whole_numbers(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a whole number of at least 1, got {value!r}"):
        StandardDims(**{field: value})


def test_rope_turns_pairs():
    assert MLADims(16, qk_rope_head_dim=2).latent_dim == 514
    with pytest.raises(ValueError, match=r"qk_rope_head_dim must be even.*got 63"):
        MLADims(16, qk_rope_head_dim=63)


def test_query_heads_share_key_heads_evenly():
    assert StandardDims(6, 3, 8).num_kv_heads == 3
    with pytest.raises(ValueError, match="num_q_heads must be a multiple of num_kv_heads, got 6 and 4"):
        StandardDims(6, 4, 8)
    with pytest.raises(ValueError, match="got 4 and 8"):
        StandardDims(4, 8, 8)


@pytest.mark.parametrize(
    ("name", "meant"),
    # A slip of the key, another separator, a missing letter.
    [("deepseek-v4", "deepseek-v"), ("deepseek_v3", "deepseek-v3"), ("lama-3-8b", "llama-3-8b")],
)
def test_unknown_preset_names_the_nearest_and_all(name, meant):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; did you mean '{meant}") as error:
        preset(name)
    for known in (*MLA_PRESETS, *STANDARD_PRESETS):
        assert known in str(error.value)


def test_nearest_without_anything_near():
    assert nearest("zzz", ["beta", "alpha"]) == "valid: alpha, beta"


@given(st.lists(st.from_regex(r"[a-z_]{3,12}", fullmatch=True), min_size=1, unique=True), st.data())
def test_nearest_of_a_valid_name_is_itself(known, data):
    name = data.draw(st.sampled_from(known))
    assert nearest(name, known).startswith(f"did you mean {name!r}? valid: ")
