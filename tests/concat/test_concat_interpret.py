import pytest
import torch

from mlakit.concat import concat_k, concat_k_cat, ops
from mlakit.testing import count_poison, poison_

pytestmark = pytest.mark.interpret


def _random(shape, dtype):
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(-99, 99, shape, dtype=dtype)


def _bits(tensor):
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


# DeepSeek's widths with a head count that no block divides; widths that are no power of two, at every alignment from 16
# bytes to one; a single head, row and element; nothing to write; GLM-5's widths. One, two and four bytes an element.
@pytest.mark.parametrize(
    ("batch", "heads", "nope", "rope"),
    [
        (2, 65, 128, 64),
        (3, 3, 40, 24),
        (2, 7, 12, 6),
        (1, 1, 1, 1),
        (2, 9, 33, 7),
        (2, 5, 16, 0),
        (2, 5, 0, 8),
        (0, 4, 8, 8),
        (1, 2, 192, 64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int8])
def test_is_bit_exact(batch, heads, nope, rope, dtype):
    k_nope, k_pe = _random((batch, heads, nope), dtype), _random((batch, 1, rope), dtype)
    out = concat_k(k_nope, k_pe, impl="triton")
    assert torch.equal(_bits(out), _bits(concat_k_cat(k_nope, k_pe)))


# Inputs as they come: keys sliced from [key, value] heads, rope rows from the latent's tail, heads before tokens, every
# second element, a start that is off by one element (so that no wide access is allowed), and out as a slice of
# something larger.
@pytest.mark.parametrize("case", ["sliced", "heads_first", "every_second", "off_by_one"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_strided_inputs_and_out(case, dtype):
    batch, heads, nope, rope = 3, 6, 16, 8
    k_pe = _random((batch, 1, 40), dtype)[..., 32:]
    room = torch.empty(batch, heads + 2, nope + rope + 3, dtype=dtype)
    if case == "sliced":
        k_nope = _random((batch, heads, 2 * nope), dtype)[..., :nope]
    elif case == "heads_first":
        k_nope = _random((heads, batch, nope), dtype).transpose(0, 1)
    elif case == "every_second":
        k_nope = _random((batch, heads, 2 * nope), dtype)[..., ::2]
        k_pe = _random((batch, 1, 2 * rope), dtype)[..., ::2]
    else:
        k_nope = _random((batch, heads, nope + 1), dtype)[..., 1:]
    poison_(room)
    out = room[:, 1:-1, 2:-1] if case == "off_by_one" else room[:, :heads, : nope + rope]
    returned = concat_k(k_nope, k_pe, out=out, impl="triton")
    assert returned is out
    assert torch.equal(_bits(out), _bits(concat_k_cat(k_nope, k_pe)))
    assert count_poison(room) >= room.numel() - out.numel()  # nothing beside the slice was touched


# Sequences of 5 tokens into the first places of a cache that has room for 9, and rows without a shared part: a copy.
@pytest.mark.parametrize("rope", [8, 0])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_sequences_into_a_cache(rope, dtype):
    heads, nope = 3, 16
    kv = _random((3, 5, heads, 2 * nope), dtype)
    k_nope, k_pe = kv[..., :nope], _random((3, 5, 1, 40), dtype)[..., :rope]
    cache = poison_(torch.empty(4, 9, heads, nope + rope, dtype=dtype))
    out = cache[:3, 2:7]
    concat_k(k_nope, k_pe, out=out, impl="triton")
    assert torch.equal(_bits(out), _bits(concat_k_cat(k_nope, k_pe)))
    assert torch.equal(_bits(concat_k(k_nope, k_pe, impl="triton")), _bits(out))
    assert count_poison(cache) >= cache.numel() - out.numel()


def test_gradients():
    k_nope, k_pe = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)
    weight = torch.randn(2, 3, 12)
    got = torch.autograd.grad((concat_k(k_nope, k_pe, impl="triton") * weight).sum(), (k_nope, k_pe))
    expected = torch.autograd.grad((concat_k(k_nope, k_pe, impl="cat") * weight).sum(), (k_nope, k_pe))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_operators_keep_their_schemas():
    k_nope, k_pe = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)
    torch.library.opcheck(ops.concat_k, (k_nope, k_pe))
    torch.library.opcheck(ops.concat_k_out, (k_nope.detach(), k_pe.detach(), torch.empty(2, 3, 12)))


def test_out_counts_as_changed_in_place():
    out = torch.zeros(1, 1, 2)
    before = out._version
    concat_k(torch.ones(1, 1, 1), torch.ones(1, 1, 1), out=out, impl="triton")
    assert out._version > before


def test_compiles_without_a_graph_break():
    k_nope, k_pe = torch.randn(2, 3, 8), torch.randn(2, 1, 4)
    compiled = torch.compile(lambda a, b: concat_k(a, b, impl="triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(k_nope, k_pe), concat_k_cat(k_nope, k_pe))
