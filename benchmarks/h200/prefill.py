"""Speed of `mla_prefill` and `merge_states` on a GPU: checked against float64, then timed beside their peers.

    python benchmarks/h200/prefill.py results.json           # the default configuration and the peers
    python benchmarks/h200/prefill.py results.json --tune    # and every launch configuration worth a try
    python benchmarks/h200/prefill.py results.json --rows "1x8192"    # rows whose name starts so

Peers are in prefill_peers.py. A time is the whole operation as a caller calls it, lse included, with a cold L2. FLOPs
are those of the visible pairs alone: 320 multiply-adds a pair and head forward, 832 backward (5 products). Rows called
"parts" begin with keys in two parts, which FlashAttention-3 must have in one: its time is with the concatenation.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Candidate, Job, Tensors, parse_arguments, run
from prefill_peers import flash_attention_3, flex_backward, sdpa_backward, sdpa_forward

from mlakit.concat import concat_k
from mlakit.merge import merge_states, merge_states_reference
from mlakit.prefill import mla_prefill, mla_prefill_reference
from mlakit.prefill.config import PrefillConfig, backward_configs, forward_config
from mlakit.prefill.triton_backward import _launch_backward
from mlakit.prefill.triton_forward import _launch_forward
from mlakit.testing import compare, compare_lse

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
# The same with the keys as a layer has them: k and v side by side in one tensor, and one rope part for all heads.
PARTS = [(1, 1024, 128, True), (1, 4096, 128, True), (1, 4096, 128, False), (1, 8192, 128, True), (8, 2048, 128, True)]
MERGE = [(2, 8192, 128, 128), (8, 8192, 128, 128), (64, 64, 16, 512)]
QK, NOPE, V = 192, 128, 128
SCALE = QK**-0.5

# block_m, block_n, warps, stages, bulk loads. Not worth a try again: computing the next block's scores while the
# softmax of this one runs, queries in registers, or masked blocks in a loop of their own (13% slower to 2% faster).
TUNE_FORWARD = [
    (128, 64, 8, 3, True), (128, 64, 8, 4, True), (128, 64, 8, 3, False), (128, 128, 8, 2, True), (64, 64, 4, 2, True),
    (64, 64, 4, 4, True), (256, 64, 16, 2, True),
]  # fmt: skip
TUNE_HEADS = (1, 2, 4, 8)
TUNE_BACKWARD_KV = [(32, 128, 8, 2), (32, 128, 8, 4), (64, 64, 8, 3)]
TUNE_BACKWARD_Q = [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3)]


def batch_name(batch: int, tokens: int, heads: int, causal: bool) -> str:
    return f"{batch}x{tokens}x{heads}{' causal' if causal else ''}"


def parts_name(batch: int, tokens: int, heads: int, causal: bool) -> str:
    return "parts " + batch_name(batch, tokens, heads, causal)


def merge_name(states: int, tokens: int, heads: int, dim: int) -> str:
    return f"merge {states}x{tokens}x{heads}x{dim}"


def config_name(config: PrefillConfig) -> str:
    tile = f"m{config.block_m} n{config.block_n} w{config.num_warps} s{config.num_stages}"
    return tile + (" tma" if config.tma else "")


def fields(batch: int, tokens: int, heads: int, causal: bool) -> dict[str, Any]:
    return {"batch": batch, "tokens": tokens, "heads": heads, "causal": causal, "dtype": "bfloat16"}


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


def forward_job(batch: int, tokens: int, heads: int, causal: bool, tune: bool, peers: bool) -> Job:
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
    inputs = (q, k, v, bounds)
    others = [*flash_attention_3(inputs, tokens, causal, SCALE), *sdpa_forward(inputs, tokens, causal, SCALE)]
    return Job(
        "mla_prefill", batch_name(batch, tokens, heads, causal), fields(batch, tokens, heads, causal),
        flops=2.0 * pairs * heads * (QK + V), least_bytes=2.0 * batch * tokens * heads * 2 * (QK + V), wrong=wrong,
        candidates=[*(others if peers else ()), *forward_candidates(inputs, tokens, causal, tune)], peer="fa3",
    )  # fmt: skip


def parts_job(batch: int, tokens: int, heads: int, causal: bool, tune: bool, peers: bool) -> Job:
    q, k, v, bounds = make(batch, tokens, heads)
    kv = torch.cat([k[..., :NOPE], v], dim=-1)
    k_nope, v, k_pe = kv[..., :NOPE], kv[..., NOPE:], k[:, :1, NOPE:].contiguous()
    out = torch.empty(v.shape, device="cuda", dtype=v.dtype)
    del k

    def expected(head: int, convert: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, c = (convert(one_head(x, head)) for x in (q, k_nope, v))
        return mla_prefill_reference(
            a, b, c, bounds, bounds, softmax_scale=SCALE, causal=causal, k_pe=convert(one_head(k_pe, 0))
        )

    answers = {h: (*expected(h, torch.Tensor.double), expected(h, torch.clone)[0]) for h in some(heads)}

    def wrong(result: Tensors) -> str:
        for h, (ref, ref_lse, eager) in answers.items():
            found = compare(result[0][:, h : h + 1], ref, eager)
            if reason := found.reason or compare_lse(result[1][:, h : h + 1], ref_lse).reason:
                return reason
        return ""

    def ours(impl: str) -> Candidate:
        def call() -> Tensors:
            return mla_prefill(
                q, k_nope, v, bounds, bounds, softmax_scale=SCALE, causal=causal, k_pe=k_pe, max_seqlen_q=tokens,
                out=out, impl=impl,
            )  # fmt: skip

        return impl, call

    def after(name: str, join: Callable[[], torch.Tensor]) -> Iterator[Candidate]:
        def call() -> Tensors:
            ((_, attend),) = flash_attention_3((q, join(), v, bounds), tokens, causal, SCALE)
            return attend()

        if any(True for _ in flash_attention_3((q, q, v, bounds), tokens, causal, SCALE)):
            yield f"{name} + fa3", call

    candidates = [ours("hopper"), ours("triton")]
    if peers:
        candidates += after("concat_k", lambda: concat_k(k_nope, k_pe))
        candidates += after("cat", lambda: torch.cat([k_nope, k_pe.expand(-1, heads, -1)], dim=-1))
    pairs = batch * tokens * ((tokens + 1) / 2 if causal else tokens)
    return Job(
        "mla_prefill", parts_name(batch, tokens, heads, causal), fields(batch, tokens, heads, causal),
        flops=2.0 * pairs * heads * (QK + V), wrong=wrong, candidates=candidates, peer="concat_k + fa3",
        least_bytes=2.0 * batch * tokens * (heads * (QK + NOPE + 2 * V) + QK - NOPE),
    )  # fmt: skip


def backward_job(batch: int, tokens: int, heads: int, causal: bool, tune: bool, peers: bool) -> Job:
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
    arguments = (q, k, v), seed, tokens, causal, SCALE
    others = [*sdpa_backward(*arguments), *flex_backward(*arguments)] if peers else []
    return Job(
        "mla_prefill_backward", "backward " + batch_name(batch, tokens, heads, causal),
        fields(batch, tokens, heads, causal), flops=2.0 * pairs * heads * (3 * QK + 2 * V),
        least_bytes=2.0 * batch * tokens * heads * 2 * (2 * QK + 2 * V), wrong=wrong,
        candidates=[*others, *backward_candidates((q, k, v, bounds), seed, causal, tune)], peer="sdpa cudnn",
    )  # fmt: skip


def merge_job(states: int, tokens: int, heads: int, dim: int) -> Job:
    outs = torch.randn((states, tokens, heads, dim), device="cuda", dtype=torch.bfloat16)
    lses = torch.randn((states, tokens, heads), device="cuda")
    end = min(tokens, 256)  # the rest of a merge is the same work on other rows
    ref, ref_lse = merge_states_reference(outs[:, -end:].double(), lses[:, -end:].double())
    eager, _ = merge_states_reference(outs[:, -end:], lses[:, -end:])

    def wrong(result: Tensors) -> str:
        return compare(result[0][-end:], ref, eager).reason or compare_lse(result[1][-end:], ref_lse).reason

    candidates: list[Candidate] = [
        ("triton", lambda: merge_states(outs, lses, impl="triton")),
        ("torch", lambda: merge_states_reference(outs, lses)),
    ]
    if states <= 8:
        separate, logs = list(outs), list(lses)
        candidates.append(("triton separate", lambda: merge_states(separate, logs, impl="triton")))
    return Job(
        "merge_states", merge_name(states, tokens, heads, dim),
        {"states": states, "tokens": tokens, "heads": heads, "dim": dim, "dtype": "bfloat16"},
        flops=2.0 * outs.numel(), least_bytes=(states + 1) * tokens * heads * (2.0 * dim + 4), wrong=wrong,
        candidates=candidates, peer="torch",
    )  # fmt: skip


def forward_candidates(inputs: Tensors, tokens: int, causal: bool, tune: bool) -> Iterator[Candidate]:
    q, k, v, bounds = inputs
    out = torch.empty_like(v)
    lse = torch.empty(q.shape[:2], device="cuda")

    def named(impl: str) -> Candidate:
        def call() -> Tensors:
            return mla_prefill(
                q, k, v, bounds, bounds, softmax_scale=SCALE, causal=causal, max_seqlen_q=tokens, out=out, impl=impl
            )

        return impl, call

    if torch.cuda.get_device_capability() == (9, 0):
        yield named("hopper")
    yield named("triton")

    def configured(config: PrefillConfig, heads: int | None = None) -> Candidate:
        def call() -> Tensors:
            _launch_forward(
                q, k, v, bounds, bounds, out, lse, softmax_scale=SCALE, causal=causal, config=config,
                heads_at_once=heads,
            )  # fmt: skip
            return out, lse

        return config_name(config) + (f" heads {heads}" if heads else ""), call

    if tune:
        for values in TUNE_FORWARD:
            yield configured(PrefillConfig(*values))
        config = forward_config(QK, V, torch.cuda.get_device_capability(), tokens)
        for heads in TUNE_HEADS:
            yield configured(config, heads)


def backward_candidates(inputs: Tensors, seed: torch.Tensor, causal: bool, tune: bool) -> Iterator[Candidate]:
    q, k, v, bounds = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = mla_prefill(
        leaves[0], leaves[1], leaves[2], bounds, bounds, softmax_scale=SCALE, causal=causal, impl="triton"
    )
    yield "triton", lambda: torch.autograd.grad(out, leaves, seed, retain_graph=True)
    if not tune:
        return
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    plain, plain_lse = out.detach(), lse.detach()

    def configured(which: str, config_kv: PrefillConfig, config_q: PrefillConfig) -> Candidate:
        def call() -> Tensors:
            _launch_backward(
                q, k, v, plain, plain_lse, seed, None, bounds, bounds, *grads, softmax_scale=SCALE, causal=causal,
                config_kv=config_kv, config_q=config_q,
            )  # fmt: skip
            return grads

        return f"{which} {config_name(config_kv if which == 'kv' else config_q)}", call

    default_kv, default_q = backward_configs(QK, V, torch.cuda.get_device_capability())
    for values in TUNE_BACKWARD_KV:
        yield configured("kv", PrefillConfig(*values), default_q)
    for values in TUNE_BACKWARD_Q:
        yield configured("q", default_kv, PrefillConfig(*values))


def jobs(wanted: str, tune: bool, peers: bool) -> Iterator[Job]:
    """The jobs whose name starts with `wanted`; each is built when its turn comes, for the memory's sake."""
    for shape in FORWARD:
        if batch_name(*shape).startswith(wanted):
            yield forward_job(*shape, tune, peers)
    for shape in PARTS:
        if parts_name(*shape).startswith(wanted):
            yield parts_job(*shape, tune, peers)
    for shape in BACKWARD:
        if f"backward {batch_name(*shape)}".startswith(wanted):
            yield backward_job(*shape, tune, peers)
    for sizes in MERGE:
        if merge_name(*sizes).startswith(wanted):
            yield merge_job(*sizes)


def main() -> None:
    """Command line."""
    args = parse_arguments(__doc__, repeats=20)
    run(jobs(args.rows or "", args.tune, not args.no_peers), args.output, args.repeats)


if __name__ == "__main__":
    main()
