"""FlashInfer: where it is found, and what its wrappers have in common.

Signatures: flashinfer-python 0.6.8, flashinfer/{mla/_core,prefill,decode}.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Parameter, Unavailable
from mlakit.backends.peers import Candidate, Library, Peer, find, half_only, without

if TYPE_CHECKING:
    import torch

    from mlakit.backends.problem import Problem

_WORKSPACE_BYTES = 128 * 2**20  # what its documentation recommends

KERNEL = Parameter("backend", str, "which of its kernels runs, instead of its own choice", choices=("fa2", "fa3"))


class FlashInferPeer(Peer):
    """Its kernels are compiled on first use, which takes minutes and counts for no row's time."""

    hardware = "NVIDIA from Ampere on"

    def library(self) -> Library | Unavailable:
        """flashinfer-python."""
        return find(
            (Candidate("flashinfer", "flashinfer-python", without("mla", "prefill", "decode")),),
            "FlashInfer: pip install flashinfer-python",
        )

    def refusal(self, problem: Problem) -> str | None:
        """Half precision."""
        return half_only(problem)


def workspace(problem: Problem) -> torch.Tensor:
    """Memory for the partial results of split keys."""
    import torch

    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=problem.device)


def ran(wrapper: Any, wanted: str) -> str:
    """Which kernel a planned wrapper runs.

    Raises:
        RuntimeError: another than the one asked for.
    """
    found = str(getattr(wrapper, "_backend", "unknown"))
    if wanted not in ("auto", found):
        raise RuntimeError(f"FlashInfer was asked for its {wanted} kernel and planned {found}")
    return found
