"""`mla_prefill` on a GPU: the real kernels against float64."""

import itertools

import pytest
import torch

from mlakit.merge import merge_states
from mlakit.prefill import mla_prefill, mla_prefill_reference, ops
from mlakit.testing import assert_close, compare_lse, count_poison, poison_
from mlakit.testing.tolerances import SUMMATION_ROUNDINGS

pytestmark = pytest.mark.gpu

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def cu(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def inputs(
    q_lens: list[int],
    k_lens: list[int],
    heads: int,
    kv_heads: int,
    qk_dim: int = 192,
    v_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    padding: int = 0,
) -> Inputs:
    """Random tensors; `padding` rows of poison after the last sequence."""
    generator = torch.Generator("cuda").manual_seed(sum(q_lens) + heads)
    tensors = []
    for rows, h, d in ((sum(q_lens), heads, qk_dim), (sum(k_lens), kv_heads, qk_dim), (sum(k_lens), kv_heads, v_dim)):
        x = torch.empty((rows + padding, h, d), dtype=dtype, device="cuda")
        poison_(x[rows:])
        x[:rows].normal_(generator=generator)
        tensors.append(x)
    q, k, v = tensors
    return q, k, v, cu(*q_lens), cu(*k_lens)


def check(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float) -> None:
    q, k, v, cu_q, cu_k = inputs
    rows, keys = int(cu_q[-1]), int(cu_k[-1])
    q, k, v = q[:rows], k[:keys], v[:keys]
    ref, ref_lse = mla_prefill_reference(
        q.double(), k.double(), v.double(), cu_q, cu_k, softmax_scale=scale, causal=causal
    )
    eager, _ = mla_prefill_reference(q, k, v, cu_q, cu_k, softmax_scale=scale, causal=causal)
    assert_close(out[:rows], ref, eager)
    found = compare_lse(lse[:rows], ref_lse)
    assert found.ok, found.reason
    assert not out[rows:].any()
    assert torch.isneginf(lse[rows:]).all()


# Lengths around every tile boundary there is (16 to 128), ragged with empty sequences at the start, between and at the
# end, more queries than keys (rows without keys), no keys at all, one new token after a long context, and enough tiles
# to fill the chip.
LENGTHS = [
    ([1], [1]),
    ([63, 64, 65], [63, 64, 65]),
    ([127, 128, 129], [127, 128, 129]),
    ([0, 5, 0, 300, 3, 200, 0], [7, 5, 9, 700, 0, 64, 0]),
    ([1, 2], [3000, 4095]),
    ([1500], [1900]),
]


# One head and several; three query heads that share one; as many kv heads as DeepSeek's.
@pytest.mark.parametrize(("q_lens", "k_lens"), LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (16, 16)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lengths_and_heads(q_lens, k_lens, heads, kv_heads, causal, dtype):
    args = inputs(q_lens, k_lens, heads, kv_heads, dtype=dtype, padding=5)
    out = poison_(torch.empty((args[0].shape[0], heads, 128), dtype=dtype, device="cuda"))
    got, lse = mla_prefill(*args, softmax_scale=192**-0.5, causal=causal, out=out, impl="triton")
    assert got is out
    assert count_poison(out) == 0
    check(args, out, lse, causal, 192**-0.5)


# Every way a head dim is cut: one part, two, padded, and the widths of GLM-5 and of MQA mode.
@pytest.mark.parametrize(
    ("qk_dim", "v_dim"),
    [(16, 16), (64, 64), (80, 80), (96, 48), (100, 33), (128, 128), (160, 128), (192, 192), (256, 256), (576, 512)],
)
@pytest.mark.parametrize(("q_lens", "k_lens"), [([40], [75]), ([257, 130], [400, 130])])
def test_head_dims(qk_dim, v_dim, q_lens, k_lens):
    args = inputs(q_lens, k_lens, 4, 1 if qk_dim == 576 else 2, qk_dim, v_dim, padding=3)
    for causal in (True, False):
        out, lse = mla_prefill(*args, softmax_scale=qk_dim**-0.5, causal=causal, impl="triton")
        check(args, out, lse, causal, qk_dim**-0.5)


def test_default_is_a_kernel():
    args = inputs([200], [200], 2, 2)
    impl = "hopper" if torch.cuda.get_device_capability() == (9, 0) else "triton"
    expected = mla_prefill(*args, softmax_scale=0.1, impl=impl)
    for got, want in zip(mla_prefill(*args, softmax_scale=0.1), expected, strict=True):
        assert torch.equal(got, want)


def test_another_sequence_does_not_matter():
    # A neighbour full of NaN: what lies past a sequence's end is loaded in whole blocks, but never used.
    q, k, v, cu_q, cu_k = inputs([100, 77, 90], [200, 77, 150], 2, 2)
    expected, expected_lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.1, impl="triton")
    for x, bounds in ((q, cu_q), (k, cu_k), (v, cu_k)):
        poison_(x[int(bounds[1]) : int(bounds[2])])
    out, lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.1, impl="triton")
    for rows in (slice(0, 100), slice(177, None)):
        assert torch.equal(out[rows], expected[rows])
        assert torch.equal(lse[rows], expected_lse[rows])


# Layouts that allow bulk loads and such that do not: v beside k_nope in one tensor, heads first, one head for all
# (stride 0), rows that are no multiple of 16 bytes apart, and a start that is not 16-byte aligned.
@pytest.mark.parametrize("layout", ["kv", "heads_first", "expanded", "odd_stride", "odd_start"])
def test_strides(layout):
    q, k, v, cu_q, cu_k = inputs([300, 70], [333, 100], 4, 4)
    n = k.shape[0]
    if layout == "kv":
        kv = torch.randn((n, 4, 256), dtype=torch.bfloat16, device="cuda")
        v = kv[..., 128:]
        k = torch.cat([kv[..., :128], k[..., 128:]], dim=-1)
    elif layout == "heads_first":
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    elif layout == "expanded":
        k, v = k[:, :1].expand(-1, 4, -1), v[:, :1].expand(-1, 4, -1)
    elif layout == "odd_stride":
        wide = torch.randn((n, 4 * 128 + 1), dtype=torch.bfloat16, device="cuda")
        v = wide[:, :512].unflatten(1, (4, 128))
    else:
        v = torch.randn(n * 512 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(n, 4, 128)
    out = torch.empty((370, 3, 4, 128), dtype=torch.bfloat16, device="cuda")[:, 1]
    _, lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.07, out=out, impl="triton")
    check((q, k, v, cu_q, cu_k), out, lse, True, 0.07)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    compare_gradients(leaves, cu_q, cu_k, True, "both")


SCALE = 0.07  # of the gradient tests


def rounding_noise(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    causal: bool,
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What rounding to float32 may leave in each gradient where its terms cancel.

    dS = P (dO V - dO O + dlse). A row that sees one key has O = V, so that dS is 0 in exact arithmetic, and in eager
    PyTorch, which takes that very difference of equal sums; a kernel sums dO V and dO O in two orders. Each sum may be
    off by a few roundings of its terms' sizes, and that goes on into dQ = dS K and dK = dS^T Q. (dV does not cancel.)
    """
    out, lse = mla_prefill_reference(q, k, v, cu_q, cu_k, softmax_scale=SCALE, causal=causal)
    groups = q.shape[1] // k.shape[1]
    noise_q, noise_k = torch.zeros_like(q), torch.zeros_like(k)
    sizes = (d_out * out).abs().sum(-1) + d_lse.abs()
    bounds = zip(*(x.tolist() for x in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])), strict=True)
    for q0, q1, k0, k1 in bounds:
        keys, values = (x[k0:k1].repeat_interleave(groups, dim=1) for x in (k, v))
        weights = torch.exp(torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * SCALE - lse[q0:q1].T[..., None])
        if causal:
            visible = (k1 - k0) - (q1 - q0) + torch.arange(q1 - q0, device=q.device)[:, None]
            weights = weights.masked_fill(torch.arange(k1 - k0, device=q.device) > visible, 0.0)
        terms = torch.einsum("qhd,khd->hqk", d_out[q0:q1].abs(), values.abs()) + sizes[q0:q1].T[..., None]
        terms = terms * weights
        noise_q[q0:q1] = torch.einsum("hqk,khd->qhd", terms, keys.abs())
        noise_k[k0:k1] = torch.einsum("hqk,qhd->khd", terms, q[q0:q1].abs()).unflatten(1, (-1, groups)).sum(2)
    unit = SUMMATION_ROUNDINGS * torch.finfo(torch.float32).eps / 2 * SCALE
    return noise_q * unit, noise_k * unit, torch.zeros_like(v)


def compare_gradients(
    tensors: list[torch.Tensor], cu_q: torch.Tensor, cu_k: torch.Tensor, causal: bool, through: str
) -> None:
    rows, keys = int(cu_q[-1]), int(cu_k[-1])
    q, k, v = tensors
    d_out = torch.randn((rows, q.shape[1], v.shape[2]), device="cuda").to(q.dtype)
    d_lse = torch.randn((rows, q.shape[1]), device="cuda")

    def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, impl: str) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = mla_prefill(
            leaves[0], leaves[1], leaves[2], cu_q, cu_k, softmax_scale=SCALE, causal=causal, impl=impl
        )
        seen = ~torch.isneginf(lse[:rows].detach())
        ends = {"out": out[:rows], "lse": lse[:rows][seen]}
        seeds = {"out": d_out.to(out.dtype), "lse": d_lse[seen].to(lse.dtype)}
        names = ["out", "lse"] if through == "both" else [through]
        # v has no part in lse.
        return torch.autograd.grad([ends[n] for n in names], leaves, [seeds[n] for n in names], materialize_grads=True)

    actual = gradients(q, k, v, "triton")
    q, k, v = q[:rows], k[:keys], v[:keys]
    exact = (q.double(), k.double(), v.double())
    reference = gradients(*exact, "reference")
    eager = gradients(q, k, v, "reference")
    noise = rounding_noise(
        *exact, cu_q, cu_k, causal, d_out.double() * (through != "lse"), d_lse.double() * (through != "out")
    )
    for name, got, ref, base, floor in zip("qkv", actual, reference, eager, noise, strict=True):
        found = got[: ref.shape[0]]
        assert_close(
            torch.where((found - ref).abs() <= floor, ref.to(got.dtype), found), ref, base, f"gradient of {name}"
        )
        assert not got[ref.shape[0] :].any()


@pytest.mark.parametrize(("q_lens", "k_lens"), LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (16, 16)])
@pytest.mark.parametrize(("causal", "through"), [(True, "both"), (False, "both"), (True, "out"), (True, "lse")])
def test_gradients(q_lens, k_lens, heads, kv_heads, causal, through):
    q, k, v, cu_q, cu_k = inputs(q_lens, k_lens, heads, kv_heads, padding=5)
    compare_gradients([q, k, v], cu_q, cu_k, causal, through)


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(16, 16), (64, 64), (80, 80), (100, 33), (128, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_other_head_dims(qk_dim, v_dim, dtype):
    q, k, v, cu_q, cu_k = inputs([257, 30], [400, 30], 4, 2, qk_dim, v_dim, dtype, padding=3)
    compare_gradients([q, k, v], cu_q, cu_k, True, "both")


def test_gradients_are_reproducible():
    q, k, v, cu_q, cu_k = inputs([700, 333], [700, 400], 8, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.1, impl="triton")
    seed = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, seed, retain_graph=True)
    second = torch.autograd.grad(out, leaves, seed)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_chunked_prefill_equals_unchunked():
    # 300 and 64 new tokens after contexts of 1000 and 130, in chunks of 256.
    new, context = [300, 64], [1000, 130]
    args = inputs(new, [n + c for n, c in zip(new, context, strict=True)], 8, 8)
    q, k, v, cu_q, cu_k = args
    starts = cu_k.tolist()
    outs, lses = [], []
    for start in range(0, 1000, 256):
        lens = [max(0, min(c - start, 256)) for c in context]
        pieces = [slice(starts[i] + start, starts[i] + start + n) for i, n in enumerate(lens)]
        chunk_k, chunk_v = (torch.cat([x[p] for p in pieces]) for x in (k, v))
        out, lse = mla_prefill(q, chunk_k, chunk_v, cu_q, cu(*lens), softmax_scale=0.07, causal=False)
        outs.append(out)
        lses.append(lse)
    own = [slice(end - n, end) for end, n in zip(starts[1:], new, strict=True)]
    own_k, own_v = (torch.cat([x[s] for s in own]) for x in (k, v))
    out, lse = mla_prefill(q, own_k, own_v, cu_q, cu_q, softmax_scale=0.07)
    merged, merged_lse = merge_states([*outs, out], [*lses, lse])
    check(args, merged, merged_lse, True, 0.07)


def test_more_than_2_to_31_elements():
    # 90000 rows of 128 heads of 192: the last sequence starts past 2^31 elements of q and k. Only its end is compared.
    rows, heads, last = 90_000, 128, 333
    q = torch.zeros((rows, heads, 192), dtype=torch.bfloat16, device="cuda")
    k, v = torch.zeros_like(q), torch.zeros((rows, heads, 128), dtype=torch.bfloat16, device="cuda")
    for x in (q, k, v):
        x[-last:].normal_()
    bounds = cu(*[3000] * 29, rows - 29 * 3000 - last, last)
    assert (rows - last) * heads * 192 > 2**31
    out, lse = mla_prefill(q, k, v, bounds, bounds, softmax_scale=0.07, impl="triton")
    own = cu(last)
    check((q[-last:], k[-last:], v[-last:], own, own), out[-last:], lse[-last:], True, 0.07)
    assert not out[:-last].any()

    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = mla_prefill(q, k, v, bounds, bounds, softmax_scale=0.07, impl="triton")
    seed = torch.zeros_like(out)
    seed[-last:].normal_()
    actual = torch.autograd.grad(out, leaves, seed)

    def expected(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = (x.requires_grad_() for x in tensors)
        out, _ = mla_prefill_reference(q, k, v, own, own, softmax_scale=0.07)
        return torch.autograd.grad(out, (q, k, v), seed[-last:].to(out.dtype))

    ends = [x.detach()[-last:] for x in (q, k, v)]
    reference, eager = expected(*(x.double() for x in ends)), expected(*(x.clone() for x in ends))
    for name, got, ref, base in zip("qkv", actual, reference, eager, strict=True):
        assert_close(got[-last:], ref, base, f"gradient of {name}")
        assert not got[:-last].any()


def test_cuda_graph_with_changing_lengths():
    # One capture serves other lengths: the grid depends on the buffers' sizes alone.
    q, k, v, cu_q, cu_k = inputs([400, 112], [512, 512], 4, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    seed = torch.randn((512, 4, 128), dtype=torch.bfloat16, device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        out, lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.07, impl="triton")
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, seed)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for q_lens, k_lens in (([400, 112], [512, 512]), ([1, 511], [1000, 24]), ([0, 300], [5, 700])):
        cu_q.copy_(cu(*q_lens))
        cu_k.copy_(cu(*k_lens))
        for x in captured:
            poison_(x)
        graph.replay()
        replayed = [x.clone() for x in captured]
        rows = sum(q_lens)
        check((q.detach(), k.detach(), v.detach(), cu_q, cu_k), replayed[0], replayed[1], True, 0.07)
        for got, want in zip(replayed, step(), strict=True):
            assert torch.equal(got, want)
        assert not replayed[2][rows:].any()


@pytest.mark.parametrize("grad", [False, True])
def test_torch_compile(grad):
    q, k, v, cu_q, cu_k = inputs([100, 30], [120, 30], 4, 2)
    leaves = [x.requires_grad_(grad) for x in (q, k, v)]

    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = mla_prefill(q * 2, k, v, cu_q, cu_k, softmax_scale=0.07, impl="triton")
        return out * 2, lse + 1

    results = []
    for run in (both, torch.compile(both, fullgraph=True)):
        out, lse = run(q, k, v)
        grads = torch.autograd.grad(out.float().sum() + lse.sum(), leaves) if grad else ()
        results.append((out, lse, *grads))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-2, rtol=1e-2)


def test_torch_compile_with_out():
    q, k, v, cu_q, cu_k = inputs([100, 30], [120, 30], 4, 2)
    out = poison_(torch.empty((130, 4, 128), dtype=torch.bfloat16, device="cuda"))

    def run(q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.07, out=out, impl="triton")[1]

    lse = torch.compile(run, fullgraph=True)(q, out)
    check((q, k, v, cu_q, cu_k), out, lse, True, 0.07)


@pytest.mark.parametrize("causal", [True, False])
def test_opcheck(causal):
    q, k, v, cu_q, cu_k = inputs([70, 30], [90, 30], 2, 1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.mla_prefill, (*leaves, cu_q, cu_k, 0.07, causal, -1))
    plain = [x.detach() for x in leaves]
    out, lse = ops.mla_prefill(*plain, cu_q, cu_k, 0.07, causal, -1)
    torch.library.opcheck(ops.mla_prefill_out, (*plain, cu_q, cu_k, torch.zeros_like(out), 0.07, causal, 70))
    torch.library.opcheck(
        ops.mla_prefill_backward,
        (torch.ones_like(out), torch.ones_like(lse), *plain, out, lse, cu_q, cu_k, 0.07, causal),
    )


def test_hints_change_nothing_but_rounding():
    args = inputs([1, 300], [64, 300], 2, 2)
    for hint, causal in itertools.product((1, 64, 300, 10**6), (True, False)):
        out, lse = mla_prefill(*args, softmax_scale=0.07, causal=causal, max_seqlen_q=hint, impl="triton")
        check(args, out, lse, causal, 0.07)


def test_nothing_waits_for_the_gpu():
    q, k, v, cu_q, cu_k = inputs([200, 100], [250, 100], 4, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step() -> None:
        out, lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=0.07, impl="triton")
        torch.autograd.grad(out.sum() + lse.sum(), leaves)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
