import pytest
import torch

from mlakit.quant import act_quant, fp8_gemm, ops, weight_dequant, weight_quant
from mlakit.quant.hopper_many_launch import ManyRowsConfig, launch_many_rows, many_rows_config
from mlakit.quant.reference import act_quant_reference, fp8_gemm_reference, weight_dequant_reference
from mlakit.quant.triton_gemm import GemmConfig, launch_fp8_gemm
from mlakit.testing import assert_close

pytestmark = pytest.mark.gpu
F8 = torch.float8_e4m3fn


def _same_codes(one, other):
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# DeepSeek's width; a tile more and less than a program takes; leading dimensions; nothing; other block sizes.
@pytest.mark.parametrize(
    ("shape", "block"),
    [((4096, 7168), 128), ((37, 384), 128), ((1, 128), 128), ((2, 3, 256), 128), ((0, 256), 128), ((5, 96), 32)],
)
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_act_quant_is_bit_exact(shape, block, scale_fmt, dtype):
    x = torch.randn(shape, device="cuda", dtype=dtype) * 7
    codes, scales = act_quant(x, block, scale_fmt)
    expected_codes, expected_scales = act_quant_reference(x, block, scale_fmt)
    assert torch.equal(scales, expected_scales)
    assert _same_codes(codes, expected_codes)


def test_act_quant_of_zeros_nan_extremes_and_rows_apart():
    x = torch.randn(8, 512, device="cuda").bfloat16()[::2, 128:384]
    x[0] = 0
    x[0, :5] = -0.0
    x[1, 5] = torch.nan
    x[2] *= 1e-30
    x[3] *= 1e30
    codes, scales = act_quant(x)
    expected_codes, expected_scales = act_quant_reference(x)
    assert torch.equal(scales, expected_scales)
    number = ~x.isnan()  # a NaN may have either sign
    assert torch.equal(codes.float().isnan(), ~number)
    assert torch.equal(codes.view(torch.uint8)[number], expected_codes.view(torch.uint8)[number])


def test_act_quant_of_more_than_2_to_the_31_elements():
    x = torch.zeros(300_000, 7168, device="cuda", dtype=torch.bfloat16)
    x[-5:] = torch.randn(5, 7168, device="cuda")
    codes, scales = act_quant(x)
    expected_codes, expected_scales = act_quant_reference(x[-6:])
    assert _same_codes(codes[-6:], expected_codes)
    assert torch.equal(scales[-6:], expected_scales)
    assert scales.min() == scales[0, 0]


# DeepSeek's largest weight; ragged edges in both directions; a single element; nothing; a small block; a width of odd
# length.
@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(7168, 18432, 128), (130, 257, 128), (1, 1, 128), (0, 5, 128), (33, 47, 16), (512, 1536, 256)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_dequant_is_bit_exact(rows, columns, block, dtype):
    codes, scales = weight_quant(torch.randn(rows, columns, device="cuda"), block)
    out = weight_dequant(codes, scales, block, dtype)
    assert torch.equal(out, weight_dequant_reference(codes, scales, block, dtype))


def test_weight_dequant_of_every_code_and_of_rows_apart():
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").repeat(3, 2)[:, 5:400].view(F8)
    scales = torch.rand(1, 4, device="cuda") + 0.5
    out = weight_dequant(codes, scales, dtype=torch.float32)
    torch.testing.assert_close(
        out, weight_dequant_reference(codes, scales, dtype=torch.float32), rtol=0, atol=0, equal_nan=True
    )


# Each tile that the launcher knows, with rows and columns that do not fill it; N over the edges of blocks of scales; a
# ragged last block of K, and one whose rows start anywhere; leading dimensions. Scales differ by octaves, so that a
# neighbour's would show.
@pytest.mark.parametrize(
    ("lead", "n", "k"),
    [
        ((1,), 7168, 2048),
        ((15,), 333, 512),
        ((31,), 1536, 7168),
        ((32,), 7168, 16384),
        ((2, 9), 130, 4224),
        ((3,), 576, 4112),
        ((3,), 576, 400),
        ((2, 50), 576, 7168),
        ((300,), 260, 384),
        ((2047,), 7168, 1024),
        ((4096,), 2112, 7168),
        ((65,), 130, 400),
        ((65,), 130, 333),
        ((0,), 5, 128),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_gemm_against_float64(lead, n, k, dtype):
    blocks = -(-k // 128)
    a = torch.randn(*lead, k, device="cuda").to(F8)
    b = torch.randn(n, k, device="cuda").to(F8)
    a_scales = torch.rand(*lead, blocks, device="cuda") + 0.5
    b_scales = (torch.rand(-(-n // 128), blocks, device="cuda") * 4).exp2()
    out = fp8_gemm(a, a_scales, b, b_scales, dtype)
    reference = fp8_gemm_reference(a, a_scales, b, b_scales, torch.float64)
    # Hopper's tensor cores keep about 14 bits of a sum of e4m3 products, whatever the result's dtype (DeepSeek-V3
    # report, 3.3.2): a float32 result is held to what a bfloat16 one is.
    eager = fp8_gemm_reference(a, a_scales, b, b_scales, torch.bfloat16)
    assert out.dtype == dtype
    assert_close(out, reference, eager)


# Both ways of loading; tiles that rows, columns and K do not fill, and none that they do not.
@pytest.mark.parametrize(("m", "n", "k"), [(300, 260, 400), (1024, 2112, 7168)])
@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(64, 128, 4, 3, descriptors=True),
        GemmConfig(64, 128, 8, 4),
        GemmConfig(128, 128, 8, 4, descriptors=True),
        GemmConfig(16, 32, 4, 5, descriptors=True),
    ],
)
def test_fp8_gemm_by_every_kind_of_configuration(config, m, n, k):
    a, b = torch.randn(m, k, device="cuda").to(F8), torch.randn(n, k, device="cuda").to(F8)
    blocks = -(-k // 128)
    a_scales = torch.rand(m, blocks, device="cuda") + 0.5
    b_scales = (torch.rand(-(-n // 128), blocks, device="cuda") * 4).exp2()
    out = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device="cuda")
    launch_fp8_gemm(a, a_scales, b, b_scales, out, config)
    reference = fp8_gemm_reference(a, a_scales, b, b_scales, torch.float64)
    assert_close(out, reference, fp8_gemm_reference(a, a_scales, b, b_scales))


MANY_ROWS = [*(ManyRowsConfig(rows) for rows in (256, 128, 192)), ManyRowsConfig(256, group=3)]


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a kernel for compute capability 9.0")


def _between_nans(x):
    """The same values, with NaN before and behind them in memory."""
    nan = 0x7F if x.dtype == F8 else 0xFF  # in every byte
    room = torch.full((x.nbytes + 2048,), nan, dtype=torch.uint8, device="cuda")
    inner = room[1024:-1024].view(x.dtype).view(x.shape)
    return inner.copy_(x)


# A row, a row more and less than a product's and a tile's, several tiles; columns of half a tile, of a tile and a half,
# and such that a result's rows do not begin at whole lines; one block of K, a number of blocks that is no multiple of
# the four whose scales are fetched at once, a ragged last block, and the most. What lies around the operands is NaN.
# Every launch gives the same bits, as the order of sums does not depend on the tile.
@pytest.mark.parametrize(
    ("m", "n", "k", "dtype"),
    [
        (1, 64, 128, torch.bfloat16),
        (63, 192, 400, torch.float16),
        (65, 144, 384, torch.bfloat16),
        (127, 328, 2304, torch.bfloat16),
        (129, 324, 1040, torch.float32),
        (129, 7168, 128, torch.bfloat16),
        (300, 448, 16384, torch.float16),
        (4100, 192, 640, torch.bfloat16),
        (2047, 1088, 1024, torch.float32),
        (513, 2112, 7168, torch.bfloat16),
        (4096, 576, 1536, torch.bfloat16),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_fp8_gemm_of_many_rows_by_every_configuration(m, n, k, dtype):
    blocks = -(-k // 128)
    a, b = (_between_nans(torch.randn(size, k, device="cuda").to(F8)) for size in (m, n))
    a_scales = _between_nans(torch.rand(m, blocks, device="cuda") + 0.5)
    b_scales = _between_nans((torch.rand(-(-n // 128), blocks, device="cuda") * 4).exp2() / k)
    reference = fp8_gemm_reference(a, a_scales, b, b_scales, torch.float64)
    # A float32 result too is held to a bfloat16 one: the tensor cores keep no more.
    eager = fp8_gemm_reference(a, a_scales, b, b_scales, torch.bfloat16 if dtype == torch.float32 else dtype)
    first = None
    for config in MANY_ROWS:
        room = torch.full((m * n + 4096,), torch.nan, dtype=dtype, device="cuda")
        out = room[: m * n].view(m, n)
        launch_many_rows(a, a_scales, b, b_scales, out, config)
        assert_close(out, reference, eager)
        assert room[m * n :].isnan().all()
        first = out if first is None else first
        assert torch.equal(out, first)


@pytest.mark.usefixtures("hopper")
def test_fp8_gemm_of_many_rows_is_the_same_each_time():
    a, a_scales = act_quant(torch.randn(1000, 1536, device="cuda"))
    b, b_scales = weight_quant(torch.randn(1600, 1536, device="cuda"))
    for config in MANY_ROWS:
        first, *others = (torch.empty(1000, 1600, dtype=torch.bfloat16, device="cuda") for _ in range(20))
        for out in (first, *others):
            launch_many_rows(a, a_scales, b, b_scales, out, config)
        assert all(torch.equal(first, other) for other in others)


# Results, and the operands, beyond 2^31 elements.
@pytest.mark.parametrize(("m", "n", "k"), [(300_100, 7168, 128), (300_100, 64, 7168)])
@pytest.mark.usefixtures("hopper")
def test_fp8_gemm_of_more_than_2_to_the_31_elements(m, n, k):
    a = torch.zeros(m, k, dtype=torch.uint8, device="cuda").view(F8)
    a[-200:] = torch.randn(200, k, device="cuda").to(F8)
    a_scales = torch.rand(m, k // 128, device="cuda") + 0.5
    b, b_scales = weight_quant(torch.randn(n, k, device="cuda"))
    tail = (a[-200:], a_scales[-200:], b, b_scales)
    reference, eager = fp8_gemm_reference(*tail, torch.float64), fp8_gemm_reference(*tail)
    for config in MANY_ROWS[:2]:
        out = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device="cuda")
        launch_many_rows(a, a_scales, b, b_scales, out, config)
        assert_close(out[-200:], reference, eager)
        assert not out[:-200].any()  # NaN is not zero
        del out


def test_a_nan_stays_in_its_row():
    a, a_scales = act_quant(torch.randn(70, 256, device="cuda"))
    b, b_scales = weight_quant(torch.randn(200, 256, device="cuda"))
    a.view(torch.uint8)[3, 7] = 0x7F
    out = fp8_gemm(a, a_scales, b, b_scales)
    assert out[3].isnan().all()
    assert out.isnan().sum() == 200


# A product by the portable kernel, and one by Hopper's for many rows.
@pytest.mark.parametrize(("rows", "columns", "k"), [(64, 300, 512), (1024, 2048, 1024)])
def test_under_a_cuda_graph(rows, columns, k):
    assert (many_rows_config(rows, columns, k, 132) is None) == (rows == 64)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    b, b_scales = weight_quant(torch.randn(columns, k, device="cuda"))
    fp8_gemm(*act_quant(x), b, b_scales)
    weight_dequant(b, b_scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8_gemm(*act_quant(x), b, b_scales)
        wide = weight_dequant(b, b_scales)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, fp8_gemm(*act_quant(x), b, b_scales))
        assert torch.equal(wide, weight_dequant(b, b_scales))


def test_compiles_without_a_graph_break():
    b, b_scales = weight_quant(torch.randn(300, 512, device="cuda"))

    def linear(x):
        return fp8_gemm(*act_quant(x * 2), b, b_scales), weight_dequant(b, b_scales)

    compiled = torch.compile(linear, fullgraph=True)
    for tokens in (8, 24, 40):  # the second length makes it dynamic
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        for got, expected in zip(compiled(x), linear(x), strict=True):
            assert torch.equal(got, expected)


def test_operators_keep_their_schemas():
    codes, scales = weight_quant(torch.randn(40, 128, device="cuda"))
    torch.library.opcheck(ops.act_quant, (torch.randn(2, 128, device="cuda"), 128, "ue8m0"))
    # Its schema check compares inputs before and after with torch.allclose, which float8 does not have.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.weight_dequant, (codes, scales, 128, torch.bfloat16), test_utils=checks)
    product = (*act_quant(torch.randn(3, 128, device="cuda")), codes, scales, torch.bfloat16)
    torch.library.opcheck(ops.fp8_gemm, product, test_utils=checks)
