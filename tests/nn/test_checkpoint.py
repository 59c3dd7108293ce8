"""Weights come in by either naming and either kind of number, and what is wrong with them is said at once."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlakit.nn import Args, get_mla
from mlakit.nn.checkpoint import convert_hf_state_dict, load_checkpoint, save_checkpoint
from mlakit.quant import weight_dequant, weight_quant
from tests.support.layers import TINY, random_x

F8 = torch.float8_e4m3fn
NAMES = {  # Hugging Face's on the left
    "q_proj": "wq", "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b", "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b", "o_proj": "wo",
}  # fmt: skip


def _layer(compute=torch.bfloat16, seed=0, kind="bf16", **args):
    torch.manual_seed(seed)
    layer = get_mla("naive", Args(**{**TINY, "dtype": kind, **args})).to(compute).eval().requires_grad_(False)
    for name, parameter in layer.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
    return layer


def _hf(state, prefix="model.layers.0.self_attn."):
    """A state dict under Hugging Face's names."""
    back = {ours: theirs for theirs, ours in NAMES.items()}
    parts = {"weight": "weight", "scale": "weight_scale_inv"}
    return {f"{prefix}{back[n.split('.')[0]]}.{parts[n.split('.')[1]]}": t.contiguous() for n, t in state.items()}


def _same(layer, other):
    state, theirs = layer.state_dict(), other.state_dict()
    assert state.keys() == theirs.keys()
    return all(torch.equal(state[n].float(), theirs[n].float()) for n in state)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("q_lora_rank", [0, 24])
def test_names_are_converted(q_lora_rank, dtype):
    layer = _layer(kind=dtype, q_lora_rank=q_lora_rank)
    state = layer.state_dict()
    others = {
        "model.embed_tokens.weight": torch.zeros(5, 48),
        "model.layers.0.mlp.gate_proj.weight": torch.zeros(3, 3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.0.self_attn.indexer.wq_b.weight": torch.zeros(4, 4),
        "vision_tower.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4),
    }
    got = convert_hf_state_dict(_hf(state) | others, layer.args)
    assert got.keys() == state.keys()
    assert all(got[name].dtype == state[name].dtype for name in state)
    target = get_mla("absorb", layer.args)
    target.load_state_dict(got)
    assert _same(target, layer)
    bare = convert_hf_state_dict(_hf(state, ""), layer.args)
    assert bare.keys() == state.keys()
    assert all(got[name].data_ptr() == state[name].data_ptr() for name in state)  # nothing was copied


def test_rope_rows_in_halves_are_put_in_pairs():
    layer = _layer(torch.float64)
    state = layer.state_dict()
    halves = {name: tensor.clone() for name, tensor in state.items()}
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    for name, heads in (("wq_b.weight", 3), ("wkv_a.weight", 1)):
        rows = halves[name].view(heads, -1, halves[name].shape[1])
        rows[:, -8:] = rows[:, -8:][:, order]
    got = convert_hf_state_dict(_hf(halves), layer.args, rope_interleave=False)
    assert all(torch.equal(got[name], state[name]) for name in state)
    kept = convert_hf_state_dict(_hf(halves), layer.args)
    assert torch.equal(kept["wq_b.weight"], halves["wq_b.weight"])


def test_float8_rope_rows_are_put_in_pairs_within_a_block_only():
    wide = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    layer = _layer(kind="fp8", **wide)  # DeepSeek's widths: 64 rows from 128, 320 and 512 on
    state = layer.state_dict()
    got = convert_hf_state_dict(_hf(state), layer.args, rope_interleave=False)
    assert not torch.equal(got["wq_b.weight"].float(), state["wq_b.weight"].float())
    halves = weight_dequant(state["wq_b.weight"], state["wq_b.scale"])[128:192]
    pairs = weight_dequant(got["wq_b.weight"], got["wq_b.scale"])[128:192]
    assert torch.equal(pairs[0::2], halves[:32])
    assert torch.equal(pairs[1::2], halves[32:])
    layer = _layer(kind="fp8", n_heads=5, qk_nope_head_dim=18)  # rope rows of the fifth head: 122 to 129
    with pytest.raises(ValueError, match=r"q_b_proj\.weight: rope rows cannot be put in order across blocks"):
        convert_hf_state_dict(_hf(layer.state_dict()), layer.args, rope_interleave=False)


def _file(folder, state):
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def _folder(folder, state):
    save_file(state, folder / "weights.safetensors")
    return folder


def _index(folder, state):
    """Two shards, the second of which begins in the middle of a layer, and one of other tensors that is not there."""
    names, places = sorted(state), {}
    for number, part in enumerate((names[:3], names[3:])):
        file = f"model-{number}.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    places["model.embed_tokens.weight"] = "model-9.safetensors"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def _indexed_folder(folder, state):
    return _index(folder, state).parent


@pytest.mark.parametrize("store", [_file, _folder, _index, _indexed_folder])
@pytest.mark.parametrize("naming", ["deepseek", "hf", "bare"])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_every_kind_of_checkpoint(tmp_path, store, naming, kind):
    source, layer = _layer(kind=kind), _layer(kind=kind, seed=1)
    state = dict(source.state_dict())
    if naming == "hf":
        state = _hf(state, "model.layers.7.self_attn.") | _hf(layer.state_dict(), "model.layers.8.self_attn.")
        state |= {"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}
    elif naming == "deepseek":
        state = {f"layers.7.attn.{name}": tensor for name, tensor in state.items()}
    done = load_checkpoint(layer, store(tmp_path, state), layer=7 if naming == "hf" else None)
    assert _same(layer, source)
    assert done == dict.fromkeys([name for name in layer.state_dict() if name.endswith("weight")], "copied")


def test_float8_is_dequantized_for_a_wide_layer(tmp_path):
    source = _layer(kind="fp8")
    for compute in (torch.bfloat16, torch.float64):
        layer = _layer(compute, seed=1)
        done = load_checkpoint(layer, _file(tmp_path, dict(source.state_dict())))
        assert done["wq_a.weight"] == "dequantized"
        assert done["kv_norm.weight"] == "copied"
        dtype = torch.bfloat16 if compute == torch.bfloat16 else torch.float32
        expected = weight_dequant(source.wkv_b.weight, source.wkv_b.scale, dtype=dtype)
        assert torch.equal(layer.wkv_b.weight, expected.to(compute))
        assert torch.equal(layer.kv_norm.weight, source.kv_norm.weight.to(compute))


def test_wide_weights_are_quantized_for_a_float8_layer(tmp_path):
    source, layer = _layer(), _layer(kind="fp8", seed=1)
    done = load_checkpoint(layer, _file(tmp_path, dict(source.state_dict())))
    assert done["wo.weight"] == "quantized"
    codes, scale = weight_quant(source.wo.weight)
    assert torch.equal(layer.wo.weight.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(layer.wo.scale, scale)
    assert torch.equal(layer.q_norm.weight, source.q_norm.weight)
    x = random_x(layer, 2, 5, torch.bfloat16)
    freqs = layer.precompute_freqs_cis()[:5]
    exact, got = source(x, 0, freqs, "causal").float(), layer(x, 0, freqs, "causal").float()
    assert (got - exact).norm() < 0.1 * exact.norm()  # e4m3 keeps 4 bits


def test_wide_weights_are_rounded_and_widened(tmp_path):
    source = _layer(torch.float32)
    source.wo.weight.add_(1e-4)  # not a bfloat16 any more
    path = _file(tmp_path, dict(source.state_dict()))
    for compute in (torch.bfloat16, torch.float64):
        layer = _layer(compute, seed=1)
        load_checkpoint(layer, path)
        assert torch.equal(layer.wo.weight, source.wo.weight.to(compute))


def test_scales_that_are_powers_of_two(tmp_path):
    source, layer = _layer(kind="fp8"), _layer(kind="fp8", seed=1)
    state = dict(source.state_dict())
    for name in [name for name in state if name.endswith("scale")]:
        state[name] = torch.full_like(state[name], 0.25).to(torch.float8_e8m0fnu)
    load_checkpoint(layer, _file(tmp_path, state))
    assert (layer.wo.scale == 0.25).all()


def test_rope_rows_follow_the_config_beside_the_checkpoint(tmp_path):
    source, layer = _layer(), _layer(seed=1)
    path = _file(tmp_path, _hf(source.state_dict()))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"rope_interleave": False}}))
    load_checkpoint(layer, path)
    expected = convert_hf_state_dict(_hf(source.state_dict()), layer.args, rope_interleave=False)
    assert torch.equal(layer.wq_b.weight, expected["wq_b.weight"])
    assert not _same(layer, source)
    load_checkpoint(layer, path, rope_interleave=True)
    assert _same(layer, source)
    # DeepSeek's own names say that rows are in pairs already.
    load_checkpoint(layer, _file(tmp_path, dict(source.state_dict())), rope_interleave=False)
    assert _same(layer, source)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("naming", ["deepseek", "hf"])
@pytest.mark.parametrize("number", [None, 3])
def test_what_is_saved_can_be_loaded(tmp_path, naming, kind, number):
    source, layer = _layer(kind=kind), _layer(kind=kind, seed=1)
    path = tmp_path / "layer.safetensors"
    save_checkpoint(source, path, layer=number, naming=naming)
    names = load_file(path)
    prefix = {"deepseek": "layers.3.attn.", "hf": "model.layers.3.self_attn."}[naming] if number is not None else ""
    assert f"{prefix}{'o_proj' if naming == 'hf' else 'wo'}.weight" in names
    assert not list(tmp_path.glob("*.part"))
    load_checkpoint(layer, path, layer=number)
    assert _same(layer, source)


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_changed(tmp_path):
    layer, before = _layer(), _layer()
    state = _hf(layer.state_dict(), "model.layers.0.self_attn.")
    prefix = "model.layers.0.self_attn."
    del state[prefix + "kv_a_layernorm.weight"]
    state[prefix + "q_proj.weight"] = torch.zeros(72, 48)
    state[prefix + "q_a_proj.bias"] = torch.zeros(24)
    state[prefix + "q_a_proj.weight"] = torch.zeros(25, 48)
    state[prefix + "q_b_proj.weight"] = torch.zeros(72, 24, dtype=torch.int8)
    state[prefix + "kv_b_proj.weight"] = state[prefix + "kv_b_proj.weight"].to(F8)
    state[prefix + "o_proj.weight_scale_inv"] = torch.ones(1, 1)
    state[prefix + "kv_a_proj_with_mqa.weight"] = state[prefix + "kv_a_proj_with_mqa.weight"].to(F8)
    state[prefix + "kv_a_proj_with_mqa.weight_scale_inv"] = torch.ones(3, 1, dtype=torch.int32)
    path = _file(tmp_path, state)
    with pytest.raises(ValueError, match="does not fit the layer") as caught:
        load_checkpoint(layer, path)
    for expected in (
        "missing kv_norm.weight (kv_a_layernorm.weight), expected [128]",
        f"unexpected {prefix}q_proj.weight [72, 48]",
        f"unexpected {prefix}q_a_proj.bias [24]",
        f"{prefix}q_a_proj.weight must have shape [24, 48], got [25, 48]",
        f"{prefix}q_b_proj.weight must be torch.bfloat16 or",
        "got I8",
        f"missing the scale of {prefix}kv_b_proj.weight, which is torch.float8_e4m3fn, expected [2, 1]",
        f"unexpected {prefix}o_proj.weight_scale_inv",
        f"{prefix}kv_a_proj_with_mqa.weight_scale_inv must have shape [2, 1], got [3, 1]",
        f"{prefix}kv_a_proj_with_mqa.weight_scale_inv must be torch.float32 or",
    ):
        assert expected in str(caught.value)
    assert str(caught.value).count("\n") == 9  # a line a problem
    assert _same(layer, before)
    with pytest.raises(ValueError, match="tensors do not fit the layer") as caught:
        convert_hf_state_dict(state, layer.args)
    assert "got torch.int8" in str(caught.value)


def test_a_single_problem_is_one_line():
    layer = _layer()
    state = _hf(layer.state_dict())
    state["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(48, 119)
    message = (
        "tensors do not fit the layer: model.layers.0.self_attn.o_proj.weight must have shape [48, 120], got [48, 119]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convert_hf_state_dict(state, layer.args)


def test_which_layer():
    layer = _layer()
    state: dict[str, torch.Tensor] = {}
    for number in (0, 1, 2, 5):
        state |= _hf(layer.state_dict(), f"model.layers.{number}.self_attn.")
    with pytest.raises(ValueError, match=r"has layers 0, 1, 2, 5: say which by layer="):
        convert_hf_state_dict(state, layer.args)
    with pytest.raises(ValueError, match=r"no layer 3; expected one of those there: layers 0, 1, 2, 5"):
        convert_hf_state_dict(state, layer.args, layer=3)
    assert convert_hf_state_dict(state, layer.args, layer=5).keys() == layer.state_dict().keys()
    with pytest.raises(ValueError, match="no layer 3; expected one of those there: tensors without a layer number"):
        convert_hf_state_dict(_hf(layer.state_dict(), ""), layer.args, layer=3)
    with pytest.raises(ValueError, match=r"has several layers 5 \(model\.layers\.5\.self_attn\., draft"):
        convert_hf_state_dict(state | _hf(layer.state_dict(), "draft.layers.5.self_attn."), layer.args, layer=5)
    with pytest.raises(ValueError, match="no layer of Multi-head Latent Attention"):
        convert_hf_state_dict({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, layer.args)


def test_files_that_cannot_be_read(tmp_path):
    layer, before = _layer(), _layer()
    state = dict(layer.state_dict())
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(layer, tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"holds no \.safetensors file \(nothing pickled is read\)"):
        load_checkpoint(layer, tmp_path)
    pickled = tmp_path / "pytorch_model.bin"
    torch.save(state, pickled)
    with pytest.raises(ValueError, match=r"must be \.safetensors or an index of such \(nothing pickled is read\), got"):
        load_checkpoint(layer, pickled)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(pickled.read_bytes())
    with pytest.raises(ValueError, match=r"broken\.safetensors is no safetensors file"):
        load_checkpoint(layer, broken)
    broken.unlink()

    index = _index(tmp_path, state)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1\.safetensors is not there, and the index says"):
        load_checkpoint(layer, tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"model-1\.safetensors holds no \w+\.weight, and the index says"):
        load_checkpoint(layer, tmp_path)
    for content in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(content)
        with pytest.raises(ValueError, match="is no index of a sharded checkpoint"):
            load_checkpoint(layer, index)
    assert _same(layer, before)


def test_a_checkpoint_that_is_split_over_gpus(tmp_path):
    layer = _layer()
    for rank in range(2):
        state = {f"layers.0.attn.{name}": tensor for name, tensor in layer.state_dict().items()}
        save_file(state, tmp_path / f"model{rank}-mp2.safetensors")
    with pytest.raises(ValueError, match=r"must be there once \(a checkpoint split over GPUs must be merged first\)"):
        load_checkpoint(layer, tmp_path)


def test_a_layer_without_memory_is_refused(tmp_path):
    with torch.device("meta"):
        layer = get_mla("naive", Args(**TINY))
    with pytest.raises(ValueError, match="got the meta device"):
        load_checkpoint(layer, tmp_path)
    with pytest.raises(ValueError, match="on the meta device"):
        save_checkpoint(layer, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="naming must be 'deepseek' or 'hf', got 'vllm'"):
        save_checkpoint(_layer(), tmp_path / "x.safetensors", naming="vllm")
    assert not list(tmp_path.iterdir())
