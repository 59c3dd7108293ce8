"""Speed of `mla_sparse_prefill` and `mla_sparse_decode` on a GPU: checked against float64 on a sample of tokens, then
timed beside FlashMLA where it can be imported.

    python benchmarks/h200/sparse.py results.json           # the default configurations and the peer
    python benchmarks/h200/sparse.py results.json --tune    # every launch configuration worth a try
    python benchmarks/h200/sparse.py results.json --rows decode    # jobs whose name starts so

A time is the whole operation as a caller calls it: every kernel, the merge of pieces and the peer's metadata included,
with a cold L2; but for "flash_mla_kept", which has the metadata from the call before. Prefill's indices are mostly of
the newest 20000 keys, as in FlashMLA's tests; decode's are any of a request's 8192, whose pages are shuffled over the
cache.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import CUDA, Candidate, Job, Tensors, parse_arguments, run

from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.hardware import capability
from mlakit.sparse import (
    mla_sparse_decode,
    mla_sparse_decode_reference,
    mla_sparse_prefill,
    mla_sparse_prefill_reference,
)
from mlakit.sparse.config import SparseConfig
from mlakit.sparse.hopper_config import HopperConfig
from mlakit.sparse.hopper_launch import _launch_hopper
from mlakit.sparse.triton_launch import _launch_decode, _launch_prefill
from mlakit.testing import compare, compare_lse

RANK, LATENT, PAGE, HEADS = 512, 576, 64, 128
SAMPLE = 24  # tokens that are checked
NEAR = 20000

# s_q, s_kv, topk, heads, width of a key.
PREFILL = [
    (1024, 4096, 512, 128, 576), (2048, 8192, 1024, 128, 576), (4096, 16384, 2048, 128, 576),
    (4096, 32768, 2048, 128, 576), (4096, 65536, 2048, 128, 576), (4096, 131072, 2048, 128, 576),
    (4096, 16384, 2048, 64, 576), (4096, 16384, 2048, 128, 512), (4096, 16384, 2048, 16, 576),
]  # fmt: skip
# requests, new tokens, heads; topk 2048 out of 8192 keys.
DECODE = [(128, 2, 128), (128, 1, 128), (64, 1, 128), (8, 1, 128), (128, 1, 64), (8, 1, 16), (128, 1, 16)]
TOPK, KEYS = 2048, 8192

TUNED_PREFILL = [
    SparseConfig(64, 64, 8, 3, wgmma=True), SparseConfig(64, 64, 8, 2, wgmma=True), SparseConfig(64, 64, 8, 2),
    SparseConfig(64, 32, 8, 3), SparseConfig(64, 32, 8, 4), SparseConfig(32, 64, 8, 3), SparseConfig(16, 32, 4, 3, 2),
]  # fmt: skip
TUNED_FP8 = [
    SparseConfig(64, 64, 8, 3, wgmma=True), SparseConfig(64, 64, 8, 2, wgmma=True),
    SparseConfig(64, 32, 8, 3, wgmma=True), SparseConfig(16, 32, 4, 3, 2), SparseConfig(16, 32, 8, 3),
    SparseConfig(16, 64, 8, 2), SparseConfig(32, 32, 8, 3), SparseConfig(32, 32, 8, 2, 2),
]  # fmt: skip
# Of the Gluon kernel, from 16 bits and from float8, beside the default.
HOPPER = [HopperConfig(216, 72, 1), HopperConfig(208, 88, 2)]
HOPPER_FP8 = [HopperConfig(208, 88, 1), HopperConfig(192, 120, 1)]


def flash_mla() -> Any:
    try:
        return importlib.import_module("vllm.third_party.flashmla.flash_mla_interface")
    except (ImportError, OSError) as error:
        print(f"no FlashMLA: {error}", file=sys.stderr)
        return None


def named(config: SparseConfig | HopperConfig) -> str:
    if isinstance(config, HopperConfig):
        return f"hopper {config.consumer_regs} {config.producer_regs} parts {config.parts}"
    form = " wgmma" if config.wgmma else ""
    return f"m{config.block_m} n{config.block_n} w{config.num_warps} s{config.num_stages} r{config.resident}{form}"


def check(
    out: torch.Tensor, lse: torch.Tensor, exact: Tensors, eager: torch.Tensor, rounded_lse: torch.Tensor | None = None
) -> str:
    return compare(out, exact[0], eager).reason or compare_lse(lse, exact[-1], rounded_lse).reason


def prefill_job(s_q: int, s_kv: int, topk: int, heads: int, latent: int, tune: bool, peer: Any) -> Job:
    scale = latent**-0.5
    other = (f" {heads} heads" if heads != HEADS else "") + (f" d {latent}" if latent != LATENT else "")
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": CUDA}
    q = (torch.randn((s_q, heads, latent), **options) / 10).bfloat16()
    kv = (torch.randn((s_kv, 1, latent), **options) / 10).bfloat16()
    shape = (s_q, 1, topk)
    near = torch.randint(0, 32, shape, **options) < 31
    new = torch.randint(max(0, s_kv - NEAR), s_kv, shape, **options, dtype=torch.int32)
    indices = torch.where(near, new, torch.randint(0, s_kv, shape, **options, dtype=torch.int32))
    some = torch.randperm(s_q, **options)[:SAMPLE]
    exact = mla_sparse_prefill_reference(q[some].double(), kv.double(), indices[some], softmax_scale=scale)
    eager = mla_sparse_prefill_reference(q[some], kv, indices[some], softmax_scale=scale)[0]
    out = torch.empty((s_q, heads, RANK), dtype=q.dtype, device=CUDA)
    max_logits, lse = torch.empty((s_q, heads), device=CUDA), torch.empty((s_q, heads), device=CUDA)

    def ours(impl: str) -> Callable[[], Tensors]:
        return lambda: mla_sparse_prefill(q, kv, indices, softmax_scale=scale, out=out, impl=impl)

    def configured(config: SparseConfig | HopperConfig) -> Callable[[], Tensors]:
        def call() -> Tensors:
            if isinstance(config, HopperConfig):
                _launch_hopper(
                    q, kv, indices, None, None, out, max_logits, lse, softmax_scale=scale, num_splits=1, config=config
                )  # fmt: skip
                return out, max_logits, lse
            _launch_prefill(
                q, kv, indices, None, None, out, max_logits, lse, softmax_scale=scale, config=config
            )  # fmt: skip
            return out, max_logits, lse

        return call

    candidates: list[Candidate] = [("triton", ours("triton"))]
    if capability(CUDA) == (9, 0):
        candidates.append(("hopper", ours("hopper")))
        candidates += [(named(config), configured(config)) for config in (HOPPER if tune else [])]
    if peer:
        candidates.append(("flash_mla", lambda: peer.flash_mla_sparse_fwd(q, kv, indices, scale, RANK)))
    if tune:
        candidates += [(named(config), configured(config)) for config in TUNED_PREFILL]
    return Job(
        op="mla_sparse_prefill",
        name=f"prefill {s_q}x{s_kv} top {topk}" + other,
        fields={"s_q": s_q, "s_kv": s_kv, "topk": topk, "heads": heads, "latent": latent, "dtype": "bfloat16"},
        flops=2.0 * s_q * heads * topk * (latent + RANK),
        least_bytes=2.0 * (q.numel() + kv.numel() + out.numel()) + 4.0 * indices.numel(),
        wrong=lambda found: check(found[0][some], found[2][some], exact, eager),
        candidates=candidates,
        peer="flash_mla",
    )


def decode_job(batch: int, q_len: int, heads: int, fp8: bool, tune: bool, peer: Any) -> Job:
    scale = LATENT**-0.5
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": CUDA}
    pages = batch * KEYS // PAGE
    width = LATENT + 80 if fp8 else LATENT
    cache = torch.empty((pages, PAGE, width), dtype=torch.uint8 if fp8 else torch.bfloat16, device=CUDA)
    for part in cache.split(1024):
        keys = torch.randn((*part.shape[:2], LATENT), **options)
        part.copy_(pack_fp8(keys[..., :RANK], keys[..., RANK:]) if fp8 else keys)
    table = torch.randperm(pages, **options).view(batch, 1, -1)
    position = torch.randint(0, KEYS, (batch, q_len, TOPK), **options)
    page = table.expand(-1, q_len, -1).gather(2, position // PAGE)
    indices = (page * PAGE + position % PAGE).int()
    q = torch.randn((batch, q_len, heads, LATENT), **options).bfloat16()
    some = torch.randperm(batch, **options)[:SAMPLE]
    near = cache[torch.unique(page[some])]  # float64 of all of a large cache is too much
    remap = torch.full((pages,), -1, device=CUDA)
    remap[torch.unique(page[some])] = torch.arange(len(near), device=CUDA)
    mine = (remap[page[some]] * PAGE + position[some] % PAGE).int()
    rounded = unpack_fp8(near) if fp8 else near  # as a kernel may round float8 codes times their scales
    values = near if fp8 else near.double()
    exact = mla_sparse_decode_reference(q[some].double(), values, mine, softmax_scale=scale)
    rounded_lse = mla_sparse_decode_reference(q[some].double(), rounded.double(), mine, softmax_scale=scale)[1]
    eager = mla_sparse_decode_reference(q[some], rounded, mine, softmax_scale=scale)[0]
    del rounded
    out = torch.empty((batch, q_len, heads, RANK), dtype=q.dtype, device=CUDA)
    lse = torch.empty((batch, q_len, heads), device=CUDA)

    def ours(impl: str) -> Callable[[], Tensors]:
        return lambda: mla_sparse_decode(q, cache, indices, softmax_scale=scale, out=out, impl=impl)

    def configured(config: SparseConfig | HopperConfig, splits: int | None) -> Callable[[], Tensors]:
        def call() -> Tensors:
            if isinstance(config, HopperConfig):
                _launch_hopper(
                    q, cache, indices, None, None, out, None, lse, softmax_scale=scale, num_splits=splits,
                    config=config,
                )  # fmt: skip
                return out, lse
            _launch_decode(
                q, cache, indices, None, None, out, lse, softmax_scale=scale, num_splits=splits, config=config
            )  # fmt: skip
            return out, lse

        return call

    def theirs(metadata: Any = None) -> Tensors:
        metadata = metadata or peer.get_mla_metadata()[0]
        found, found_lse = peer.flash_mla_with_kvcache(
            q, cache[:, :, None], None, None, RANK, metadata, None, softmax_scale=scale, is_fp8_kvcache=True,
            indices=indices,
        )  # fmt: skip
        return found, found_lse.transpose(1, 2)

    candidates: list[Candidate] = [("triton", ours("triton"))]
    if capability(CUDA) == (9, 0):
        candidates.append(("hopper", ours("hopper")))
        forms = HOPPER_FP8 if fp8 else HOPPER
        candidates += [(named(config), configured(config, None)) for config in (forms if tune else [])]
    if peer and fp8:
        candidates.append(("flash_mla", theirs))
        kept = peer.get_mla_metadata()[0]  # as for the layers of a model, of which the first fills it in
        candidates.append(("flash_mla_kept", lambda: theirs(kept)))
    if tune:
        tuned = TUNED_FP8 if fp8 else TUNED_PREFILL
        candidates += [(named(config), configured(config, None)) for config in tuned]
    dtype = "fp8" if fp8 else "bfloat16"
    return Job(
        op="mla_sparse_decode",
        name=f"decode {dtype} {batch}x{q_len}x{heads}",
        fields={"batch": batch, "q_len": q_len, "heads": heads, "topk": TOPK, "cache": dtype, "dtype": "bfloat16"},
        flops=2.0 * batch * q_len * heads * TOPK * (LATENT + RANK),
        least_bytes=batch * q_len * TOPK * width * cache.element_size() + 2.0 * (q.numel() + out.numel()),
        wrong=lambda found: check(found[0][some], found[1][some], exact, eager, rounded_lse),
        candidates=candidates,
        peer="flash_mla",
    )


def jobs(tune: bool, peers: bool, wanted: str | None) -> Iterator[Job]:
    peer = flash_mla() if peers else None
    if wanted is None or "prefill".startswith(wanted[:7]):
        for shape in PREFILL[:3] if tune else PREFILL:
            yield prefill_job(*shape, tune, peer)
    if wanted is None or "decode".startswith(wanted[:6]):
        for batch, q_len, heads in DECODE:
            yield decode_job(batch, q_len, heads, True, tune, peer)
        for batch, q_len, heads in [(128, 1, 128), (8, 1, 128), (128, 1, 16)]:
            yield decode_job(batch, q_len, heads, False, tune, peer)


def main() -> None:
    args = parse_arguments(__doc__, 30)
    chosen = (job for job in jobs(args.tune, not args.no_peers, args.rows) if job.name.startswith(args.rows or ""))
    run(chosen, args.output, args.repeats)


if __name__ == "__main__":
    main()
