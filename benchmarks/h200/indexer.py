"""Speed of the indexer on a GPU, its logits and the selection: checked, then timed beside their peers.

    python benchmarks/h200/indexer.py results.json                    # the default configurations and the peers
    python benchmarks/h200/indexer.py results.json --tune             # and every launch configuration worth a try
    python benchmarks/h200/indexer.py results.json --rows topk        # rows whose name starts so

DeepGEMM's logits take part where it can be imported, with -inf where a query does not see a key, as ours have it
(`clean_logits`, a launch of its own); from a paged cache it leaves what lies there. Selections are of logits that the
indexer has scored, and beside torch.topk. Logits are compared with float64 in every sixteenth row, selections by the
values that they select. FLOPs are of the scores that are seen. Cold L2; allocations of results are included.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import CUDA, Job, Tensors, parse_arguments, run

from mlakit.indexer import indexer_logits, indexer_logits_paged, pack_index_cache, select_topk
from mlakit.indexer.config import LogitsConfig, TopkConfig
from mlakit.indexer.hopper_config import HopperLogitsConfig, HopperTopkConfig
from mlakit.indexer.hopper_launch import (
    launch_indexer_logits_hopper,
    launch_indexer_logits_paged_hopper,
    launch_select_topk_hopper,
)
from mlakit.indexer.reference import indexer_logits_paged_reference, indexer_logits_reference
from mlakit.indexer.triton_logits import launch_indexer_logits, launch_indexer_logits_paged
from mlakit.indexer.triton_topk import launch_select_topk
from mlakit.testing import compare

F8 = torch.float8_e4m3fn
IMPLS = ("hopper", "triton")
HEADS, DIM, PAGE, K = 64, 128, 64, 2048
SHAPES = [(4096, 8192), (4096, 32768), (2048, 131072)]
CAUSAL = [(4096, 4096), (4096, 32768)]  # the newest queries of so many keys
DECODE = [(64, 1, 32768), (128, 2, 8192), (1, 1, 131072)]  # requests, new tokens, keys of each
FEW_ROWS = [(64, 131072), (1, 131072)]
CHECKED = 16

LOGITS = [
    *(
        HopperLogitsConfig(2, split, stages)
        for split, stages in [(1024, 4), (2048, 4), (4096, 4), (8192, 4), (8192, 2)]
    ),
    *(LogitsConfig(2, 64, 4, 4, split, descriptors=True) for split in (1024, 4096, 16384)),
    LogitsConfig(2, 64, 4, 3, 8192, descriptors=True),
    LogitsConfig(2, 64, 4, 3, 8192),
    LogitsConfig(2, 128, 4, 3, 8192, descriptors=True),
]
PAGED = [
    *(HopperLogitsConfig(queries, split, 4 // queries) for queries in (1, 2) for split in (512, 1024, 2048, 4096)),
    *(LogitsConfig(block_q, block_n, 4, 3, 512) for block_q, block_n in [(1, 128), (2, 64)]),
]
TOPK = [
    *(HopperTopkConfig(512, held, 0) for held in (16, 32)),
    *(
        HopperTopkConfig(threads, held, sample, ahead, registers)
        for threads, held, sample, ahead, registers in [
            (512, 8, 2048, False, 40), (512, 16, 4096, False, 40), (512, 16, 4096, False, 64),
            (512, 16, 16384, False, 40), (512, 8, 16384, True, 64), (1024, 8, 16384, True, 64),
        ]
    ),
    TopkConfig(4096, 2048, 1024, 4, 4),
    TopkConfig(4096, 8192, 1024, 8, 2),
]  # fmt: skip


def wrong_logits(reference: torch.Tensor, eager: torch.Tensor, found: Tensors) -> str:
    out = found[0][:: (found[0].shape[0] + CHECKED - 1) // CHECKED]
    hidden = torch.isneginf(reference)
    if len(found) == 1 and not torch.equal(torch.isneginf(out), hidden):
        return "-inf in the wrong places"
    return compare(
        out.masked_fill(hidden, 0), reference.masked_fill(hidden, 0), eager.float().masked_fill(hidden, 0)
    ).reason


def wrong_selection(logits: torch.Tensor, expected: torch.Tensor, found: Tensors) -> str:
    index = found[-1].view(torch.int32 if found[-1].dtype == torch.float32 else torch.int64).long()
    if not bool((index.sort(dim=1).values.diff(dim=1) > 0).all()):
        return "an index is selected twice"
    got = logits.gather(1, index).sort(dim=1, descending=True).values
    return "" if torch.equal(got, expected) else "other values than torch.topk"


def inputs(s_q: int, s_kv: int) -> tuple[torch.Tensor, ...]:
    q = torch.randn(s_q, HEADS, DIM, device=CUDA).to(F8)
    k = torch.randn(s_kv, DIM, device=CUDA).to(F8)
    return q, k, torch.rand(s_kv, device=CUDA) + 0.5, torch.randn(s_q, HEADS, device=CUDA)


def deep_gemm() -> Any:
    try:
        return importlib.import_module("deep_gemm")
    except Exception as error:  # an extension that does not fit this PyTorch may fail in any way
        print(f"no DeepGEMM: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def name_of(config: Any) -> str:
    """A configuration's fields, by their first letters."""
    kind = "hopper" if type(config).__name__.startswith("Hopper") else "triton"
    return kind + "".join(f" {name[0]}{value}" for name, value in vars(config).items() if value is not None)


def tuned_logits(arguments: tuple[Any, ...], config: LogitsConfig | HopperLogitsConfig) -> Tensors:
    out = torch.empty(arguments[0].shape[0], arguments[1].shape[0], device=CUDA)
    hopper = isinstance(config, HopperLogitsConfig)
    (launch_indexer_logits_hopper if hopper else launch_indexer_logits)(*arguments, out, config)
    return (out,)


def logits_jobs(tune: bool, peer: Any) -> Iterator[Job]:
    every = [(*shape, False) for shape in SHAPES] + [(*shape, True) for shape in (() if tune else CAUSAL)]
    for s_q, s_kv, causal in every:
        arguments = inputs(s_q, s_kv)
        start = torch.zeros(s_q, dtype=torch.int32, device=CUDA)
        end = torch.full_like(start, s_kv)
        if causal:
            end = torch.arange(s_kv - s_q + 1, s_kv + 1, dtype=torch.int32, device=CUDA)
        limits = (start, end) if causal else (None, None)
        step = (s_q + CHECKED - 1) // CHECKED
        some = (arguments[0][::step], arguments[1], arguments[2], arguments[3][::step], start[::step], end[::step])
        seen = int(end.long().sum())
        job = Job(
            "indexer_logits",
            f"logits {s_q}x{s_kv}" + (" causal" if causal else ""),
            {"s_q": s_q, "s_kv": s_kv, "heads": HEADS, "dim": DIM, "causal": causal},
            2.0 * seen * HEADS * DIM,
            float(s_q * HEADS * (DIM + 4) + s_kv * (DIM + 4) + 4 * s_q * s_kv),
            partial(wrong_logits, indexer_logits_reference(*some, dtype=torch.float64),
                    indexer_logits_reference(*some, dtype=torch.bfloat16)),
            peer="deep_gemm",
        )  # fmt: skip
        for impl in IMPLS:
            job.candidates.append((impl, lambda a=arguments, b=limits, i=impl: (indexer_logits(*a, *b, impl=i),)))
        if peer is not None:
            q, k, scales, weights = arguments
            call: Callable[[], Tensors] = lambda q=q, k=(k, scales), w=weights, s=start, e=end: (  # noqa: E731
                peer.fp8_mqa_logits(q, k, w, s, e),
            )
            job.candidates.append(("deep_gemm", call))
        for config in LOGITS if tune else ():
            job.candidates.append((name_of(config), partial(tuned_logits, (*arguments, *limits), config)))
        yield job


def tuned_paged(arguments: tuple[Any, ...], columns: int, config: LogitsConfig | HopperLogitsConfig) -> Tensors:
    q = arguments[0]
    out = torch.empty(q.shape[0] * q.shape[1], columns, device=CUDA)
    hopper = isinstance(config, HopperLogitsConfig)
    (launch_indexer_logits_paged_hopper if hopper else launch_indexer_logits_paged)(*arguments, out, config)
    return (out,)


def deep_gemm_paged(peer: Any, arguments: tuple[Any, ...], columns: int) -> Tensors:
    """DeepGEMM's paged logits, its schedule included: it depends on the lengths, which are new in every step. It leaves
    what is not seen as it is: two results tell the check so.
    """
    q, cache, weights, table, lens = arguments
    units = torch.cuda.get_device_properties(0).multi_processor_count
    newest = torch.arange(1 - q.shape[1], 1, device=CUDA, dtype=torch.int32)
    lens = lens[:, None] + newest  # of each new token
    schedule = peer.get_paged_mqa_logits_metadata(lens, PAGE, units)
    rows = weights.view(-1, weights.shape[-1])
    return (peer.fp8_paged_mqa_logits(q, cache.unsqueeze(2), rows, lens, table, schedule, columns, False),) * 2


def paged_jobs(tune: bool, peer: Any) -> Iterator[Job]:
    for batch, q_len, keys in DECODE:
        pages = batch * keys // PAGE
        cache = pack_index_cache(
            torch.randn(pages, PAGE, DIM, device=CUDA).to(F8), torch.rand(pages, PAGE, device=CUDA) + 0.5
        )
        table = torch.randperm(pages, device=CUDA).int().view(batch, -1)
        lens = torch.full((batch,), keys, dtype=torch.int32, device=CUDA)
        q = torch.randn(batch, q_len, HEADS, DIM, device=CUDA).to(F8)
        arguments = (q, cache, torch.randn(batch, q_len, HEADS, device=CUDA), table, lens)
        step = (batch * q_len + CHECKED - 1) // CHECKED
        reference = indexer_logits_paged_reference(*arguments, keys, dtype=torch.float64)[::step]
        eager = indexer_logits_paged_reference(*arguments, keys, dtype=torch.bfloat16)[::step]
        job = Job(
            "indexer_logits_paged",
            f"paged {batch}x{q_len}x{keys}",
            {"batch": batch, "q_len": q_len, "keys": keys, "heads": HEADS, "dim": DIM},
            2.0 * batch * q_len * keys * HEADS * DIM,
            float(batch * keys * (DIM + 4) + 4 * batch * q_len * keys),
            partial(wrong_logits, reference, eager),
            peer="deep_gemm",
        )
        for impl in IMPLS:
            job.candidates.append(
                (impl, lambda a=arguments, n=keys, i=impl: (indexer_logits_paged(*a, max_context_len=n, impl=i),))
            )
        if peer is not None:
            job.candidates.append(("deep_gemm", partial(deep_gemm_paged, peer, arguments, keys)))
        for config in PAGED if tune else ():
            job.candidates.append((name_of(config), partial(tuned_paged, arguments, keys, config)))
        yield job


def tuned_topk(logits: torch.Tensor, config: TopkConfig | HopperTopkConfig) -> Tensors:
    out = torch.empty(logits.shape[0], K, dtype=torch.int32, device=CUDA)
    hopper = isinstance(config, HopperTopkConfig)
    (launch_select_topk_hopper if hopper else launch_select_topk)(logits, K, None, out, config)
    return (out.view(torch.float32),)


def torch_topk(logits: torch.Tensor, ordered: bool) -> Tensors:
    values, index = torch.topk(logits, K, dim=1, sorted=ordered)
    return values, index.view(torch.float64)


def topk_jobs(tune: bool) -> Iterator[Job]:
    for rows, columns in [*SHAPES, *FEW_ROWS]:
        logits = indexer_logits(*inputs(rows, columns))
        expected = torch.topk(logits, K, dim=1).values
        job = Job(
            "select_topk",
            f"topk {rows}x{columns}",
            {"rows": rows, "columns": columns, "k": K},
            0.0,
            float(rows * (columns + K) * 4),
            partial(wrong_selection, logits, expected),
            peer="torch.topk",
        )
        # Indices are seen as floats, so that the check can tell that they are written.
        for impl in IMPLS:
            job.candidates.append((impl, lambda x=logits, i=impl: (select_topk(x, K, impl=i).view(torch.float32),)))
        for name, ordered in (("torch.topk", True), ("torch.topk unsorted", False)):
            job.candidates.append((name, partial(torch_topk, logits, ordered)))
        for config in TOPK if tune else ():
            if config.sample == 0 and config.threads * config.held < columns:
                continue
            job.candidates.append((name_of(config), partial(tuned_topk, logits, config)))
        yield job


def main() -> None:
    """Command line; see the module's text."""
    args = parse_arguments(__doc__, repeats=20)
    torch.manual_seed(0)
    peer = None if args.no_peers else deep_gemm()
    groups: list[tuple[str, Callable[[], Iterator[Job]]]] = [
        ("logits", lambda: logits_jobs(args.tune, peer)),
        ("paged", lambda: paged_jobs(args.tune, peer)),
        ("topk", lambda: topk_jobs(args.tune)),
    ]
    wanted = args.rows or ""
    chosen = [jobs for name, jobs in groups if name.startswith(wanted[: len(name)])]
    run((job for jobs in chosen for job in jobs() if job.name.startswith(wanted)), args.output, args.repeats)


if __name__ == "__main__":
    main()
