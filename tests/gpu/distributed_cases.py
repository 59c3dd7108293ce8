"""What two ranks with a GPU each do; see tests/distributed/cases.py for those on a CPU. Nothing here touches a GPU when
it is imported: the ranks are forks of a process that has.
"""

import faulthandler
import itertools
import os
import signal
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mlakit.bench.timing import capture
from mlakit.decode import mla_decode_reference
from mlakit.distributed import (
    ParallelMLA,
    ShardedLatentCache,
    context_parallel_decode,
    local_lengths,
    process_group,
)
from mlakit.distributed.launch import say_to
from mlakit.nn import ATTN_IMPLS, Args, LatentCache, get_mla
from mlakit.testing import assert_close, compare_lse, poison_
from mlakit.testing.inputs import random_paged_cache

PAGE, RANK, ROPE = 64, 512, 64
OPTIONS = {"softmax_scale": 192**-0.5, "kv_lora_rank": RANK}
# Heads given and wanted, and the exchange; the other combinations are tried on CPUs.
WAYS = [
    ("all", "all", "all_gather"),
    ("all", "all", "all_to_all"),
    ("all", "own", "all_to_all"),
    ("own", "own", "all_gather"),
    ("own", "own", "all_to_all"),
]


def shard(mesh: DeviceMesh, seq_lens: list[int], columns: int, dtype: torch.dtype):
    """The whole cache, and this rank's pages and table, [batch, columns]."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(sum(seq_lens))
    whole = random_paged_cache(
        seq_lens, (RANK + ROPE,), page_size=PAGE, dtype=dtype, device=device, generator=generator
    )
    ranks, rank = mesh.size(), mesh.get_local_rank()
    mine = whole.block_table[:, rank::ranks].long()
    held = [len(range(rank, -(-length // PAGE), ranks)) for length in seq_lens]
    table = torch.zeros(len(seq_lens), columns, dtype=torch.int32, device="cuda")
    pages = [torch.full((1, PAGE, RANK + ROPE), torch.nan, dtype=dtype, device="cuda")]  # where dead slots point
    used = 1
    for request, count in enumerate(held):
        pages.append(whole.pages[mine[request, :count]])
        table[request, :count] = torch.arange(used, used + count, dtype=torch.int32)
        used += count
    return whole, torch.cat(pages), table


# Pages, rounds of pages and their edges, requests that one rank alone holds, and none; one long request, which the
# kernels split; a batch of which one rank alone holds anything. Other lengths are tried on CPUs: here every shape costs
# seconds of compiling.
BATCHES = ([1000, 1, 129, 64, 0], [9001], [40, 7, 0, 0, 0])


def context_is_exact(mesh: DeviceMesh, folder: Path) -> None:
    """Against float64, of 16 heads (the kernels for few) and 128."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    dtype = torch.bfloat16
    steps = ((1, True, 128), (3, True, 16), (2, False, 128))
    for seq_lens, (q_len, causal, heads) in itertools.product(BATCHES, steps):
        columns = -(-max(*seq_lens, 1000) // (PAGE * ranks)) + 1
        whole, pages, table = shard(mesh, seq_lens, columns, dtype)
        generator = torch.Generator(whole.pages.device).manual_seed(1)
        q = torch.randn(len(seq_lens), q_len, heads, RANK + ROPE, device="cuda", generator=generator).to(dtype)
        inputs = q, whole.pages, whole.block_table, whole.seq_lens
        ref, ref_lse = mla_decode_reference(q.double(), whole.pages.double(), *inputs[2:], causal=causal, **OPTIONS)
        eager, _ = mla_decode_reference(*inputs, causal=causal, **OPTIONS)
        local = local_lengths(whole.seq_lens, page_size=PAGE, rank=rank, ranks=ranks, q_len=q_len, causal=causal)
        own = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
        for given, wanted, exchange in WAYS:
            out, lse = context_parallel_decode(
                q[:, :, own] if given == "own" else q, pages, table, local, mesh=mesh, query_heads=given,
                out_heads=wanted, exchange=exchange, **OPTIONS,
            )  # fmt: skip
            picked = own if wanted == "own" else slice(None)
            what = f"{seq_lens[:5]} q_len {q_len} causal {causal} heads {heads} {given} {wanted} {exchange}"
            assert_close(out, ref[:, :, picked], eager[:, :, picked], what)
            found = compare_lse(lse, ref_lse[:, :, picked])
            assert found.ok, f"{what}: {found.reason}"


def graphs_find_new_lengths(mesh: DeviceMesh, folder: Path) -> None:
    """Captured once, replayed with other lengths; the host waits for nothing."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    for query_heads, q_len in itertools.product(("all", "own"), (1, 2)):
        longest, heads = [700, 333, 64], 32
        whole, pages, table = shard(mesh, longest, 6, torch.bfloat16)
        q = torch.randn(3, q_len, heads, RANK + ROPE, device="cuda").bfloat16()
        dist.broadcast(q, 0)
        own = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
        given = q[:, :, own].contiguous() if query_heads == "own" else q
        lens = whole.seq_lens.clone()

        def call(given=given, pages=pages, table=table, lens=lens, q_len=q_len, query_heads=query_heads):
            local = local_lengths(lens, page_size=PAGE, rank=rank, ranks=ranks, q_len=q_len)
            return context_parallel_decode(given, pages, table, local, mesh=mesh, query_heads=query_heads, **OPTIONS)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            call()
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out, lse = call()
        for seq_lens in ([700, 333, 64], [2, 333, 63], [65, 130, 3]):
            lens.copy_(torch.tensor(seq_lens, dtype=torch.int32))
            poison_(out)
            poison_(lse)
            graph.replay()
            inputs = whole.block_table, lens
            ref, ref_lse = mla_decode_reference(q.double(), whole.pages.double(), *inputs, **OPTIONS)
            eager, _ = mla_decode_reference(q, whole.pages, *inputs, **OPTIONS)
            picked = own if query_heads == "own" else slice(None)
            assert_close(out, ref[:, :, picked], eager[:, :, picked], f"{query_heads} {q_len} {seq_lens}")
            assert compare_lse(lse, ref_lse[:, :, picked]).ok
        torch.cuda.synchronize()
        graph.reset()  # before its communicator goes


def layers_agree_with_one(mesh: DeviceMesh, folder: Path) -> None:
    """A prefill and steps of decode in bfloat16, beside the layer in float64; a captured step of the fused ones."""
    from mlakit.studies.layer_difference import difference

    size = {"dim": 1024, "n_heads": 16, "q_lora_rank": 256, "max_batch_size": 2, "max_seq_len": 512}
    ranks = mesh.size()
    shapes = {"tp": (ranks, 1), "cp": (1, ranks), **({"both": (2, ranks // 2)} if ranks > 2 else {})}
    # Once each: every mesh has communicators of its own, which take longer to set up than a case takes.
    meshes = {
        kind: DeviceMesh("cuda", mesh.mesh.view(shape), mesh_dim_names=("tp", "cp")) for kind, shape in shapes.items()
    }
    for impl, (kind, both), gather in itertools.product(ATTN_IMPLS, meshes.items(), (True, False)):
        if impl != "fused" and (kind != "tp" or not gather):  # context parallel is for fused; gathering for that
            continue
        args = Args(attn_impl=impl, **size)
        with torch.device("cuda"):
            torch.manual_seed(0)
            layer = get_mla(impl, args).eval().requires_grad_(False)
            parallel = ParallelMLA(args, both, gather_query=gather).eval().requires_grad_(False)
            exact = get_mla("absorb", args).double().eval().requires_grad_(False)
        parallel.load_whole(layer.state_dict())
        exact.load_state_dict(layer.state_dict())
        generator = torch.Generator(layer.wkv_a.weight.device).manual_seed(2)
        x = torch.randn(2, 310, args.dim, device="cuda", generator=generator).bfloat16()
        freqs = exact.precompute_freqs_cis()
        kept = [one.make_cache() for one in (parallel, exact)]
        for begin, end in ((0, 300), (300, 301), (301, 304)):
            out = parallel(x[:, begin:end], begin, freqs[begin:end], "causal", kept[0])
            right = exact(x[:, begin:end].double(), begin, freqs[begin:end], "causal", kept[1])
            found = difference(out, right)
            assert found.agrees(1.5e-2), f"{impl} {kind} gather {gather} {begin}: {found}"
        if impl != "fused":
            continue
        start = torch.full((2,), 304, dtype=torch.int32, device="cuda")
        new = x[:, 304:305].clone()
        parallel(new, start, freqs, None, kept[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = parallel(new, start, freqs, None, kept[0])
        for position in (304, 305, 306):
            start.fill_(position)
            new.copy_(x[:, position : position + 1])
            graph.replay()
            right = exact(new.double(), position, freqs[position : position + 1], None, kept[1])
            found = difference(out, right)
            assert found.agrees(1.5e-2), f"graph, {kind} gather {gather} {position}: {found}"
        torch.cuda.synchronize()
        graph.reset()
        assert isinstance(kept[0], LatentCache if kind == "tp" else ShardedLatentCache)


CASES = (context_is_exact, graphs_find_new_lengths, layers_agree_with_one)


# Seconds for a case on every rank, kernels that nobody compiled yet included; and to leave the group.
CASE, LEAVE = 60.0, 20.0


def must_end(within: float, folder: Path, rank: int, what: str) -> None:
    """End this process with every thread's stack in a file, if it does not end or come here again in time."""
    file = (folder / f"stuck{rank}").open("w")
    file.write(f"rank {rank} did not end {what} within {within:g} s\n")
    file.flush()
    faulthandler.dump_traceback_later(within, exit=True, file=file)
    _OPEN[:] = [file]


_OPEN: list[object] = []


def run_all(folder: Path, timeout: float) -> int:
    """What a rank runs: all cases, up to the first that fails."""
    rank = int(os.environ["RANK"])
    must_end(CASE, folder, rank, "joining the others")
    with process_group("cuda", timeout=timeout) as here, torch.no_grad():
        mesh = DeviceMesh("cuda", torch.arange(here.size))
        for case in CASES:
            must_end(CASE, folder, rank, case.__name__)
            begin = time.monotonic()
            try:
                case(mesh, folder)
            except Exception:
                text = f"{case.__name__} on rank {here.rank}:\n{traceback.format_exc()}"
                (folder / f"failed{here.rank}").write_text(text)
                os._exit(1)
            with (folder / f"done{here.rank}").open("a") as file:
                file.write(f"{case.__name__} {time.monotonic() - begin:.1f}\n")
        must_end(LEAVE, folder, rank, "leaving the group")
    must_end(LEAVE, folder, rank, "its process")
    (folder / f"stuck{rank}").unlink()
    return 0


def lose_a_rank(victim: int, doing: str, folder: Path, timeout: float) -> int:
    """One rank is killed; another one's GPU waits for it, and its host for the GPU."""
    say_to(folder / "words")
    rank = int(os.environ["RANK"])
    must_end(3 * timeout, folder, rank, f"though rank {victim} is gone")
    with process_group("cuda", timeout=timeout) as here, torch.no_grad():
        mesh = DeviceMesh("cuda", torch.arange(here.size))
        step = _steps(doing, mesh)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        dist.barrier()
        # Some steps are done and some are not when it dies, as far ahead as the host is of the GPU.
        for number in range(100_000):
            step()
            if here.rank == victim and number == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            if number % 8 == 7:
                torch.cuda.synchronize()
    return 0


def _steps(doing: str, mesh: DeviceMesh):
    """What ranks do together when one dies: a decode, or a decode from a graph."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    whole, pages, table = shard(mesh, [5000, 70], 41, torch.bfloat16)
    q = torch.randn(2, 1, 128, RANK + ROPE, device="cuda").bfloat16()
    local = local_lengths(whole.seq_lens, page_size=PAGE, rank=rank, ranks=ranks)

    def decode() -> object:
        return context_parallel_decode(q, pages, table, local, mesh=mesh, **OPTIONS)

    if doing == "decode":
        return decode
    assert doing == "graph"
    return capture(decode, error_mode="thread_local").replay
