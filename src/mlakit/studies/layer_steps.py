"""What the studies of the layer do with a layer: build it in every implementation with the same weights, run a prefill
or a decode step, time it, and tell why it cannot be done.
"""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mlakit.bench.measure import first_line, is_out_of_memory
from mlakit.bench.memory import available_bytes, measure_peak
from mlakit.bench.timing import Timing, time_calls
from mlakit.nn import Args, get_mla
from mlakit.studies.layer_options import Options, Shape

_GIB = 2**30
# Of a score, naive and absorb hold at once: itself, in float32 for the softmax, the weights, and those rounded.
_BYTES_A_SCORE = 12
OUT_OF_MEMORY = "out of memory"


class Layers:
    """A layer of one shape, in every implementation, all with the same weights."""

    def __init__(self, shape: Shape, options: Options, max_batch: int, max_seq_len: int) -> None:
        self.shape = shape
        self.options = options
        self.device = torch.device(options.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # graphs are captured on the current one
        self._sizes = {"max_batch_size": max_batch, "max_seq_len": max_seq_len}
        self._built: dict[tuple[str, tuple[tuple[str, Any], ...]], Any] = {}
        self._first: Any = None
        self._freqs: torch.Tensor | None = None

    def args(self, implementation: str, **changes: Any) -> Args:
        """The layer's configuration.

        Raises:
            ValueError: this implementation cannot have these dimensions.
        """
        o = self.options
        fields = {"dtype": o.dtype, "gemm_impl": o.gemm_impl, "cache_dtype": o.cache_dtype, **self._sizes}
        return Args(attn_impl=implementation, **{**fields, **self.shape.fields(), **changes})

    def require_possible(self) -> None:
        """Raise what is wrong with the dimensions, unless some implementation can have them.

        Raises:
            ValueError: none can.
        """
        reasons = []
        for implementation in self.options.implementations:
            try:
                self.args(implementation)
                return
            except ValueError as error:
                reasons.append(str(error))
        raise ValueError(reasons[-1])

    def model(self, implementation: str, **changes: Any) -> Any:
        """The layer in one implementation, made at first use; `changes` are fields of its `Args`."""
        key = (implementation, tuple(sorted(changes.items())))
        if key not in self._built:
            self._built[key] = self._build(self.args(implementation, **changes))
        return self._built[key]

    def adopt(self, make: Callable[[Args], torch.nn.Module], **changes: Any) -> Any:
        """A layer of somebody else's, from naive's `Args`, with the same weights."""
        model = make(self.args("naive", **changes)).to(self.device)
        self.freqs()  # builds the layer whose weights are copied
        model.load_state_dict(self._first.state_dict())
        return model.eval()

    def _build(self, args: Args, *, share: bool = True) -> Any:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.device(self.device):
            torch.manual_seed(self.options.seed)
            model = get_mla(args.attn_impl, args)
        if self._first is None:
            self._first = model
        else:
            model.load_state_dict(self._first.state_dict(), assign=share)
        return model.eval()

    def freqs(self) -> torch.Tensor:
        """The rope table, [max_seq_len, rope / 2]."""
        if self._freqs is None:
            model = self._first if self._first is not None else self.model("naive", cache_dtype="bf16")
            self._freqs = model.precompute_freqs_cis(self.args("naive", cache_dtype="bf16")).to(self.device)
        return self._freqs

    def inputs(self, batch: int, seq_len: int) -> torch.Tensor:
        """Hidden states [batch, seq_len, dim] as a normalized residual stream has them."""
        generator = torch.Generator(self.device).manual_seed(self.options.seed + 1)
        x = torch.randn(batch, seq_len, self.shape.dim, device=self.device, generator=generator)
        return x.to(torch.bfloat16)

    @property
    def weight_bytes(self) -> int:
        """Of the parameters."""
        model = self._first if self._first is not None else self.model("naive", cache_dtype="bf16")
        return sum(p.numel() * p.element_size() for p in model.parameters())

    def reference(self, x: torch.Tensor, *, causal: bool = True) -> torch.Tensor:
        """What the layer should give for hidden states [batch, seq_len, dim]: naive in float64, by the standard path,
        and if causal in chunks, whose scores fit where those of all do not.
        """
        key = ("float64", ())
        if key not in self._built:
            self.freqs()  # builds the layer whose weights are copied
            args = self.args("naive", cache_dtype="bf16", gemm_impl="bf16", fast_path_tokens=0)
            self._built[key] = self._build(args, share=False).double()
        model, end = self._built[key], x.shape[1]
        cache = model.make_cache(x.shape[0], end, torch.float64)
        if not causal:
            return model(x.double(), 0, self.freqs()[:end], None, cache)
        parts = []
        for start, stop in self._chunks(x.shape[0], end, 4 * _BYTES_A_SCORE):
            mask = torch.full((stop - start, stop), -math.inf, dtype=torch.float64, device=self.device).triu_(start + 1)
            parts.append(model(x[:, start:stop].double(), start, self.freqs()[start:stop], mask, cache))
        return torch.cat(parts, dim=1)

    def fill(self, model: Any, x: torch.Tensor, cache: Any) -> None:
        """Run a prefill for the sake of the cache, in chunks that any implementation has the memory for."""
        for start, stop in self._chunks(x.shape[0], x.shape[1], _BYTES_A_SCORE):
            model(x[:, start:stop], start, self.freqs()[start:stop], "causal", cache)

    def _chunks(self, batch: int, end: int, bytes_a_score: int) -> Iterator[tuple[int, int]]:
        room = 4 * _GIB if self.device.type == "cuda" else _GIB // 4
        room = min(room, available_bytes(self.device) // 4)
        size = max(1, room // (bytes_a_score * batch * self.shape.dims.num_heads * max(end, 1)))
        for start in range(0, end, size):
            yield start, min(start + size, end)


class Step:
    """A prefill of `seq_len` tokens, or a decode step whose token is the last of `seq_len` keys: ready to be called.

    With `table` a decode step gets its position as a tensor, and the whole
    rope table, as under a CUDA graph. A `cache` that is given holds the earlier tokens already.
    """

    def __init__(
        self, layers: Layers, model: Any, x: torch.Tensor, phase: str, *, table: bool = False, cache: Any = None
    ) -> None:
        batch, seq_len = x.shape[:2]
        self.cache = model.make_cache(batch, seq_len) if cache is None else cache
        self._out: torch.Tensor | None = None
        self._model = model
        freqs = layers.freqs()
        self._inputs: tuple[Any, ...]
        if phase == "prefill":
            self._inputs = (x, 0, freqs[:seq_len], "causal", self.cache)
            return
        if cache is None:
            layers.fill(model, x[:, :-1], self.cache)
        new = x[:, -1:].contiguous()
        if table:
            start = torch.full((batch,), seq_len - 1, dtype=torch.int32, device=x.device)
            self._inputs = (new, start, freqs, None, self.cache)
        else:
            self._inputs = (new, seq_len - 1, freqs[seq_len - 1 : seq_len], None, self.cache)

    def __call__(self) -> torch.Tensor:
        """Run it."""
        self._out = self._model(*self._inputs)
        return self._out

    def last(self) -> torch.Tensor:
        """The output of the last call, or of the last replay of the graph that captured it."""
        assert self._out is not None
        return self._out


def cache_bytes(cache: Any) -> int:
    """Of the tensors that a cache holds."""
    tensors = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Measured:
    """Times of a call, and the MiB that it took on top of weights, inputs and cache."""

    timing: Timing
    temporary_mib: float | None
    allocated_mib: float | None


def measure_call(call: Callable[[], object], options: Options, *, cuda_graph: bool = False) -> Measured:
    """Peak memory and times of a call."""
    device = torch.device(options.device)
    call()  # whatever is compiled or kept at the first call is no part of what a call takes
    peak = measure_peak(call, device)
    timing = time_calls(
        [call], device, repeats=options.trials, warmup=options.warmup, cuda_graph=cuda_graph, budget=0.3
    )
    return Measured(timing, peak["memory_temporary_mb"], peak["memory_allocated_mb"])


def require_memory(shape: Shape, device: torch.device, batch: int, queries: int, keys: int) -> None:
    """On a CPU, refuse what cannot fit: there the system ends a process that takes more than there is.

    Raises:
        MemoryError: the scores alone take more than is free.
    """
    if device.type != "cpu":
        return
    needed = _BYTES_A_SCORE * batch * shape.dims.num_heads * queries * keys
    free = available_bytes(device)
    if needed > free:
        raise MemoryError(f"the scores take {needed / _GIB:.1f} GiB, {free / _GIB:.1f} GiB are free")


def reason_of(error: Exception) -> str:
    """Why a row has no time, in a line.

    Raises:
        Exception: the error itself, if the device is in a state that nothing after can be believed in.
    """
    text = str(error)
    if is_out_of_memory(error):
        return f"{OUT_OF_MEMORY} ({text})" if isinstance(error, MemoryError) and text else OUT_OF_MEMORY
    if "illegal" in text or "unspecified launch" in text or "device-side assert" in text:
        raise error
    return text.strip().splitlines()[0] if isinstance(error, ValueError) and text.strip() else first_line(error)


def free_memory() -> None:
    """Give back what a row leaves behind on a GPU, so that the next one has it."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def stamp(options: Options) -> dict[str, Any]:
    """For a record: where and when it was measured, and on a GPU what that can do."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from mlakit.bench.environment import describe_environment
    from mlakit.bench.limits import gpu_ceilings
    from mlakit.hardware import device_info

    ceilings = gpu_ceilings(options.device)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe_environment(device_info(options.device)),
        "ceilings": asdict(ceilings) if ceilings else None,
    }
