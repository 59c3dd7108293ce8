"""Names, shapes and dtypes of a layer's tensors: by Hugging Face's names and by those of DeepSeek's inference code,
which are the layer's own.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from mlakit.nn.args import Args

OURS = {
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}
HF = {ours: theirs for theirs, ours in OURS.items()}
PARTS = {"weight": "weight", "weight_scale_inv": "scale", "scale": "scale"}
_MLA_ONLY = {*OURS, *HF} - {"q_proj", "wq", "o_proj", "wo"}  # what no other attention has
_IGNORED = ("rotary_emb.", "indexer.")  # computed from the config; of sparse attention
_NAME = re.compile(
    r"(?P<prefix>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:self_attn|attn)\.|(?:self_attn|attn)\.)?(?P<rest>.+)"
)

BLOCK = 128
F8 = torch.float8_e4m3fn
_WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": F8,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


# Rows or columns of a tensor: (dimension, begin, end).
Cut = tuple[int, int, int]


@dataclass(frozen=True)
class Stored:
    """A tensor that may be on disk: what is known of it before it is read, which may be in part. An unheard-of dtype is
    its name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[Cut | None], torch.Tensor]


def parse(name: str) -> tuple[str, int | None, str] | None:
    """(prefix, layer, rest) of an attention tensor's name, None for another's."""
    match = _NAME.fullmatch(name)
    assert match is not None
    if match["prefix"] is None and match["rest"].split(".")[0] not in {*OURS, *HF}:
        return None
    return match["prefix"] or "", None if match["layer"] is None else int(match["layer"]), match["rest"]


def choose(stored: Iterable[Stored], layer: int | None, where: str) -> dict[str, Stored]:
    """One layer's tensors, by the layer's own names; others' names as they are, for `problems_of` to refuse."""
    groups: dict[tuple[str, int | None], dict[str, list[Stored]]] = {}
    for one in stored:
        parsed = parse(one.name)
        if parsed is not None and not parsed[2].startswith(_IGNORED):
            groups.setdefault(parsed[:2], {}).setdefault(own_name(parsed[2]), []).append(one)
    groups = {key: named for key, named in groups.items() if _MLA_ONLY & {name.split(".")[0] for name in named}}
    layers = sorted({number for _, number in groups if number is not None})
    if not groups:
        raise ValueError(f"{where}: no layer of Multi-head Latent Attention (no kv_a_proj_with_mqa or wkv_a)")
    fitting = [key for key in groups if layer is None or key[1] == layer]
    held = f"layers {_ranges(layers)}" if layers else "tensors without a layer number"
    if not fitting:
        raise ValueError(f"{where}: no layer {layer}; expected one of those there: {held}")
    if len(fitting) > 1:
        kinds = ", ".join(prefix or "no prefix" for prefix, _ in fitting[:3])
        hint = f"has {held}: say which by layer=" if layer is None else f"has several layers {layer} ({kinds})"
        raise ValueError(f"{where} {hint}")
    chosen = groups[fitting[0]]
    twice = [f"{' and '.join(one.name for one in found)} are the same tensor" for found in chosen.values() if found[1:]]
    require(twice, f"{where}: a tensor must be there once (a checkpoint split over GPUs must be merged first)")
    return {name: found[0] for name, found in chosen.items()}


def own_name(rest: str) -> str:
    """The layer's own name of a tensor; what is no layer's stays as it is."""
    module, _, part = rest.rpartition(".")
    if part in PARTS and (module in OURS or module in HF):
        return f"{OURS.get(module, module)}.{PARTS[part]}"
    return rest


def hf_name(name: str) -> str:
    """Hugging Face's name of a tensor, without a prefix."""
    module, _, part = name.partition(".")
    return f"{HF[module]}.{'weight_scale_inv' if part == 'scale' else part}"


def _ranges(numbers: list[int]) -> str:
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole and len(numbers) > 2 else ", ".join(map(str, numbers))


def shapes_of(args: Args) -> dict[str, tuple[int, ...]]:
    """The weights that a layer of these dimensions has."""
    heads, rank = args.n_heads, args.kv_lora_rank
    shapes: dict[str, tuple[int, ...]] = {"wq.weight": (heads * args.qk_head_dim, args.dim)}
    if args.q_lora_rank:
        shapes = {
            "wq_a.weight": (args.q_lora_rank, args.dim),
            "q_norm.weight": (args.q_lora_rank,),
            "wq_b.weight": (heads * args.qk_head_dim, args.q_lora_rank),
        }
    return shapes | {
        "wkv_a.weight": (args.latent_dim, args.dim),
        "kv_norm.weight": (rank,),
        "wkv_b.weight": (heads * (args.qk_nope_head_dim + args.v_head_dim), rank),
        "wo.weight": (args.dim, heads * args.v_head_dim),
    }


def cut_of(name: str, args: Args, part: tuple[int, int]) -> Cut | None:
    """What of a tensor belongs to part i of n of the heads, given as (i, n); None for all of it, as of those that the
    heads share. `args` are of the layer with all heads.

    Raises:
        ValueError: the heads cannot be divided so.
    """
    index, parts = part
    module, _, kind = name.partition(".")
    widths = {
        "wq": (0, args.qk_head_dim),
        "wq_b": (0, args.qk_head_dim),
        "wkv_b": (0, args.qk_nope_head_dim + args.v_head_dim),
        "wo": (1, args.v_head_dim),
    }
    if parts == 1 or module not in widths:
        return None
    if args.n_heads % parts:
        raise ValueError(f"{args.n_heads} heads cannot be divided into {parts} parts; expected a divisor of them")
    dim, width = widths[module]
    size = args.n_heads // parts * width
    if kind == "weight":
        return dim, index * size, (index + 1) * size
    if size % BLOCK:
        raise ValueError(
            f"{name} cannot be divided into {parts} parts of {size}: a scale belongs to {BLOCK} of them; dequantize it "
            "first, or take fewer parts"
        )
    return dim, index * size // BLOCK, (index + 1) * size // BLOCK


def problems_of(found: Mapping[str, Stored], args: Args) -> list[str]:
    """All that keeps a layer's tensors from being taken."""
    shapes = shapes_of(args)
    known = {*shapes, *(name.replace(".weight", ".scale") for name, shape in shapes.items() if len(shape) == 2)}
    problems = [
        f"unexpected {one.name} {list(one.shape)}, the layer has no such tensor"
        for name, one in found.items()
        if name not in known
    ]
    for name, shape in shapes.items():
        one = found.get(name)
        if one is None:
            problems.append(f"missing {name} ({hf_name(name)}), expected {list(shape)}")
            continue
        if one.shape != shape:
            problems.append(f"{one.name} must have shape {list(shape)}, got {list(one.shape)}")
        allowed = (*_WIDE, F8) if len(shape) == 2 else _WIDE
        if one.dtype not in allowed:
            problems.append(f"{one.name} must be {' or '.join(map(str, allowed))}, got {one.dtype}")
        if len(shape) == 2:
            problems += _scale_problems(one, shape, found.get(name.replace(".weight", ".scale")))
    return problems


def _scale_problems(weight: Stored, shape: tuple[int, ...], scale: Stored | None) -> list[str]:
    blocks = tuple(-(-size // BLOCK) for size in shape)
    if weight.dtype != F8:
        return [] if scale is None else [f"unexpected {scale.name}, {weight.name} is {weight.dtype} and needs no scale"]
    if scale is None:
        return [f"missing the scale of {weight.name}, which is {F8}, expected {list(blocks)}"]
    problems = []
    if scale.shape != blocks:
        problems.append(f"{scale.name} must have shape {list(blocks)}, got {list(scale.shape)}")
    if scale.dtype not in _SCALES:
        problems.append(f"{scale.name} must be {' or '.join(map(str, _SCALES))}, got {scale.dtype}")
    return problems


def require(problems: list[str], what: str) -> None:
    """Raise ValueError with all problems, if there are any."""
    if problems:
        raise ValueError("\n  ".join([f"{what}:", *problems]) if len(problems) > 1 else f"{what}: {problems[0]}")
