"""FlashAttention over a paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Available, Backend, Parameter, Unavailable, UnsupportedError
from mlakit.backends.flash_attention import find_flash, require_flash
from mlakit.backends.peers import half_only, why_not

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlakit.backends.base import Output
    from mlakit.backends.problem import Problem, StandardProblem
    from mlakit.hardware import DeviceInfo


class Flash(Backend):
    """FA3 on Hopper, FA2 elsewhere; the authors' build before vLLM's."""

    name = "flash"
    summary = "FlashAttention, version 3 on Hopper and 2 elsewhere; one call for all requests"
    hardware = "NVIDIA from Ampere on"
    attention = frozenset({"standard"})
    extra_parameters = (
        Parameter("fa_version", int, "generation of FlashAttention", minimum=2, maximum=3),
        Parameter("num_splits", int, "pieces that a request's keys are cut into (version 3)", minimum=1, maximum=256),
    )

    def availability(self, device: DeviceInfo) -> Available | Unavailable:
        """Any of the builds."""
        if reason := why_not(device, (8, 0)):
            return Unavailable(reason)
        found = find_flash(device)
        return found if isinstance(found, Unavailable) else Available(found.label)

    def refusal(self, problem: Problem) -> str | None:
        """Half precision, and head dims up to 256."""
        from mlakit.backends.problem import StandardProblem

        if reason := half_only(problem):
            return reason
        if isinstance(problem, StandardProblem) and (problem.dims.head_dim > 256 or problem.dims.head_dim % 8):
            return f"takes head dims up to 256 that are multiples of 8, got {problem.dims.head_dim}"
        return None

    def prepare_standard(
        self, problem: StandardProblem, fa_version: int | None = None, num_splits: int = 0, **parameters: Any
    ) -> Callable[..., Output]:
        """The number of splits is the library's choice if it is not given."""
        flash = require_flash(problem, fa_version)
        page_size = problem.batch.page_size
        if page_size % flash.smallest_page:
            raise UnsupportedError(f"{flash.label} takes pages of multiples of {flash.smallest_page}, got {page_size}")
        if num_splits and flash.generation == 2:
            raise UnsupportedError("num_splits is FlashAttention-3's, and what runs is FlashAttention-2")
        problem.kernel = f"{flash.label}, paged"
        run = flash.paged(problem, num_splits=num_splits)
        return lambda q, k_cache, v_cache, out: run(q, k_cache, v_cache, None, out)
