"""The Triton kernels under the interpreter (TRITON_INTERPRET=1). float16: it has no bfloat16 product."""

from typing import TYPE_CHECKING, Any

import pytest
import torch

from mlakit.hardware import DeviceInfo, pretend
from mlakit.sparse import mla_sparse_decode, mla_sparse_prefill
from mlakit.testing import count_poison, poison_

if TYPE_CHECKING:
    from tests.sparse.conftest import MakeDecode, MakePrefill

pytestmark = pytest.mark.interpret

# A GPU of 12 multiprocessors, so that small batches are cut into pieces as large ones are on a large GPU.
SMALL_GPU = DeviceInfo("cpu", 0, "interpreter", None, 12, 2**20, 2**30)


# topk: one, around a step of 32 keys, more than there are keys; 17 heads make a second tile with one row; no rope; two
# key heads; no keys at all; no indices.
@pytest.mark.parametrize(
    ("s_q", "s_kv", "topk", "options"),
    [
        (3, 40, 1, {}),
        (3, 40, 33, {"heads": 17, "sink": True}),
        (2, 20, 64, {"rope": 0, "lengths": True}),
        (3, 50, 31, {"heads": 6, "kv_heads": 2, "sink": True, "lengths": True}),
        (2, 0, 5, {}),
        (2, 9, 0, {"sink": True}),
        (0, 9, 4, {}),
    ],
)
def test_prefill_against_float64(
    make_prefill: "MakePrefill", s_q: int, s_kv: int, topk: int, options: dict[str, Any]
) -> None:
    problem = make_prefill(s_q, s_kv, topk, **options)
    out = poison_(torch.empty((*problem.q.shape[:2], problem.options["d_v"]), dtype=problem.q.dtype))
    result, max_logits, lse = mla_sparse_prefill(*problem.inputs, **problem.options, out=out, impl="triton")
    assert result is out
    assert count_poison(out) == 0
    problem.check(out, max_logits, lse)


# Both caches; pieces chosen and given (more than there are steps); lengths a request and a token; several new tokens.
@pytest.mark.parametrize(
    ("batch", "q_len", "topk", "num_splits", "options"),
    [
        (1, 1, 100, None, {"sink": True}),
        (2, 2, 70, None, {"lengths": "request", "heads": 17}),
        (2, 1, 40, 1, {"sink": True, "lengths": "token"}),
        (2, 1, 70, 99, {"lengths": "token"}),
        (1, 2, 40, None, {"fp8": True, "rank": 256, "sink": True}),
        (2, 1, 33, 1, {"fp8": True, "rank": 128, "lengths": "request"}),
    ],
)
def test_decode_against_float64(
    make_decode: "MakeDecode", batch: int, q_len: int, topk: int, num_splits: int | None, options: dict[str, Any]
) -> None:
    problem = make_decode(batch, q_len, topk, **options)
    out = poison_(torch.empty((*problem.q.shape[:3], problem.options["kv_lora_rank"]), dtype=problem.q.dtype))
    with pretend(SMALL_GPU):
        result, lse = mla_sparse_decode(
            *problem.inputs, **problem.options, num_splits=num_splits, out=out, impl="triton"
        )
    assert result is out
    assert count_poison(out) == 0
    problem.check(out, lse)


# The form for Hopper's warpgroup instructions is a form for the compiler: what it computes can be interpreted. Steps
# without masks: none, all, some before a masked one, and nothing after it.
@pytest.mark.parametrize(
    ("heads", "rope", "fp8", "valid_first"),
    [(5, 16, False, 0), (70, 0, False, 150), (5, 16, False, 70), (5, 16, True, 130), (5, 16, False, 64)],
)
def test_the_warpgroup_form(make_decode: "MakeDecode", heads: int, rope: int, fp8: bool, valid_first: int) -> None:
    from mlakit.sparse.config import SparseConfig
    from mlakit.sparse.triton_launch import _launch_decode

    problem = make_decode(
        2, 1, 150, heads=heads, rope=rope, fp8=fp8, rank=256, sink=True, valid_first=valid_first,
        lengths="" if valid_first else "request",
    )  # fmt: skip
    out = poison_(torch.empty((2, 1, heads, 256), dtype=torch.float16))
    lse = poison_(torch.empty((2, 1, heads)))
    options = problem.options
    for splits in (1, 2):
        _launch_decode(
            *problem.inputs, options["attn_sink"], options.get("topk_length"), out, lse,
            softmax_scale=options["softmax_scale"], num_splits=splits,
            config=SparseConfig(64, 64, 8, 3, wgmma=True),
        )  # fmt: skip
        assert count_poison(out) == 0
        problem.check(out, lse)


def test_strided_inputs_and_output(make_prefill: "MakePrefill", make_decode: "MakeDecode") -> None:
    def spread(x: torch.Tensor) -> torch.Tensor:
        wide = poison_(torch.empty((*x.shape[:-1], x.shape[-1] + 16), dtype=x.dtype).transpose(0, 1).contiguous())
        view = wide.transpose(0, 1)[..., : x.shape[-1]]
        view.copy_(x)
        return view

    problem = make_prefill(3, 20, 10, heads=4, kv_heads=2)
    q, kv = spread(problem.q), spread(problem.kv)
    out = spread(torch.empty((3, 4, 64), dtype=q.dtype))
    _, max_logits, lse = mla_sparse_prefill(q, kv, problem.indices, **problem.options, out=out, impl="triton")
    problem.check(out, max_logits, lse)
    one = make_decode(3, 2, 10, heads=4)
    q, cache = spread(one.q), spread(one.cache)  # pages that do not follow one another
    out = spread(torch.empty((3, 2, 4, 64), dtype=q.dtype))
    _, lse = mla_sparse_decode(q, cache, one.indices, **one.options, out=out, impl="triton")
    one.check(out, lse)


def test_opcheck(make_prefill: "MakePrefill", make_decode: "MakeDecode") -> None:
    problem = make_prefill(2, 9, 5, sink=True)
    options = problem.options
    rest = (options["softmax_scale"], 64, options["attn_sink"], None, "triton")
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_prefill, (*problem.inputs, *rest))
    one = make_decode(2, 1, 5, lengths="request")
    out = torch.empty((2, 1, 3, 64), dtype=torch.float16)
    more = (one.options["softmax_scale"], 64, None, one.options["topk_length"], 2, "triton")
    torch.library.opcheck(torch.ops.mlakit.mla_sparse_decode_out, (*one.inputs, out, *more))
