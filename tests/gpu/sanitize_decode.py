"""Small decodes of every kernel, checked: what test_decode_sanitizer.py runs under NVIDIA's compute-sanitizer.

compute-sanitizer --tool memcheck python tests/gpu/sanitize_decode.py hopper triton
compute-sanitizer --tool racecheck python tests/gpu/sanitize_decode.py few rows
compute-sanitizer --tool racecheck --racecheck-report analysis python tests/gpu/sanitize_decode.py many exchange
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.decode import mla_decode, mla_decode_reference
from mlakit.decode.hopper_parts import _hear, _tell
from mlakit.testing import assert_close, random_paged_cache

SCALE = 192**-0.5
# Pieces to merge, an empty request, a partly filled tile; one request; 16 rows (few heads) and two tiles of 64 (many).
CASES = {
    "few": ("hopper", [([70, 0, 200], 1, 16), ([300], 1, 16)]),
    "many": ("hopper", [([70, 0, 300], 1, 128)]),
    "causal": ("hopper", [([70, 3], 4, 32)]),
    "rows": ("hopper", [([70, 0, 200], 1, 16), ([300], 2, 16)]),  # from the float8 cache of 656 bytes a token
    "triton": ("triton", [([70, 0, 200], 2, 16), ([300], 1, 128)]),
}
GROUPS = {"hopper": ("few", "many", "causal", "rows")}
TOLD, TAKEN = gl.constexpr(8), gl.constexpr(9)


@gluon.jit
def _exchange(W: gl.constexpr, x_ptr, y_ptr, zero, box, FOUR: gl.constexpr):
    """The left warpgroup hands 64 numbers to the right one, twice, as the kernel for many heads hands maxima."""
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    # A number of a row lies with the four threads that have the row's columns, or with one thread.
    rows: gl.constexpr = gl.SliceLayout(1, product) if FOUR else gl.BlockedLayout([1], [32], [4], [0])
    row = gl.arange(0, 64, rows)
    for i in range(2):
        if W == 0:
            box.store(gl.load(x_ptr + i * 64 + row))
            _tell(TOLD, zero)
            _hear(TAKEN)
        else:
            _hear(TOLD)
            gl.store(y_ptr + i * 64 + row, box.load(rows))
            _tell(TAKEN, zero)


@gluon.jit
def _give(args, FOUR: gl.constexpr):
    _exchange(0, *args, FOUR)


@gluon.jit
def _take(args, FOUR: gl.constexpr):
    _exchange(1, *args, FOUR)


@gluon.jit
def _launch(x_ptr, y_ptr, zero, FOUR: gl.constexpr):
    box = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    args = (x_ptr, y_ptr, zero, box)
    gl.warp_specialize([(_give, (args, FOUR)), (_take, (args, FOUR))], [4], [120])


@gluon.jit(do_not_specialize=["zero"])
def _one_thread_kernel(x_ptr, y_ptr, zero):
    _launch(x_ptr, y_ptr, zero, False)


@gluon.jit(do_not_specialize=["zero"])
def _four_threads_kernel(x_ptr, y_ptr, zero):
    _launch(x_ptr, y_ptr, zero, True)


def exchange() -> None:
    for kernel in (_one_thread_kernel, _four_threads_kernel):
        x = torch.randn(128, device="cuda")
        y = torch.zeros_like(x)
        kernel[(1,)](x, y, 0, num_warps=4)
        assert torch.equal(x, y)
        print(f"right: {kernel.__name__}", flush=True)


def main() -> None:
    for group in sys.argv[1:]:
        if group == "exchange":
            exchange()
            continue
        for name in GROUPS.get(group, (group,)):
            impl, cases = CASES[name]
            for lens, q_len, heads in cases:
                generator = torch.Generator("cuda").manual_seed(0)
                paged = random_paged_cache(
                    lens, (576,), page_size=64, dtype=torch.bfloat16, device="cuda", generator=generator
                )
                q = torch.randn((len(lens), q_len, heads, 576), generator=generator, device="cuda").bfloat16()
                keys, cache = paged.pages, paged.pages
                if name == "rows":
                    cache = pack_fp8(keys[..., :512], keys[..., 512:])
                    keys = unpack_fp8(cache)
                rest = (paged.block_table, paged.seq_lens)
                out, _ = mla_decode(q, cache, *rest, softmax_scale=SCALE, impl=impl)
                eager, _ = mla_decode_reference(q, keys, *rest, softmax_scale=SCALE)
                expected, _ = mla_decode_reference(q.double(), cache, *rest, softmax_scale=SCALE)
                assert_close(out, expected, eager)
                print(f"right: {name} {lens} {q_len} {heads}", flush=True)


if __name__ == "__main__":
    main()
