"""What other kernels leave to the next one: `mla_decode` and its peers with their instructions displaced, on a GPU.

    python benchmarks/h200/cold_code.py results.json

A benchmark calls one kernel again and again, so that its instructions stay in the caches of the multiprocessors, even
where L2 is flushed. In a model dozens of other kernels run in between. Here a kernel of 320 KB of straight code, more
than those caches hold, runs right before each call ("displaced"), or one that does the same arithmetic in a loop. Every
candidate is checked as in dense_decode.py, and timed by events around the call with a cold L2.
"""

import statistics
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from common import write_rows
from dense_decode import build, measure, ours, peers_of

# requests, heads, keys, new tokens
BATCHES = [
    (1, 16, 8192, 1), (16, 16, 1024, 1), (64, 16, 4096, 1), (16, 16, 4096, 4), (1, 128, 8192, 1), (16, 128, 1024, 1),
    (16, 128, 4096, 1), (64, 128, 4096, 1), (128, 128, 2048, 1),
]  # fmt: skip
CANDIDATES = ("hopper", "triton", "flash_mla", "flashinfer", "fa3")
SAMPLES = 30
ADDITIONS = 20000  # an instruction has 16 bytes
STEP = "fma.rn.f32 $0, $0, $0, 0f3F000000;\n"
STRAIGHT = tl.constexpr("mov.f32 $0, $1;\n" + STEP * ADDITIONS)
LOOP = tl.constexpr(
    "{ .reg .pred more; .reg .u32 left; mov.f32 $0, $1; mov.u32 left, "
    + f"{ADDITIONS // 50};\nAGAIN: {STEP * 50} sub.u32 left, left, 1; setp.ne.u32 more, left, 0; @more bra AGAIN; }}"
)


@triton.jit
def _arithmetic_kernel(x_ptr, CODE: tl.constexpr):
    at = x_ptr + tl.arange(0, 128)
    x = tl.inline_asm_elementwise(CODE, "=f,f", [tl.load(at)], dtype=tl.float32, is_pure=False, pack=1)
    tl.store(at, x)


def median_after(before: Callable[[], object], call: Callable[[], object]) -> float:
    """Seconds of a call right behind another kernel, by events; the head start covers launching all three."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(SAMPLES)]
    torch.cuda.synchronize()
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(2_000_000)
        before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e-3


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    numbers, units = torch.zeros(128, device="cuda"), torch.cuda.get_device_properties(0).multi_processor_count
    kept = partial(_arithmetic_kernel[(2 * units,)], numbers, LOOP)
    displaced = partial(_arithmetic_kernel[(2 * units,)], numbers, STRAIGHT)
    rows: list[dict[str, Any]] = []
    for batch, heads, keys, q_len in BATCHES:
        row = build(f"{batch}x{heads}x{keys}" + (f" q{q_len}" if q_len > 1 else ""), [keys] * batch, heads, q_len)
        for candidate in [*ours(row, False), *peers_of(row)]:
            name, call = candidate
            if name not in CANDIDATES:
                continue
            timing, reason = measure(row, candidate, 10, False)
            if timing is None:
                print(f"{row.name:20} {name:12} {reason}")
                continue
            times = {name: median_after(kept, call), f"{name}, displaced": median_after(displaced, call)}
            rows += [{"op": "cold_code", "job": row.name, "method": m, "median_s": s} for m, s in times.items()]
            print(f"{row.name:20} {name:12}" + "".join(f"{s * 1e6:10.1f}" for s in times.values()), flush=True)
        write_rows(output, rows)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
