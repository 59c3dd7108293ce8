"""`mla_prefill` with impl="hopper" on a Hopper: the Gluon kernel against float64."""

import pytest
import torch

from mlakit.prefill import mla_prefill, mla_prefill_reference, ops
from mlakit.testing import assert_close, compare_lse, count_poison, poison_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="for compute capability 9.0",
    ),
]

SCALE = 0.07


def cu(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def rows_of(lengths: list[int], *shape: int, dtype: torch.dtype, padding: int, seed: int) -> torch.Tensor:
    """Random rows, then `padding` rows of poison."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = poison_(torch.empty((sum(lengths) + padding, *shape), dtype=dtype, device="cuda"))
    x[: sum(lengths)].normal_(generator=generator)
    return x


def inputs(
    q_lens: list[int],
    k_lens: list[int],
    heads: int,
    kv_heads: int,
    dims: tuple[int, int, int] = (128, 64, 128),
    apart: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    padding: int = 0,
) -> dict[str, torch.Tensor]:
    """`mla_prefill`'s tensors by name. `dims`: the keys' two parts, and the values; `apart`: the rope part in k_pe, for
    all heads, and k and v side by side in one tensor as a layer's up-projection leaves them.
    """
    nope, rope, v_dim = dims
    q = rows_of(q_lens, heads, nope + rope, dtype=dtype, padding=padding, seed=1)
    found = {"q": q, "cu_seqlens_q": cu(*q_lens), "cu_seqlens_k": cu(*k_lens)}
    if apart:
        kv = rows_of(k_lens, kv_heads, nope + v_dim, dtype=dtype, padding=padding, seed=2)
        found |= {"k": kv[..., :nope], "v": kv[..., nope:]}
        found["k_pe"] = rows_of(k_lens, 1, rope, dtype=dtype, padding=padding, seed=3)
    else:
        found["k"] = rows_of(k_lens, kv_heads, nope + rope, dtype=dtype, padding=padding, seed=2)
        found["v"] = rows_of(k_lens, kv_heads, v_dim, dtype=dtype, padding=padding, seed=3)
    return found


def check(args: dict[str, torch.Tensor], out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float) -> None:
    rows, keys = int(args["cu_seqlens_q"][-1]), int(args["cu_seqlens_k"][-1])
    used = {name: x if name.startswith("cu") else x[: rows if name == "q" else keys] for name, x in args.items()}
    exact = {name: x if name.startswith("cu") else x.double() for name, x in used.items()}
    ref, ref_lse = mla_prefill_reference(**exact, softmax_scale=scale, causal=causal)
    eager, _ = mla_prefill_reference(**used, softmax_scale=scale, causal=causal)
    assert_close(out[:rows], ref, eager)
    found = compare_lse(lse[:rows], ref_lse)
    assert found.ok, found.reason
    assert not out[rows:].any()
    assert torch.isneginf(lse[rows:]).all()


# Lengths around the tiles' edges (64 rows of a warpgroup, 128 of a tile, 128 keys), ragged with empty sequences at the
# start, between and at the end, more queries than keys (rows without keys), no keys at all, one new token after a long
# context, and more tiles than a chip has multiprocessors.
LENGTHS = [
    ([1], [1]),
    ([63, 64, 65], [63, 64, 65]),
    ([127, 128, 129], [127, 128, 129]),
    ([0, 5, 0, 300, 3, 200, 0], [7, 5, 9, 700, 0, 64, 0]),
    ([1, 2], [3000, 4095]),
    ([1500], [1900]),
    ([513, 257, 1], [513, 900, 300]),
]


# One head and several; three query heads that share one; as many kv heads as DeepSeek's. Keys in one tensor and in two.
@pytest.mark.parametrize(("q_lens", "k_lens"), LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (16, 16)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)])
def test_lengths_and_heads(q_lens, k_lens, heads, kv_heads, causal, dtype, apart):
    args = inputs(q_lens, k_lens, heads, kv_heads, apart=apart, dtype=dtype, padding=5)
    out = poison_(torch.empty((args["q"].shape[0], heads, 128), dtype=dtype, device="cuda"))
    got, lse = mla_prefill(**args, softmax_scale=192**-0.5, causal=causal, out=out, impl="hopper")
    assert got is out
    assert count_poison(out) == 0
    check(args, out, lse, causal, 192**-0.5)


# Every pair of parts that the kernel takes, and values narrower than keys and wider.
@pytest.mark.parametrize(
    ("dims", "apart"),
    [
        ((64, 0, 64), False),
        ((64, 0, 128), False),
        ((128, 0, 128), False),
        ((128, 64, 64), False),
        ((64, 64, 64), True),
        ((64, 128, 128), True),
    ],
)
@pytest.mark.parametrize(("q_lens", "k_lens"), [([40], [75]), ([257, 130], [400, 130])])
def test_head_dims(dims, apart, q_lens, k_lens):
    args = inputs(q_lens, k_lens, 4, 2, dims, apart, padding=3)
    for causal in (True, False):
        out, lse = mla_prefill(**args, softmax_scale=SCALE, causal=causal, impl="hopper")
        check(args, out, lse, causal, SCALE)


def test_default_is_this_kernel():
    args = inputs([200], [200], 2, 2)
    expected = mla_prefill(**args, softmax_scale=0.1, impl="hopper")
    for got, want in zip(mla_prefill(**args, softmax_scale=0.1), expected, strict=True):
        assert torch.equal(got, want)


def test_k_pe_of_every_head():
    args = inputs([200, 30], [200, 90], 6, 3)
    args["k_pe"] = rows_of([290], 3, 64, dtype=torch.bfloat16, padding=0, seed=4)
    out, lse = mla_prefill(**args, softmax_scale=SCALE, impl="hopper")
    check(args, out, lse, True, SCALE)


def test_large_and_whole_scores():
    # Scores of some hundreds, whose exp overflows; and whole numbers, which leave no rounding to hide behind.
    args = inputs([300], [300], 2, 2)
    for name in ("q", "k", "k_pe"):
        args[name] = (args[name] * 4).round()
    args["v"] = args["v"].round()
    out, lse = mla_prefill(**args, softmax_scale=0.25, impl="hopper")
    assert lse.max() > 100
    check(args, out, lse, True, 0.25)


# Weights are computed by a maximum that may be old: scores that grow by a hundred within a sequence, towards the last
# keys, which are read first, and away from them; one key alone that outdoes all others; rows without any key.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("growth", ["first", "last", "one"])
@pytest.mark.parametrize(("q_lens", "k_lens"), [([1500], [1900]), ([300, 70], [100, 1000])])
def test_scores_that_outgrow_those_before(dtype, growth, q_lens, k_lens):
    args = inputs(q_lens, k_lens, 4, 2, apart=False, dtype=dtype, padding=3)
    keys = sum(k_lens)
    ramp = torch.linspace(0, 1, keys, device="cuda")
    factors = {"first": 20 * (1 - ramp) ** 3, "last": 20 * ramp**3, "one": torch.ones_like(ramp)}[growth]
    if growth == "one":
        factors[[3, k_lens[0] - 40]] = 20
    args["k"][:keys] *= factors[:, None, None].to(dtype)
    for causal in (True, False):
        out, lse = mla_prefill(**args, softmax_scale=192**-0.5, causal=causal, impl="hopper")
        check(args, out, lse, causal, 192**-0.5)
        again, _ = mla_prefill(**args, softmax_scale=192**-0.5, causal=causal, impl="hopper")
        assert torch.equal(again, out)


def test_another_sequence_does_not_matter():
    # A neighbour full of NaN: what lies past a sequence's end is loaded in whole tiles, but never used.
    args = inputs([100, 77, 90], [200, 77, 150], 2, 2)
    expected, expected_lse = mla_prefill(**args, softmax_scale=0.1, impl="hopper")
    for name in ("q", "k", "v", "k_pe"):
        bounds = args["cu_seqlens_q" if name == "q" else "cu_seqlens_k"]
        poison_(args[name][int(bounds[1]) : int(bounds[2])])
    out, lse = mla_prefill(**args, softmax_scale=0.1, impl="hopper")
    for rows in (slice(0, 100), slice(177, None)):
        assert torch.equal(out[rows], expected[rows])
        assert torch.equal(lse[rows], expected_lse[rows])


# Heads first, one head for all (stride 0), the rope part as a view of the latent that it comes from, and an output that
# lies between others.
@pytest.mark.parametrize("layout", ["heads_first", "expanded", "latent"])
def test_strides(layout):
    args = inputs([300, 70], [333, 100], 4, 4)
    if layout == "heads_first":
        args |= {name: args[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "k", "v")}
    elif layout == "expanded":
        args |= {name: args[name][:, :1].expand(-1, 4, -1) for name in ("k", "v")}
    else:
        args["k_pe"] = rows_of([433], 1, 576, dtype=torch.bfloat16, padding=0, seed=4)[..., 512:]
    out = torch.empty((370, 3, 4, 128), dtype=torch.bfloat16, device="cuda")[:, 1]
    _, lse = mla_prefill(**args, softmax_scale=SCALE, out=out, impl="hopper")
    check(args, out, lse, True, SCALE)


def test_what_cannot_be_loaded_in_bulk_is_refused():
    args = inputs([30], [40], 2, 2)
    wide = torch.zeros(40 * 2 * 128 + 1, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="must begin at multiples of 16 bytes, got an address of 2 mod 16"):
        mla_prefill(**(args | {"v": wide[1:].view(40, 2, 128)}), softmax_scale=SCALE, impl="hopper")
    odd = torch.zeros((40, 257), dtype=torch.bfloat16, device="cuda")[:, :256].unflatten(1, (2, 128))
    with pytest.raises(RuntimeError, match="multiples of 16 bytes apart, got strides"):
        mla_prefill(**(args | {"v": odd}), softmax_scale=SCALE, impl="hopper")
    # Without a name, another kernel takes them.
    out, lse = mla_prefill(**(args | {"v": odd}), softmax_scale=SCALE)
    check(args | {"v": odd}, out, lse, True, SCALE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (16, 16)])
def test_gradients(heads, kv_heads, causal):
    # The forward pass gives the backward pass what it needs: lse. The rope part's gradient is summed over heads.
    args = inputs([63, 200, 5, 1], [65, 300, 5, 1], heads, kv_heads)
    names = ("q", "k", "v", "k_pe")
    generator = torch.Generator("cuda").manual_seed(5)
    d_out = torch.randn((269, heads, 128), device="cuda", generator=generator).bfloat16()

    def gradients(convert, impl):
        leaves = [convert(args[name]).detach().clone().requires_grad_() for name in names]
        bounds = {name: x for name, x in args.items() if name.startswith("cu")}
        out, _ = mla_prefill(
            **dict(zip(names, leaves, strict=True)), **bounds, softmax_scale=SCALE, causal=causal, impl=impl
        )
        return torch.autograd.grad(out, leaves, d_out.to(out.dtype))

    found = gradients(torch.clone, "hopper")
    portable = gradients(torch.clone, "triton")
    exact = gradients(torch.Tensor.double, "reference")
    for name, got, other, ref in zip(names, found, portable, exact, strict=True):
        # tests/gpu/test_prefill.py holds the portable kernels against float64, where terms cancel too.
        assert got.shape == ref.shape
        error, allowed = (float((x - ref).square().mean().sqrt()) for x in (got, other))
        assert error <= 1.1 * allowed + 1e-6, name


def test_more_than_2_to_31_elements():
    # 90000 rows of 128 heads of 192: the last sequence starts past 2^31 elements of q and of k and v. Only its end is
    # compared.
    rows, heads, last = 90_000, 128, 333
    q = torch.zeros((rows, heads, 192), dtype=torch.bfloat16, device="cuda")
    kv = torch.zeros((rows, heads, 256), dtype=torch.bfloat16, device="cuda")
    k_pe = torch.zeros((rows, 1, 64), dtype=torch.bfloat16, device="cuda")
    for x in (q, kv, k_pe):
        x[-last:].normal_()
    bounds = cu(*[3000] * 29, rows - 29 * 3000 - last, last)
    args = {"q": q, "k": kv[..., :128], "v": kv[..., 128:], "k_pe": k_pe}
    out, lse = mla_prefill(**args, cu_seqlens_q=bounds, cu_seqlens_k=bounds, softmax_scale=SCALE, impl="hopper")
    ends = {name: x[-last:] for name, x in args.items()} | {"cu_seqlens_q": cu(last), "cu_seqlens_k": cu(last)}
    check(ends, out[-last:], lse[-last:], True, SCALE)
    assert not out[:-last].any()


def test_cuda_graphs_with_changing_lengths():
    # One capture serves other lengths; and two captures of one stream are replayed on two at once, which must not draw
    # their tiles from the same counter.
    args = inputs([400, 112], [512, 512], 4, 4)
    out, lse = mla_prefill(**args, softmax_scale=SCALE, impl="hopper")  # compiles
    graphs, results = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(mla_prefill(**args, softmax_scale=SCALE, impl="hopper"))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for q_lens, k_lens in (([400, 112], [512, 512]), ([1, 511], [1000, 24]), ([0, 300], [5, 700])):
        args["cu_seqlens_q"].copy_(cu(*q_lens))
        args["cu_seqlens_k"].copy_(cu(*k_lens))
        expected = mla_prefill(**args, softmax_scale=SCALE, impl="hopper")
        check(args, *expected, True, SCALE)
        for x in (*results[0], *results[1]):
            poison_(x)
        torch.cuda.synchronize()
        for _ in range(10):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for out, lse in results:
            assert torch.equal(out, expected[0])
            assert torch.equal(lse, expected[1])


def test_streams_at_once():
    args = inputs([700, 300], [700, 900], 16, 16)
    expected, expected_lse = mla_prefill(**args, softmax_scale=SCALE, impl="hopper")
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(3)], []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(mla_prefill(**args, softmax_scale=SCALE, impl="hopper"))
    torch.cuda.synchronize()
    for out, lse in results:
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("impl", ["hopper", None])
def test_torch_compile(impl):
    args = inputs([100, 30], [120, 30], 4, 2)
    q = args.pop("q").requires_grad_()

    def run(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = mla_prefill(q * 2, **args, softmax_scale=SCALE, impl=impl)
        return out * 2, lse + 1

    results = []
    for call in (run, torch.compile(run, fullgraph=True)):
        out, lse = call(q)
        results.append((out, lse, *torch.autograd.grad(out.float().sum() + lse.sum(), q)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-2, rtol=1e-2)


def test_opcheck():
    args = inputs([70, 30], [90, 30], 2, 2)
    q, k, v, k_pe = (args[name].requires_grad_() for name in ("q", "k", "v", "k_pe"))
    cu_q, cu_k = args["cu_seqlens_q"], args["cu_seqlens_k"]
    torch.library.opcheck(ops.mla_prefill, (q, k, v, cu_q, cu_k, SCALE, True, -1, k_pe, "hopper"))
    plain = [x.detach() for x in (q, k, v)]
    out = torch.zeros((100, 2, 128), dtype=torch.bfloat16, device="cuda")
    torch.library.opcheck(ops.mla_prefill_out, (*plain, cu_q, cu_k, out, SCALE, True, -1, k_pe.detach(), "hopper"))


def test_nothing_waits_for_the_gpu():
    args = inputs([200, 100], [250, 100], 4, 4)
    mla_prefill(**args, softmax_scale=SCALE, impl="hopper")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mla_prefill(**args, softmax_scale=SCALE, impl="hopper")
    finally:
        torch.cuda.set_sync_debug_mode("default")
