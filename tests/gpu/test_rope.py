import pytest
import torch

from mlakit.rope import apply_rope, apply_rope_reference, ops
from mlakit.rope.triton_rope import RopeConfig, launch_rope
from mlakit.testing import assert_close, count_poison, poison_

pytestmark = pytest.mark.gpu
LAYOUTS = ["interleaved", "half"]


def _table(rows, half):
    angle = torch.randn(rows, half, dtype=torch.float64, device="cuda") * 3
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def _check(got, x, table, **options):
    exact = apply_rope_reference(x.double(), table.real, table.imag, **options)
    assert_close(got, exact, apply_rope_reference(x, table.real, table.imag, **options))


# Prefill and decode of DeepSeek-V3, V2-Lite and GLM-5; the shared key; head counts and widths that fill no block; a
# single pair; nothing.
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"),
    [
        (4096, 128, 64), (32, 128, 64), (1, 128, 64), (1023, 16, 64), (4097, 1, 64), (3, 65, 64), (5, 3, 12), (1, 1, 2),
        (2, 7, 256), (0, 4, 8), (130, 5, 66),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(tokens, heads, dim, dtype, layout):
    x = torch.randn(tokens, heads, 3 * dim, device="cuda").to(dtype)[..., 2 * dim :]
    table = _table(tokens, dim // 2)
    got = apply_rope(x, table.real, table.imag, layout=layout)
    assert got.is_contiguous()
    _check(got, x, table, layout=layout)
    out = poison_(torch.empty_like(x))
    apply_rope(x, table.real, table.imag, layout=layout, out=out)
    assert torch.equal(out, got)


# Tables of another dtype and of contiguous rows; requests with positions of their own, strided and int32; heads before
# tokens; a start and rows that allow no wide access.
@pytest.mark.parametrize("case", ["bf16_table", "own_positions", "shared", "heads_first", "off_by_one"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_inputs_come(case, layout):
    batch, tokens, heads, dim = 3, 37, 16, 64
    x = torch.randn(batch, tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
    table, positions = _table(tokens, dim // 2), None
    cos, sin = table.real, table.imag
    if case == "bf16_table":
        cos, sin = cos.bfloat16(), sin.bfloat16()
    elif case == "own_positions":
        table = _table(1000, dim // 2)
        cos, sin = table.real, table.imag
        positions = torch.randint(0, 1000, (batch, 2 * tokens), device="cuda", dtype=torch.int32)[:, ::2]
    elif case == "heads_first":
        x = torch.randn(batch, heads, tokens, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    elif case == "off_by_one":
        x = torch.randn(batch, tokens, heads, dim + 1, device="cuda", dtype=torch.bfloat16)[..., 1:]
    got = apply_rope(x, cos, sin, positions=positions, layout=layout)
    exact = apply_rope_reference(x.double(), cos, sin, positions=positions, layout=layout)
    assert_close(got, exact, apply_rope_reference(x, cos, sin, positions=positions, layout=layout))


@pytest.mark.parametrize("tokens", [1, 32, 4096])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_and_into_the_last_columns(tokens, layout):
    q, table = torch.randn(tokens, 128, 192, device="cuda").bfloat16(), _table(tokens, 32)
    x, before = q[..., 128:], q.clone()
    expected = apply_rope(x, table.real, table.imag, layout=layout)
    room = poison_(torch.empty(tokens, 128, 576, device="cuda", dtype=torch.bfloat16))
    apply_rope(x, table.real, table.imag, layout=layout, out=room[..., 512:])
    assert torch.equal(room[..., 512:], expected)
    assert count_poison(room) == room.numel() * 512 // 576
    apply_rope(x, table.real, table.imag, layout=layout, out=x)
    assert torch.equal(q[..., 128:], expected)
    assert torch.equal(q[..., :128], before[..., :128])


@pytest.mark.parametrize(
    "config", [RopeConfig(1, 1, 1), RopeConfig(4, 2, 1), RopeConfig(1, 128, 8), RopeConfig(2, 4, 4)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_configurations_in_place(config, layout):
    x, table = torch.randn(33, 128, 64, device="cuda", dtype=torch.bfloat16), _table(33, 32)
    expected = apply_rope(x, table.real, table.imag, layout=layout)
    launch_rope(x, table.real, table.imag, None, x, layout=layout, config=config)
    assert torch.equal(x, expected)


def test_more_than_2_to_the_31_elements():
    tokens = 90_000  # of 128 heads of 192: 2.2e9 elements, of which the last are looked at
    q, table = torch.empty(tokens, 128, 192, device="cuda", dtype=torch.bfloat16), _table(tokens, 32)
    q[-3:] = torch.randn(3, 128, 192, device="cuda")
    x = q[..., 128:]
    expected = apply_rope(x[-3:], table.real[-3:], table.imag[-3:])
    apply_rope(x, table.real, table.imag, out=x)
    assert torch.equal(x[-3:], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    x = torch.randn(33, 16, 64, device="cuda", dtype=torch.float32, requires_grad=True)
    table, weight = _table(50, 32), torch.randn(33, 16, 64, device="cuda")
    positions = torch.randint(0, 50, (33,), device="cuda")

    def gradient(impl):
        out = apply_rope(x, table.real, table.imag, positions=positions, layout=layout, impl=impl)
        return torch.autograd.grad((out * weight).sum() + out.sum(), x)[0]

    torch.testing.assert_close(gradient("triton"), gradient("reference"))


def test_under_a_cuda_graph():
    table = _table(100, 32)
    x = torch.randn(32, 128, 192, device="cuda", dtype=torch.bfloat16)
    positions = torch.zeros(32, device="cuda", dtype=torch.int32)
    out = torch.empty(32, 128, 576, device="cuda", dtype=torch.bfloat16)
    apply_rope(x[..., 128:], table.real, table.imag, positions=positions, out=out[..., 512:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply_rope(x[..., 128:], table.real, table.imag, positions=positions, out=out[..., 512:])
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        positions.copy_(torch.randint(0, 100, (32,), device="cuda"))
        graph.replay()
        assert torch.equal(out[..., 512:], apply_rope(x[..., 128:], table.real, table.imag, positions=positions))


def test_compiles_without_a_graph_break():
    table = _table(100, 32)
    cos, sin = table.real.contiguous(), table.imag.contiguous()

    def function(x, positions, room):
        apply_rope(x, cos, sin, positions=positions, out=room[..., 512:])
        mine = x * 2
        apply_rope(mine, cos, sin, positions=positions, out=mine)
        return apply_rope(x, cos, sin, positions=positions) + mine

    compiled = torch.compile(function, fullgraph=True)
    for tokens in (8, 24, 40):  # the second length makes it dynamic
        x = torch.randn(tokens, 16, 64, device="cuda", dtype=torch.bfloat16)
        positions = torch.randint(0, 100, (tokens,), device="cuda")
        rooms = [torch.zeros(tokens, 16, 576, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        assert torch.equal(compiled(x, positions, rooms[0]), function(x, positions, rooms[1]))
        assert torch.equal(*rooms)


def test_operators_keep_their_schemas():
    x, table = torch.randn(3, 2, 8, device="cuda", requires_grad=True), _table(3, 4)
    cos, sin = table.real.contiguous(), table.imag.contiguous()
    torch.library.opcheck(ops.apply_rope, (x, cos, sin, None, "half", False))
    x = x.detach()
    torch.library.opcheck(ops.apply_rope_out, (x, cos, sin, None, "interleaved", torch.empty_like(x)))
    torch.library.opcheck(ops.apply_rope_, (x, cos, sin, torch.tensor([2, 0, 1], device="cuda"), "interleaved"))


def test_calls_that_are_remembered_are_not_confused():
    # Same x, table and positions; a new result, in place, into something else, the other layout, a wrong out.
    table, positions = _table(50, 8), torch.randint(0, 50, (5,), device="cuda")
    room = torch.zeros(5, 6, 40, device="cuda")
    for _ in range(3):
        for layout in LAYOUTS:
            for cos, sin, where in ((table.real, table.imag, positions), (table.real[:5], table.imag[:5], None)):
                x = torch.randn(5, 6, 48, device="cuda")[..., 32:]
                expected = apply_rope_reference(x, cos, sin, positions=where, layout=layout)
                got = apply_rope(x, cos, sin, positions=where, layout=layout)
                assert got.is_contiguous()
                torch.testing.assert_close(got, expected)
                apply_rope(x, cos, sin, positions=where, layout=layout, out=room[..., 24:])
                torch.testing.assert_close(room[..., 24:], expected)
                apply_rope(x, cos, sin, positions=where, layout=layout, out=x)
                torch.testing.assert_close(x, expected)
                with pytest.raises(ValueError, match="out must have shape"):
                    apply_rope(x, cos, sin, positions=where, layout=layout, out=room)
                with pytest.raises(ValueError, match="not differentiable"):
                    apply_rope(x.requires_grad_(), cos, sin, positions=where, layout=layout, out=room[..., 24:])


def test_a_launch_is_remembered_only_for_addresses_aligned_alike():
    room = torch.randn(3 * 6 * 16 + 8, device="cuda").bfloat16()
    table = _table(3, 8)
    for start in (0, 1, 4, 2, 0, 8, 1):
        x = room[start : start + 3 * 6 * 16].view(3, 6, 16)
        for _ in range(2):
            _check(apply_rope(x, table.real, table.imag, impl="triton"), x, table)
