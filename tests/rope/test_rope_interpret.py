import pytest
import torch

from mlakit.rope import apply_rope, apply_rope_reference, ops
from mlakit.rope.triton_rope import RopeConfig, launch_rope
from mlakit.testing import assert_close, count_poison, poison_

pytestmark = pytest.mark.interpret
LAYOUTS = ["interleaved", "half"]


def _table(rows, half):
    angle = torch.randn(rows, half, dtype=torch.float64) * 3
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def _check(got, x, table, **options):
    options = {name: value for name, value in options.items() if name in ("positions", "layout")}
    exact = apply_rope_reference(x.double(), table.real, table.imag, **options)
    assert_close(got, exact, apply_rope_reference(x, table.real, table.imag, **options))


# DeepSeek's width with a head count that no block divides; a width that is no power of two; a single pair; a shared key
# (one head: several tokens a program), with a ragged last program; heads alone that fill a program; nothing to do.
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"),
    [(2, 65, 64), (3, 3, 12), (1, 1, 2), (71, 1, 64), (1, 17, 128), (0, 4, 8), (4, 0, 8)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(tokens, heads, dim, dtype, layout):
    # As the layer hands them over: the last columns of wider heads, and a complex table's parts.
    x = torch.randn(tokens, heads, 3 * dim).to(dtype)[..., 2 * dim :]
    table = _table(tokens, dim // 2)
    got = apply_rope(x, table.real, table.imag, layout=layout, impl="triton")
    assert got.is_contiguous()
    _check(got, x, table, layout=layout)


# Requests that share their positions, that have their own (strided, int32), and one table for all tokens; x whose
# requests are not one behind another, and whose heads come before its tokens.
@pytest.mark.parametrize("case", ["shared", "own", "flat", "one_position"])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_and_requests(case, heads_first, layout):
    batch, tokens, heads, dim = 2, 3, 5, 12
    x = torch.randn(batch, heads if heads_first else tokens + 1, tokens if heads_first else heads, dim)
    x = x.transpose(1, 2) if heads_first else x[:, :tokens]
    table = _table(tokens if case == "shared" else 11, dim // 2)
    own = torch.randint(0, 11, (batch, 2 * tokens), dtype=torch.int32)[:, ::2]
    if case == "flat":
        x = x[1]
    same = torch.tensor([7]).expand(batch, tokens)
    positions = {"shared": None, "own": own, "flat": own[1], "one_position": same}[case]
    got = apply_rope(x, table.real, table.imag, positions=positions, layout=layout, impl="triton")
    _check(got, x, table, positions=positions, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_into_the_last_columns_of_a_wider_buffer(layout):
    x, table = torch.randn(3, 6, 16), _table(3, 8)
    room = poison_(torch.empty(3, 7, 41))
    out = room[:, :6, 24:40]
    assert apply_rope(x, table.real, table.imag, layout=layout, out=out, impl="triton") is out
    assert torch.equal(out, apply_rope(x, table.real, table.imag, layout=layout, impl="triton"))
    assert count_poison(room) == room.numel() - out.numel()  # nothing beside it was touched


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place(layout):
    wide, table = torch.randn(3, 6, 24), _table(3, 4)
    x = wide[..., 16:]
    before, version = wide.clone(), wide._version
    expected = apply_rope(x, table.real, table.imag, layout=layout, impl="triton")
    assert apply_rope(x, table.real, table.imag, layout=layout, out=x, impl="triton") is x
    assert torch.equal(x, expected)
    assert torch.equal(wide[..., :16], before[..., :16])
    assert wide._version > version


# Every way of dividing the work gives the same bits.
@pytest.mark.parametrize("config", [RopeConfig(1, 1, 1), RopeConfig(4, 2, 1), RopeConfig(1, 16, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_configurations(config, layout):
    x, table = torch.randn(5, 3, 8), _table(5, 4)
    out = torch.full_like(x, torch.nan)
    launch_rope(x, table.real, table.imag, None, out, layout=layout, config=config)
    assert torch.equal(out, apply_rope(x, table.real, table.imag, layout=layout, impl="triton"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_positions", [False, True])
def test_gradients(layout, with_positions):
    x, table = torch.randn(3, 2, 8, requires_grad=True), _table(5 if with_positions else 3, 4)
    positions = torch.tensor([4, 0, 2]) if with_positions else None
    weight = torch.randn(3, 2, 8)

    def gradient(impl):
        out = apply_rope(x, table.real, table.imag, positions=positions, layout=layout, impl=impl)
        return torch.autograd.grad((out * weight).sum() + out.sum(), x)[0]

    torch.testing.assert_close(gradient("triton"), gradient("reference"))


def test_operators_keep_their_schemas():
    x, table = torch.randn(3, 2, 8, requires_grad=True), _table(3, 4)
    cos, sin = table.real.contiguous(), table.imag.contiguous()
    torch.library.opcheck(ops.apply_rope, (x, cos, sin, None, "half", False))
    torch.library.opcheck(ops.apply_rope, (x, cos, sin, torch.tensor([2, 0, 1]), "interleaved", True))
    x = x.detach()
    torch.library.opcheck(ops.apply_rope_out, (x, cos, sin, None, "half", torch.empty_like(x)))
    torch.library.opcheck(ops.apply_rope_, (x, cos, sin, None, "half"))


def test_compiles_without_a_graph_break():
    x, table = torch.randn(3, 2, 8), _table(3, 4)
    cos, sin = table.real.contiguous(), table.imag.contiguous()

    def function(x, room):
        turned = apply_rope(x, cos, sin, impl="triton")
        apply_rope(turned, cos, sin, out=room[..., 4:], impl="triton")
        mine = x * 2
        apply_rope(mine, cos, sin, out=mine, impl="triton")
        return turned + mine

    room, compiled_room = torch.zeros(3, 2, 12), torch.zeros(3, 2, 12)
    expected = function(x, room)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(x, compiled_room)
    assert torch.equal(got, expected)
    assert torch.equal(compiled_room, room)
