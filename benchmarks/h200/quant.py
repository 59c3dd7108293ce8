"""Speed of the float8 and cache operations on a GPU: each checked against its reference, then timed.

    python benchmarks/h200/quant.py results.json                     # the default configurations and the baselines
    python benchmarks/h200/quant.py results.json --tune              # and every launch configuration worth a try
    python benchmarks/h200/quant.py results.json --only fp8_gemm     # one operation

Baselines: eager PyTorch (the reference) for what moves bytes; for the product PyTorch's bfloat16 matmul, cuBLAS's
float8 with the same scales, 1 x 128 of a and 128 x 128 of b (`torch._scaled_mm`), and DeepGEMM, where they are there.
The scales of a lie in rows, as `act_quant` writes them: DeepGEMM transposes them in its call, cuBLAS gets them
transposed. Cold L2; allocations of results are included. Products are timed in turns (common.py tells why).
"""

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import order_of_turn

from mlakit.bench.limits import measure_ceilings
from mlakit.bench.timing import Timing, time_calls
from mlakit.cache import append_latent, gather_latent, pack_fp8
from mlakit.cache.reference import append_latent_reference, gather_latent_reference
from mlakit.cache.triton_append import AppendConfig, launch_append
from mlakit.cache.triton_gather import GatherConfig, launch_gather
from mlakit.quant import act_quant, fp8_gemm, weight_dequant, weight_quant
from mlakit.quant.hopper_many_launch import ManyRowsConfig, launch_many_rows
from mlakit.quant.reference import act_quant_reference, fp8_gemm_reference, weight_dequant_reference
from mlakit.quant.triton_gemm import GemmConfig, launch_fp8_gemm
from mlakit.quant.triton_quant import ActQuantConfig, WeightDequantConfig, launch_act_quant, launch_weight_dequant
from mlakit.testing import compare

CUDA = torch.device("cuda")
BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
Call = Callable[[], object]

ACT_SHAPES = [(128, 7168), (4096, 7168), (32768, 7168)]
TUNED_ACT_SHAPES = ACT_SHAPES[1:]
WEIGHT_SHAPES = [(2048, 7168), (7168, 18432)]
TUNED_WEIGHT_SHAPES = WEIGHT_SHAPES[1:]
# m, n, k of DeepSeek-V3: the latent's down-projection, an expert's, the dense MLP's and attention's output.
GEMM_SHAPES = [
    (16, 7168, 2048), (128, 7168, 16384), (512, 4096, 7168), (1024, 2112, 7168), (4096, 576, 7168), (4096, 7168, 2048),
    (4096, 24576, 1536), (4096, 4096, 7168), (4096, 7168, 7168), (4096, 7168, 16384), (4096, 18432, 7168),
    (8192, 7168, 7168), (8192, 8192, 8192),
]  # fmt: skip
TUNED_GEMM_SHAPES = [shape for shape in GEMM_SHAPES if shape[0] != 8192]
APPEND_TOKENS = [128, 4096, 65536]
TUNED_APPEND_TOKENS = [128, 65536]
GATHER_LENS = [[8192] * 8, [1024] * 128]
TUNED_GATHER_LENS = GATHER_LENS[1:]
SHOWN = 8  # lines a job, the best ones


# Elements a program and warps: 16 to 64 elements a thread.
ACT_TILES = [
    (512, 1),
    (1024, 1),
    (1024, 2),
    (2048, 1),
    (2048, 2),
    (2048, 4),
    (4096, 4),
    (4096, 8),
    (8192, 4),
    (8192, 8),
]
# Rows, columns and warps: 16 to 64 elements a thread.
WEIGHT_TILES = [
    (16, 128, 2), (16, 128, 4), (32, 128, 2), (32, 128, 4), (32, 128, 8), (64, 128, 4), (64, 128, 8), (128, 128, 8),
    (8, 512, 4),
]  # fmt: skip


@dataclass
class Job:
    """One operation on one shape: what counts as right, how much it moves and computes, and who takes part."""

    op: str
    shape: str
    least_bytes: float
    flops: float
    wrong: Callable[[Any], str]
    candidates: list[tuple[str, Call]]
    peers: tuple[str, ...]
    written: torch.Tensor | None = None  # what the calls write in place
    turns: int = 1  # in which the candidates are timed, a share of the samples each time


def _differs(what: bool) -> str:
    return "" if what else "differs from the reference"


def _unequal(expected: torch.Tensor, got: torch.Tensor) -> str:
    return _differs(torch.equal(got, expected))


def tuned_act_quant(x: torch.Tensor, config: ActQuantConfig) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty_like(x, dtype=F8)
    scales = x.new_empty(x.shape[0], x.shape[1] // 128, dtype=torch.float32)
    launch_act_quant(x, codes, scales, block_size=128, ue8m0=False, config=config)
    return codes, scales


def tuned_weight_dequant(w: torch.Tensor, scales: torch.Tensor, config: WeightDequantConfig) -> torch.Tensor:
    out = torch.empty_like(w, dtype=BF16)
    launch_weight_dequant(w, scales, out, block_size=128, config=config)
    return out


def tuned_gemm(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, config: GemmConfig | None
) -> torch.Tensor:
    out = torch.empty(a.shape[0], b.shape[0], device=CUDA, dtype=BF16)
    launch_fp8_gemm(a, a_scales, b, b_scales, out, config)
    return out


def tuned_append(tensors: tuple[torch.Tensor, ...], config: AppendConfig) -> None:
    kv, weight, cos, sin, cache, slots = tensors
    launch_append(kv, weight, cos, sin, cache, slots, None, eps=1e-6, interleaved=True, ue8m0=False, config=config)


def tuned_gather(tensors: tuple[torch.Tensor, ...], total: int, config: GatherConfig) -> torch.Tensor:
    cache, table, cu_seqlens = tensors
    out = torch.empty(total, 576, device=CUDA, dtype=BF16)
    launch_gather(cache, table, cu_seqlens, None, out, kv_lora_rank=512, config=config)
    return out


def act_quant_jobs(tune: bool) -> Iterator[Job]:
    for shape in TUNED_ACT_SHAPES if tune else ACT_SHAPES:
        x = torch.randn(shape, device=CUDA, dtype=BF16)
        expected, expected_scales = act_quant_reference(x)
        candidates: list[tuple[str, Call]] = [
            ("reference", partial(act_quant_reference, x)),
            ("triton", partial(act_quant, x)),
            ("triton ue8m0", partial(act_quant, x, scale_fmt="ue8m0")),
        ]
        for elements, num_warps in ACT_TILES if tune else ():
            for streaming, evict_first in ((False, False), (True, False), (False, True)):
                config = ActQuantConfig(elements, num_warps, streaming, evict_first)
                name = f"triton e{elements} w{num_warps} {'cs' if streaming else 'wb'}" + (" ef" if evict_first else "")
                candidates.append((name, partial(tuned_act_quant, x, config)))

        def wrong(got: Any, codes: torch.Tensor = expected, scales: torch.Tensor = expected_scales) -> str:
            if not torch.equal(got[1], scales):  # ue8m0: the values must be near all the same
                near = got[0].float().unflatten(-1, (-1, 128)) * got[1][..., None]
                want = codes.float().unflatten(-1, (-1, 128)) * scales[..., None]
                return _differs(bool(((near - want).norm() < 0.05 * want.norm()).item()))
            return _differs(torch.equal(got[0].view(torch.uint8), codes.view(torch.uint8)))

        moved = x.numel() * 3 + expected_scales.numel() * 4
        yield Job("act_quant", "x".join(map(str, shape)), moved, 0, wrong, candidates, ("reference",))


def weight_dequant_jobs(tune: bool) -> Iterator[Job]:
    for shape in TUNED_WEIGHT_SHAPES if tune else WEIGHT_SHAPES:
        codes, scales = weight_quant(torch.randn(shape, device=CUDA))
        expected = weight_dequant_reference(codes, scales)
        candidates: list[tuple[str, Call]] = [
            ("reference", partial(weight_dequant_reference, codes, scales)),
            ("triton", partial(weight_dequant, codes, scales)),
        ]
        for rows, columns, num_warps in WEIGHT_TILES if tune else ():
            for streaming in (False, True):
                config = WeightDequantConfig(rows, columns, num_warps, streaming=streaming)
                name = f"triton {rows}x{columns} w{num_warps} {'cs' if streaming else 'wb'}"
                candidates.append((name, partial(tuned_weight_dequant, codes, scales, config)))
        wrong = partial(_unequal, expected)
        moved = codes.numel() * 3 + scales.numel() * 4
        yield Job("weight_dequant", "x".join(map(str, shape)), moved, 0, wrong, candidates, ("reference",))


def gemm_configs(m: int) -> Iterator[GemmConfig]:
    if m <= 16:  # tile, warps, stages
        for n, w, s in [(16, 4, 6), (32, 4, 5), (32, 4, 8), (64, 4, 6), (32, 2, 5)]:
            yield GemmConfig(16, n, w, s)
        for n, s in [(32, 6), (64, 6)]:
            yield GemmConfig(16, n, 4, s, descriptors=True)
        return
    if m <= 128:
        for n, w, s in [(64, 4, 4), (64, 4, 6), (32, 4, 6), (128, 4, 4)]:
            yield GemmConfig(64, n, w, s)
            yield GemmConfig(64, n, w, s, descriptors=True)
        yield GemmConfig(128, 64, 4, 5, descriptors=True)
        return
    # DeepSeek's tile by pointers, two or three programs a multiprocessor; the same by TMA; the larger tile.
    yield GemmConfig(64, 128, 4, 4)
    yield GemmConfig(64, 128, 8, 3)
    yield GemmConfig(64, 128, 8, 4)
    yield GemmConfig(128, 128, 8, 4)
    yield GemmConfig(64, 128, 4, 3, descriptors=True)
    yield GemmConfig(64, 128, 4, 3, 16, descriptors=True)
    yield GemmConfig(64, 128, 4, 4, descriptors=True)
    yield GemmConfig(64, 128, 8, 3, descriptors=True)
    yield GemmConfig(128, 64, 4, 3, descriptors=True)
    yield GemmConfig(128, 128, 8, 4, descriptors=True)
    yield GemmConfig(128, 128, 8, 6, descriptors=True)


def many_rows_configs() -> Iterator[ManyRowsConfig]:
    for block_m in (256, 192, 128):
        for group in (4, 8, 16):
            yield ManyRowsConfig(block_m, group)


def tuned_many_rows(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, config: ManyRowsConfig
) -> torch.Tensor:
    out = torch.empty(a.shape[0], b.shape[0], device=CUDA, dtype=BF16)
    launch_many_rows(a, a_scales, b, b_scales, out, config)
    return out


def gemm_name(config: GemmConfig) -> str:
    tile = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages} g{config.group_m}"
    return f"{tile} tma" if config.descriptors else tile


def gemm_peers(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor) -> Iterator[tuple[str, Call]]:
    wide_a, wide_b = a.to(BF16), b.to(BF16)
    yield "torch bf16 (other numbers)", lambda: wide_a @ wide_b.T
    outer = a_s.T.contiguous().T  # cuBLAS wants the scales of a run of rows side by side
    yield "torch._scaled_mm", lambda: torch._scaled_mm(a, b.T, scale_a=outer, scale_b=b_s.T, out_dtype=BF16)
    try:
        deep_gemm = importlib.import_module("deep_gemm")
    except (ImportError, OSError) as error:
        print(f"no DeepGEMM: {error}", file=sys.stderr)
        return

    def call() -> torch.Tensor:
        out = torch.empty(a.shape[0], b.shape[0], device=CUDA, dtype=BF16)
        deep_gemm.fp8_gemm_nt((a, a_s), (b, b_s), out)
        return out

    yield "deep_gemm", call


def gemm_jobs(tune: bool) -> Iterator[Job]:
    for m, n, k in TUNED_GEMM_SHAPES if tune else GEMM_SHAPES:
        a, a_scales = act_quant(torch.randn(m, k, device=CUDA, dtype=BF16))
        b, b_scales = weight_quant(torch.randn(n, k, device=CUDA))
        some = torch.randperm(m, device=CUDA)[:256]  # rows held against float64
        checked = (a[some], a_scales[some], b, b_scales)
        expected, eager = fp8_gemm_reference(*checked, torch.float64), fp8_gemm_reference(*checked)
        candidates = [*gemm_peers(a, a_scales, b, b_scales)]
        candidates.append(("triton", partial(fp8_gemm, a, a_scales, b, b_scales)))
        candidates.append(("triton portable", partial(tuned_gemm, a, a_scales, b, b_scales, None)))
        for many in many_rows_configs() if tune and m > 16 else ():
            name = f"hopper {many.block_m}x128 g{many.group}"
            candidates.append((name, partial(tuned_many_rows, a, a_scales, b, b_scales, many)))
        for config in gemm_configs(m) if tune else ():
            call = partial(tuned_gemm, a, a_scales, b, b_scales, config)
            candidates.append((f"triton {gemm_name(config)}", call))

        def wrong(got: Any, expected: Any = expected, eager: Any = eager, some: Any = some) -> str:
            return compare(got[some], expected, eager).reason

        moved = a.numel() + b.numel() + 2 * m * n + 4 * (a_scales.numel() + b_scales.numel())
        peers = ("torch._scaled_mm", "deep_gemm")
        yield Job("fp8_gemm", f"{m}x{n}x{k}", moved, 2.0 * m * n * k, wrong, candidates, peers, turns=4)


def append_jobs(tune: bool) -> Iterator[Job]:
    for tokens in TUNED_APPEND_TOKENS if tune else APPEND_TOKENS:
        for is_fp8 in (False, True):
            kv = torch.randn(tokens, 576, device=CUDA, dtype=BF16)
            weight = torch.rand(512, device=CUDA, dtype=BF16)
            angles = torch.rand(tokens, 32, device=CUDA)
            slots = torch.randperm(tokens + 64, device=CUDA)[:tokens]
            pages, width, dtype = tokens // 64 + 2, 656 if is_fp8 else 576, torch.uint8 if is_fp8 else BF16
            cache = torch.zeros(pages, 64, width, dtype=dtype, device=CUDA)
            expected = torch.zeros_like(cache)
            rest = (kv, weight, angles.cos(), angles.sin())
            append_latent_reference(*rest, expected, slots)
            exact = torch.zeros(pages, 64, 576, dtype=torch.float64, device=CUDA)
            wide_kv, wide_weight, wide_cos, wide_sin = (tensor.double() for tensor in rest)
            append_latent_reference(wide_kv, wide_weight, wide_cos, wide_sin, exact, slots)
            written = cache.view(-1, width)

            def check(got: Any, written: Any = written, expected: Any = expected, exact: Any = exact) -> str:
                if written.dtype == torch.uint8:  # a last bit of the latent may turn a code
                    return _differs(bool((written != expected.view_as(written)).float().mean() < 0.01))
                return compare(written, exact.view_as(written), expected.view_as(written)).reason

            candidates: list[tuple[str, Call]] = [
                ("reference", partial(append_latent_reference, *rest, cache, slots)),
                ("triton", partial(append_latent, *rest, cache, slots)),
            ]
            for num_warps in (1, 2, 4) if tune else ():
                tuned = partial(tuned_append, (*rest, cache, slots), AppendConfig(num_warps))
                candidates.append((f"triton w{num_warps}", tuned))
            moved = tokens * (1152 + width * cache.element_size() + 256 + 8)
            name = f"{tokens} {'656-byte' if is_fp8 else 'bf16'}"
            yield Job("append_latent", name, moved, 0, check, candidates, ("reference",), written=cache)


def gather_jobs(tune: bool) -> Iterator[Job]:
    for lens in TUNED_GATHER_LENS if tune else GATHER_LENS:
        for is_fp8 in (False, True):
            total, count = sum(lens), lens[0] // 64
            cache = torch.randn(total // 64, 64, 576, device=CUDA, dtype=BF16)
            if is_fp8:
                cache = pack_fp8(cache[..., :512], cache[..., 512:])
            table = torch.randperm(total // 64, device=CUDA, dtype=torch.int32).view(len(lens), count)
            cu_seqlens = torch.arange(len(lens) + 1, device=CUDA, dtype=torch.int32) * lens[0]
            expected = gather_latent_reference(cache, table, cu_seqlens, total)
            candidates: list[tuple[str, Call]] = [
                ("reference", partial(gather_latent_reference, cache, table, cu_seqlens, total)),
                ("triton", partial(gather_latent, cache, table, cu_seqlens, total)),
            ]
            for block, num_warps in [(4, 1), (4, 2), (4, 4), (8, 4), (8, 2), (16, 4), (16, 8)] if tune else ():
                tuned = partial(tuned_gather, (cache, table, cu_seqlens), total, GatherConfig(block, num_warps))
                candidates.append((f"triton t{block} w{num_warps}", tuned))
            wrong = partial(_unequal, expected)
            moved = total * (cache.shape[2] * cache.element_size() + 1152)
            name = f"{len(lens)}x{lens[0]} {'656-byte' if is_fp8 else 'bf16'}"
            yield Job("gather_latent", name, moved, 0, wrong, candidates, ("reference",))


JOBS = {
    "act_quant": act_quant_jobs,
    "weight_dequant": weight_dequant_jobs,
    "fp8_gemm": gemm_jobs,
    "append_latent": append_jobs,
    "gather_latent": gather_jobs,
}


def answer(job: Job, call: Call) -> object:
    """The result of a call, in memory that held NaN before: the last call's answer may lie in what the allocator hands
    out.
    """
    first = call()
    for tensor in first if isinstance(first, tuple) else (first, job.written):
        if isinstance(tensor, torch.Tensor):
            tensor.view(torch.uint8).fill_(0xFF if job.written is None else 0)
    del first
    return call()


def compile_all(job: Job) -> None:
    """Every candidate's first call, side by side: compiling takes seconds each, and most of them in ptxas."""

    def first(candidate: tuple[str, Call]) -> None:
        with contextlib.suppress(Exception):  # `measure` calls it again and says what is wrong
            candidate[1]()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(first, [each for each in job.candidates if each[0].startswith("triton ")]))
    torch.cuda.synchronize()


def measure(job: Job, repeats: int, copy: float) -> list[dict[str, Any]]:
    samples: dict[str, list[float]] = {}
    hosts: dict[str, float | None] = {}
    failed: set[str] = set()
    for turn in range(job.turns):
        left = [candidate for candidate in job.candidates if candidate[0] not in failed]
        for name, call in (left[i] for i in order_of_turn(len(left), turn)):
            try:
                reason = "" if turn or "other numbers" in name else job.wrong(answer(job, call))
                if not reason:
                    times = -(-(5 if name == "reference" else repeats) // job.turns)
                    timing = time_calls([call], CUDA, repeats=times)
                    samples.setdefault(name, []).extend(timing.samples)
                    hosts[name] = timing.host
                    continue
                reason = f"WRONG: {reason}"
            except Exception as error:  # a peer may fail in any way; its line says how
                if "illegal" in str(error) or "unspecified launch" in str(error):
                    raise  # nothing after it on this device can be believed
                reason = f"{type(error).__name__}: {str(error).splitlines()[:1]}"[:150]
            print(f"{job.op:14} {job.shape:16} {name:28} {reason}", flush=True)
            failed.add(name)
            samples.pop(name, None)
    rows: list[dict[str, Any]] = []
    for name, found in samples.items():
        timing = Timing(tuple(found), hosts[name])
        rows.append(
            {
                "op": job.op,
                "shape": job.shape,
                "impl": name,
                "median_s": timing.median,
                "ci95_s": list(timing.ci95),
                "host_s": timing.host,
                "tb_per_s": job.least_bytes / timing.median * 1e-12,
                "fraction_of_copy": job.least_bytes / timing.median / copy,
                "tflop_per_s": job.flops / timing.median * 1e-12 if job.flops else None,
            }
        )
    peer = min((row["median_s"] for row in rows if row["impl"] in job.peers), default=None)
    for row in rows:
        row["ratio_to_peer"] = peer / row["median_s"] if peer else None
    return sorted(rows, key=lambda row: row["median_s"])


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The best of one job, with the default configuration and the baselines wherever they are."""
    for i, row in enumerate(rows):
        if i >= SHOWN and row["impl"].startswith(("triton ", "hopper ")):
            continue
        speed = (
            f"{row['tflop_per_s']:5.0f} TFLOP/s" if row["tflop_per_s"] else f"{row['fraction_of_copy']:5.3f} of copy"
        )
        ratio = f"{row['ratio_to_peer']:5.2f}x peer" if row["ratio_to_peer"] else ""
        yield (
            f"{row['op']:14} {row['shape']:16} {row['impl']:32} {row['median_s'] * 1e6:8.1f} us "
            f"(host {row['host_s'] * 1e6:3.0f}) {row['tb_per_s']:4.2f} TB/s {speed} {ratio}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tune", action="store_true", help="time every launch configuration")
    parser.add_argument("--only", choices=JOBS, nargs="+", help="only these operations")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    copy = measure_ceilings(CUDA).copy_bytes_per_s
    print(f"copy ceiling {copy * 1e-12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    shown: list[str] = []
    for name in args.only or JOBS:
        start = time.perf_counter()
        for job in JOBS[name](args.tune):
            compile_all(job)
            found = measure(job, args.repeats, copy)
            rows += found
            shown += lines(found)
            args.output.write_text(json.dumps(rows, indent=1))
            del job
            torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(shown))


if __name__ == "__main__":
    main()
