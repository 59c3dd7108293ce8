"""Speed of `mla_decode` on a GPU: checked against float64, then timed beside its peers.

    python benchmarks/h200/dense_decode.py results.json                # the default configuration and the peers
    python benchmarks/h200/dense_decode.py results.json --tune         # some rows, every launch configuration
    python benchmarks/h200/dense_decode.py results.json --rows 1x16    # rows whose name, {b}x{h}x{s}, starts so

FlashMLA (and its float8 kernel), FlashInfer, FlashAttention-3 and vLLM's Triton decode take part where they can be
imported. A time is the whole operation, every kernel and the combine included, with a cold L2. What a peer can prepare
once for many layers is prepared outside of the timed call, in its favour: `flash_mla` keeps its scheduling metadata
(`flash_mla_metadata` makes it in each call), `flashinfer` is planned on the host, of which nothing is timed.
`ratio_to_best_peer` is with these; `ratio_to_best_call` with the peers as one call needs them: FlashMLA with its
metadata, vLLM's Triton with the number of splits that vLLM passes (`vllm_triton` is the best of several).

`limit_s` is the least time by this device's measured ceilings: reading everything once, or the products.
"""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlakit import which_impl
from mlakit.bench.limits import Ceilings, measure_ceilings
from mlakit.bench.timing import Timing, time_calls
from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.decode import mla_decode, mla_decode_reference
from mlakit.decode.triton_launch import DecodeConfig, _launch_decode
from mlakit.hardware import capability
from mlakit.sparse import mla_sparse_decode
from mlakit.testing import compare, compare_lse, eager_e4m3_lse, poison_

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
# Float8 caches: batch, heads, keys. "e4m3": query and cache of it, a scale for each; "rows": 656 bytes a token, with
# scales of their own, and a query of bfloat16.
FLOAT8 = [
    (1, 16, 8192, "e4m3"), (64, 16, 4096, "e4m3"), (128, 16, 8192, "e4m3"), (128, 32, 8192, "e4m3"),
    (64, 64, 4096, "e4m3"), (1, 128, 8192, "e4m3"), (16, 128, 1024, "e4m3"), (64, 128, 4096, "e4m3"),
    (128, 128, 8192, "e4m3"), (1, 16, 8192, "rows"), (128, 16, 8192, "rows"), (64, 32, 4096, "rows"),
    (128, 128, 8192, "rows"),
]  # fmt: skip
Q_SCALE, KV_SCALE = 2.0, 0.5
# FlashMLA's float8 kernel rounds the weights to e4m3 too: further from float64 than the rule allows. It is timed all
# the same, and what it misses stands beside its time.
ROUNDED = "weights in e4m3"
SCALE = 192**-0.5
RANK, LATENT, PAGE = 512, 576, 64
VLLM_SPLITS = (4, 8, 16, 32, 64)
VLLM_DEFAULT_SPLITS = 4
# The peers that a ratio is with: what can be prepared for many layers prepared once, or everything in each call.
PREPARED_ONCE = ("flash_mla", "flashinfer", "fa3", "vllm_triton")
AS_CALLED = ("flash_mla_metadata", "flashinfer", "fa3", "vllm_triton_default")

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
    """One batch, its float64 answer and the yardstick of eager PyTorch: its output, and the lse of keys rounded to
    bfloat16, or of e4m3 products.
    """

    name: str
    q: torch.Tensor
    cache: torch.Tensor
    table: torch.Tensor
    lens: torch.Tensor
    expected: torch.Tensor
    expected_lse: torch.Tensor
    eager: torch.Tensor
    rounded_lse: torch.Tensor
    flops: float
    least_bytes: float
    kind: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        scales = {"q_scale": Q_SCALE, "kv_scale": KV_SCALE} if self.kind == "e4m3" else {}
        return {"softmax_scale": SCALE, **scales}

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.cache, self.table, self.lens

    def wrong(self, out: torch.Tensor, lse: torch.Tensor | None) -> str:
        """Why a result is wrong; empty if it is right."""
        reason = compare(out.view_as(self.expected), self.expected, self.eager).reason
        return reason or (compare_lse(lse, self.expected_lse, self.rounded_lse).reason if lse is not None else "")


def as_kept(latents: torch.Tensor, kind: str) -> torch.Tensor:
    """A cache of random latents as `kind` keeps it."""
    if kind == "bfloat16":
        return latents
    if kind == "e4m3":
        return latents.to(torch.float8_e4m3fn)
    return torch.cat([pack_fp8(part[..., :RANK], part[..., RANK:]) for part in latents.split(2048)])


def build(name: str, lens: list[int], heads: int, q_len: int, kind: str = "bfloat16") -> Row:
    generator = torch.Generator("cuda").manual_seed(0)
    batch = len(lens)
    counts = [-(-n // PAGE) for n in lens]
    order = torch.randperm(sum(counts), generator=generator, device="cuda").int()
    cache = torch.randn((sum(counts), PAGE, LATENT), generator=generator, device="cuda", dtype=torch.bfloat16)
    table = torch.zeros((batch, max(counts)), dtype=torch.int32, device="cuda")
    for i, pages in enumerate(order.split(counts)):
        table[i, : len(pages)] = pages
    q = torch.randn((batch, q_len, heads, LATENT), generator=generator, device="cuda", dtype=torch.bfloat16)
    cache = as_kept(cache, kind)
    if kind == "e4m3":
        q = q.to(torch.float8_e4m3fn)
    lengths = torch.tensor(lens, dtype=torch.int32, device="cuda")
    row = Row(
        name, q, cache, table, lengths, q, q, q, q,
        flops=2.0 * heads * (LATENT + RANK) * sum(min(n, n - q_len + s + 1) for n in lens for s in range(q_len)),
        least_bytes=1.0 * (sum(lens) * cache.shape[2] * cache.element_size() + q.numel() * q.element_size()
                           + 2 * batch * q_len * heads * RANK),
        kind=kind,
    )  # fmt: skip
    expected, expected_lse, eager, rounded_lse = [], [], [], []
    for i in range(batch):  # one request at a time: all of a large cache in float64 is 40 GB
        pages = cache.view(torch.uint8)[table[i, : counts[i]].long()].view(cache.dtype)
        own = torch.arange(counts[i], dtype=torch.int32, device="cuda")[None]
        one = (own, lengths[i : i + 1])
        keys = unpack_fp8(pages, RANK) if kind == "rows" else pages  # as a kernel may round them
        out, lse = mla_decode_reference(q[i : i + 1].double(), pages, *one, **row.options)
        expected.append(out)
        expected_lse.append(lse)
        eager.append(mla_decode_reference(q[i : i + 1], keys, *one, **row.options)[0])
        if kind == "rows":
            lse = mla_decode_reference(q[i : i + 1].double(), keys, *one, **row.options)[1]
        elif kind == "e4m3" and capability("cuda") == (9, 0):  # where others do not multiply e4m3
            lse = eager_e4m3_lse(q[i : i + 1], pages, *one, **row.options)
        rounded_lse.append(lse)
    row.expected, row.expected_lse, row.eager = torch.cat(expected), torch.cat(expected_lse), torch.cat(eager)
    row.rounded_lse = torch.cat(rounded_lse)
    return row


Candidate = tuple[str, Callable[[], tuple[torch.Tensor, torch.Tensor | None]]]


def ours(row: Row, tune: bool) -> Iterator[Candidate]:
    out = torch.empty((*row.q.shape[:3], RANK), dtype=torch.bfloat16, device="cuda")
    lse = torch.empty(row.q.shape[:3], device="cuda")

    def default(impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        return mla_decode(*row.inputs, **row.options, out=out, impl=impl)

    yield "triton", partial(default, "triton")
    if which_impl(mla_decode, *row.inputs, **row.options) == "hopper":
        yield "hopper", partial(default, "hopper")
    if row.kind == "rows":  # sparse attention that is told to look at every token, by slots that are there already
        slots = (row.table[:, :, None] * PAGE + torch.arange(PAGE, dtype=torch.int32, device="cuda")).flatten(1)[
            :, None
        ]

        def sparse() -> tuple[torch.Tensor, torch.Tensor]:
            return mla_sparse_decode(row.q, row.cache, slots, softmax_scale=SCALE, topk_length=row.lens, out=out)

        yield "sparse, all slots", sparse
    if not tune or row.kind != "bfloat16":
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
    if row.kind != "bfloat16" or row.q.shape[1] > 1 or row.cache.numel() > 2**30:
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
    if row.kind == "rows":
        return  # it attends to those sparsely alone
    try:
        module = importlib.import_module("vllm.third_party.flashmla.flash_mla_interface")
        if row.kind == "e4m3":
            importlib.import_module("vllm._flashmla_extension_C")
    except (ImportError, OSError) as error:
        print(f"no FlashMLA: {error}", file=sys.stderr)
        return
    keys = row.cache[:, :, None]
    if row.kind == "e4m3":
        yield from flash_mla_e4m3(row, keys)
        return
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


def flash_mla_e4m3(row: Row, keys: torch.Tensor) -> Iterator[Candidate]:
    library = torch.ops._flashmla_extension_C
    scales = [torch.tensor([scale], device="cuda") for scale in (Q_SCALE, KV_SCALE)]
    rows = row.q.shape[1] * row.q.shape[2]
    made = library.get_mla_decoding_metadata_dense_fp8(row.lens, rows, 1)

    def call(metadata: Any = None) -> tuple[torch.Tensor, None]:
        tiles, splits = metadata or library.get_mla_decoding_metadata_dense_fp8(row.lens, rows, 1)
        out, _ = library.fwd_kvcache_mla_fp8(
            row.q, keys, RANK, row.lens, row.table, SCALE, True, tiles, splits, *scales
        )  # fmt: skip
        return out, None

    yield "flash_mla", partial(call, made)
    yield "flash_mla_metadata", call


def flashinfer(row: Row) -> Iterator[Candidate]:
    if row.kind != "bfloat16":
        return
    try:
        library = importlib.import_module("flashinfer")
    except (ImportError, OSError) as error:
        print(f"no FlashInfer: {error}", file=sys.stderr)
        return
    batch, q_len, heads, _ = row.q.shape
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = library.mla.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
    counts = -(-row.lens // PAGE)
    wrapper.plan(
        torch.arange(0, batch * q_len + 1, q_len, dtype=torch.int32, device="cuda"),
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
        torch.cat([row.table[i, :n] for i, n in enumerate(counts.tolist())]),
        row.lens, heads, RANK, LATENT - RANK, PAGE, q_len > 1, SCALE, row.q.dtype, row.cache.dtype,
    )  # fmt: skip
    q, cache = row.q.flatten(0, 1), row.cache
    parts = (q[..., :RANK], q[..., RANK:], cache[..., :RANK], cache[..., RANK:])
    yield "flashinfer", lambda: (wrapper.run(*parts), None)


def flash_attention_3(row: Row) -> Iterator[Candidate]:
    if row.kind != "bfloat16":
        return
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


def peers_of(row: Row) -> list[Candidate]:
    found: list[Candidate] = []
    for peer in (vllm_triton, flash_mla, flashinfer, flash_attention_3):
        try:
            found += peer(row)
        except Exception as error:  # a peer may fail to be prepared in any way
            print(f"{row.name:24} {peer.__name__:40} {type(error).__name__}: {error}"[:200])
    return found


def measure(row: Row, candidate: Candidate, repeats: int, graph: bool) -> tuple[Timing | None, str]:
    """Time a candidate if it runs and is right; else say why not. What rounds on purpose is timed, and named."""
    name, call = candidate
    note = ""
    try:
        out, lse = call()
        poison_(out)
        if lse is not None and lse.is_contiguous():
            poison_(lse)
        out, lse = call()
        if reason := row.wrong(out, lse):
            if row.kind != "e4m3" or not name.startswith("flash_mla"):
                return None, f"WRONG: {reason}"
            note = f"{ROUNDED}: {reason}"
        return time_calls([call], torch.device("cuda"), repeats=repeats, cuda_graph=graph), note
    except Exception as error:  # a peer may fail in any way; the row then says how
        if "illegal" in str(error) or "unspecified launch" in str(error):
            raise  # nothing after it on this device can be believed
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150]


def record(
    row: Row, name: str, timing: Timing, note: str, times: dict[str, float], ceilings: Ceilings
) -> dict[str, Any]:
    """A candidate's JSON row; `times` are those of all peers, with what they prepare once outside and inside."""
    batch, q_len, heads, _ = row.q.shape
    once = [times[peer] for peer in PREPARED_ONCE if peer in times]
    called = [times[peer] for peer in AS_CALLED if peer in times]
    reading = row.least_bytes / ceilings.read_bytes_per_s
    # The products' ceiling is of 16 bits: it does not bind those of e4m3.
    limit = reading if row.kind == "e4m3" else max(reading, row.flops / ceilings.flops_per_s)
    return {
        "op": "mla_decode",
        "row": row.name,
        "batch": batch,
        "q_len": q_len,
        "heads": heads,
        "keys": int(row.lens.sum()) // batch,
        "dtype": row.kind,
        "page_size": PAGE,
        "impl": name,
        "median_s": timing.median,
        "ci95_s": list(timing.ci95),
        "tb_per_s": row.least_bytes / timing.median * 1e-12,
        "tflop_per_s": row.flops / timing.median * 1e-12,
        "limit_s": limit,
        "fraction_of_limit": limit / timing.median,
        "host_s": timing.host,
        "ratio_to_best_peer": min(once) / timing.median if once else None,
        "ratio_to_best_call": min(called) / timing.median if called else None,
        **({"note": note} if note else {}),
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
    for batch, heads, keys, kind in FLOAT8:
        name = f"{kind} {batch}x{heads}x{keys}"
        if is_wanted(name):
            yield build(name, [keys] * batch, heads, 1, kind)


def compile_flashinfer() -> None:
    """FlashInfer compiles on first use, for half a minute: in a process of its own, while the first row is built."""
    for _, call in flashinfer(build("compile", [64], 16, 1)):
        call()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tune", action="store_true", help="time every launch configuration")
    parser.add_argument("--rows", help="only rows whose name starts so")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--cuda-graph", action="store_true", help="time replays of a captured call")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--compile-flashinfer", action="store_true", help="only let FlashInfer compile its kernel")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"needs an NVIDIA GPU, and PyTorch {torch.__version__} sees none here")
    if args.compile_flashinfer:
        compile_flashinfer()
        return
    compiling = None
    if not args.no_peers and importlib.util.find_spec("flashinfer") is not None:
        compiling = subprocess.Popen([sys.executable, __file__, "-", "--compile-flashinfer"], stdout=subprocess.DEVNULL)

    ceilings = measure_ceilings(torch.device("cuda"))
    records: list[dict[str, Any]] = []
    for row in rows(args.rows, args.tune):
        if compiling is not None:  # nothing is timed beside it
            compiling.wait()
            compiling = None
        peers: dict[str, Timing] = {}
        notes: dict[str, str] = {}
        for candidate in [] if args.no_peers else peers_of(row):
            timing, reason = measure(row, candidate, args.repeats, args.cuda_graph)
            family = candidate[0].split(" splits ")[0]
            if timing is None:
                print(f"{row.name:24} {candidate[0]:40} {reason}")
                continue
            if family not in peers or timing.median < peers[family].median:
                peers[family], notes[family] = timing, reason
            if candidate[0] == f"vllm_triton splits {VLLM_DEFAULT_SPLITS}":
                peers["vllm_triton_default"] = timing
        times = {name: timing.median for name, timing in peers.items()}
        found = list(peers.items())
        for candidate in ours(row, args.tune):
            timing, reason = measure(row, candidate, args.repeats, args.cuda_graph)
            if timing is None:
                print(f"{row.name:24} {candidate[0]:40} {reason}")
            else:
                found.append((candidate[0], timing))
        for name, timing in sorted(found, key=lambda item: item[1].median):
            entry = record(row, name, timing, notes.get(name, ""), times, ceilings)
            ratio = f"{entry['ratio_to_best_peer']:5.2f}x" if entry["ratio_to_best_peer"] else "     -"
            called = f"{entry['ratio_to_best_call']:5.2f}x" if entry["ratio_to_best_call"] else "     -"
            print(
                f"{row.name:24} {name:40} {timing.median * 1e6:9.1f} us {entry['tb_per_s']:6.2f} TB/s "
                f"{entry['tflop_per_s']:6.0f} TFLOP/s {entry['fraction_of_limit']:4.0%} of the limit; "
                f"best peer {ratio}, as called {called} {notes.get(name, '')}",
                flush=True,
            )
            records.append(entry)
        args.output.write_text(json.dumps(records, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
