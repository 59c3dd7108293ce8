"""Weights of a layer from and to safetensors files, by Hugging Face's names or by those of DeepSeek's inference code.

Nothing pickled is read or written, only the tensors that are needed are read, and all that is wrong with a checkpoint
is said at once, before anything is changed.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mlakit.nn.args import Args
from mlakit.nn.checkpoint_names import (
    BLOCK,
    DTYPES,
    F8,
    OURS,
    Cut,
    Stored,
    choose,
    cut_of,
    hf_name,
    parse,
    problems_of,
    require,
)
from mlakit.nn.hf_config import args_from_hf_config as args_from_hf_config
from mlakit.nn.mla import MultiheadLatentAttention
from mlakit.quant import weight_dequant, weight_quant


def convert_hf_state_dict(
    tensors: Mapping[str, torch.Tensor], args: Args, *, layer: int | None = None, rope_interleave: bool = True
) -> dict[str, torch.Tensor]:
    """Rename a layer's tensors from transformers' names to the layer's own, ready for `load_state_dict`.

    Args:
        tensors: by name: `q_proj` or `q_a_proj`, `q_a_layernorm` and `q_b_proj`; `kv_a_proj_with_mqa`,
            `kv_a_layernorm`, `kv_b_proj`, `o_proj`, each with `.weight` and, where that is float8, `.weight_scale_inv`;
            bare, or behind `model.layers.N.self_attn.`. Other layers and other modules may be among them; names that
            are the layer's own already stay.
        args: of the layer; says which shapes are right.
        layer: N; None if there is only one.
        rope_interleave: of the model's config. True, as for every DeepSeek model: the rope rows of the projections are
            interleaved, as here. False: they are in halves and are put in order.

    Returns:
        The tensors by the layer's names, in the dtypes that they had; scales as float32. Nothing is copied that need
        not be.

    Raises:
        ValueError: tensors are missing, misshapen, of a wrong dtype or not the layer's, or there is no such layer; all
            of it in one message.
    """
    found = {
        name: Stored(name, tuple(t.shape), t.dtype, lambda cut, t=t: t)  # type: ignore[misc]
        for name, t in tensors.items()
    }
    chosen = choose(found.values(), layer, "the tensors")
    require(problems_of(chosen, args), "tensors do not fit the layer")
    return {name: _converted(name, stored, args, rope_interleave) for name, stored in chosen.items()}


def load_checkpoint(
    model: MultiheadLatentAttention,
    path: str | Path,
    *,
    layer: int | None = None,
    rope_interleave: bool | None = None,
    part: tuple[int, int] = (0, 1),
) -> dict[str, str]:
    """Fill a layer's parameters from a checkpoint.

    Args:
        model: the layer. Its parameters keep their dtypes and devices: a float8 checkpoint is dequantized for a layer
            of bfloat16 (`weight_dequant`), a wide one quantized for a layer of float8 (`weight_quant`), and wide
            weights are rounded to the layer's dtype.
        path: a .safetensors file, a sharded checkpoint's model.safetensors.index.json, or a folder that holds one of
            them; of Hugging Face's names or of DeepSeek's inference code's (one that is not split over GPUs). Only the
            layer's own tensors are read.
        layer: which; None if there is only one.
        rope_interleave: as in `convert_hf_state_dict`; None looks it up in the config.json beside the checkpoint, and
            takes True if there is none.
        part: (i, n): the layer has the i-th n-th of the checkpoint's heads, and only their rows and columns are read.

    Returns:
        What was done to each parameter: "copied", "dequantized" or "quantized".

    Raises:
        ValueError: tensors are missing, misshapen, of a wrong dtype or not the layer's, there is no such layer, or a
            file cannot be read; all that is wrong in one message, and the layer is as it was.
        FileNotFoundError: there is nothing at `path`.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the layer's parameters must have memory to be loaded into, got the meta device: to_empty()")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part must be (i, n) with i in 0 to n - 1, got {part}")
    path = Path(path)
    whole = replace(model.args, n_heads=model.args.n_heads * part[1])
    with ExitStack() as stack:
        files = _files(path)
        chosen = choose(_stored(files, stack), layer, str(path))
        require(problems_of(chosen, whole), f"{path} does not fit the layer")
        if rope_interleave is None:
            rope_interleave = _rope_interleave(path)
        cuts = {name: cut_of(name, whole, part) for name in chosen}
        new = {
            name: _converted(name, stored, model.args, rope_interleave, cuts[name]) for name, stored in chosen.items()
        }
    own = model.state_dict()
    ready: dict[str, torch.Tensor] = {}
    done: dict[str, str] = {}
    for name in (name for name in own if name.endswith(".weight")):
        target, scale = own[name], name.removesuffix("weight") + "scale"
        weight = new[name].to(target.device)
        if weight.dtype == target.dtype == F8:
            ready[scale] = new[scale]
            done[name] = "copied"
        elif weight.dtype == F8:
            dtype = torch.float32 if target.dtype == torch.float64 else target.dtype
            weight, done[name] = weight_dequant(weight, new[scale].to(target.device), BLOCK, dtype), "dequantized"
        elif target.dtype == F8:
            (weight, ready[scale]), done[name] = weight_quant(weight, BLOCK), "quantized"
        else:
            done[name] = "copied"
        ready[name] = weight
    with torch.no_grad():
        for name, tensor in ready.items():
            own[name].copy_(tensor)
    return done


def save_checkpoint(
    model: MultiheadLatentAttention, path: str | Path, *, layer: int | None = None, naming: str = "deepseek"
) -> None:
    """Write a layer's parameters to a safetensors file, which is replaced in one step.

    Args:
        model: the layer; dtypes are kept.
        path: of the file; its folder must exist.
        layer: number to put into the names; None writes bare names.
        naming: "deepseek" (`layers.N.attn.wq_a.weight`, `.scale`) or "hf" (`model.layers.N.self_attn.q_a_proj.weight`,
            `.weight_scale_inv`).

    Raises:
        ValueError: unknown `naming`, or parameters on the meta device.
    """
    if naming not in ("deepseek", "hf"):
        raise ValueError(f"naming must be 'deepseek' or 'hf', got {naming!r}")
    prefix = {"deepseek": f"layers.{layer}.attn.", "hf": f"model.layers.{layer}.self_attn."}[naming]
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: there is nothing to save")
        shown = hf_name(name) if naming == "hf" else name
        tensors[(prefix if layer is not None else "") + shown] = tensor.detach().cpu().contiguous()
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _files(path: Path) -> dict[Path, list[str] | None]:
    """The files of a checkpoint and, if an index says so, the tensors in each."""
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        files = sorted(path.glob("*.safetensors"))
        if index.exists():
            path = index
        elif files:
            return dict.fromkeys(files)
        else:
            raise ValueError(f"{path} holds no .safetensors file (nothing pickled is read)")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return {path: None}
    if path.suffix != ".json":
        raise ValueError(f"a checkpoint must be .safetensors or an index of such (nothing pickled is read), got {path}")
    try:
        places = json.loads(path.read_text())["weight_map"]
        by_file: dict[Path, list[str] | None] = {}
        for name, file in places.items():
            names = by_file.setdefault(path.parent / file, [])
            assert names is not None
            names.append(name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no index of a sharded checkpoint: no weight_map ({error!r})") from None
    return by_file


def _stored(files: Mapping[Path, list[str] | None], stack: ExitStack) -> Iterable[Stored]:
    """What the files hold of attention. A shard that holds nothing of it is not opened."""
    for file, names in files.items():
        if names is not None and not any(parse(name) for name in names):
            continue
        if not file.exists():
            raise ValueError(f"{file} is not there, and the index says that tensors are in it")
        try:
            handle: Any = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from None
        held = set(handle.keys())
        for name in names if names is not None else sorted(held):
            if parse(name) is None:
                continue
            if name not in held:
                raise ValueError(f"{file} holds no {name}, and the index says that it does")
            part = handle.get_slice(name)
            kind = part.get_dtype()
            yield Stored(
                name,
                tuple(part.get_shape()),
                DTYPES.get(kind, kind),
                lambda cut, handle=handle, name=name: _read(handle, name, cut),  # type: ignore[misc]
            )


def _read(handle: Any, name: str, cut: Cut | None) -> torch.Tensor:
    if cut is None:
        return handle.get_tensor(name)
    dim, begin, end = cut
    return handle.get_slice(name)[begin:end] if dim == 0 else handle.get_slice(name)[:, begin:end]


def _converted(name: str, stored: Stored, args: Args, rope_interleave: bool, cut: Cut | None = None) -> torch.Tensor:
    tensor = stored.read(cut)
    if name.endswith(".scale"):
        return tensor.float()
    heads = {"wq.weight": args.n_heads, "wq_b.weight": args.n_heads, "wkv_a.weight": 1}.get(name)
    parsed = parse(stored.name)
    if rope_interleave or heads is None or parsed is None or parsed[2].split(".")[0] not in OURS:
        return tensor
    return _interleaved(tensor, heads, args.qk_rope_head_dim, stored.name)


def _interleaved(weight: torch.Tensor, heads: int, rope: int, name: str) -> torch.Tensor:
    """Put the last `rope` rows of each head, which are in halves, in pairs."""
    per_head = weight.shape[0] // heads
    first = torch.arange(heads) * per_head + per_head - rope
    if weight.dtype == F8 and (first // BLOCK != (first + rope - 1) // BLOCK).any():
        raise ValueError(
            f"{name}: rope rows cannot be put in order across blocks of float8 scales; dequantize it first"
        )
    order = torch.arange(weight.shape[0])
    pairs = torch.arange(rope).view(2, -1).T.flatten()
    order.view(heads, per_head)[:, -rope:] = first[:, None] + pairs
    if weight.dtype == F8:
        return weight.view(torch.uint8)[order].view(F8)
    return weight[order]


def _rope_interleave(path: Path) -> bool:
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.exists():
        return True
    found = json.loads(config.read_text())
    inner = found.get("text_config")
    return bool((found if "rope_interleave" in found or inner is None else inner).get("rope_interleave", True))
