"""Compiling a warp-specialized kernel so that ptxas knows that a warp stays together, and descriptors come early.

Triton branches to its partitions by the number of the warp, which it makes uniform by a shuffle; ptxas folds that
shuffle away, and then takes all that follows for divergent: matrix descriptors are computed in vector registers, four
instructions and two transfers each, instead of one in uniform registers. A reduction over the warp in place of the
shuffle has the same value and is not folded: a pair of tiles takes 950 instructions instead of 1280, and nothing
spills. Where the shuffle is not found the code is left as it is: right, and slower.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs

_WARP_NUMBER = re.compile(
    r"(mov\.u32\s+(%r\d+), %tid\.x;\s+shr\.u32\s+(%r\d+), \2, 5;\s+)shfl\.sync\.idx\.b32\s+(%r\d+), \3, 0, 31, -1;"
)


def keep_warps_together(ptx: str) -> str:
    """The same code with the first shuffle of the warp's number as a reduction."""
    return _WARP_NUMBER.sub(r"\1redux.sync.max.u32 \4, \3, -1;", ptx, count=1)


def keep_registers(ptx: str) -> str:
    """The same code without giving registers from one warpgroup to another: where two of them fill a multiprocessor, a
    thread has 255 from the start, and none to give.
    """
    return re.sub(r"\n[^\n;]*\bsetmaxnreg\.[^\n]*", "", ptx)


def fetch_descriptors(ptx: str) -> str:
    """The same code with a request for each descriptor of bulk copies in front: the first copy through one then waits
    for its data alone (1x128x8192: 0.6 us of 21.5).
    """
    params = re.findall(r"\.param \.align 64 \.b8 (\w+)\[128\]", ptx)
    begin = re.search(r"\.entry .*?// %bb\.0:\n", ptx, re.DOTALL)
    if not params or begin is None:
        return ptx
    requests = "".join(f"\t@one prefetch.param.tensormap [{param}];\n" for param in params)
    return (
        f"{ptx[: begin.end()]}\t{{\n\t.reg .pred one; .reg .u32 thread;\n"
        f"\tmov.u32 thread, %tid.x;\n\tsetp.eq.u32 one, thread, 0;\n{requests}\t}}\n{ptx[begin.end() :]}"
    )


class _Hook:
    """What Triton calls when it compiles: without arguments for the key of its cache, else to change the stages."""

    def __init__(self, before: Any, fixed_registers: bool) -> None:
        self._before = before
        self._fixed_registers = fixed_registers

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[str, str] | None:
        if not args and not kwargs:
            key, hashed = self._before() if self._before is not None else ("", "")
            own = "mlakit-together" + "-fixed" * self._fixed_registers
            return key + own, hashed + own
        if self._before is not None:
            self._before(*args, **kwargs)
        stages = args[1] if len(args) > 1 else kwargs["stages"]
        to_ptx: Callable[[Any, Any], str] = stages["ptx"]

        def changed(source: Any, metadata: Any) -> str:
            ptx = fetch_descriptors(keep_warps_together(to_ptx(source, metadata)))
            return keep_registers(ptx) if self._fixed_registers else ptx

        stages["ptx"] = changed
        return None


@contextmanager
def warps_together(*, fixed_registers: bool = False) -> Iterator[None]:
    """What is compiled inside is compiled so; with `fixed_registers`, and by `keep_registers`."""
    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = _Hook(before, fixed_registers)
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before
