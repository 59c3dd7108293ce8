"""Speed and memory of the MLA layer on a GPU: checked against float64, then timed beside DeepSeek's own layer.

    python benchmarks/h200/layer.py results.json                    # everything
    python benchmarks/h200/layer.py results.json --rows decode      # rows whose name starts so

One layer of DeepSeek-V3 (dim 7168, 128 heads, q_lora_rank 1536) in bfloat16, from hidden state to hidden state: a long
prompt, a decode step of 32 requests at 4096 keys (as it is called and as a CUDA graph), and 32 short prompts.
Baselines: DeepSeek's naive and absorb as tests/support/deepseek_layer.py has them, and transformers' attention by
PyTorch's SDPA where it can be imported. Cold L2. `temporary_bytes` is the most memory that a call needed beyond what it
was given, its result included. Rows of op "layer_kernels" tell where the fused layer's time goes, kernel by kernel.
"""

import gc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CUDA, Job, as_row, parse_arguments, write_rows

from mlakit.bench.timing import time_calls
from mlakit.nn import ATTN_IMPLS, Args, KVCache, LatentCache, get_mla
from mlakit.testing import compare, poison_

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from deepseek_layer import DeepSeekMLA, rotation_table  # by the line above

V3 = Args(dim=7168, n_heads=128, q_lora_rank=1536, max_batch_size=1, max_seq_len=4096)
SHORT = (64, 128, 256, 512)
DECODING, KEYS = 32, 4096
Tensor = torch.Tensor
State = dict[str, Tensor]


@dataclass
class Candidate:
    """A layer's call. `exact`: its result must be as near to float64 as DeepSeek's own; another one's (float8 weights,
    rounded rotations) must be near enough to be the same layer's.
    """

    name: str
    call: Callable[[], Tensor]
    graph: bool = False
    exact: bool = True


@dataclass
class Case:
    """A job, how to build its candidates, and what is right."""

    job: Job
    candidates: Callable[[], Iterator[Candidate]]
    reference: Tensor
    eager: Tensor
    profiled: dict[str, Callable[[], Tensor]] = field(default_factory=dict)


def new_state() -> State:
    """Random weights that keep a hidden state of unit variance as it is."""
    torch.manual_seed(0)
    with torch.device(CUDA):
        return get_mla("absorb", V3).state_dict()


def ours(impl: str, args: Args, state: State) -> Any:
    bf16 = args.dtype == "bf16"
    with torch.device("meta" if bf16 else CUDA):
        layer = get_mla(impl, replace(args, attn_impl=impl))
    if bf16:
        layer.load_state_dict(state, assign=True)
    return layer.eval().requires_grad_(False)


def deepseek(impl: str, args: Args, state: State, dtype: torch.dtype = torch.bfloat16) -> DeepSeekMLA:
    with torch.device(CUDA):  # not "meta": its caches are made with it
        layer = DeepSeekMLA(args, impl, dtype)
    layer.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return layer.eval().requires_grad_(False)


def float8_layer(args: Args, state: State) -> Any:
    """The fused layer with float8 weights and products, quantized from the same weights."""
    from mlakit.quant import weight_quant

    layer = ours("fused", replace(args, dtype="fp8", gemm_impl="fp8"), state)
    quantized = dict(state)
    for name in [name for name in state if f"{name.removesuffix('weight')}scale" in layer.state_dict()]:
        quantized[name], quantized[f"{name.removesuffix('weight')}scale"] = weight_quant(state[name])
    layer.load_state_dict(quantized)
    return layer


def transformers_layer(args: Args, state: State) -> Any:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    from mlakit.nn.checkpoint_names import hf_name

    config = DeepseekV3Config(max_position_embeddings=args.max_seq_len)  # its defaults are DeepSeek-V3's
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        layer = DeepseekV3Attention(config, layer_idx=0)
    layer.load_state_dict({hf_name(name): tensor for name, tensor in state.items()}, assign=True)
    return layer.eval().requires_grad_(False)


def causal(seqlen: int) -> Tensor:
    """As DeepSeek's model makes its mask, but in the scores' dtype."""
    return torch.full((seqlen, seqlen), -torch.inf, device=CUDA, dtype=torch.bfloat16).triu_(1)


def attention_flops(bsz: int, seqlen: int) -> float:
    return 2.0 * bsz * V3.n_heads * seqlen * (seqlen + 1) / 2 * (V3.qk_head_dim + V3.v_head_dim)


def prompt(name: str, bsz: int, seqlen: int, state: State) -> Case:
    """`bsz` prompts of `seqlen` tokens, causal, from an empty cache, which is filled."""
    args = replace(V3, max_batch_size=bsz, max_seq_len=seqlen)
    x = torch.randn(bsz, seqlen, V3.dim, device=CUDA, dtype=torch.bfloat16)
    table, mask = rotation_table(args).to(CUDA), causal(seqlen)
    reference = deepseek("naive", args, state, torch.float64)(x.double(), 0, table, mask.double())
    eager = deepseek("naive", args, state)(x, 0, table, mask)
    weights = sum(tensor.numel() for tensor in state.values())

    def candidates() -> Iterator[Candidate]:
        for impl in ATTN_IMPLS:
            yield Candidate(impl, partial(ours(impl, args, state), x, 0, table, "causal"))
        if bsz > 1:
            slow = ours("naive", replace(args, fast_path_tokens=0), state)
            yield Candidate("naive, standard path", partial(slow, x, 0, table, "causal"))
        yield Candidate("fused, fp8 weights", partial(float8_layer(args, state), x, 0, table, "causal"), exact=False)
        for impl in ("naive", "absorb"):
            yield Candidate(f"deepseek {impl}", partial(deepseek(impl, args, state), x, 0, table, mask))
        if importlib.util.find_spec("transformers") is not None:
            theirs = transformers_layer(args, state)
            angles = tuple(torch.cat((p, p), dim=-1)[None].bfloat16() for p in (table.real, table.imag))
            yield Candidate("transformers sdpa", lambda: theirs(x, angles, None)[0], exact=False)

    job = Job(
        op="layer",
        name=name,
        fields={"phase": "prefill", "batch": bsz, "new_tokens": seqlen, "keys": seqlen},
        flops=2.0 * bsz * seqlen * weights + attention_flops(bsz, seqlen),
        least_bytes=2.0 * (weights + 2 * x.numel() + bsz * seqlen * V3.latent_dim),
        wrong=lambda results: "",
        peer="deepseek naive",
    )
    return Case(job, candidates, reference, eager)


def fill(cache: KVCache | LatentCache, layer: Any, tokens: Tensor) -> Any:
    """Put latents and rotated keys [batch, tokens, 576] into a cache of either kind."""
    rank, count = V3.kv_lora_rank, tokens.shape[1]
    if isinstance(cache, LatentCache):
        cache.pages.view(cache.batch, cache.capacity, -1)[:, :count] = tokens
    else:
        for request, row in enumerate(tokens):
            k_nope, v = layer.expand(row[:, :rank])
            cache.k[request, :count, :, : V3.qk_nope_head_dim] = k_nope
            cache.k[request, :count, :, V3.qk_nope_head_dim :] = row[:, None, rank:]
            cache.v[request, :count] = v
    cache.filled = count
    return cache


def decode(name: str, state: State) -> Case:
    """One new token for each of 32 requests that have 4095."""
    before, rank = KEYS - 1, V3.kv_lora_rank
    args = replace(V3, max_batch_size=DECODING, max_seq_len=KEYS + 64)  # beyond 4096: with YaRN
    x = torch.randn(DECODING, 1, V3.dim, device=CUDA, dtype=torch.bfloat16)
    tokens = torch.randn(DECODING, before, V3.latent_dim, device=CUDA, dtype=torch.bfloat16)
    table = rotation_table(args).to(CUDA)
    row = table[before:KEYS]

    def theirs(impl: str, dtype: torch.dtype = torch.bfloat16, requests: int = DECODING) -> Callable[[], Tensor]:
        layer = deepseek(impl, replace(args, max_batch_size=requests), state, dtype)
        first, second = tokens[:requests, :, :rank], tokens[:requests, :, rank:]
        if impl == "absorb":
            layer.first_cache[:, :before], layer.second_cache[:, :before] = first, second
        else:
            kv = fill(KVCache(layer.first_cache, layer.second_cache), ours("naive", args, state), tokens)
            assert kv.k is layer.first_cache
        return partial(layer, x[:requests].to(dtype), before, row, None)

    some = 4  # requests: float64 of all would take long
    reference, eager = theirs("absorb", torch.float64, some)(), theirs("absorb")()[:some]
    start = torch.full((DECODING,), before, device=CUDA, dtype=torch.int32)
    fused = ours("fused", args, state)
    fused_cache = fill(fused.make_cache(), fused, tokens)

    def candidates() -> Iterator[Candidate]:
        for keeps_kv in (False, True):
            cache = None
            for impl in ("naive", "naive+flash") if keeps_kv else ("absorb", "fused"):
                layer = ours(impl, args, state)
                cache = cache or fill(layer.make_cache(), layer, tokens)
                call = partial(layer, x, before, row, None, cache)
                yield Candidate(impl, call)
                yield Candidate(f"{impl}, CUDA graph", call, graph=True)
        by_tensor = partial(fused, x, start, table, None, fused_cache)
        yield Candidate("fused, start_pos a tensor", by_tensor)
        yield Candidate("fused, start_pos a tensor, CUDA graph", by_tensor, graph=True)
        float8 = partial(float8_layer(args, state), x, before, row, None, fused_cache)
        yield Candidate("fused, fp8 weights, CUDA graph", float8, graph=True, exact=False)
        for impl in ("absorb", "naive"):
            call = theirs(impl)
            yield Candidate(f"deepseek {impl}", call)
            yield Candidate(f"deepseek {impl}, CUDA graph", call, graph=True)

    weights = sum(tensor.numel() for tensor in state.values())
    work = 2.0 * DECODING * (weights + V3.n_heads * KEYS * (V3.latent_dim + rank))
    job = Job(
        op="layer",
        name=name,
        fields={"phase": "decode", "batch": DECODING, "new_tokens": 1, "keys": KEYS},
        flops=work,
        least_bytes=2.0 * (weights + DECODING * KEYS * V3.latent_dim + 2 * x.numel()),
        wrong=lambda results: "",
        peer="deepseek absorb",
    )
    return Case(job, candidates, reference, eager)


def why_wrong(case: Case, candidate: Candidate, result: Tensor) -> str:
    some = result[: case.reference.shape[0]]
    found = compare(some, case.reference, case.eager)
    if candidate.exact:
        return found.reason
    return "" if found.cosine_distance < 0.01 else f"cosine distance {found.cosine_distance:.3g}, allowed 0.01"


def measure(case: Case, candidate: Candidate, repeats: int) -> tuple[Any, float, str]:
    """(timing, bytes of temporaries, why there is none)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            poison_(candidate.call())  # the memory that the next call's result is likely to get
            if reason := why_wrong(case, candidate, candidate.call()):
                return None, 0, f"WRONG: {reason}"
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            candidate.call()
            torch.cuda.synchronize()
            temporary = torch.cuda.max_memory_allocated() - held
            timing = time_calls([candidate.call], CUDA, repeats=repeats, cuda_graph=candidate.graph)
            return timing, temporary, ""
    except Exception as error:
        if "illegal" in str(error) or "unspecified launch" in str(error):
            raise
        lines = str(error).splitlines()
        return None, 0, f"{type(error).__name__}: {lines[0] if lines else ''}"[:150]


def kernels(name: str, call: Callable[[], Tensor], steps: int = 5) -> list[dict[str, Any]]:
    """Where the time of a call goes: kernels with their time and number a call, longest first."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that events of earlier cycles are dropped: there is one
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                call()
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us() * 1e-6)
    rows = [
        {
            "op": "layer_kernels",
            "row": name,
            "impl": "fused",
            "kernel": kernel[:120],
            "launches": len(found) / steps,
            "median_s": sum(found) / steps,
        }
        for kernel, found in times.items()
        if sum(found) > 0  # calls of the runtime are listed with none
    ]
    return sorted(rows, key=lambda row: -float(row["median_s"]))


def run_case(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Measure a case's candidates, print them, and profile the fused one."""
    found: dict[str, tuple[Any, float]] = {}
    breakdown: list[dict[str, Any]] = []
    for candidate in case.candidates():
        timing, temporary, reason = measure(case, candidate, repeats)
        if reason:
            print(f"{case.job.name:16} {candidate.name:40} {reason}", flush=True)
        else:
            found[candidate.name] = timing, temporary
            if candidate.name == "fused":
                breakdown = kernels(case.job.name, candidate.call)
        gc.collect()
        torch.cuda.empty_cache()
    peer = found[case.job.peer][0].median if case.job.peer in found else None
    rows = []
    for name, (timing, temporary) in sorted(found.items(), key=lambda item: item[1][0].median):
        row = as_row(case.job, name, timing, peer) | {"temporary_bytes": temporary}
        rows.append(row)
        ratio = f"{row['ratio_to_peer']:6.2f}x" if peer else ""
        print(
            f"{case.job.name:16} {name:40} {timing.median * 1e3:8.3f} ms (host {(timing.host or 0) * 1e3:6.3f}) "
            f"{row['tflop_per_s']:4.0f} TFLOP/s {row['tb_per_s']:5.2f} TB/s {temporary / 2**30:6.2f} GiB {ratio}",
            flush=True,
        )
    for row in breakdown[:14]:
        print(f"{case.job.name:16}   {row['median_s'] * 1e6:8.1f} us  {row['launches']:4.1f}x  {row['kernel'][:80]}")
    return [*rows, *breakdown]


def cases(state: State) -> Iterator[tuple[str, Callable[[], Case]]]:
    """All there is to measure, built one at a time."""
    for seqlen in (1024, 4096):
        yield f"prefill 1x{seqlen}", partial(prompt, f"prefill 1x{seqlen}", 1, seqlen, state)
    yield f"decode {DECODING}x{KEYS}", partial(decode, f"decode {DECODING}x{KEYS}", state)
    for seqlen in SHORT:
        yield f"short 32x{seqlen}", partial(prompt, f"short 32x{seqlen}", 32, seqlen, state)


@torch.no_grad()
def main() -> None:
    args = parse_arguments(__doc__, repeats=20)
    state = new_state()
    rows: list[dict[str, Any]] = []
    for name, build in cases(state):
        if args.rows and not name.startswith(args.rows):
            continue
        rows += run_case(build(), args.repeats)
        write_rows(args.output, rows)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
