"""What the studies of the bench's rows share: the device, and rows on demand kept in a record."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlakit.bench.config import DEFAULT_MLA_MODEL, BenchmarkConfig, infer_attention
from mlakit.bench.files import output_file, output_folder
from mlakit.bench.results import BenchmarkResult, Record
from mlakit.bench.runner import Device, Meter, new_session, probe
from mlakit.bench.units import rate
from mlakit.dims import MLADims, preset
from mlakit.studies.checkpoint import resumable
from mlakit.studies.row_flags import REPEATS

_DTYPES = {"cpu": "fp32", "cuda": "bf16"}  # as in `bench`: what each computes fastest
CPU_MODEL = {"mla": "deepseek-v2-lite", "standard": "tiny-gqa"}
STANDARD_MODEL = "llama-3-8b"


@dataclass
class Rows:
    """Rows on demand. `base` holds what all of them share, as fields of a `BenchmarkConfig`."""

    base: dict[str, Any]
    device: Device
    meter: Meter
    record: Record
    path: Path

    def measure(self, backend: str, spec: str, **fields: Any) -> BenchmarkResult:
        """The row of a backend on a batch, measured unless the record holds it.

        Raises:
            ValueError: a field that cannot be meant.
        """
        return self.meter.row(BenchmarkConfig(**{**self.base, "backend": backend, "batch_spec": spec, **fields}))

    @property
    def title(self) -> str:
        """Model, heads, dtype and device, for a heading."""
        base = self.base
        device = self.device.environment["device"]["name"]
        return f"{base['model']}, {base['num_q_heads']} heads, {base['dtype']}, on {device}"

    def finish(self, findings: Sequence[str]) -> None:
        """Complete the record with what was found."""
        self.record.findings = list(findings)
        self.record.planned = len(self.record.rows)
        self.record.complete = True
        self.record.save(self.path)


def dimensions(args: argparse.Namespace, attention: str, *, cpu: bool) -> dict[str, Any]:
    """Model and heads a GPU, as fields of a `BenchmarkConfig`. `args.models` may name those of a config: on a GPU, on a
    CPU.

    Raises:
        ValueError: unknown model, or heads that --tp does not divide.
    """
    fallback = CPU_MODEL[attention] if cpu else DEFAULT_MLA_MODEL if attention == "mla" else STANDARD_MODEL
    model = args.model or getattr(args, "models", (None, None))[cpu] or fallback
    dims = preset(model)
    if isinstance(dims, MLADims):
        heads, kv_heads = args.num_q_heads or dims.num_heads, 1
    else:
        heads, kv_heads = args.num_q_heads or dims.num_q_heads, max(1, dims.num_kv_heads // args.tp)
    if heads % args.tp:
        raise ValueError(f"--tp {args.tp} does not divide the {heads} heads of {model}")
    return {"model": model, "num_q_heads": heads // args.tp, "num_kv_heads": kv_heads}


@contextmanager
def open_rows(args: argparse.Namespace, name: str, description: str, mode: Any = "compare") -> Iterator[Rows]:
    """Find the device and begin a record, in `--output-json` or a folder of the run's own.

    Raises:
        ValueError: bad input.
        DeviceError: the device does not work.
        KeyboardInterrupt: after saying how to go on.
    """
    from mlakit.backends import registry
    from mlakit.bench.progress import Progress
    from mlakit.bench.record_file import open_record
    from mlakit.bench.table import make_console

    if args.resume and not args.output_json:
        raise ValueError("--resume needs --output-json: the record to go on with")
    kinds = [registry.attention_kinds(backend) for backend in args.backends or []]
    attention = infer_attention(args.model or getattr(args, "models", (None, None))[0], kinds)
    for cpu in (True, False):
        dimensions(args, attention, cpu=cpu)  # what cannot be is said before a device is looked for
    path = output_file(args.output_json, "--output-json")
    with Progress(make_console(stderr=True), quiet=args.quiet) as progress:
        dtypes = {kind: [args.dtype or dtype] for kind, dtype in _DTYPES.items()}
        device = probe(args.device, dtypes, progress)
        cpu = device.name == "cpu"
        kind = "cpu" if cpu else "cuda"
        base = {
            **dimensions(args, attention, cpu=cpu),
            "attention": attention,
            "block_size": args.block_size,
            "dtype": dtypes[kind][0],
            "device": device.name,
            "num_layers": 1,  # the cache is flushed before each sample: one layer is as good as several
            "repeats": args.repeats or REPEATS[kind],
            "timeout": args.timeout,
        }
        path = path or output_folder(None, name, "") / "record.json"
        session = new_session(device, ["mlakit", *sys.argv[1:]])
        fresh = Record(name=name, description=description, mode=mode, planned=0, sessions=[session])
        record = open_record(path, fresh, resume=args.resume)
        record.complete = False
        rows = Rows(base, device, Meter(device, record, lambda r: r.save(path), progress), record, path)
        if not args.quiet:
            ceilings = device.ceilings[base["dtype"]]
            memory = max(ceilings["copy_bytes_per_s"], ceilings["read_bytes_per_s"])
            compute = rate(ceilings["flops_per_s"], "FLOP/s")
            progress.say(f"{name}: {rows.title}; measured ceilings {rate(memory, 'B/s')}, {compute}")
        progress.expect(0)
        with resumable(path, () if args.output_json else ("--output-json", str(path))), rows.meter:
            yield rows
    if not args.quiet:
        print(f"saved: record {path}", file=sys.stderr)


def print_findings(out: Console, findings: Iterable[str], reasons: Mapping[str, str]) -> None:
    """What was found, a line each, and why a backend has no part in it."""
    for line in (*findings, *(f"{name}: not available: {reason}" for name, reason in reasons.items())):
        out.print(line, soft_wrap=True)
