"""A process that measures for the runner, so that a crash, a hang or an illegal address costs one row and not the run.

It reads one JSON request a line from standard input and writes JSON events to what was its standard output; whatever
backends print goes to standard error. It ends when its input does, or when it finds itself unfit to go on (after a CUDA
error, say).
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serve requests until there are no more."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # C libraries print to descriptor 1 too
    _die_with_parent()
    for line in sys.stdin:
        if not _serve(json.loads(line), events):
            return 1
    return 0


def _serve(request: dict[str, Any], events: TextIO) -> bool:
    """Answer one request; False if the process should not take another."""
    try:
        answer = _HANDLERS[request["command"]](request, events)
        _send(events, "done", **answer)
        return not answer.get("unfit", False)
    except ValueError as error:
        _send(events, "refused", message=str(error))
        return True


def _send(events: TextIO, event: str, **content: Any) -> None:
    events.write(json.dumps({"event": event, **content}) + "\n")
    events.flush()


def _probe(request: dict[str, Any], events: TextIO) -> dict[str, Any]:
    """Resolve the device, and measure its ceilings for the dtypes asked for."""
    from mlakit.bench.environment import describe_environment
    from mlakit.bench.limits import measure_ceilings
    from mlakit.bench.workload import DTYPES
    from mlakit.hardware import device_info

    device = parse_device(request["device"])
    info = device_info(device)
    ceilings = {}
    dtypes = request["dtypes"]
    for dtype in dtypes[device.type] if isinstance(dtypes, dict) else dtypes:
        _send(events, "stage", name=f"measuring this device's limits in {dtype}")
        ceilings[dtype] = vars(measure_ceilings(device, DTYPES[dtype]))
    return {"device": str(device), "environment": describe_environment(info), "ceilings": ceilings}


def parse_device(name: str) -> Any:
    """A torch.device with its index; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: no device's name.
    """
    import torch

    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu or cuda:0 (1, ...), got {name!r}") from None
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _backends(request: dict[str, Any], events: TextIO) -> dict[str, Any]:
    """What each backend is, and whether it can run on the device."""
    from mlakit.backends import registry
    from mlakit.backends.base import Available
    from mlakit.hardware import device_info

    device = parse_device(request["device"])
    info = device_info(device)
    rows = []
    for name in request["names"]:
        try:
            backend = registry.load(name)
            found = backend.availability(info)
        except Exception as error:  # a broken package of somebody's must not hide the others
            rows.append({"name": name, "kind": "", "hardware": "", "version": None, "reason": _short(error)})
            continue
        rows.append(
            {
                "name": name,
                "kind": " and ".join(sorted(backend.attention)),
                "summary": backend.summary,
                "hardware": backend.hardware,
                "version": found.version if isinstance(found, Available) else None,
                "reason": None if isinstance(found, Available) else found.reason,
                "parameters": {p.name: p.values for p in backend.parameters.values()},
            }
        )
    return {"device": f"{info.name} ({device})", "rows": rows}


def _row(request: dict[str, Any], events: TextIO) -> dict[str, Any]:
    """Measure one row. An error of the backend's is its row's outcome."""
    from mlakit.bench.config import BenchmarkConfig
    from mlakit.bench.limits import Ceilings
    from mlakit.bench.measure import measure_row
    from mlakit.bench.results import BenchmarkResult

    config = BenchmarkConfig(**request["config"])
    ceilings = Ceilings(**request["ceilings"])
    scratch = Path(request["scratch"]) if request.get("scratch") else None
    try:
        row = measure_row(config, ceilings, scratch, lambda name: _send(events, "stage", name=name))
    except Exception as error:
        traceback.print_exc()
        row = BenchmarkResult(config=config, status="error", error=_short(error))
        return {"row": row.model_dump(mode="json"), "unfit": _spoils_the_process(error)}
    return {"row": row.model_dump(mode="json")}


def _short(error: BaseException) -> str:
    from mlakit.bench.measure import first_line

    return first_line(error)


def _spoils_the_process(error: BaseException) -> bool:
    # After an illegal address every later CUDA call of the process fails with the same error.
    return any(
        word in str(error) for word in ("CUDA error", "device-side assert", "illegal memory access", "Triton Error")
    )


def _die_with_parent() -> None:
    """Be killed if the runner is, and be the first to go if memory runs out. Linux only; elsewhere the end of the input
    has to do.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went in the meantime
        os._exit(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


_HANDLERS = {"probe": _probe, "backends": _backends, "row": _row}

if __name__ == "__main__":
    sys.exit(main())
