import pytest
import torch

from mlakit.concat import concat_k, concat_k_cat, ops
from mlakit.testing import count_poison, poison_

pytestmark = pytest.mark.gpu


def _random(shape, dtype):
    # Every bit pattern, NaNs with it: a copy keeps them all.
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, device="cuda")
    return raw.view(dtype)


def _bits(tensor):
    return tensor.contiguous().view(torch.uint8)


# Every batch of the study up to where memory is large, DeepSeek's, GLM-5's and V2-Lite's heads and widths, widths that
# are no power of two at every alignment from 16 bytes to one, and a single element. One, two, four and eight bytes.
@pytest.mark.parametrize("batch", [1, 32, 133, 4096])
@pytest.mark.parametrize(
    ("heads", "nope", "rope"), [(128, 128, 64), (64, 192, 64), (16, 128, 64), (3, 40, 24), (7, 33, 7), (1, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
def test_is_bit_exact(batch, heads, nope, rope, dtype):
    k_nope, k_pe = _random((batch, heads, nope), dtype), _random((batch, 1, rope), dtype)
    out = poison_(torch.empty(batch, heads, nope + rope, dtype=dtype, device="cuda"))
    concat_k(k_nope, k_pe, out=out)
    assert torch.equal(_bits(out), _bits(concat_k_cat(k_nope, k_pe)))
    assert torch.equal(_bits(concat_k(k_nope, k_pe)), _bits(out))


# Inputs as they come: keys sliced from [key, value] heads and rope rows from the latent's tail, heads before tokens,
# every second element, a start that allows no wide access.
@pytest.mark.parametrize("case", ["sliced", "heads_first", "every_second", "off_by_one"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_strided_inputs_and_out(case, dtype):
    batch, heads, nope, rope = 67, 128, 128, 64
    k_pe = _random((batch, 1, 576), dtype)[..., 512:]
    room = poison_(torch.empty(batch, heads + 2, nope + rope + 3, dtype=dtype, device="cuda"))
    if case == "sliced":
        k_nope = _random((batch, heads, 2 * nope), dtype)[..., :nope]
    elif case == "heads_first":
        k_nope = _random((heads, batch, nope), dtype).transpose(0, 1)
    elif case == "every_second":
        k_nope = _random((batch, heads, 2 * nope), dtype)[..., ::2]
        k_pe = _random((batch, 1, 2 * rope), dtype)[..., ::2]
    else:
        k_nope = _random((batch, heads, nope + 1), dtype)[..., 1:]
    out = room[:, 1:-1, 2:-1] if case == "off_by_one" else room[:, :heads, : nope + rope]
    concat_k(k_nope, k_pe, out=out)
    assert torch.equal(_bits(out), _bits(concat_k_cat(k_nope, k_pe)))
    assert count_poison(room) >= room.numel() - out.numel()


# Sequences of 5 tokens into the first places of a cache that has room for 9, and rows without a shared part: a copy.
@pytest.mark.parametrize("rope", [8, 0])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_sequences_into_a_cache(rope, dtype):
    heads, nope = 128, 128
    kv = _random((3, 5, heads, 2 * nope), dtype)
    k_nope, k_pe = kv[..., :nope], _random((3, 5, 1, 40), dtype)[..., :rope]
    cache = poison_(torch.empty(4, 9, heads, nope + rope, dtype=dtype, device="cuda"))
    out = cache[:3, 2:7]
    concat_k(k_nope, k_pe, out=out)
    assert torch.equal(_bits(out), _bits(concat_k_cat(k_nope, k_pe)))
    assert torch.equal(_bits(concat_k(k_nope, k_pe)), _bits(out))
    assert count_poison(cache) >= cache.numel() - out.numel()


def test_more_than_2_to_the_31_elements():
    batch = 140_000  # 3.4e9 elements out
    k_nope, k_pe = _random((batch, 128, 128), torch.float8_e4m3fn), _random((batch, 1, 64), torch.float8_e4m3fn)
    out = concat_k(k_nope, k_pe).view(torch.uint8)
    assert torch.equal(out[..., :128], k_nope.view(torch.uint8))
    assert (out[..., 128:] == k_pe.view(torch.uint8)).all()
    # Heads before tokens: the offset of a head alone is beyond 2^31.
    far = k_nope.view(torch.uint8).view(128, batch, 128).transpose(0, 1)
    out = concat_k(far[-40:], k_pe[-40:].view(torch.uint8))
    assert torch.equal(out[..., :128], far[-40:])


@pytest.mark.parametrize("impl", ["cat", "direct_copy", "triton"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_every_implementation_agrees(impl, dtype):
    k_nope, k_pe = _random((65, 128, 128), dtype), _random((65, 1, 64), dtype)
    assert torch.equal(_bits(concat_k(k_nope, k_pe, impl=impl)), _bits(concat_k_cat(k_nope, k_pe)))


def test_gradients():
    k_nope = torch.randn(33, 16, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k_pe = torch.randn(33, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(33, 16, 192, device="cuda", dtype=torch.bfloat16)
    got = torch.autograd.grad((concat_k(k_nope, k_pe) * weight).sum(), (k_nope, k_pe))
    assert torch.equal(got[0], weight[..., :128])
    torch.testing.assert_close(got[1].double(), weight[..., 128:].double().sum(1, keepdim=True), rtol=2**-7, atol=0.02)


def test_under_a_cuda_graph():
    k_nope, k_pe = _random((64, 128, 128), torch.bfloat16), _random((64, 1, 64), torch.bfloat16)
    concat_k(k_nope, k_pe)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = concat_k(k_nope, k_pe)
    for _ in range(2):
        k_nope.copy_(_random(k_nope.shape, torch.bfloat16))
        k_pe.copy_(_random(k_pe.shape, torch.bfloat16))
        graph.replay()
        assert torch.equal(_bits(out), _bits(concat_k_cat(k_nope, k_pe)))


def test_compiles_without_a_graph_break():
    compiled = torch.compile(lambda a, b: concat_k(a * 2, b) + 1, fullgraph=True)
    for batch in (8, 24, 40):  # the second length makes it dynamic
        k_nope = torch.randn(batch, 16, 128, device="cuda", dtype=torch.bfloat16)
        k_pe = torch.randn(batch, 1, 64, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(compiled(k_nope, k_pe), concat_k_cat(k_nope * 2, k_pe) + 1)


def test_operators_keep_their_schemas():
    k_nope = torch.randn(5, 16, 128, device="cuda", requires_grad=True)
    k_pe = torch.randn(5, 1, 64, device="cuda", requires_grad=True)
    torch.library.opcheck(ops.concat_k, (k_nope, k_pe))
    out = torch.empty(5, 16, 192, device="cuda")
    torch.library.opcheck(ops.concat_k_out, (k_nope.detach(), k_pe.detach(), out))


def test_a_launch_is_remembered_only_for_addresses_aligned_alike():
    # One shape and one set of strides, whose addresses are multiples of 16, 8, 4 and 2 bytes in turn.
    room = torch.randn(3 * 6 * 16 + 8, device="cuda").bfloat16()
    k_pe = torch.randn(3, 1, 8, device="cuda").bfloat16()
    for start in (0, 1, 4, 2, 0, 8, 1):
        k_nope = room[start : start + 3 * 6 * 16].view(3, 6, 16)
        for _ in range(2):
            assert torch.equal(concat_k(k_nope, k_pe, impl="triton"), concat_k_cat(k_nope, k_pe))
