"""Speed of `mla_prefill` and `merge_states` on a GPU: checked against float64, then timed beside their peers.

    python benchmarks/h200/prefill.py results.json           # the default configuration and the peers
    python benchmarks/h200/prefill.py results.json --tune    # and every launch configuration worth a try
    python benchmarks/h200/prefill.py results.json --rows "1x8192"    # rows whose name starts so

FlashAttention-3 (vLLM's build, which has no backward) and PyTorch's SDPA (cuDNN, flash) take part where they can be
imported and take these head dims. A time is the whole operation as a caller calls it, lse included, with a cold L2.
FLOPs are those of the visible pairs alone: 320 multiply-adds a pair and head forward, 832 backward (5 products).
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlakit.bench.timing import Timing, time_calls
from mlakit.merge import merge_states, merge_states_reference
from mlakit.prefill import mla_prefill, mla_prefill_reference
from mlakit.prefill.config import PrefillConfig, backward_configs
from mlakit.prefill.triton_backward import _launch_backward
from mlakit.prefill.triton_forward import _launch_forward
from mlakit.testing import compare, compare_lse, poison_

# batch, tokens, heads, causal: the table of dense prefill, in its order.
FORWARD = [
    *((1, 1024, 128, causal) for causal in (False, True)),
    *((1, 4096, 128, causal) for causal in (False, True)),
    *((1, 8192, 128, causal) for causal in (False, True)),
    *((1, 16384, 128, causal) for causal in (False, True)),
    *((8, 2048, 128, causal) for causal in (False, True)),
    *((1, 8192, 16, causal) for causal in (False, True)),
]
BACKWARD = [(1, 4096, 128, True), (1, 8192, 128, True), (1, 4096, 128, False)]
# states, tokens, heads, value dim: two chunks, eight chunks, and the splits of a decode.
MERGE = [(2, 8192, 128, 128), (8, 8192, 128, 128), (64, 64, 16, 512)]
QK, V = 192, 128
SCALE = QK**-0.5

# block_m, block_n, warps, stages, bulk loads.
TUNE_FORWARD = [
    (128, 64, 8, 3, True), (128, 64, 8, 4, True), (128, 64, 8, 2, True), (128, 128, 8, 2, True),
    (128, 64, 8, 3, False), (128, 64, 8, 2, False), (128, 128, 8, 2, False), (128, 32, 8, 3, True),
    (128, 32, 8, 4, True), (64, 64, 4, 2, True), (64, 128, 4, 2, True), (64, 64, 4, 4, True), (256, 64, 16, 2, True),
]  # fmt: skip
TUNE_HEADS = (1, 2, 4, 8, 16)
TUNE_BACKWARD_KV = [(32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2), (64, 64, 8, 3), (64, 128, 8, 2)]
TUNE_BACKWARD_Q = [(128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2)]

Tensors = tuple[torch.Tensor, ...]
Candidate = tuple[str, Callable[[], Tensors]]


@dataclass
class Row:
    """One batch, and how to tell whether a result is right."""

    op: str
    name: str
    fields: dict[str, Any]
    inputs: Tensors
    wrong: Callable[[Tensors], str]
    flops: float
    least_bytes: float


def make(batch: int, tokens: int, heads: int) -> Tensors:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((batch * tokens, heads, QK), (batch * tokens, heads, QK), (batch * tokens, heads, V))
    q, k, v = (torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes)
    return q, k, v, torch.arange(batch + 1, dtype=torch.int32, device="cuda") * tokens


def some(heads: int) -> list[int]:
    """The heads that are compared: float64 scores of all of them would be 275 GB at 16384 tokens."""
    return sorted({0, 1, heads // 2, heads - 1})


def one_head(x: torch.Tensor, head: int) -> torch.Tensor:
    return x[:, head : head + 1].detach().clone()


def build_forward(batch: int, tokens: int, heads: int, causal: bool) -> Row:
    q, k, v, bounds = make(batch, tokens, heads)

    def expected(head: int, convert: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, c = (convert(one_head(x, head)) for x in (q, k, v))
        return mla_prefill_reference(a, b, c, bounds, bounds, softmax_scale=SCALE, causal=causal)

    answers = {h: (*expected(h, torch.Tensor.double), expected(h, torch.clone)[0]) for h in some(heads)}

    def wrong(result: Tensors) -> str:
        for h, (ref, ref_lse, eager) in answers.items():
            found = compare(result[0].reshape(q.shape[0], heads, V)[:, h : h + 1], ref, eager)
            if found.reason or len(result) == 1:
                return found.reason
            if reason := compare_lse(result[1][:, h : h + 1], ref_lse).reason:
                return reason
        return ""

    pairs = batch * tokens * ((tokens + 1) / 2 if causal else tokens)
    name = f"{batch}x{tokens}x{heads}{' causal' if causal else ''}"
    return Row(
        "mla_prefill", name, {"batch": batch, "tokens": tokens, "heads": heads, "causal": causal}, (q, k, v, bounds),
        wrong, flops=2.0 * pairs * heads * (QK + V), least_bytes=2.0 * batch * tokens * heads * 2 * (QK + V),
    )  # fmt: skip


def build_backward(batch: int, tokens: int, heads: int, causal: bool) -> Row:
    q, k, v, bounds = make(batch, tokens, heads)
    seed = torch.randn_like(v)

    def expected(head: int, convert: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
        a, b, c = (convert(one_head(x, head)).requires_grad_() for x in (q, k, v))
        out, _ = mla_prefill_reference(a, b, c, bounds, bounds, softmax_scale=SCALE, causal=causal)
        return torch.autograd.grad(out, (a, b, c), one_head(seed, head).to(out.dtype))

    answers = {h: (expected(h, torch.Tensor.double), expected(h, torch.clone)) for h in some(heads)}

    def wrong(result: Tensors) -> str:
        for h, (refs, eagers) in answers.items():
            for x, got, ref, eager in zip("qkv", result, refs, eagers, strict=True):
                if reason := compare(got.reshape(q.shape[0], heads, -1)[:, h : h + 1], ref, eager).reason:
                    return f"gradient of {x}, head {h}: {reason}"
        return ""

    pairs = batch * tokens * ((tokens + 1) / 2 if causal else tokens)
    name = f"backward {batch}x{tokens}x{heads}{' causal' if causal else ''}"
    return Row(
        "mla_prefill_backward", name, {"batch": batch, "tokens": tokens, "heads": heads, "causal": causal},
        (q, k, v, bounds, seed), wrong, flops=2.0 * pairs * heads * (3 * QK + 2 * V),
        least_bytes=2.0 * batch * tokens * heads * 2 * (2 * QK + 2 * V),
    )  # fmt: skip


def build_merge(states: int, tokens: int, heads: int, dim: int) -> Row:
    outs = torch.randn((states, tokens, heads, dim), device="cuda", dtype=torch.bfloat16)
    lses = torch.randn((states, tokens, heads), device="cuda")
    end = min(tokens, 256)  # the rest of a merge is the same work on other rows
    ref, ref_lse = merge_states_reference(outs[:, -end:].double(), lses[:, -end:].double())
    eager, _ = merge_states_reference(outs[:, -end:], lses[:, -end:])

    def wrong(result: Tensors) -> str:
        return compare(result[0][-end:], ref, eager).reason or compare_lse(result[1][-end:], ref_lse).reason

    return Row(
        "merge_states", f"merge {states}x{tokens}x{heads}x{dim}",
        {"states": states, "tokens": tokens, "heads": heads, "dim": dim}, (outs, lses), wrong,
        flops=2.0 * outs.numel(), least_bytes=(states + 1) * tokens * heads * (2.0 * dim + 4),
    )  # fmt: skip


def forward_candidates(row: Row, tune: bool) -> Iterator[Candidate]:
    q, k, v, bounds = row.inputs
    causal, tokens = row.fields["causal"], row.fields["tokens"]
    out = torch.empty_like(v)
    lse = torch.empty(q.shape[:2], device="cuda")

    def default() -> Tensors:
        return mla_prefill(
            q, k, v, bounds, bounds, softmax_scale=SCALE, causal=causal, max_seqlen_q=tokens, out=out, impl="triton"
        )

    yield "triton", default

    def configured(config: PrefillConfig, heads: int | None = None) -> Callable[[], Tensors]:
        def call() -> Tensors:
            _launch_forward(
                q, k, v, bounds, bounds, out, lse, softmax_scale=SCALE, causal=causal, config=config,
                heads_at_once=heads,
            )  # fmt: skip
            return out, lse

        return call

    for fields in TUNE_FORWARD if tune else []:
        yield (
            f"m{fields[0]} n{fields[1]} w{fields[2]} s{fields[3]}{' tma' if fields[4] else ''}",
            configured(PrefillConfig(*fields)),
        )
    for heads in TUNE_HEADS if tune else []:
        if heads <= row.fields["heads"]:
            yield f"m128 n64 w8 s3 tma heads {heads}", configured(PrefillConfig(128, 64, 8, 3, True), heads)


def flash_attention_3(row: Row) -> Iterator[Candidate]:
    try:
        module = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    except (ImportError, OSError) as error:
        print(f"no FlashAttention-3: {error}", file=sys.stderr)
        return
    q, k, v, bounds = row.inputs
    tokens = row.fields["tokens"]

    def call() -> Tensors:
        out, lse = module.flash_attn_varlen_func(
            q, k, v, max_seqlen_q=tokens, cu_seqlens_q=bounds, max_seqlen_k=tokens, cu_seqlens_k=bounds,
            softmax_scale=SCALE, causal=row.fields["causal"], return_softmax_lse=True, fa_version=3,
        )[:2]  # fmt: skip
        return out, lse.T  # [heads, tokens]

    yield "fa3", call


def sdpa_inputs(row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens = row.fields["batch"], row.fields["tokens"]
    q, k, v = (x.unflatten(0, (batch, tokens)).transpose(1, 2) for x in row.inputs[:3])
    return q, k, v


BACKENDS = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION}  # flash takes no keys wider than the values


def sdpa_forward(row: Row) -> Iterator[Candidate]:
    q, k, v = sdpa_inputs(row)
    for name, backend in BACKENDS.items():

        def call(backend: SDPBackend = backend) -> Tensors:
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=row.fields["causal"], scale=SCALE
                )
            return (out.transpose(1, 2),)

        yield name, call


def sdpa_backward(row: Row) -> Iterator[Candidate]:
    seed = row.inputs[4].unflatten(0, (row.fields["batch"], row.fields["tokens"])).transpose(1, 2)
    for name, backend in BACKENDS.items():
        leaves = [x.detach().requires_grad_() for x in sdpa_inputs(row)]
        kept: list[torch.Tensor] = []

        def call(
            backend: SDPBackend = backend, leaves: Sequence[torch.Tensor] = leaves, kept: list[torch.Tensor] = kept
        ) -> Tensors:
            if not kept:
                with sdpa_kernel(backend):
                    q, k, v = leaves
                    kept.append(
                        torch.nn.functional.scaled_dot_product_attention(
                            q, k, v, is_causal=row.fields["causal"], scale=SCALE
                        )
                    )
            grads = torch.autograd.grad(kept[0], leaves, seed, retain_graph=True)
            return tuple(g.transpose(1, 2) for g in grads)

        yield name, call


def backward_candidates(row: Row, tune: bool) -> Iterator[Candidate]:
    q, k, v, bounds, seed = row.inputs
    causal = row.fields["causal"]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = mla_prefill(
        leaves[0], leaves[1], leaves[2], bounds, bounds, softmax_scale=SCALE, causal=causal, impl="triton"
    )

    def default() -> Tensors:
        return torch.autograd.grad(out, leaves, seed, retain_graph=True)

    yield "triton", default
    if not tune:
        return
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    plain, plain_lse = out.detach(), lse.detach()

    def configured(config_kv: PrefillConfig, config_q: PrefillConfig) -> Callable[[], Tensors]:
        def call() -> Tensors:
            _launch_backward(
                q, k, v, plain, plain_lse, seed, None, bounds, bounds, *grads, softmax_scale=SCALE, causal=causal,
                config_kv=config_kv, config_q=config_q,
            )  # fmt: skip
            return grads

        return call

    default_kv, default_q = backward_configs(QK, V, torch.cuda.get_device_capability())
    for m, n, warps, stages in TUNE_BACKWARD_KV:
        yield f"kv m{m} n{n} w{warps} s{stages}", configured(PrefillConfig(m, n, warps, stages), default_q)
    for m, n, warps, stages in TUNE_BACKWARD_Q:
        yield f"q m{m} n{n} w{warps} s{stages}", configured(default_kv, PrefillConfig(m, n, warps, stages))


def merge_candidates(row: Row) -> Iterator[Candidate]:
    outs, lses = row.inputs
    yield "triton", lambda: merge_states(outs, lses, impl="triton")
    if outs.shape[0] <= 8:
        separate, logs = list(outs), list(lses)
        yield "triton separate", lambda: merge_states(separate, logs, impl="triton")
    yield "torch", lambda: merge_states_reference(outs, lses)


def measure(row: Row, candidate: Candidate, repeats: int) -> tuple[Timing | None, str]:
    """Time a candidate if it runs and is right; else say why not."""
    call = candidate[1]
    try:
        for x in call():
            if x.is_contiguous() and not x.requires_grad:
                poison_(x)
        if reason := row.wrong(tuple(x.detach() for x in call())):
            return None, f"WRONG: {reason}"
        return time_calls([call], torch.device("cuda"), repeats=repeats), ""
    except Exception as error:  # a peer may fail in any way; the row then says how
        if "illegal" in str(error) or "unspecified launch" in str(error):
            raise  # nothing after it on this device can be believed
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150]


def jobs(wanted: str | None, tune: bool, peers: bool) -> Iterator[tuple[Row, list[Candidate], str]]:
    """Each row, who takes part (peers first), and the peer that ratios refer to."""

    def chosen(name: str) -> bool:
        return wanted is None or name.startswith(wanted)

    for shape in FORWARD:
        if chosen(f"{shape[0]}x{shape[1]}x{shape[2]}{' causal' if shape[3] else ''}"):
            row = build_forward(*shape)
            others = [*flash_attention_3(row), *sdpa_forward(row)] if peers else []
            yield row, [*others, *forward_candidates(row, tune)], "fa3"
    for shape in BACKWARD:
        if chosen(f"backward {shape[0]}x{shape[1]}x{shape[2]}{' causal' if shape[3] else ''}"):
            row = build_backward(*shape)
            others = [*sdpa_backward(row)] if peers else []
            yield row, [*others, *backward_candidates(row, tune)], "sdpa cudnn"
    for sizes in MERGE:
        if chosen(f"merge {'x'.join(map(str, sizes))}"):
            row = build_merge(*sizes)
            yield row, [*merge_candidates(row)], "torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tune", action="store_true", help="time every launch configuration")
    parser.add_argument("--rows", help="only rows whose name starts so")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()

    records: list[dict[str, Any]] = []
    for row, candidates, peer_name in jobs(args.rows, args.tune, not args.no_peers):
        found: list[tuple[str, Timing]] = []
        for candidate in candidates:
            timing, reason = measure(row, candidate, args.repeats)
            if timing is None:
                print(f"{row.name:28} {candidate[0]:28} {reason}", flush=True)
            else:
                found.append((candidate[0], timing))
        peer = dict(found)[peer_name].median if peer_name in dict(found) else None
        for name, timing in sorted(found, key=lambda item: item[1].median):
            entry = {
                "op": row.op,
                "row": row.name,
                **row.fields,
                "dtype": "bfloat16",
                "impl": name,
                "median_s": timing.median,
                "ci95_s": list(timing.ci95),
                "tb_per_s": row.least_bytes / timing.median * 1e-12,
                "tflop_per_s": row.flops / timing.median * 1e-12,
                "peer": peer_name if peer else None,
                "ratio_to_peer": peer / timing.median if peer else None,
            }
            records.append(entry)
            ratio = f"{peer / timing.median:5.2f}x {peer_name}" if peer else ""
            print(
                f"{row.name:28} {name:28} {timing.median * 1e3:9.3f} ms {entry['tflop_per_s']:6.0f} TFLOP/s "
                f"{entry['tb_per_s']:6.2f} TB/s  {ratio}",
                flush=True,
            )
        args.output.write_text(json.dumps(records, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
