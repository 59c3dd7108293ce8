"""Counters by which the programs of a launch tell one another that partial results are written, so that merging them
needs no second launch. All programs must be resident: a cooperative launch.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# The name of Triton 3.6, and that of later ones.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def arrive(counter_ptr, first, arrivals):
    """Tell other programs that what this warpgroup has written so far can be read. A counter is a multiple of 65536
    between launches and once all of its `arrivals` are there: the `first` of them adds what the others leave to the
    next multiple, so that nobody has to set it back.
    """
    barrier()
    gl.inline_asm_elementwise(
        """{
        .reg .pred one; .reg .u32 lane;
        mov.u32 lane, %tid.x; and.b32 lane, lane, 127; setp.eq.u32 one, lane, 0;
        @one red.release.gpu.global.add.u32 [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [counter_ptr, gl.where(first, 65537 - arrivals, 1)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def await_all(counter_ptr):
    """Wait until all have arrived; to be called after one's own `arrive`. One thread looks, and the others wait for it:
    looks stand in the way of those who arrive.
    """
    gl.inline_asm_elementwise(
        """{
        .reg .pred more; .reg .u32 seen;
        mov.u32 seen, %tid.x; and.b32 seen, seen, 127; setp.ne.u32 more, seen, 0;
        @more bra DONE;
        AGAIN: ld.acquire.gpu.global.u32 seen, [$1];
        and.b32 seen, seen, 65535; setp.ne.u32 more, seen, 0;
        @more bra AGAIN;
        DONE: mov.u32 $0, 0;
        }""",
        "=r,l",
        [counter_ptr],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    barrier()


class _Counters:
    """Zeros by which programs of a launch tell one another that partial results are written; each launch leaves their
    lower 16 bits zero. Launches that may run at the same time must not share them: a stream has its own, and so has a
    captured call.
    """

    SIZE = 1 << 20

    def __init__(self, device: torch.device) -> None:
        self._zeros = torch.zeros(self.SIZE, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once: from here on every stream may take them to be zero
        self._used = 0
        self._streams: dict[int, torch.Tensor] = {}

    def of_stream(self, stream: int, count: int) -> torch.Tensor:
        """Counters of calls on a stream, which follow one another."""
        own = self._streams.get(stream)
        if own is None or own.numel() < count:
            own = self._streams[stream] = self.take(max(count, 1024))
        return own

    def take(self, count: int) -> torch.Tensor:
        """Counters that nobody else gets."""
        count = -(-count // 4) * 4
        if self._used + count > self.SIZE:
            return torch.zeros(count, dtype=torch.int32, device=self._zeros.device)
        self._used += count
        return self._zeros[self._used - count : self._used]


_COUNTERS: dict[torch.device, _Counters] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    if device.type != "cuda":  # compiled, not run
        return torch.zeros(count, dtype=torch.int32)
    capturing = torch.cuda.is_current_stream_capturing()
    found = _COUNTERS.get(device)
    if found is None:
        if capturing:  # no way to wait for zeros written outside of the graph: one more node, for this graph alone
            return torch.zeros(count, dtype=torch.int32, device=device)
        found = _COUNTERS[device] = _Counters(device)
    if capturing:
        return found.take(count)
    return found.of_stream(torch.cuda.current_stream(device).cuda_stream, count)
