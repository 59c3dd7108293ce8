"""FlashInfer's standard attention: the paged decode and prefill wrappers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mlakit.backends.base import Parameter
from mlakit.backends.flashinfer_common import KERNEL, FlashInferPeer, ran, workspace
from mlakit.backends.peers import PageLists, page_lists

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlakit.backends.base import Output
    from mlakit.backends.problem import Ragged, StandardProblem

_DECODE = ("tensor_cores", "cuda_cores")


@dataclass(frozen=True)
class _Segment:
    """Neighbouring requests of one kind: with one new token each, or with more."""

    decode: bool
    requests: slice
    rows: slice


class FlashInfer(FlashInferPeer):
    """Requests with one new token go through the decode wrapper, the others through prefill, each kind in one call
    where they follow one another. Plans are made once a batch.
    """

    name = "flashinfer"
    summary = "FlashInfer's paged decode and prefill wrappers; planned once a batch, outside the timed call"
    attention = frozenset({"standard"})
    extra_parameters = (
        KERNEL,
        Parameter("decode_kernel", str, "decode on tensor cores (default) or on CUDA cores", choices=_DECODE),
    )

    def prepare_standard(
        self, problem: StandardProblem, backend: str = "auto", decode_kernel: str = _DECODE[0], **parameters: Any
    ) -> Callable[..., Output]:
        """`backend` goes to both wrappers; decode on CUDA cores has one kernel."""
        library = self.require()
        batch = problem.batch
        calls, kernels = [], []
        for segment in _segments(batch):
            pages = page_lists(batch, segment.requests)
            if segment.decode:
                wrapper = self._plan_decode(library.module, problem, pages, backend, decode_kernel == _DECODE[0])
                found = ran(wrapper, backend) if decode_kernel == _DECODE[0] else "cuda cores"
                kernels.append(f"decode paged, {found}")
            else:
                wrapper = self._plan_prefill(library.module, problem, pages, segment, backend)
                kernels.append(f"prefill paged, {ran(wrapper, backend)}")
            calls.append((segment.rows, wrapper))
        problem.kernel = f"{library.label}, {' + '.join(kernels)}"

        def run(q: Any, k_cache: Any, v_cache: Any, out: Any) -> Output:
            for rows, wrapper in calls:
                wrapper.run(q[rows], (k_cache, v_cache), out=out[rows])
            return out

        return run

    @staticmethod
    def _plan_decode(
        flashinfer: Any, problem: StandardProblem, pages: PageLists, backend: str, tensor_cores: bool
    ) -> Any:
        dims = problem.dims
        wrapper = flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper(
            workspace(problem), "NHD", use_tensor_cores=tensor_cores, backend=backend
        )
        wrapper.plan(
            pages.indptr,
            pages.indices,
            pages.last_page_len,
            dims.num_q_heads,
            dims.num_kv_heads,
            dims.head_dim,
            problem.batch.page_size,
            q_data_type=problem.dtype,
            kv_data_type=problem.dtype,
            sm_scale=problem.softmax_scale,
        )
        return wrapper

    @staticmethod
    def _plan_prefill(
        flashinfer: Any, problem: StandardProblem, pages: PageLists, segment: _Segment, backend: str
    ) -> Any:
        batch, dims = problem.batch, problem.dims
        first = segment.requests.start
        bounds = batch.cu_seqlens_q[first : segment.requests.stop + 1]
        wrapper = flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper(workspace(problem), "NHD", backend=backend)
        wrapper.plan(
            bounds - bounds[0],
            pages.indptr,
            pages.indices,
            pages.last_page_len,
            dims.num_q_heads,
            dims.num_kv_heads,
            dims.head_dim,
            batch.page_size,
            causal=problem.causal,
            sm_scale=problem.softmax_scale,
            q_data_type=problem.dtype,
            kv_data_type=problem.dtype,
        )
        return wrapper


def _segments(batch: Ragged) -> list[_Segment]:
    segments, row, request = [], 0, 0
    for decode, members in groupby(batch.q_lens, key=lambda q_len: q_len == 1):
        lens = list(members)
        requests, rows = slice(request, request + len(lens)), slice(row, row + sum(lens))
        segments.append(_Segment(decode, requests, rows))
        row, request = rows.stop, requests.stop
    return segments
