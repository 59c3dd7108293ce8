"""What `time_calls` says, beside other ways of timing the same call, on a GPU: is its clock right?

    python benchmarks/h200/timing.py results.json

The judge is PyTorch's profiler, which gets its times from the GPU: from the start of a call's first kernel to the end
of its last. Events show some 3 us more, as they stand before the first kernel's launch and after the last one's end.
`triton.testing.do_bench` and the ways named after what they leave out or add are the others. Each job has one set of
buffers; that its answers are right, the speed script of its operation checks.
"""

import importlib
import math
import statistics
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from common import CUDA, write_rows
from torch.profiler import ProfilerActivity, profile

from mlakit.bench import timing
from mlakit.bench.timing import capture, time_calls
from mlakit.concat import concat_k
from mlakit.decode import mla_decode

Call = Callable[[], object]
SCALE, RANK, PAGE = 192**-0.5, 512, 64
BATCHES = [(1, 16, 8192), (16, 16, 1024), (64, 16, 4096), (1, 128, 8192), (128, 128, 2048)]  # requests, heads, keys
SAMPLES = 40
FLUSH_BYTES = 2**28


@triton.jit
def _empty_kernel(number):
    pass


def decode_inputs(batch: int, heads: int, keys: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    pages = batch * keys // PAGE
    q = torch.randn((batch, 1, heads, 576), generator=generator, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn((pages, PAGE, 576), generator=generator, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(pages, generator=generator, device="cuda").int().view(batch, -1)
    return q, cache, table, torch.full((batch,), keys, dtype=torch.int32, device="cuda")


def decode_jobs(batch: int, heads: int, keys: int) -> Iterator[tuple[str, Call]]:
    """Ours; FlashMLA with the metadata that a model makes once a step for all its layers, and with new ones a call."""
    q, cache, table, lens = decode_inputs(batch, heads, keys)
    out = torch.empty((batch, 1, heads, RANK), dtype=q.dtype, device="cuda")
    name = f"{batch}x{heads}x{keys}"
    yield (
        f"{name} mla_decode triton",
        partial(mla_decode, q, cache, table, lens, softmax_scale=SCALE, out=out, impl="triton"),
    )
    try:
        module = importlib.import_module("vllm.third_party.flashmla.flash_mla_interface")
    except (ImportError, OSError) as error:
        print(f"no FlashMLA: {error}", file=sys.stderr)
        return
    made = module.get_mla_metadata()[0]  # filled by the first call

    def flash(metadata: Any = None) -> None:
        own = metadata or module.get_mla_metadata()[0]
        module.flash_mla_with_kvcache(
            q, cache[:, :, None], table, lens, RANK, own, None, softmax_scale=SCALE, causal=True
        )

    yield f"{name} flash_mla", partial(flash, made)
    yield f"{name} flash_mla_metadata", flash


def jobs() -> Iterator[tuple[str, Call]]:
    for batch in BATCHES:
        yield from decode_jobs(*batch)
    for mib in (1, 64):
        source = torch.randn(mib * 2**18, device="cuda")
        yield f"copy {mib} MiB", partial(torch.empty_like(source).copy_, source)
    # What the smallest kernels take is what no launch can be shorter than.
    yield "add to 64 numbers", partial(torch.zeros(64, device="cuda").add_, 1)
    yield "empty Triton kernel", lambda: _empty_kernel[(1,)](0, num_warps=1)
    k_nope, k_pe = torch.randn(32, 128, 128, device="cuda").bfloat16(), torch.randn(32, 1, 64, device="cuda").bfloat16()
    keys = torch.empty(32, 128, 192, dtype=torch.bfloat16, device="cuda")
    yield "concat_k of 32 tokens", lambda: concat_k(k_nope, k_pe, out=keys)


def by_events(call: Call, *, head_start: float = 3.0, flush: str = "write", graph: bool = False) -> float:
    """As `time_calls` does it, but for what is named; `head_start` is in multiples of the call's host time."""
    host = timing._host_seconds([call])
    buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    run = capture(call).replay if graph else call
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(SAMPLES)]
    torch.cuda.synchronize()
    for start, end in events:
        if flush == "write":
            buffer.zero_()
        elif flush == "read":
            buffer.sum()
        if head_start:
            torch.cuda._sleep(int((head_start * host + 20e-6) * 2e9))
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e-3


def by_profiler(call: Call) -> float:
    """From the start of the first kernel to the end of the last one."""
    host = timing._host_seconds([call])
    buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(SAMPLES // 2):
            buffer.zero_()
            torch.cuda._sleep(int((3 * host + 20e-6) * 2e9))
            call()
        torch.cuda.synchronize()
    on_gpu = [e.time_range for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans: list[float] = []
    begin = end = math.nan
    inside = False
    for name, at in sorted(zip(names, on_gpu, strict=True), key=lambda pair: pair[1].start):
        if "spin" in name:  # a sample begins behind the head start, and ends before the next flush
            inside, begin = True, math.nan
        elif ("emset" in name or "Fill" in name) and at.elapsed_us() > 30:
            if inside and not math.isnan(begin):
                spans.append((end - begin) * 1e-6)
            inside = False
        elif inside:
            begin = at.start if math.isnan(begin) else begin
            end = at.end
    return statistics.median(spans[2:])


METHODS: dict[str, Callable[[Call], float]] = {
    "time_calls": lambda call: time_calls([call], CUDA, repeats=SAMPLES).median,
    "profiler": by_profiler,
    "do_bench": lambda call: triton.testing.do_bench(call, warmup=10, rep=40, quantiles=[0.5]) * 1e-3,
    "no head start": partial(by_events, head_start=0.0),
    "head start x3": partial(by_events, head_start=9.0),
    "flush by reading": partial(by_events, flush="read"),
    "no flush": partial(by_events, flush="none"),
    "graph": partial(by_events, graph=True),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    warnings.simplefilter("ignore")  # the profiler's, about its own start
    rows: list[dict[str, Any]] = []
    print(f"{'us':32}" + "".join(f"{name:>18}" for name in METHODS))
    for name, call in jobs():
        call()
        found = {}
        for method, measure in METHODS.items():
            try:
                found[method] = measure(call)
            except Exception as error:  # a way that this machine does not offer (no access to the profiler's counters)
                print(f"{name} {method}: {type(error).__name__}: {error}"[:150], file=sys.stderr)
        rows += [{"op": "timing", "job": name, "method": method, "median_s": s} for method, s in found.items()]
        print(f"{name:32}" + "".join(f"{found.get(method, math.nan) * 1e6:18.1f}" for method in METHODS), flush=True)
        write_rows(output, rows)


if __name__ == "__main__":
    main()
