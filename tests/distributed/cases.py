"""What the ranks of a test do: each function runs on every rank of a group, and raises if its rank got a wrong result.

They run in processes that are started once for all of them.
"""

import itertools
import os
import threading
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mlakit.decode import mla_decode
from mlakit.distributed import (
    ParallelMLA,
    ShardedLatentCache,
    context_parallel_decode,
    local_lengths,
    process_group,
)
from mlakit.distributed.launch import say_to
from mlakit.nn import ATTN_IMPLS, Args, get_mla, save_checkpoint
from mlakit.testing import assert_close
from mlakit.testing.inputs import random_paged_cache
from tests.support.layers import TINY, causal_mask

EXACT = {"rtol": 1e-9, "atol": 1e-11}
HEADS, RANK, ROPE, PAGE = 4, 24, 8, 8
SCALE = 0.3

# Uneven lengths, at and beside the edges of pages and of rounds of pages; requests that reach the first rank alone, and
# that reach none; one request; a batch of which some ranks hold no key at all; one in which nobody holds any.
LENGTHS = ([100, 1, 17, 64], [33], [8, 3, 5], [7, 0, 40], [0, 0], [16, 32, 31, 257])
# Heads given, heads wanted, exchange: either where both can be, and what is chosen.
WAYS = [
    *itertools.product(("all", "own"), ("all", "own"), ("all_to_all", "all_gather")),
    ("all", "all", None),
]


def shard(mesh: DeviceMesh, seq_lens: list[int], seed: int) -> Iterator[torch.Tensor]:
    """The whole cache, table and lengths, then this rank's cache and table: pages dealt out in turn, in another order,
    with NaN where nobody promised a value.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = random_paged_cache(
        seq_lens, (RANK + ROPE,), page_size=PAGE, dtype=torch.float64, device="cpu", generator=generator
    )
    ranks, rank = mesh.size(), mesh.get_local_rank()
    mine = whole.block_table[:, rank::ranks]
    columns = max(mine.shape[1], 1)
    held = -(-whole.seq_lens // PAGE)  # pages of each request, over all ranks
    pages = torch.full((len(seq_lens) * columns + 1, PAGE, RANK + ROPE), torch.nan, dtype=torch.float64)
    table = torch.full((len(seq_lens), columns), pages.shape[0] - 1, dtype=torch.int32)
    free = iter(torch.randperm(pages.shape[0] - 1, generator=generator).tolist())
    for request in range(len(seq_lens)):
        for column in range(len(range(rank, int(held[request]), ranks))):
            place = next(free)
            pages[place] = whole.pages[mine[request, column]]
            table[request, column] = place
    yield from (whole.pages, whole.block_table, whole.seq_lens, pages, table)


def _named(what: str, message: str) -> str:
    return f"{what}: {message}"


def context_is_exact(mesh: DeviceMesh, folder: Path) -> None:
    """All heads or the rank's own, in and out, by either exchange, one new token or several: as on one rank."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    for number, seq_lens in enumerate(LENGTHS):
        cache, table, lens, pages, mine = shard(mesh, seq_lens, number)
        for q_len, causal in ((1, True), (3, True), (3, False), (PAGE + 3, True)):
            q = torch.randn(len(seq_lens), q_len, HEADS, RANK + ROPE, dtype=torch.float64)
            dist.broadcast(q, 0)
            options = {"softmax_scale": SCALE, "kv_lora_rank": RANK}
            expected = mla_decode(q, cache, table, lens, causal=causal, **options)
            local = local_lengths(lens, page_size=PAGE, rank=rank, ranks=ranks, q_len=q_len, causal=causal)
            own = slice(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
            for given, wanted, exchange in WAYS:
                found = context_parallel_decode(
                    q[:, :, own] if given == "own" else q,
                    pages,
                    mine,
                    local,
                    mesh=mesh,
                    query_heads=given,
                    out_heads=wanted,
                    exchange=exchange,
                    **options,
                )
                for actual, whole in zip(found, expected, strict=True):
                    right = whole[:, :, own] if wanted == "own" else whole
                    what = f"{seq_lens} q_len {q_len} causal {causal} {given} {wanted} {exchange}"
                    torch.testing.assert_close(actual, right, **EXACT, msg=partial(_named, what))


def ranks_without_requests(mesh: DeviceMesh, folder: Path) -> None:
    """A rank with no pages and no room in its table; no requests at all; heads that cannot be divided."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    options = {"softmax_scale": SCALE, "kv_lora_rank": RANK}
    cache, table, lens, _, _ = shard(mesh, [20, 9], 0)
    q = torch.randn(2, 2, 5, RANK + ROPE, dtype=torch.float64)
    dist.broadcast(q, 0)
    expected = mla_decode(q, cache, table, lens, causal=False, **options)
    # Everything lies on the last rank.
    empty = torch.zeros(0, PAGE, RANK + ROPE, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.int32), lens * 0
    held = (cache, table, lens) if rank == ranks - 1 else empty
    found = context_parallel_decode(q, *held, mesh=mesh, **options)
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, **EXACT)
    for wanted in ("all", "own"):
        none = context_parallel_decode(q[:0, :, :4], cache, table[:0], lens[:0], mesh=mesh, out_heads=wanted, **options)
        assert none[0].shape == (0, 2, 4 if wanted == "all" else 4 // ranks, RANK)
    with pytest.raises(ValueError, match=f"5 heads cannot be divided over {ranks} ranks"):
        context_parallel_decode(q, *held, mesh=mesh, out_heads="own", **options)


def rounded_once_more(mesh: DeviceMesh, folder: Path) -> None:
    """In bfloat16 partial results are rounded before they travel: within what a kernel may be off."""
    cache, table, lens, pages, mine = shard(mesh, [100, 1, 17, 64], 7)
    q = torch.randn(4, 1, HEADS, RANK + ROPE, dtype=torch.float64)
    dist.broadcast(q, 0)
    options = {"softmax_scale": SCALE, "kv_lora_rank": RANK}
    half, half_pages, half_cache = (tensor.bfloat16() for tensor in (q, pages, cache))
    reference, reference_lse = mla_decode(half.double(), half_cache.double(), table, lens, **options)
    eager, eager_lse = mla_decode(half, half_cache, table, lens, **options)
    local = local_lengths(lens, page_size=PAGE, rank=mesh.get_local_rank(), ranks=mesh.size())
    out, lse = context_parallel_decode(half, half_pages, mine, local, mesh=mesh, out_heads="all", **options)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert_close(out, reference, eager)
    # The reference rounds scores to bfloat16, which a log-sum-exp feels; merging adds nothing to that.
    assert (lse - reference_lse).abs().max() <= 2 * (eager_lse - reference_lse).abs().max() + 1e-3


def _whole(impl: str, args: Args):
    """The one-rank layer, alike on every rank."""
    torch.manual_seed(0)
    layer = get_mla(impl, args).double().eval().requires_grad_(False)
    for name, parameter in layer.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
    return layer


def _args(impl: str, **changes) -> Args:
    return Args(**{**TINY, "n_heads": 8, "attn_impl": impl, **changes})


def _compare(parallel: ParallelMLA, layer, args: Args) -> None:
    """A prefill, a chunk, speculative tokens, single steps, and steps of requests of different lengths."""
    parallel = parallel.double().eval().requires_grad_(False)
    parallel.load_whole(layer.state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 60, args.dim, dtype=torch.float64, generator=generator)
    freqs = layer.precompute_freqs_cis()
    caches = [one.make_cache(dtype=torch.float64) for one in (layer, parallel)]
    begin = 0
    for seqlen, mask in [(17, "causal"), (12, causal_mask(12)), (4, None), (1, None), (2, "causal")]:
        end = begin + seqlen
        new = x[:, begin:end], begin, freqs[begin:end], mask
        torch.testing.assert_close(parallel(*new, caches[1]), layer(*new, caches[0]), **EXACT)
        begin = end
    for length, mask in ((1, None), (3, "causal")):
        starts = torch.tensor([begin, 3, 20], dtype=torch.int32)
        step = x[:, begin : begin + length], starts, freqs, mask
        torch.testing.assert_close(parallel(*step, caches[1]), layer(*step, caches[0]), **EXACT)


def tensor_parallel_layer_agrees(mesh: DeviceMesh, folder: Path) -> None:
    """All four implementations, with and without a low rank of queries."""
    flat = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=("tp",))
    for impl, q_rank in itertools.product(ATTN_IMPLS, (24, 0)):
        args = _args(impl, q_lora_rank=q_rank)
        _compare(ParallelMLA(args, flat), _whole(impl, args), args)


def context_parallel_layer_agrees(mesh: DeviceMesh, folder: Path) -> None:
    """Context parallel alone and both in a mesh of two dimensions, queries gathered or not; nobody has all pages."""
    args = _args("fused")
    layer = _whole("fused", args)
    shapes = [(1, mesh.size()), (mesh.size(), 1), (2, mesh.size() // 2)]
    for shape in dict.fromkeys(shapes):
        both = DeviceMesh("cpu", mesh.mesh.view(shape), mesh_dim_names=("tp", "cp"))
        for gather in (True, False):
            parallel = ParallelMLA(args, both, gather_query=gather)
            cache = parallel.make_cache()
            if shape[1] > 1:
                assert isinstance(cache, ShardedLatentCache)
                assert cache.pages.shape[0] * shape[1] == layer.make_cache().pages.shape[0]
            _compare(parallel, layer, args)
    for impl, changes, words in (("absorb", {}, "must be 'fused'"), ("fused", {"cache_dtype": "fp8"}, "cache_dtype")):
        with pytest.raises(ValueError, match=words):
            ParallelMLA(_args(impl, **changes), DeviceMesh("cpu", mesh.mesh, mesh_dim_names=("cp",)))


def checkpoints_are_read_in_part(mesh: DeviceMesh, folder: Path) -> None:
    """Each rank reads its own rows and columns, by either naming, of wide and of float8 weights."""
    from mlakit.nn import checkpoint

    flat = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=("tp",))
    ranks, rank = mesh.size(), mesh.get_local_rank()
    for naming, dtype, q_rank in (("hf", "bf16", 24), ("deepseek", "fp8", 0)):
        # Parts of float8 weights end where blocks of scales do.
        widths = dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 64) if dtype == "fp8" else {}
        args = _args("absorb", q_lora_rank=q_rank, dtype=dtype, **widths)
        path = folder / f"{naming}{ranks}.safetensors"
        torch.manual_seed(0)
        layer = get_mla("absorb", args)
        if rank == 0:
            save_checkpoint(layer, path, layer=3, naming=naming)
        dist.barrier(mesh.get_group())
        parallel, expected = ParallelMLA(args, flat), ParallelMLA(args, flat)
        read: dict[str, int] = {}
        original = checkpoint._read

        def counting(handle, name, cut, read=read, original=original):
            tensor = original(handle, name, cut)
            read[name] = tensor.numel()
            return tensor

        checkpoint._read = counting
        try:
            parallel.load_checkpoint(path)
        finally:
            checkpoint._read = original
        expected.load_whole(layer.state_dict())
        for name, tensor in expected.state_dict().items():
            assert torch.equal(parallel.state_dict()[name].float(), tensor.float()), name
        assert sum(read.values()) == sum(tensor.numel() for tensor in parallel.state_dict().values())
        assert sum(read.values()) < sum(tensor.numel() for tensor in layer.state_dict().values())


def tables_may_end_before_what_others_keep(mesh: DeviceMesh, folder: Path) -> None:
    """A new token goes to its page's rank, and nowhere on the others, though their tables have no place for it."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    table = torch.arange(2 * 2, dtype=torch.int32).view(2, 2)[:, : 2 if rank == 0 else 1]
    pages = torch.zeros(4, PAGE, RANK + ROPE, dtype=torch.float64)
    cache = ShardedLatentCache(pages, table, RANK, torch.float64, mesh=mesh)
    for position, owner, column in ((0, 0, 0), (PAGE * ranks - 1, ranks - 1, 0), (PAGE * ranks, 0, 1)):
        slots = cache.slots(torch.full((2,), position, dtype=torch.int32), 2, 1)
        assert cache.slots(position, 2, 1).tolist() == slots.tolist()
        here = [int(table[i, column]) * PAGE + position % PAGE for i in range(2)] if rank == owner else [-1, -1]
        assert slots.tolist() == here
    with pytest.raises(ValueError, match="for attn_impl 'fused'"):
        cache.write(0, pages[:, :1, :RANK], pages[:, :1, RANK:])
    for wrong in (lambda: cache.read(2, 1), lambda: cache.gather(2, 0, 1)):
        with pytest.raises(ValueError, match="without gradients"):
            wrong()
    with pytest.raises(ValueError, match="one dimension, got None"):
        ShardedLatentCache(pages, table, RANK, torch.float64)
    with pytest.raises(ValueError, match="the float8 cache"):
        ShardedLatentCache(torch.zeros(4, PAGE, 9, dtype=torch.uint8), table, RANK, torch.bfloat16, mesh=mesh)


CASES = (
    context_is_exact,
    ranks_without_requests,
    rounded_once_more,
    tables_may_end_before_what_others_keep,
    tensor_parallel_layer_agrees,
    context_parallel_layer_agrees,
    checkpoints_are_read_in_part,
)


def run_all(folder: Path, timeout: float) -> int:
    """What a rank runs: all cases, up to the first that fails; others may wait for it then."""
    torch.set_num_threads(1)
    with process_group("cpu", timeout=timeout) as here:
        mesh = DeviceMesh("cpu", torch.arange(here.size))
        done: list[str] = []
        for case in CASES:
            try:
                case(mesh, folder)
            except Exception:
                (folder / f"failed{here.rank}").write_text(
                    f"{case.__name__} on rank {here.rank}:\n{traceback.format_exc()}"
                )
                os._exit(1)
            done.append(case.__name__)
            (folder / f"done{here.rank}").write_text(" ".join(done))
    return 0


SHORT = 6.0


def lose_a_rank(victim: int, number: int, waiting: bool, words: Path) -> int:
    """One rank gets a signal; the others wait for it in a collective, or do not."""
    say_to(words)
    with process_group("cpu", timeout=SHORT) as here:
        pids = torch.zeros(here.size, dtype=torch.int64)
        pids[here.rank] = os.getpid()
        dist.all_reduce(pids)
        ready = [words.with_name(f"ready{rank}") for rank in range(here.size)]
        ready[here.rank].touch()
        if here.rank == (victim + 1) % here.size:
            while not all(path.exists() for path in ready):  # the sum is here, but perhaps not where it came through
                time.sleep(0.01)
            os.kill(int(pids[victim]), number)
        elif here.rank == victim or waiting:
            dist.all_reduce(torch.ones(3))
        threading.Event().wait()
    return 0


def refuse(words: Path) -> int:
    """Every rank finds the same input wrong."""
    say_to(words)
    with process_group("cpu", timeout=SHORT):
        raise ValueError("no, got something\n  else")
