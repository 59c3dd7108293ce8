"""Which backends there are: mlakit's own, those that installed packages declare, and `module:Class` paths."""

import importlib
import os
import sys
from functools import lru_cache
from importlib.metadata import entry_points

from mlakit.backends.base import Attention, Backend
from mlakit.dims import nearest

ENTRY_POINT_GROUP = "mlakit.backends"

_OWN = {
    "torch_naive": "mlakit.backends.torch_naive:TorchNaive",
    "torch_absorb": "mlakit.backends.torch_absorb:TorchAbsorb",
    "sdpa": "mlakit.backends.sdpa:SDPA",
    "mlakit_triton": "mlakit.backends.mlakit_triton:MlakitTriton",
    "triton": "mlakit.backends.mlakit_triton:TritonStandard",
    "mlakit": "mlakit.backends.mlakit_triton:Mlakit",
    "flex": "mlakit.backends.flex:Flex",
    "cudnn": "mlakit.backends.sdpa:CuDNN",
    "flash": "mlakit.backends.flash:Flash",
    "flashinfer": "mlakit.backends.flashinfer:FlashInfer",
    "flashmla": "mlakit.backends.flashmla:FlashMLA",
    "flashattn_mla": "mlakit.backends.flashattn_mla:FlashAttnMLA",
    "flashinfer_mla": "mlakit.backends.flashinfer_mla:FlashInferMLA",
    "cutlass_mla": "mlakit.backends.cutlass_mla:CutlassMLA",
    "vllm_triton_mla": "mlakit.backends.vllm_triton_mla:VLLMTritonMLA",
}

# A library of the field that no adapter runs yet: naming it is not a mistake, so it costs a row with this reason and
# not the run.
WITHOUT_ADAPTER: dict[str, frozenset[Attention]] = {
    "tokenspeed_mla": frozenset({"mla"}),
}

# How vLLM's enum and its benchmark configs spell them, beyond what lower case gives.
_ALIASES = {
    "flash_attn": "flash",
    "triton_attn": "triton",
    "flash_attn_mla": "flashattn_mla",
    "triton_mla": "vllm_triton_mla",
    "torch_sdpa": "sdpa",
}


def normalize(name: str) -> str:
    """Our spelling of a backend's name: `FLASH_ATTN_MLA` is `flashattn_mla`. A `module:Class` path stays as it is."""
    if ":" in name:
        return name
    lower = name.strip().lower()
    return _ALIASES.get(lower, lower)


@lru_cache
def _declared() -> dict[str, str]:
    """Backends of installed packages, by normalized name. One of mlakit's own names cannot be taken over."""
    found = {normalize(e.name): f"{e.module}:{e.attr}" for e in entry_points(group=ENTRY_POINT_GROUP)}
    return {name: path for name, path in found.items() if name not in _OWN}


def names() -> list[str]:
    """Every backend that can be loaded, mlakit's own first."""
    return [*_OWN, *sorted(_declared())]


def has_adapter(name: str) -> bool:
    """True for what `load` takes: an own or declared backend's name, or a `module:Class` path."""
    return ":" in name or name in _OWN or name in _declared()


def is_known(name: str) -> bool:
    """True for a name that `load` takes or that is in `WITHOUT_ADAPTER`."""
    return has_adapter(name) or name in WITHOUT_ADAPTER


def check_name(name: str) -> str:
    """The normalized name.

    Raises:
        ValueError: there is no such backend; the message gives the nearest name and lists all.
    """
    normalized = normalize(name)
    if not is_known(normalized):
        raise ValueError(f"unknown backend {name!r}; {nearest(normalized, {*names(), *WITHOUT_ADAPTER})}")
    return normalized


def load(name: str) -> Backend:
    """An instance of a backend, by name or by `module:Class`.

    Raises:
        ValueError: unknown, without an adapter, not importable, or no Backend.
    """
    name = check_name(name)
    path = name if ":" in name else _OWN.get(name) or _declared().get(name)
    if path is None:
        raise ValueError(f"mlakit has no adapter for {name} in this version")
    module_name, _, class_name = path.partition(":")
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script does not look in the working directory by itself
    try:
        found = getattr(importlib.import_module(module_name), class_name)
        if isinstance(found, type) and issubclass(found, Backend):
            return found()
    except Exception as error:  # whatever a module of somebody's raises while it is imported, or its class made
        raise ValueError(f"backend {name!r} cannot be loaded from {path}: {type(error).__name__}: {error}") from error
    raise ValueError(f"backend {name!r}: {path} is no subclass of mlakit.backends.Backend, but {found!r}")


def attention_kinds(name: str) -> frozenset[Attention]:
    """What a backend can compute: "mla", "standard" or both.

    Raises:
        ValueError: unknown, or not importable.
    """
    name = check_name(name)
    return load(name).attention if has_adapter(name) else WITHOUT_ADAPTER[name]
