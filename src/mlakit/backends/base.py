"""The interface between the bench and whatever it measures. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from mlakit.backends.problem import MLAProblem, Problem, StandardProblem
    from mlakit.hardware import DeviceInfo

    # An output, or an output and its log-sum-exp (natural log, float32, [tokens, heads]).
    Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

Attention = Literal["mla", "standard"]
Mode = Literal["mqa", "mha"]


@dataclass(frozen=True)
class Available:
    """The backend can run here; `version` names the library that does the work."""

    version: str


@dataclass(frozen=True)
class Unavailable:
    """The backend cannot run here; `reason` says why, and what to do if something can be done."""

    reason: str


class UnsupportedError(Exception):
    """Raised while preparing, or by a first call before it launched anything: this problem cannot be run with these
    parameters. The message says why; the row's status is "unsupported".
    """


@dataclass(frozen=True)
class Parameter:
    """A setting that can be given and swept.

    `minimum` and `maximum` bound an int (inclusive); `choices` lists what a str may be. "auto" is always accepted and
    means: not given. `tunes`: it makes a call faster or slower; otherwise it only says what is in it.
    """

    name: str
    type: type[int] | type[str]
    help: str
    minimum: int | None = None
    maximum: int | None = None
    choices: tuple[str, ...] = ()
    tunes: bool = True

    def candidates(self, most: int = 64) -> list[int | str]:
        """Values worth a try beside "auto": each choice, all of a few numbers, else powers of two; up to `most`."""
        if self.type is str:
            return list(self.choices)
        low, high = self.minimum or 0, most if self.maximum is None else min(most, self.maximum)
        if high - low < 4:
            return list(range(low, high + 1))
        return [2**i for i in range(high.bit_length()) if low <= 2**i <= high]

    @property
    def values(self) -> str:
        """What it may be, in short: "1..64", "0.." or "fa2|fa3"."""
        if self.type is str:
            return "|".join(self.choices)
        low, high = ("" if bound is None else str(bound) for bound in (self.minimum, self.maximum))
        return f"{low}..{high}"

    def parse(self, value: object) -> int | str:
        """The value in this parameter's type.

        Raises:
            ValueError: naming what is expected and what was given.
        """
        if value == "auto":
            return "auto"
        if self.type is str:
            if value not in self.choices:
                raise ValueError(f"{self.name} must be one of auto, {', '.join(self.choices)}; got {value!r}")
            return str(value)
        try:
            number = int(str(value))
        except ValueError:
            raise ValueError(f"{self.name} must be a whole number or auto, got {value!r}") from None
        if (self.minimum is not None and number < self.minimum) or (self.maximum is not None and number > self.maximum):
            low = "" if self.minimum is None else f" from {self.minimum}"
            high = "" if self.maximum is None else f" to {self.maximum}"
            raise ValueError(f"{self.name} must be a whole number{low}{high}, got {number}")
        return number


REORDER_BATCH_THRESHOLD = Parameter(
    "reorder_batch_threshold",
    int,
    "requests with at most this many new tokens go through the decode pipeline, the others through prefill",
    minimum=0,
)


class Backend:
    """One way to compute attention. A subclass says what it is and prepares callables; it never times or checks
    anything.

    For MLA a backend implements `prepare_mqa`, `prepare_mha` or both, and says in `decode_mode` and `prefill_mode`
    which of them each pipeline uses. The projections around them, paging and up-projection are the bench's
    (`backends/pipeline.py`). For standard attention it implements `prepare_standard`.

    A prepared callable is given one layer's tensors and an output buffer. It writes the buffer and returns it, or
    returns a tensor of its own; it may return a pair with the log-sum-exp, which is then checked too. It must not keep
    results from an earlier call.

    A backend whose library chooses among kernels writes into `problem.kernel` which one runs, as it prepares or in the
    first call. One that cannot run the kernel it was asked for raises; it never runs another instead.
    """

    name: str = ""
    summary: str = ""
    hardware: str = "any"
    attention: frozenset[Attention] = frozenset()
    decode_mode: Mode = "mqa"
    prefill_mode: Mode = "mha"
    # Used for `reorder_batch_threshold: auto`: speculative decoding of up to 8 tokens counts as decode.
    default_reorder_batch_threshold: int = 8
    extra_parameters: Sequence[Parameter] = ()

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What can be set and swept, by name."""
        shared = [REORDER_BATCH_THRESHOLD] if "mla" in self.attention else []
        return {p.name: p for p in [*shared, *self.extra_parameters]}

    def mode(self, pipeline: Literal["decode", "prefill"]) -> Mode:
        """In which of MLA's two modes this backend runs a pipeline."""
        return self.decode_mode if pipeline == "decode" else self.prefill_mode

    def availability(self, device: DeviceInfo) -> Available | Unavailable:
        """Whether this backend can run on the device at all; must not raise."""
        raise NotImplementedError

    def refusal(self, problem: Problem) -> str | None:
        """Why this backend cannot take this problem (a page size, a head count), found before any launch; None if it
        can.
        """
        return None

    def known_limit(self, problem: Problem) -> str | None:
        """What is known to go wrong with this library on this problem: added to the message if it fails. None if
        nothing is.
        """
        return None

    def prepare_mqa(self, problem: MLAProblem, **parameters: Any) -> Callable[..., Output]:
        """Prepare attention in the latent space: `run(q_latent, cache, out)`.

        q_latent is [tokens, heads, latent_dim], cache [pages, page_size, latent_dim], out [tokens, heads,
        kv_lora_rank].
        """
        raise NotImplementedError

    def prepare_mha(self, problem: MLAProblem, **parameters: Any) -> Callable[..., Output]:
        """Prepare attention with expanded keys and values: `run(q, k, v, out)`.

        q is [tokens, heads, qk_head_dim], k [keys, heads, qk_head_dim], v [keys, heads, v_head_dim], out [tokens,
        heads, v_head_dim].
        """
        raise NotImplementedError

    def prepare_standard(self, problem: StandardProblem, **parameters: Any) -> Callable[..., Output]:
        """Prepare standard attention over a paged cache: `run(q, k_cache, v_cache, out)`.

        q is [tokens, num_q_heads, head_dim], the caches [pages, page_size, num_kv_heads, head_dim], out like q.
        """
        raise NotImplementedError
