"""What the launcher of the Hopper decode kernels gives them: no GPU, nothing is compiled."""

import pytest
import torch

from mlakit.cache import pack_fp8, unpack_fp8
from mlakit.decode.hopper_launch import _CallPlan, _plan_call
from mlakit.hardware import DeviceInfo, pretend

H200 = DeviceInfo("cuda", 0, "NVIDIA H200", (9, 0), 132, 60 * 2**20, 141 * 2**30)
CODES = torch.float8_e4m3fn
DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (CODES, CODES)]
PACKED = (torch.bfloat16, torch.uint8)


def plan_of(q: torch.Tensor, cache: torch.Tensor) -> _CallPlan:
    table = torch.zeros((q.shape[0], 8192 // cache.shape[1]), dtype=torch.int32)
    with pretend(H200):
        return _plan_call(
            q, cache, table, torch.empty((*q.shape[:3], 512), dtype=torch.bfloat16), 0.1, True, None, 1.0, 1.0, None
        )


# Every kernel, from pages as large as a tile and smaller.
@pytest.mark.parametrize(
    ("dtypes", "heads"), [(dtypes, heads) for dtypes in DTYPES for heads in (16, 32, 128)] + [(PACKED, 16)]
)
@pytest.mark.parametrize("page_size", [64, 16])
def test_a_kernel_gets_what_it_names(dtypes: tuple[torch.dtype, torch.dtype], heads: int, page_size: int) -> None:
    q = torch.empty((4, 1, heads, 576), dtype=dtypes[0])
    width = 656 if dtypes == PACKED else 576
    plan = plan_of(q, torch.empty((3, page_size, width), dtype=dtypes[1]))
    names = plan.launches._kernel.arg_names
    descriptors = [name for name in names if name.endswith("_desc")]
    assert len(descriptors) == len(plan.query_boxes) + len(plan.key_boxes)
    assert names[: len(descriptors)] == descriptors
    assert ("q_ptr" in names) == plan.takes_query
    pointers = [name for name in names if name.endswith("_ptr")]
    taken = len(descriptors) + len(pointers)
    assert names[taken:][: len(plan.numbers)] == [name for name in names[taken:] if not name.isupper()]
    assert names[taken + len(plan.numbers) :] == list(plan.constants)
    assert plan.numbers[-1] == 0  # what the kernel must not know to be zero


def test_boxes_of_rows_with_scales_of_their_own() -> None:
    latents = torch.randn((2 * 64, 576))
    packed = torch.zeros((2, 64, 672), dtype=torch.uint8)
    packed[..., :656] = pack_fp8(latents[:, :512], latents[:, 512:]).view(2, 64, 656)
    plan = plan_of(torch.empty((4, 1, 16, 576), dtype=torch.bfloat16), packed[..., :656])
    codes, scales, ropes = (
        packed.view(dtype).as_strided((length, width), (stride, 1), first // dtype.itemsize)
        for first, dtype, length, width, stride, _, _ in plan.key_boxes
    )
    values = (codes.view(CODES).float().view(-1, 4, 128) * scales[:, :, None]).flatten(1)
    expected = unpack_fp8(packed[..., :656], dtype=torch.float32).flatten(0, 1)
    assert torch.equal(torch.cat([values, ropes.float()], dim=1), expected)
    assert [box[-2:] for box in plan.key_boxes] == [(64, 512), (64, 4), (64, 64)]
