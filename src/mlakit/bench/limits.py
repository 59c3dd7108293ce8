"""What a device can do at best, measured on that device in that run: the yardstick of every row."""

import sys
from typing import Any

import torch

from mlakit.bench.ceilings import Ceilings
from mlakit.bench.timing import time_calls
from mlakit.hardware import device_info


def measure_ceilings(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Ceilings:
    """Measure copy and read bandwidth, and the matrix product rate in `dtype`. About a second.

    Raises:
        ValueError: the device is not there.
    """
    device = torch.device(device)
    info = device_info(device)
    # Several times the cache, so that it is memory that is measured; the GPU's product is large enough to fill every
    # unit.
    count = (2**30 if info.is_cuda else max(2**28, 3 * info.cache_bytes)) // 64 * 16
    size = 8192 if info.is_cuda else 1536
    source = torch.randn(count // 16, device=device).repeat(16)  # drawing all of it takes a CPU longer than measuring
    target = torch.empty_like(source)
    # Timed as rows are, with pauses in between (back to back, an H200 at its power limit gives 677 TFLOP/s where
    # kernels timed one at a time reach 754), and the fastest sample counts: a ceiling is what the device can do, not
    # what it does on average.
    # A CPU takes tenths of a second for each: five samples are what it gets of the budget, so no pilot has to find out.
    patience: dict[str, Any] = {"budget": 0.2} if info.is_cuda else {"repeats": 5, "warmup": 1}
    copy = time_calls([lambda: target.copy_(source)], device, **patience)
    read = time_calls([lambda: source.sum()], device, **patience)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    product = time_calls([lambda: torch.mm(a, b, out=out)], device, **patience)
    return Ceilings(
        device=info.name,
        dtype=str(dtype).removeprefix("torch."),
        copy_bytes_per_s=2 * 4 * count / copy.min,
        read_bytes_per_s=4 * count / read.min,
        flops_per_s=2 * size**3 / product.min,
    )


def gpu_ceilings(device: torch.device | str) -> Ceilings | None:
    """A GPU's ceilings for a study's record, with a word on stderr, as it takes a second; None on a CPU.

    None as well where its memory is too short to measure them (3 GiB): what the study itself measures may fit.
    """
    if not device_info(device).is_cuda:
        return None
    print("measuring the ceilings ...", file=sys.stderr, flush=True)
    try:
        return measure_ceilings(device)
    except torch.OutOfMemoryError:
        print("not measured: too little free memory on the GPU", file=sys.stderr, flush=True)
    torch.cuda.empty_cache()
    return None
