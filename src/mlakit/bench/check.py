"""Check before time: a result is compared with float64 before anyone looks at its speed."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from mlakit.backends.pipeline import Result, absorb_query, expand, gather
from mlakit.backends.problem import MLALayer, MLAProblem, Problem, StandardLayer, StandardProblem
from mlakit.bench.workload import Layer, Part
from mlakit.decode.reference import mla_decode_reference
from mlakit.prefill.reference import mla_prefill_reference
from mlakit.testing import Comparison, compare, compare_lse, count_poison, poison_

# Scores held at once by the float64 reference, in elements: 1 GiB on a GPU, an eighth of it on a CPU.
_SCORE_BUDGET = {"cuda": 2**27, "cpu": 2**24}
# Expectations larger than this are computed again by each backend's worker instead of being kept in a file.
_LARGEST_FILE = 2**30


@dataclass(frozen=True)
class Expected:
    """What a part's output must be: from float64 (kept in float32), and what eager PyTorch makes of it in the row's
    dtype.
    """

    out: torch.Tensor
    lse: torch.Tensor
    eager: torch.Tensor


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: `status` is "ok", "wrong" or "unwritten"."""

    status: Literal["ok", "wrong", "unwritten"]
    reason: str = ""
    comparison: Comparison | None = None
    lse_error: float | None = None


def check_part(run: Callable[[Any], Result], part: Part, layer: int, expected: Expected) -> Verdict:
    """Run on poisoned outputs, and compare with what is expected."""
    part.problem.poison()
    out, lse = run(part.layers[layer])
    if not _is_buffer(out, part.problem):
        # The backend allocates its own output. Give the allocator poisoned memory of that size, so that `torch.empty`
        # shows.
        size = out.shape
        del out, lse
        poisoned = [poison_(torch.empty(size, dtype=part.problem.dtype, device=part.problem.device)) for _ in range(4)]
        del poisoned
        out, lse = run(part.layers[layer])
    return judge(out, lse, expected, part.name)


def judge(out: torch.Tensor, lse: torch.Tensor | None, expected: Expected, name: str) -> Verdict:
    """Compare one part's output with what is expected; the reason names the part."""
    if out.shape != expected.out.shape:
        shapes = f"expected {tuple(expected.out.shape)}, got {tuple(out.shape)}"
        return Verdict("wrong", f"{name}: output shape: {shapes}")
    if out.dtype != expected.eager.dtype:
        return Verdict("wrong", f"{name}: output dtype: expected {expected.eager.dtype}, got {out.dtype}")
    unwritten = count_poison(out)
    if unwritten:
        return Verdict("unwritten", f"{name}: {unwritten} of {out.numel()} output values were never written")
    comparison = compare(out, expected.out, expected.eager)
    if not comparison.ok:
        return Verdict("wrong", f"{name}: {comparison.reason}", comparison)
    if lse is None:
        return Verdict("ok", comparison=comparison)
    lse_comparison = compare_lse(lse, expected.lse)
    if not lse_comparison.ok:
        return Verdict("wrong", f"{name}: {lse_comparison.reason}", comparison, lse_comparison.max_error)
    return Verdict("ok", comparison=comparison, lse_error=lse_comparison.max_error)


def _is_buffer(out: torch.Tensor, problem: Problem) -> bool:
    return any(out.data_ptr() == buffer.data_ptr() for buffer in problem._buffers.values())


def expectation(part: Part, layer: int, mode: str, scratch: Path | None, key: dict[str, Any]) -> Expected:
    """What a part's output must be, computed, or read from `scratch` where another backend's worker left it.

    `key` holds whatever the workload depends on.
    """
    identity = {**key, "part": part.name, "layer": layer, "mode": mode}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    path = scratch / f"expected-{digest}.safetensors" if scratch is not None else None
    if path is not None and path.exists():
        return Expected(**load_file(path, device=str(part.problem.device)))
    expected = compute_expectation(part.problem, part.layers[layer], mode)
    size = sum(t.numel() * t.element_size() for t in vars(expected).values())
    if path is not None and size <= _LARGEST_FILE:
        partial = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in vars(expected).items()}, partial)
        partial.replace(path)
    return expected


def compute_expectation(problem: Problem, layer: Layer, mode: str) -> Expected:
    """The reference's answer for one layer of a part, request by request, in float64 and in eager PyTorch."""
    exact = _attend_all(problem, layer, mode, torch.float64)
    eager = _attend_all(problem, layer, mode, problem.dtype)
    return Expected(exact[0].float(), exact[1].float(), eager[0])


def _attend_all(problem: Problem, layer: Layer, mode: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every request in `dtype`: (out, lse), tokens laid end to end."""
    batch = problem.batch
    outs, lses = [], []
    row = key = 0
    for q_len, kv_len in zip(batch.q_lens, batch.kv_lens, strict=True):
        rows, slots = slice(row, row + q_len), batch.slots[key : key + kv_len]
        keys = slice(key, key + kv_len)
        if isinstance(problem, StandardProblem):
            assert isinstance(layer, StandardLayer)
            k, v = gather(layer.k_cache, slots).to(dtype), gather(layer.v_cache, slots).to(dtype)
            out, lse = _attend(layer.q[rows].to(dtype), k, v, problem)
        else:
            assert isinstance(problem, MLAProblem)
            assert isinstance(layer, MLALayer)
            out, lse = _attend_mla(problem, layer, mode, rows, keys, slots, dtype)
        outs.append(out)
        lses.append(lse)
        row, key = row + q_len, key + kv_len
    return torch.cat(outs), torch.cat(lses)


def _attend_mla(
    problem: MLAProblem,
    layer: MLALayer,
    mode: str,
    rows: slice,
    keys: slice,
    slots: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    rank = problem.dims.kv_lora_rank
    w_uk, w_uv = layer.w_uk.to(dtype), layer.w_uv.to(dtype)
    if mode == "mqa":
        if problem.scope == "attention":
            q = layer.q_latent[rows].to(dtype)
        else:
            q = absorb_query(layer.q[rows].to(dtype), w_uk, problem.dims.qk_nope_head_dim)
        latent = gather(layer.cache, slots).to(dtype)
        out, lse = _attend(q, latent[:, None], latent[:, None, :rank], problem)
        if problem.scope == "pipeline":
            out = torch.matmul(out.transpose(0, 1), w_uv).transpose(0, 1)
        return out, lse
    if layer.k is not None and layer.v is not None:
        k, v = layer.k[keys].to(dtype), layer.v[keys].to(dtype)
    else:
        exact = MLALayer(layer.q, layer.q_latent, layer.cache, w_uk, w_uv)
        k, v = expand(gather(layer.cache, slots).to(dtype), exact)
    return _attend(layer.q[rows].to(dtype), k, v, problem)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """One request, in pieces of queries and heads whose scores fit the budget. q [n, heads, d], k and v [keys,
    kv_heads, d].
    """
    tokens, heads, _ = q.shape
    kv_len, kv_heads = k.shape[:2]
    budget = _SCORE_BUDGET[q.device.type]
    shared = kv_heads == 1 and v.data_ptr() == k.data_ptr()
    ratio = 1 if shared else heads // kv_heads  # query heads that go with one head of k and v
    step_h = ratio * max(1, min(heads // ratio, budget // (kv_len * min(tokens, 64) * ratio)))
    step_q = max(1, min(tokens, budget // (kv_len * step_h)))
    out = q.new_empty((tokens, heads, v.shape[-1]))
    lse = torch.empty(
        (tokens, heads), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32, device=q.device
    )
    for first in range(0, tokens, step_q):
        last = min(first + step_q, tokens)
        # A causal piece of queries, cut off after its last visible key, is itself aligned bottom-right.
        seen = kv_len - tokens + last if problem.causal else kv_len
        for head in range(0, heads, step_h):
            piece = (slice(first, last), slice(head, head + step_h))
            if shared:
                found = mla_decode_reference(
                    q[piece][None],
                    k[:seen, 0][None],
                    torch.zeros((1, 1), dtype=torch.int32, device=q.device),
                    torch.tensor([seen]),
                    softmax_scale=problem.softmax_scale,
                    causal=problem.causal,
                    kv_lora_rank=v.shape[-1],
                )
                out[piece], lse[piece] = found[0][0], found[1][0]
            else:
                group = slice(head // ratio, (head + step_h) // ratio)
                found = mla_prefill_reference(
                    q[piece],
                    k[:seen, group],
                    v[:seen, group],
                    torch.tensor([0, last - first]),
                    torch.tensor([0, seen]),
                    softmax_scale=problem.softmax_scale,
                    causal=problem.causal,
                )
                out[piece], lse[piece] = found
    return out, lse
