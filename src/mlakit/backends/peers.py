"""What the backends that run other people's libraries share: finding a library, and saying why it cannot run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeGuard

from mlakit.backends.base import Backend, Unavailable

if TYPE_CHECKING:
    import torch

    from mlakit.backends.problem import MLAProblem, Problem, Ragged
    from mlakit.hardware import DeviceInfo

# What DeepSeek's models have, and what kernels for MLA are written for.
LATENT = (512, 64)


@dataclass(frozen=True)
class Candidate:
    """A module that may offer what is wanted, the distribution it comes from, and what it must have.

    `lacks` says why the module, once imported, does not do; None if it does.
    """

    module: str
    distribution: str
    lacks: Callable[[Any], str | None] = lambda module: None


@dataclass(frozen=True)
class Library:
    """An imported module and its label, "vllm 0.20.2"."""

    module: Any
    label: str


def find(candidates: Iterable[Candidate], install: str) -> Library | Unavailable:
    """The first candidate that can be imported and has what is wanted.

    A library that is there and broken is a reason that says so, beside `install`, which says what to do where there is
    none.
    """
    problems = []
    for candidate in candidates:
        try:
            module = importlib.import_module(candidate.module)
        except ModuleNotFoundError as error:
            # Only the candidate's own absence, or that of a package around it, means that it is not installed.
            if error.name is None or not f"{candidate.module}.".startswith(f"{error.name}."):
                problems.append(f"{candidate.module} needs the module {error.name}, which is not installed")
            continue
        except Exception as error:  # a library built for another PyTorch fails in whatever way it likes
            problems.append(f"{candidate.module} cannot be imported: {_first_line(error)}")
            continue
        reason = candidate.lacks(module)
        if reason is None:
            return Library(module, f"{candidate.distribution} {_version(candidate)}")
        problems.append(f"{candidate.module}: {reason}")
    return Unavailable("; ".join([*problems, install]))


def without(*names: str) -> Callable[[Any], str | None]:
    """A `Candidate.lacks` that wants functions by name."""

    def lacks(module: Any) -> str | None:
        missing = [name for name in names if not hasattr(module, name)]
        return f"has no {' and no '.join(missing)}" if missing else None

    return lacks


def _version(candidate: Candidate) -> str:
    try:
        return version(candidate.distribution)
    except PackageNotFoundError:
        top = importlib.import_module(candidate.module.partition(".")[0])
        return str(getattr(top, "__version__", "of unknown version"))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def why_not(device: DeviceInfo, least: tuple[int, int], *, only: bool = False) -> str | None:
    """Why kernels for a compute capability cannot run on a device; `only`: no later generation runs them either."""
    wanted = ".".join(map(str, least)) + ("" if only else " or later")
    if device.capability is None:
        return f"needs an NVIDIA GPU of compute capability {wanted}, this is a CPU"
    if device.capability[0] == least[0] if only else device.capability >= least:
        return None
    return f"needs compute capability {wanted}, this GPU has {'.'.join(map(str, device.capability))}"


def half_only(problem: Problem) -> str | None:
    """Why a kernel that takes half precision cannot take this problem."""
    import torch

    if problem.dtype in (torch.bfloat16, torch.float16):
        return None
    return f"takes bf16 and fp16, got {str(problem.dtype).removeprefix('torch.')}"


def in_decode(problem: Problem) -> TypeGuard[MLAProblem]:
    """Whether this is MLA's decode pipeline: what most libraries' MLA kernels are for."""
    from mlakit.backends.problem import MLAProblem

    return isinstance(problem, MLAProblem) and problem.pipeline == "decode"


def latent_only(problem: MLAProblem) -> str | None:
    """Why a kernel that is written for DeepSeek's latent cannot take this problem."""
    found = (problem.dims.kv_lora_rank, problem.dims.qk_rope_head_dim)
    if found == LATENT:
        return None
    return "takes kv_lora_rank {} and qk_rope_head_dim {}, got {} and {}".format(*LATENT, *found)


def one_token_only(problem: MLAProblem) -> str | None:
    """Why a decode kernel that takes one new token a request cannot take this problem."""
    if problem.batch.max_q_len == 1:
        return None
    return (
        f"takes one new token a request in decode, got {problem.batch.max_q_len} "
        "(reorder_batch_threshold 1 sends such requests through prefill)"
    )


@dataclass(frozen=True)
class PageLists:
    """Pages as FlashInfer takes them: those of request i are indices[indptr[i] : indptr[i + 1]], all int32."""

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor


def page_lists(batch: Ragged, requests: slice | None = None) -> PageLists:
    """The pages of some requests, of all if none are named."""
    import torch

    requests = requests or slice(0, batch.size)
    counts, lens = batch.page_counts[requests], batch.kv_lens[requests]
    device = batch.block_table.device
    indptr = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).to(torch.int32)
    rows = batch.block_table[requests]
    indices = torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])
    last = [n - (count - 1) * batch.page_size for n, count in zip(lens, counts, strict=True)]
    return PageLists(indptr.to(device), indices, torch.tensor(last, dtype=torch.int32, device=device))


class Peer(Backend):
    """A backend that runs a library which may not be installed.

    A subclass says what hardware its kernels are for, and how to find the library.
    """

    capability: tuple[int, int] = (8, 0)
    only_this_generation = False

    def library(self) -> Library | Unavailable:
        """The library, imported."""
        raise NotImplementedError

    def availability(self, device: DeviceInfo) -> Any:
        """First the GPU, as nothing that can be installed changes that; then the library."""
        from mlakit.backends.base import Available

        if reason := why_not(device, self.capability, only=self.only_this_generation):
            return Unavailable(reason)
        found = self.library()
        return found if isinstance(found, Unavailable) else Available(found.label)

    def require(self) -> Library:
        """The library, once `availability` has found it."""
        found = self.library()
        if isinstance(found, Unavailable):
            raise RuntimeError(found.reason)
        return found
