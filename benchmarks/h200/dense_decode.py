"""Speed of `mla_decode` on a GPU: checked against float64, then timed beside its peers.

    python benchmarks/h200/dense_decode.py results.json           # the default configuration and the peers
    python benchmarks/h200/dense_decode.py results.json --tune    # some rows, with every launch configuration worth a try
    python benchmarks/h200/dense_decode.py results.json --rows 1x16    # rows whose name, {b}x{h}x{s}, starts so

vLLM's Triton decode, FlashMLA and FlashAttention-3 take part where they can be imported. A time is the whole operation
as a caller calls it: every kernel, the combine and the peers' metadata included, with a cold L2. vLLM's kernel needs a
number of splits from its caller: `vllm_triton` is the best of several, `vllm_triton_default` the 4 that vLLM passes.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlakit.bench.timing import Timing, time_calls
from mlakit.decode import mla_decode, mla_decode_reference
from mlakit.decode.triton_launch import DecodeConfig, _launch_decode
from mlakit.hardware import capability
from mlakit.testing import compare, compare_lse, poison_

# batch, heads, keys: the table of dense MLA decode, in its order.
ROWS = [
    (1, 16, 8192), (1, 16, 131072), (16, 16, 1024), (32, 16, 8192), (64, 16, 4096), (128, 16, 2048), (128, 16, 8192),
    (64, 32, 4096), (128, 32, 8192), (64, 64, 4096), (128, 64, 8192), (1, 128, 8192), (1, 128, 131072), (16, 128, 1024),
    (32, 128, 4096), (32, 128, 8192), (64, 128, 4096), (128, 128, 2048), (128, 128, 8192),
]  # fmt: skip
# Lengths normally distributed, deviation half the mean; batch, heads, mean keys, new tokens.
RAGGED = [(128, 128, 4096, 1), (128, 128, 4096, 2), (128, 128, 16384, 1), (128, 16, 4096, 1)]
# Several new tokens: batch, heads, keys, new tokens.
SPECULATIVE = [(64, 128, 4096, 4), (16, 16, 8192, 4)]
SCALE = 192**-0.5
RANK, LATENT, PAGE = 512, 576, 64
VLLM_SPLITS = (4, 8, 16, 32, 64)
VLLM_DEFAULT_SPLITS = 4

# block_m, block_n, warps, stages, programs a multiprocessor; and splits (None: evenly shared).
Tuned = tuple[tuple[int, int, int, int, int], tuple[int | None, ...]]
FEW: list[Tuned] = [
    ((16, 32, 4, 3, 2), (None,)), ((16, 64, 4, 3, 1), (None,)), ((16, 64, 8, 3, 1), (None,)),
    ((16, 64, 4, 2, 2), (None,)), ((16, 32, 4, 4, 1), (None,)),
]  # fmt: skip
MIDDLE: list[Tuned] = [
    ((32, 64, 8, 3, 1), (None, 2)), ((32, 64, 4, 3, 1), (None, 2)), ((32, 32, 4, 3, 2), (None,)),
    ((64, 64, 8, 2, 1), (None,)),
]  # fmt: skip
MANY: list[Tuned] = [((64, 64, 8, 2, 1), (None, 1)), ((64, 32, 8, 4, 1), (None,)), ((64, 32, 8, 3, 1), (None,))]
TUNED_ROWS = (
    "128x16x8192", "64x16x4096", "64x32x4096", "1x16x8192", "128x128x8192", "32x128x8192", "ragged 128x128x4096 q1",
)  # fmt: skip


@dataclass
class Row:
    """One batch, its float64 answer and the yardstick of eager PyTorch."""

    name: str
    q: torch.Tensor
    cache: torch.Tensor
    table: torch.Tensor
    lens: torch.Tensor
    expected: torch.Tensor
    expected_lse: torch.Tensor
    eager: torch.Tensor
    flops: float
    least_bytes: float

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.cache, self.table, self.lens

    def wrong(self, out: torch.Tensor, lse: torch.Tensor | None) -> str:
        """Why a result is wrong; empty if it is right."""
        reason = compare(out.view_as(self.expected), self.expected, self.eager).reason
        return reason or (compare_lse(lse, self.expected_lse).reason if lse is not None else "")


def build(name: str, lens: list[int], heads: int, q_len: int) -> Row:
    generator = torch.Generator("cuda").manual_seed(0)
    batch = len(lens)
    counts = [-(-n // PAGE) for n in lens]
    order = torch.randperm(sum(counts), generator=generator, device="cuda").int()
    cache = torch.randn((sum(counts), PAGE, LATENT), generator=generator, device="cuda", dtype=torch.bfloat16)
    table = torch.zeros((batch, max(counts)), dtype=torch.int32, device="cuda")
    for i, pages in enumerate(order.split(counts)):
        table[i, : len(pages)] = pages
    q = torch.randn((batch, q_len, heads, LATENT), generator=generator, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor(lens, dtype=torch.int32, device="cuda")
    expected, expected_lse, eager = [], [], []
    for i in range(batch):  # one request at a time: all of a large cache in float64 is 40 GB
        pages = cache[table[i, : counts[i]].long()]
        own = torch.arange(counts[i], dtype=torch.int32, device="cuda")[None]
        one = (own, lengths[i : i + 1])
        out, lse = mla_decode_reference(q[i : i + 1].double(), pages.double(), *one, softmax_scale=SCALE)
        expected.append(out)
        expected_lse.append(lse)
        eager.append(mla_decode_reference(q[i : i + 1], pages, *one, softmax_scale=SCALE)[0])
    seen = sum(min(n, n - q_len + s + 1) for n in lens for s in range(q_len))
    return Row(
        name, q, cache, table, lengths, torch.cat(expected), torch.cat(expected_lse), torch.cat(eager),
        flops=2.0 * seen * heads * (LATENT + RANK),
        least_bytes=2.0 * (sum(lens) * LATENT + q.numel() + batch * q_len * heads * RANK),
    )  # fmt: skip


Candidate = tuple[str, Callable[[], tuple[torch.Tensor, torch.Tensor | None]]]


def ours(row: Row, tune: bool) -> Iterator[Candidate]:
    out = torch.empty((*row.q.shape[:3], RANK), dtype=row.q.dtype, device="cuda")
    lse = torch.empty(row.q.shape[:3], device="cuda")

    def default() -> tuple[torch.Tensor, torch.Tensor]:
        return mla_decode(*row.inputs, softmax_scale=SCALE, out=out, impl="triton")

    yield "triton", default
    if capability("cuda") == (9, 0):
        yield (
            "hopper",
            lambda: mla_decode(*row.inputs, softmax_scale=SCALE, out=out, impl="hopper"),
        )
    if not tune:
        return
    rows = row.q.shape[1] * row.q.shape[2]
    for fields, splits in FEW if rows <= 16 else MIDDLE if rows <= 32 else MANY:
        config = DecodeConfig(*fields)
        for num_splits in splits:

            def configured(
                config: DecodeConfig = config, num_splits: int | None = num_splits
            ) -> tuple[torch.Tensor, torch.Tensor]:
                _launch_decode(
                    *row.inputs, out, lse, softmax_scale=SCALE, causal=True, kv_lora_rank=RANK, num_splits=num_splits,
                    config=config,
                )  # fmt: skip
                return out, lse

            m, n, warps, stages, resident = fields
            yield f"m{m} n{n} w{warps} s{stages} r{resident} splits {num_splits or 'auto'}", configured


def vllm_triton(row: Row) -> Iterator[Candidate]:
    if row.q.shape[1] > 1 or row.cache.numel() > 2**30:
        return  # it takes one new token a request, and has 32-bit offsets: an illegal address would end this run
    try:
        module = importlib.import_module("vllm.v1.attention.ops.triton_decode_attention")
    except ImportError as error:
        print(f"no vLLM Triton decode: {error}", file=sys.stderr)
        return
    batch, _, heads, _ = row.q.shape
    keys = row.cache[:, :, None]
    out = torch.empty((batch, heads, RANK), dtype=row.q.dtype, device="cuda")
    lse = torch.empty((batch, heads), device="cuda")
    one = torch.ones(1, device="cuda")
    for splits in VLLM_SPLITS:
        logits = torch.empty((batch, heads, splits, RANK + 1), device="cuda")

        def call(splits: int = splits, logits: torch.Tensor = logits) -> tuple[torch.Tensor, torch.Tensor]:
            module.decode_attention_fwd(
                row.q[:, 0], keys, keys[..., :RANK], out, lse, row.table, row.lens, logits, splits, SCALE, PAGE,
                k_scale=one, v_scale=one,
            )  # fmt: skip
            return out, lse[:, None]

        yield f"vllm_triton splits {splits}", call


def flash_mla(row: Row) -> Iterator[Candidate]:
    try:
        module = importlib.import_module("vllm.third_party.flashmla.flash_mla_interface")
    except (ImportError, OSError) as error:
        print(f"no FlashMLA: {error}", file=sys.stderr)
        return
    keys = row.cache[:, :, None]
    made, _ = module.get_mla_metadata()  # filled by the first call

    def call(metadata: Any = None) -> tuple[torch.Tensor, None]:
        if metadata is None:
            metadata, _ = module.get_mla_metadata()
        out, _ = module.flash_mla_with_kvcache(
            row.q, keys, row.table, row.lens, RANK, metadata, None, softmax_scale=SCALE, causal=True
        )
        return out, None

    yield "flash_mla", partial(call, made)
    yield "flash_mla_metadata", call


def flash_attention_3(row: Row) -> Iterator[Candidate]:
    try:
        module = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    except (ImportError, OSError) as error:
        print(f"no FlashAttention-3: {error}", file=sys.stderr)
        return
    batch, q_len = row.q.shape[:2]
    q, keys = row.q.flatten(0, 1), row.cache[:, :, None]
    bounds = torch.arange(0, batch * q_len + 1, q_len, dtype=torch.int32, device="cuda")
    longest = int(row.lens.max())

    def call() -> tuple[torch.Tensor, None]:
        out = module.flash_attn_varlen_func(
            q[..., RANK:], keys[..., RANK:], keys[..., :RANK], q_v=q[..., :RANK], max_seqlen_q=q_len,
            cu_seqlens_q=bounds, max_seqlen_k=longest, seqused_k=row.lens, block_table=row.table, softmax_scale=SCALE,
            causal=True, fa_version=3,
        )  # fmt: skip
        return out, None

    yield "fa3", call


def measure(row: Row, candidate: Candidate, repeats: int, graph: bool) -> tuple[Timing | None, str]:
    """Time a candidate if it runs and is right; else say why not."""
    call = candidate[1]
    try:
        out, lse = call()
        poison_(out)
        if lse is not None and lse.is_contiguous():
            poison_(lse)
        out, lse = call()
        if reason := row.wrong(out, lse):
            return None, f"WRONG: {reason}"
        return time_calls([call], torch.device("cuda"), repeats=repeats, cuda_graph=graph), ""
    except Exception as error:  # a peer may fail in any way; the row then says how
        if "illegal" in str(error) or "unspecified launch" in str(error):
            raise  # nothing after it on this device can be believed
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150]


def record(row: Row, name: str, timing: Timing, peer: float | None, best: float | None) -> dict[str, Any]:
    batch, q_len, heads, _ = row.q.shape
    return {
        "op": "mla_decode",
        "row": row.name,
        "batch": batch,
        "q_len": q_len,
        "heads": heads,
        "keys": int(row.lens.sum()) // batch,
        "dtype": "bfloat16",
        "page_size": PAGE,
        "impl": name,
        "median_s": timing.median,
        "ci95_s": list(timing.ci95),
        "tb_per_s": row.least_bytes / timing.median * 1e-12,
        "tflop_per_s": row.flops / timing.median * 1e-12,
        "host_s": timing.host,
        "ratio_to_peer": peer / timing.median if peer else None,
        "ratio_to_best_peer": best / timing.median if best else None,
    }


def rows(wanted: str | None, tune: bool) -> Iterator[Row]:
    def is_wanted(name: str) -> bool:
        return name.startswith(wanted) if wanted else name in TUNED_ROWS or not tune

    for batch, heads, keys in ROWS:
        name = f"{batch}x{heads}x{keys}"
        if is_wanted(name):
            yield build(name, [keys] * batch, heads, 1)
    for batch, heads, mean, q_len in RAGGED:
        name = f"ragged {batch}x{heads}x{mean} q{q_len}"
        if is_wanted(name):
            generator = torch.Generator().manual_seed(0)
            lens = (torch.randn(batch, generator=generator) * mean / 2 + mean).clamp(min=q_len).int().tolist()
            yield build(name, lens, heads, q_len)
    for batch, heads, keys, q_len in SPECULATIVE:
        name = f"{batch}x{heads}x{keys} q{q_len}"
        if is_wanted(name):
            yield build(name, [keys] * batch, heads, q_len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tune", action="store_true", help="time every launch configuration")
    parser.add_argument("--rows", help="only rows whose name starts so")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--cuda-graph", action="store_true", help="time replays of a captured call")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()

    records: list[dict[str, Any]] = []
    for row in rows(args.rows, args.tune):
        peers: dict[str, Timing] = {}
        for candidate in [] if args.no_peers else [*vllm_triton(row), *flash_mla(row), *flash_attention_3(row)]:
            timing, reason = measure(row, candidate, args.repeats, args.cuda_graph)
            family = candidate[0].split(" splits ")[0]
            if timing is None:
                print(f"{row.name:24} {candidate[0]:40} {reason}")
                continue
            if family not in peers or timing.median < peers[family].median:
                peers[family] = timing
            if candidate[0] == f"vllm_triton splits {VLLM_DEFAULT_SPLITS}":
                peers["vllm_triton_default"] = timing
        peer = peers["vllm_triton"].median if "vllm_triton" in peers else None
        best = min((timing.median for timing in peers.values()), default=None)
        found = list(peers.items())
        for candidate in ours(row, args.tune):
            timing, reason = measure(row, candidate, args.repeats, args.cuda_graph)
            if timing is None:
                print(f"{row.name:24} {candidate[0]:40} {reason}")
            else:
                found.append((candidate[0], timing))
        for name, timing in sorted(found, key=lambda item: item[1].median):
            entry = record(row, name, timing, peer, best)
            ratio = f"{entry['ratio_to_peer']:6.2f}x" if peer else "      -"
            ratio += f", best peer {entry['ratio_to_best_peer']:5.2f}x" if best else ""
            print(
                f"{row.name:24} {name:40} {timing.median * 1e6:9.1f} us {entry['tb_per_s']:6.2f} TB/s "
                f"{entry['tflop_per_s']:6.0f} TFLOP/s  vs vllm_triton {ratio}",
                flush=True,
            )
            records.append(entry)
        args.output.write_text(json.dumps(records, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
