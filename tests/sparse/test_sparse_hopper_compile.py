"""The Gluon kernel compiled for a Hopper that is not there, by the real launcher: it builds, fits, and its loops over
keys spill next to nothing.
"""

import re

import pytest
import torch

from mlakit.sparse.hopper_launch import _launch_hopper
from mlakit.testing.offline import CompiledKernel, offline

pytestmark = pytest.mark.compiled

BF16, FP8 = torch.bfloat16, torch.uint8


def compile_prefill(tokens: int, topk: int, keys: int) -> list[CompiledKernel]:
    numbers = torch.empty((tokens, 128))
    with offline(90) as kernels:
        _launch_hopper(
            torch.empty((tokens, 128, 576), dtype=BF16),
            torch.empty((keys, 1, 576), dtype=BF16),
            torch.empty((tokens, 1, topk), dtype=torch.int32),
            None,
            None,
            torch.empty((tokens, 128, 512), dtype=BF16),
            numbers,
            numbers.clone(),
            softmax_scale=1.0,
            num_splits=1,
        )
    return kernels


def compile_decode(batch: int) -> list[CompiledKernel]:
    with offline(90) as kernels:
        _launch_hopper(
            torch.empty((batch, 1, 128, 576), dtype=BF16),
            torch.empty((4, 64, 656), dtype=FP8),
            torch.empty((batch, 1, 2048), dtype=torch.int32),
            torch.empty(128),
            torch.empty(batch, dtype=torch.int32),
            torch.empty((batch, 1, 128, 512), dtype=BF16),
            None,
            torch.empty((batch, 1, 128)),
            softmax_scale=1.0,
            num_splits=None,
        )
    return kernels


def loops(sass: str) -> list[list[str]]:
    """The bodies of loops, the shortest first."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/ +(\S.*?);", sass)]
    back = [(int(found[1], 16), at) for at, text in code if (found := re.search(r"BRA\S* .*?(0x[0-9a-f]+)", text))]
    bodies = [[text for at, text in code if begin <= at <= end] for begin, end in back if begin < end]
    return sorted(bodies, key=len)


def count(body: list[str], what: str) -> int:
    return sum(bool(re.search(what, text)) for text in body)


def check(kernel: CompiledKernel, spilled: int) -> None:
    assert kernel.shared_bytes <= 227 * 1024
    assert kernel.registers <= 168  # 12 warps
    # Each warpgroup: 36 instructions for the scores of a tile, 4 for its half of either tile's values.
    assert len(re.findall(r"\bHGMMA\.", kernel.sass)) == 2 * (36 + 8)
    assert kernel.sass.count("WARPGROUP.ARRIVE") <= 14  # more of them would mean products that wait for one another
    left, right = [body for body in loops(kernel.sass) if count(body, "HGMMA") == 44][:2]
    for body in (left, right):
        assert count(body, "LDL|STL") <= spilled
        assert count(body, "R2UR") <= 4  # descriptors live in uniform registers


def test_prefill() -> None:
    (kernel,) = compile_prefill(4, 2048, 100)
    check(kernel, 0)
    # Of the warpgroup that gathers, a pair of tiles: 36 copies of 16 bytes a thread and tile, past L1; none narrower.
    gathering = next(body for body in loops(kernel.sass) if count(body, r"LDGSTS\.E") == 72)
    assert count(gathering, r"LDGSTS\.E\.BYPASS\.128") == 72
    assert count(gathering, "LDL|STL") == 0
    assert len(gathering) < 350


def test_other_lengths_do_not_compile_again() -> None:
    from mlakit.sparse.hopper_attention import _mla_sparse_hopper_kernel

    def variants() -> int:
        return len(_mla_sparse_hopper_kernel.device_caches[90][0])

    compile_prefill(4, 2048, 100)
    before = variants()
    for tokens, topk, keys in ((1, 1, 1), (1000, 77, 20001)):
        compile_prefill(tokens, topk, keys)
    assert variants() == before


def test_decode_of_few_requests_from_the_float8_cache() -> None:
    (attention,) = compile_decode(8)  # which merges, too
    check(attention, 8)
    # 8 parts of 128 codes and 2 of rope values, 16 bytes each, with what L2 is asked for besides; two codes an
    # instruction.
    gathering = next(body for body in loops(attention.sass) if count(body, r"F2FP\.F16\.E4M3") == 256)
    assert count(gathering, r"LDG\.E\.LTC256B\.128") == 40
    assert count(gathering, r"STS\.128") == 72
    assert count(gathering, "LDL|STL") <= 32
