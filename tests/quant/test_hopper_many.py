"""The Hopper kernel of `fp8_gemm` for many rows, as far as that can be seen without a GPU."""

import re

import pytest
import torch

from mlakit.quant.hopper_many_launch import ManyRowsConfig, launch_many_rows, many_rows_config, why_not_many_rows
from mlakit.testing.offline import offline

F8 = torch.float8_e4m3fn


# Both heights of a tile; a result of 32 bits whose rows do not begin at whole lines.
@pytest.mark.compiled
@pytest.mark.parametrize(
    ("config", "n", "dtype"),
    [
        (ManyRowsConfig(256), 7168, torch.bfloat16),
        (ManyRowsConfig(128), 7168, torch.bfloat16),
        (ManyRowsConfig(192), 7168, torch.bfloat16),
        (ManyRowsConfig(256), 580, torch.float32),
    ],
)
def test_every_kernel_fits(config: ManyRowsConfig, n: int, dtype: torch.dtype) -> None:
    a, b = torch.empty(4096, 7168, dtype=F8), torch.empty(n, 7168, dtype=F8)
    scales, b_scales = torch.empty(4096, 56), torch.empty(-(-n // 128), 56)
    with offline(90) as compiled:
        launch_many_rows(a, scales, b, b_scales, torch.empty(4096, n, dtype=dtype), config)
    (kernel,) = compiled
    assert kernel.spills == 0
    assert kernel.shared_bytes <= 227 * 1024
    # Of 64 rows, in the code of the warpgroups: those of a step, and the first of all.
    each = config.block_m // config.warpgroups // 64
    products = config.warpgroups * (each + 1)
    assert kernel.sass.count("QGMMA.64x128x32") == 4 * products  # of 32 columns of K each
    # ptxas waits for a product where it is read, and nowhere else: else it would wait after each of its instructions.
    assert kernel.sass.count("WARPGROUP.DEPBAR") == products
    assert kernel.sass.count("UTMALDG.2D") == config.warpgroups + 1
    # A bulk store for each 64 rows and 128 bytes.
    assert kernel.sass.count("UTMASTG.2D") == config.block_m // 64
    # Between a product's end and the next one's beginning are its sums: no barrier, nothing waited for.
    turns = re.findall(r"WARPGROUP\.DEPBAR(?:(?!WARPGROUP\.DEPBAR).)*?WARPGROUP\.ARRIVE", kernel.sass, re.DOTALL)
    turns = [turn for turn in turns if turn.count("FFMA") >= 64]
    assert len(turns) == config.warpgroups * each
    assert not any(re.search(r"\b(BAR|SYNCS|LDG)\b", turn) for turn in turns)


# The fewest rounds of tiles, each as long as measured; few tiles, for which the portable kernel has smaller ones; a K
# too short to have been measured.
@pytest.mark.parametrize(
    ("m", "n", "k", "block_m"),
    [
        (8192, 8192, 8192, 256),
        (4096, 576, 7168, 192),
        (512, 7168, 2048, 256),
        (512, 4096, 7168, 128),
        (1024, 2112, 7168, 192),
        (4096, 2112, 7168, 192),
        (4096, 7168, 7168, 256),
        (128, 7168, 16384, None),
        (4096, 7168, 512, None),
    ],
)
def test_the_tile_suits_the_shape(m: int, n: int, k: int, block_m: int | None) -> None:
    config = many_rows_config(m, n, k, 132)
    assert (config and config.block_m) == block_m


def test_what_the_kernel_cannot_run_is_said() -> None:
    room = torch.empty(4096 + 16, dtype=F8)
    aligned = room[room.data_ptr() % 16 and 16 - room.data_ptr() % 16 :]
    a, b, out = aligned[:2048].view(8, 256), aligned[2048:4096].view(8, 256), torch.empty(8, 8)
    assert why_not_many_rows(a, b, out, (9, 0)) is None
    assert why_not_many_rows(a, b, out, (10, 0)) == "it needs compute capability 9.0, got (10, 0)"
    odd = aligned[1:2049].view(8, 256)
    for x, y in ((odd, b), (a, odd)):
        assert "multiples of 16 bytes" in str(why_not_many_rows(x, y, out, (9, 0)))
    assert "rows of 200" in str(
        why_not_many_rows(aligned[:1600].view(8, 200), aligned[:1600].view(8, 200), out, (9, 0))
    )
    assert "bulk stores" in str(why_not_many_rows(a, b[:7], torch.empty(8, 7), (9, 0)))
    assert "nothing to sum" in str(why_not_many_rows(a[:0], b, out[:0], (9, 0)))
    long = torch.empty(16, dtype=F8).as_strided((2**31, 16), (0, 1))
    assert "32 bits" in str(why_not_many_rows(long, b[:, :16], out, (9, 0)))
