"""FlashAttention-3 in MLA's latent space: the rope part is its query and key, the latent its value, and `q_v` the
absorbed query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Available, Backend, Parameter, Unavailable
from mlakit.backends.flash_attention import find_flash, prefill_by_flash, require_flash
from mlakit.backends.peers import half_only, in_decode, latent_only, why_not

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlakit.backends.base import Output
    from mlakit.backends.problem import MLAProblem, Problem
    from mlakit.hardware import DeviceInfo


class FlashAttnMLA(Backend):
    """Scores are q_rope k_rope + q_v latent, in one kernel."""

    name = "flashattn_mla"
    summary = "FlashAttention-3 with q_v; its schedule is made once a batch, as for all layers of a step"
    hardware = "NVIDIA Hopper"
    attention = frozenset({"mla"})
    extra_parameters = (
        Parameter("num_splits", int, "pieces that a request's keys are cut into in decode", minimum=1, maximum=256),
        Parameter(
            "metadata",
            str,
            "decode's schedule: once a batch (default) or in each call",
            choices=("batch", "call"),
            tunes=False,
        ),
    )

    def availability(self, device: DeviceInfo) -> Available | Unavailable:
        """FlashAttention-3, the authors' or vLLM's."""
        if reason := why_not(device, (9, 0), only=True):
            return Unavailable(reason)
        found = find_flash(device, 3)
        return found if isinstance(found, Unavailable) else Available(found.label)

    def refusal(self, problem: Problem) -> str | None:
        """Half precision; in decode DeepSeek's latent."""
        return half_only(problem) or (latent_only(problem) if in_decode(problem) else None)

    def known_limit(self, problem: Problem) -> str | None:
        """It multiplies what lies behind a request's last key by zero (seen with 128 heads, not with 16)."""
        batch = problem.batch
        if not in_decode(problem) or all(n % batch.page_size == 0 for n in batch.kv_lens):
            return None
        return (
            "a request ends within a page, and with many heads FlashAttention-3 multiplies what follows there by zero: "
            "the NaN that the bench has there stays NaN"
        )

    def prepare_mqa(
        self, problem: MLAProblem, num_splits: int = 0, metadata: str = "batch", **parameters: Any
    ) -> Callable[..., Output]:
        """One call for requests of any lengths."""
        flash, dims = require_flash(problem, 3), problem.dims
        rank = dims.kv_lora_rank
        schedule = None
        if metadata == "batch":
            schedule = flash.schedule(
                problem,
                heads=dims.num_heads,
                kv_heads=1,
                head_dim=dims.qk_rope_head_dim,
                v_head_dim=rank,
                num_splits=num_splits,
            )
        made = "in each call" if schedule is None else "once a batch"
        problem.kernel = f"{flash.label}, paged with q_v; schedule made {made}"
        attend = flash.paged(problem, num_splits=num_splits, metadata=schedule)

        def run(q: Any, cache: Any, out: Any) -> Output:
            keys = cache[:, :, None]
            return attend(q[..., rank:], keys[..., rank:], keys[..., :rank], q[..., :rank], out)

        return run

    def prepare_mha(self, problem: MLAProblem, **parameters: Any) -> Callable[..., Output]:
        """The same library's varlen kernel."""
        return prefill_by_flash(problem)
