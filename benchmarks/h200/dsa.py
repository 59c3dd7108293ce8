"""A whole step of DeepSeek Sparse Attention on a GPU, timed as one: index, select, attend.

    python benchmarks/h200/dsa.py results.json
    python benchmarks/h200/dsa.py results.json --rows decode    # jobs whose name starts so

Ours beside the same step of the best parts there are elsewhere: DeepGEMM's logits, torch.topk, FlashMLA's attention.
Which keys are selected may differ where two score alike to float32's rounding, so the check has two parts: in a sample
of queries the selected keys' scores in float64 add up to those of the best, and the output is that of attention over
the very keys that were selected. Cold L2; queries are quantized before, as their projection would do it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from common import CUDA, Job, Tensors, parse_arguments, run
from indexer import DIM, F8, PAGE, deep_gemm
from indexer import HEADS as INDEX_HEADS
from sparse import HEADS, LATENT, RANK, SAMPLE, flash_mla

from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.indexer import indexer_logits, indexer_logits_paged, pack_index_cache, select_topk, slots_of
from mlakit.indexer.reference import indexer_logits_paged_reference, indexer_logits_reference
from mlakit.sparse import mla_sparse_decode, mla_sparse_prefill, mla_sparse_prefill_reference
from mlakit.testing import compare

TOPK = 2048
SCALE = LATENT**-0.5
PREFILL = [(4096, 8192), (4096, 32768), (4096, 131072)]  # the newest queries of so many keys
DECODE = [(1, 1, 131072), (64, 1, 32768), (128, 2, 8192)]  # requests, new tokens, keys of each


def wrong(
    scores: torch.Tensor, rows: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, found: Tensors
) -> str:  # fmt: skip
    """`scores` in float64, `q` and `rows` are of the sample; `keys` [sample or 1, keys, 576] of its requests."""
    out, chosen = found[0].flatten(0, -3)[rows], found[1].view(torch.int32)[rows].long()
    if not bool((chosen.sort(dim=1).values.diff(dim=1) > 0).all()):
        return "an index is selected twice"
    best = torch.topk(scores, TOPK, dim=1).values
    lost = (best.sum(1) - scores.gather(1, chosen).sum(1)) / best.abs().sum(1)
    if not bool((lost < 1e-5).all()):
        return f"keys are selected that score {float(lost.max()):.1e} less than the best"
    latent = keys.expand(len(rows), -1, -1).gather(1, chosen[..., None].expand(-1, -1, LATENT))
    everything = torch.arange(TOPK, dtype=torch.int32, device=CUDA)[None, None]

    def attended(dtype: torch.dtype) -> torch.Tensor:
        pairs = zip(q.to(dtype).unsqueeze(1), latent.to(dtype).unsqueeze(2), strict=True)
        return torch.cat([mla_sparse_prefill_reference(a, b, everything, softmax_scale=SCALE)[0] for a, b in pairs])

    return compare(out, attended(torch.float64), attended(torch.bfloat16)).reason


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device=CUDA) * scale


def prefill_job(s_q: int, s_kv: int, gemm: Any, mla: Any) -> Job:
    torch.manual_seed(0)
    end = torch.arange(s_kv - s_q + 1, s_kv + 1, dtype=torch.int32, device=CUDA)
    start = torch.zeros_like(end)
    q_index, weights = normal(s_q, INDEX_HEADS, DIM).to(F8), normal(s_q, INDEX_HEADS)
    k_index, scales = normal(s_kv, DIM).to(F8), torch.rand(s_kv, device=CUDA) + 0.5
    q, kv = normal(s_q, HEADS, LATENT, scale=0.1).bfloat16(), normal(s_kv, 1, LATENT, scale=0.1).bfloat16()
    rows = torch.randperm(s_q, device=CUDA)[:SAMPLE]
    some = (q_index[rows], k_index, scales, weights[rows], start[rows], end[rows])
    scores = indexer_logits_reference(*some, dtype=torch.float64)

    def ours() -> Tensors:
        logits = indexer_logits(q_index, k_index, scales, weights, None, end)
        indices = select_topk(logits, TOPK, end)
        out = mla_sparse_prefill(q, kv, indices[:, None], softmax_scale=SCALE)[0]
        return out, indices.view(torch.float32)

    def theirs() -> Tensors:
        logits = gemm.fp8_mqa_logits(q_index, (k_index, scales), weights, start, end)
        indices = torch.topk(logits, TOPK, dim=1, sorted=False).indices.int()
        out = mla.flash_mla_sparse_fwd(q, kv, indices[:, None], SCALE, RANK)[0]
        return out, indices.view(torch.float32)

    seen = int(end.long().sum())
    job = Job(
        op="dsa_step",
        name=f"prefill {s_q}x{s_kv}",
        fields={"mode": "prefill", "s_q": s_q, "s_kv": s_kv, "topk": TOPK, "heads": HEADS, "index_heads": INDEX_HEADS},
        flops=2.0 * seen * INDEX_HEADS * DIM + 2.0 * s_q * HEADS * TOPK * (LATENT + RANK),
        least_bytes=float(q_index.numel() + k_index.numel() + 2 * (q.numel() + kv.numel() + s_q * HEADS * RANK)),
        wrong=partial(wrong, scores, rows, q[rows], kv[None, :, 0]),
        candidates=[("mlakit", ours)],
        peer="peers",
    )
    return with_peers(job, theirs, gemm, mla)


def decode_job(batch: int, q_len: int, keys: int, gemm: Any, mla: Any) -> Job:
    torch.manual_seed(0)
    pages, tokens = batch * keys // PAGE, batch * q_len
    index_cache = pack_index_cache(normal(pages, PAGE, DIM).to(F8), torch.rand(pages, PAGE, device=CUDA) + 0.5)
    cache = torch.empty((pages, PAGE, LATENT + 80), dtype=torch.uint8, device=CUDA)
    for part in cache.split(1024):
        latent = normal(*part.shape[:2], LATENT)
        part.copy_(pack_fp8(latent[..., :RANK], latent[..., RANK:]))
    table = torch.randperm(pages, device=CUDA).int().view(batch, -1)
    tables = table.repeat_interleave(q_len, dim=0)
    lens = torch.full((batch,), keys, dtype=torch.int32, device=CUDA)
    limits = (lens[:, None] + torch.arange(1 - q_len, 1, device=CUDA, dtype=torch.int32)).contiguous()
    q_index, weights = normal(batch, q_len, INDEX_HEADS, DIM).to(F8), normal(batch, q_len, INDEX_HEADS)
    q = normal(batch, q_len, HEADS, LATENT).bfloat16()
    some = torch.randperm(batch, device=CUDA)[: SAMPLE // q_len]
    rows = (some[:, None] * q_len + torch.arange(q_len, device=CUDA)).flatten()
    inputs = (q_index[some], index_cache, weights[some], table[some], lens[some])
    scores = indexer_logits_paged_reference(*inputs, keys, dtype=torch.float64)
    latents = unpack_fp8(cache[table[some].long()].flatten(1, 2)).repeat_interleave(q_len, dim=0)

    def attend_ours(logits: torch.Tensor) -> Tensors:
        positions = select_topk(logits, TOPK, limits.flatten())
        slots = slots_of(positions, tables, PAGE).view(batch, q_len, TOPK)
        return mla_sparse_decode(q, cache, slots, softmax_scale=SCALE)[0], positions.view(torch.float32)

    def ours() -> Tensors:
        return attend_ours(indexer_logits_paged(q_index, index_cache, weights, table, lens, max_context_len=keys))

    def theirs() -> Tensors:
        schedule = gemm.get_paged_mqa_logits_metadata(
            limits, PAGE, torch.cuda.get_device_properties(0).multi_processor_count
        )
        flat = weights.view(tokens, INDEX_HEADS)
        logits = gemm.fp8_paged_mqa_logits(
            q_index, index_cache.unsqueeze(2), flat, limits, table, schedule, keys, False
        )
        seen = torch.arange(keys, device=CUDA) < limits.view(tokens, 1)  # it leaves the others as they are
        positions = torch.topk(logits.masked_fill(~seen, -torch.inf), TOPK, dim=1, sorted=False).indices.int()
        slots = slots_of(positions, tables, PAGE).view(batch, q_len, TOPK)
        metadata, _ = mla.get_mla_metadata()
        out, _ = mla.flash_mla_with_kvcache(
            q, cache[:, :, None], None, None, RANK, metadata, None, softmax_scale=SCALE, is_fp8_kvcache=True,
            indices=slots,
        )  # fmt: skip
        return out, positions.view(torch.float32)

    job = Job(
        op="dsa_step",
        name=f"decode {batch}x{q_len}x{keys}",
        fields={
            "mode": "decode", "batch": batch, "q_len": q_len, "keys": keys, "topk": TOPK, "heads": HEADS,
            "index_heads": INDEX_HEADS, "cache": "fp8",
        },
        flops=2.0 * int(limits.long().sum()) * INDEX_HEADS * DIM + 2.0 * tokens * HEADS * TOPK * (LATENT + RANK),
        least_bytes=float(
            batch * keys * (DIM + 4) + tokens * TOPK * (LATENT + 80) + 2 * tokens * HEADS * (LATENT + RANK)
        ),
        wrong=partial(wrong, scores, rows, q[some].flatten(0, 1), latents),
        candidates=[("mlakit", ours)],
        peer="peers",
    )  # fmt: skip
    return with_peers(job, theirs, gemm, mla)


def with_peers(job: Job, call: Any, gemm: Any, mla: Any) -> Job:
    if gemm and mla:
        job.candidates.append(("peers", call))
    return job


def main() -> None:
    args = parse_arguments(__doc__, 20)
    gemm, mla = (None, None) if args.no_peers else (deep_gemm(), flash_mla())
    wanted = args.rows or ""

    def jobs() -> Iterator[Job]:
        for shape in PREFILL:
            if f"prefill {shape[0]}x{shape[1]}".startswith(wanted):
                yield prefill_job(*shape, gemm, mla)
        for batch, q_len, keys in DECODE:
            if f"decode {batch}x{q_len}x{keys}".startswith(wanted):
                yield decode_job(batch, q_len, keys, gemm, mla)

    run(jobs(), args.output, args.repeats)


if __name__ == "__main__":
    main()
