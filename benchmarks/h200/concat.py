"""Speed of `concat_k` on a GPU: checked bit for bit, then timed beside the two PyTorch methods.

    python benchmarks/h200/concat.py results.json            # the default configuration and the PyTorch methods
    python benchmarks/h200/concat.py results.json --tune     # and every launch configuration worth a try
    python benchmarks/h200/concat.py results.json --batches 32 65536

Keys of DeepSeek-V3, [B, 128, 128] and [B, 1, 64], contiguous as in the seed's benchmark, and ("sliced") as the layer
hands them over: a slice of [key, value] heads and the tail of the latent. Cold L2; the allocation of the result is
included.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlakit.bench.limits import measure_ceilings
from mlakit.bench.timing import time_calls
from mlakit.concat import concat_k, concat_k_cat
from mlakit.concat.triton_concat import ConcatConfig, launch_concat

HEADS, NOPE, ROPE = 128, 128, 64
BATCHES = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
TUNED_BATCHES = [32, 128, 512, 65536]
SHOWN = 8  # lines a job, the best ones
CUDA = torch.device("cuda")


def inputs(batch: int, dtype: torch.dtype, sliced: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if sliced:
        wide = torch.randn(batch, HEADS, 2 * NOPE, device=CUDA, dtype=torch.bfloat16).to(dtype)
        latent = torch.randn(batch, 1, 576, device=CUDA, dtype=torch.bfloat16).to(dtype)
        return wide[..., :NOPE], latent[..., 512:]
    k_nope = torch.randn(batch, HEADS, NOPE, device=CUDA, dtype=torch.bfloat16).to(dtype)
    return k_nope, torch.randn(batch, 1, ROPE, device=CUDA, dtype=torch.bfloat16).to(dtype)


def configs(element_bytes: int) -> Iterator[ConcatConfig]:
    for block_heads in (4, 8, 16, 32, 64, 128):
        for num_warps in (1, 2, 4, 8):
            in_flight = block_heads * NOPE * element_bytes // (32 * num_warps)  # bytes a thread reads
            if 16 <= in_flight <= 256 and block_heads * ROPE * element_bytes >= 512 * num_warps:
                for streaming, evict_first in ((True, False), (False, False), (True, True)):
                    yield ConcatConfig(block_heads, num_warps, streaming, evict_first)


def candidates(
    k_nope: torch.Tensor, k_pe: torch.Tensor, tune: bool
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    for impl in ("cat", "direct_copy", "triton"):
        yield impl, partial(concat_k, k_nope, k_pe, impl=impl)
    if not tune:
        return
    for config in configs(k_nope.element_size()):

        def call(config: ConcatConfig = config) -> torch.Tensor:
            out = torch.empty(*k_nope.shape[:2], NOPE + ROPE, dtype=k_nope.dtype, device=CUDA)
            launch_concat(k_nope, k_pe, out, config)
            return out

        stores = ("cs" if config.streaming else "wb") + (" ef" if config.evict_first else "")
        yield f"triton h{config.block_heads} w{config.num_warps} {stores}", call


def measure(
    batch: int, dtype: torch.dtype, sliced: bool, tune: bool, repeats: int, copy: float
) -> list[dict[str, Any]]:
    k_nope, k_pe = inputs(batch, dtype, sliced)
    expected = concat_k_cat(k_nope, k_pe).view(torch.uint8)
    moved = (k_nope.numel() + k_pe.numel()) * k_nope.element_size() + expected.numel()
    rows: list[dict[str, Any]] = []
    found = list(candidates(k_nope, k_pe, tune))
    with ThreadPoolExecutor(16) as pool:  # compiles side by side
        list(pool.map(lambda candidate: candidate[1]() is None, found))
    torch.cuda.synchronize()
    for name, call in found:
        call().view(torch.uint8).fill_(0xFF)  # the memory that the next call's result will get
        if not torch.equal(call().view(torch.uint8), expected):
            print(f"{batch:6} {name:24} WRONG")
            continue
        timing = time_calls([call], CUDA, repeats=repeats)
        rows.append(
            {
                "op": "concat_k",
                "batch": batch,
                "heads": HEADS,
                "nope": NOPE,
                "rope": ROPE,
                "dtype": str(dtype).removeprefix("torch."),
                "inputs": "sliced" if sliced else "contiguous",
                "impl": name,
                "median_s": timing.median,
                "mean_s": timing.mean,
                "ci95_s": list(timing.ci95),
                "host_s": timing.host,
                "tb_per_s": moved / timing.median * 1e-12,
                "fraction_of_copy": moved / timing.median / copy,
            }
        )
    peer = min(row["median_s"] for row in rows if row["impl"] in ("cat", "direct_copy"))
    for row in rows:
        row["ratio_to_peer"] = peer / row["median_s"]
    return sorted(rows, key=lambda row: row["median_s"])


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The best of one job, with the default configuration and the PyTorch methods wherever they are."""
    for i, row in enumerate(rows):
        if i < SHOWN or not row["impl"].startswith("triton "):
            yield (
                f"{row['dtype'][:8]:8} {row['inputs']:10} {row['batch']:6} {row['impl']:18} "
                f"{row['median_s'] * 1e6:8.2f} us (host {row['host_s'] * 1e6:3.0f}) {row['tb_per_s']:4.2f} TB/s "
                f"{row['fraction_of_copy']:5.3f} of copy {row['ratio_to_peer']:5.2f}x PyTorch"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tune", action="store_true", help="time every launch configuration, on fewer batches")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    copy = measure_ceilings(CUDA).copy_bytes_per_s
    print(f"copy ceiling {copy * 1e-12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    shown: list[str] = []
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for batch in args.batches or (TUNED_BATCHES if args.tune else BATCHES):
            found = measure(batch, dtype, False, args.tune, args.repeats, copy)
            rows += found
            shown += lines(found)
            args.output.write_text(json.dumps(rows, indent=1))
        found = measure(8192, dtype, True, False, args.repeats, copy)
        rows += found
        shown += lines(found)
    args.output.write_text(json.dumps(rows, indent=1))
    print("\n".join(shown))


if __name__ == "__main__":
    main()
