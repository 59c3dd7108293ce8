"""`make bench-h200`: run every speed script on this GPU and refresh results/h200.

    PYTHONPATH=src python benchmarks/h200/run_all.py                          # all of them
    PYTHONPATH=src python benchmarks/h200/run_all.py --only dense_decode prefill --out /tmp/results

Each script runs in a process of its own. One that fails or takes too long costs its own file only: the old one stays.
Exit code: 0 if everything was refreshed, 1 if something was not, 2 if nothing could be run.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mlakit.bench.environment import describe_environment
from mlakit.bench.limits import measure_ceilings
from mlakit.hardware import device_info

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "results" / "h200"
SCHEMA = "mlakit.speed/1"
# The studies' records; what each is run with beside the file it writes.
STUDIES = {
    "k_concat": ("k-concat",),
    "sparse_prefill": ("sparse-prefill", "--warmup", "2", "--rep", "6"),
    "fast_path": ("fast-path", "--model", "deepseek-v3"),
    "layers": (
        "layers", "--model", "deepseek-v3", "--batch-sizes", "1", "32", "--seq-lengths", "1024", "4096", "--trials",
        "10", "--output-dir", "layers",
    ),
    "correctness": (
        "correctness", "--min-seq-len", "256", "--max-seq-len", "2048", "--seq-len-step", "256", "--batch-sizes", "1",
        "4", "--trials", "3", "--output", "correctness",
    ),
    "num_splits": ("num-splits", "--tp", "8", "--repeats", "20"),
    "reorder_threshold": ("reorder-threshold", "--batch-sizes", "1", "8", "64", "256", "--repeats", "20"),
}  # fmt: skip
# seconds; 240 for the others
LIMITS = {
    "reorder_threshold": 600.0, "num_splits": 400.0, "mla_decode": 900.0, "mla_mixed_batch": 400.0,
    "speculative_decode": 600.0, "standard_attention": 400.0, "reorder_grid": 900.0, "backends_standard": 400.0,
}  # fmt: skip
# The bench's records: the suite's own commands (seed_commands.sh runs all there are), and all backends side by side.
BENCHES = {
    "quickstart": ("--config", "quickstart"),
    "mla_decode": ("--config", "mla_decode"),
    "mla_mixed_batch": ("--config", "mla_mixed_batch"),
    "speculative_decode": ("--config", "speculative_decode"),
    "standard_attention": ("--config", "standard_attention"),
    "reorder_grid": ("--config", "reorder_threshold"),
    "backends_decode": ("--config", "backends.yaml"),
    "backends_mla": (
        "--backends", "cutlass_mla", "flashinfer_mla", "flashattn_mla", "flashmla", "mlakit", "--batch-specs",
        "64q1s1k", "64q1s4k",
    ),
    "backends_standard": (
        "--backends", "flash", "triton", "flashinfer", "--batch-specs", "q2k", "8q1s1k", "2q2k_32q1s1k",
        "--num-layers", "10", "--repeats", "5",
    ),
    "backends_reorder": (
        "--backend", "flashmla", "--batch-specs", "q4s1k", "q8s2k", "--sweep-param", "reorder_batch_threshold",
        "--sweep-values", "1", "4", "16", "64", "256", "512",
    ),
    "backends_cutlass": (
        "--backend", "cutlass_mla", "--batch-specs", "64q1s1k", "64q1s4k", "64q1s16k", "--sweep-param",
        "num_kv_splits", "--sweep-values", "1", "2", "4", "8", "16",
    ),
    # A cache of more than 2^31 elements, which vLLM's Triton decode cannot number, and what is measured after it.
    "backends_large_cache": (
        "--backends", "vllm_triton_mla", "mlakit", "flashmla", "--batch-specs", "128q1s32k", "16q1s1k",
        "--num-q-heads", "16", "--num-layers", "1", "--repeats", "20",
    ),
}  # fmt: skip
RECOMMEND = ("--model", "deepseek-v3", "--tp", "8", "--batch-specs", "64q1s4k", "16q4s4k", "q1s64k", "--repeats", "20")
NOTHING_RAN = 1  # what a command says where no backend of its is available: as much of a record as any other
# Modules of the peers, and the distributions that hold their versions.
PEERS = {
    "vllm": "vllm",
    "flashinfer": "flashinfer-python",
    "flash_mla": "flash-mla",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "deep_gemm": "deep-gemm",
    "transformers": "transformers",
}


@dataclass(frozen=True)
class Step:
    """A record to refresh, the command that makes it (its last argument is the file it writes), and its time limit."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    codes: tuple[int, ...] = (0,)  # exit codes of a record worth keeping

    @property
    def stamped(self) -> bool:
        """Whether the command writes bare rows, which need a stamp; records of bench and studies have theirs."""
        return self.name not in (*BENCHES, *STUDIES, "recommend")


def steps(scripts: Path = HERE) -> list[Step]:
    """All there is to run. The limits are some three times what each took on an H200, or more."""
    limits = {
        "cold_code": 120.0, "concat": 120.0, "dense_decode": 240.0, "dsa": 90.0, "indexer": 150.0, "layer": 200.0,
        "prefill": 150.0, "quant": 120.0, "rope": 60.0, "sparse": 150.0, "timing": 90.0,
    }  # fmt: skip
    found = [Step(name, (sys.executable, str(scripts / f"{name}.py")), limit) for name, limit in limits.items()]
    mlakit = (sys.executable, "-m", "mlakit")
    found += [
        Step(name, (*mlakit, "study", *options, "--output-json"), LIMITS.get(name, 240.0))
        for name, options in STUDIES.items()
    ]
    found.append(Step("recommend", (*mlakit, "recommend", *RECOMMEND, "--output-json"), 400.0))
    codes = {"backends_cutlass": (0, NOTHING_RAN)}
    return found + [
        Step(name, (*mlakit, "bench", *options, "--output-json"), LIMITS.get(name, 240.0), codes.get(name, (0,)))
        for name, options in BENCHES.items()
    ]


def run_step(step: Step, output: Path) -> str:
    """Run a step's command in the folder of its output, so that no path gets into a record; why it failed, or ""."""
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [*step.command, output.name]
    for config in HERE.glob("*.yaml"):
        shutil.copy(config, output.parent)
    process = subprocess.Popen(command, cwd=output.parent, env=environment, start_new_session=True)
    try:
        code = process.wait(step.limit_s)
    except BaseException as error:
        # Its own workers must not go on measuring beside the next step.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"took longer than {step.limit_s:.0f} s"
        raise
    return "" if code in step.codes else f"exit code {code}"


def read_output(step: Step, output: Path) -> tuple[Any, str]:
    """(what a step wrote, why it cannot be used or "")."""
    try:
        found = json.loads(output.read_text())
    except (OSError, ValueError) as error:
        return None, f"no JSON written ({type(error).__name__})"
    rows = found if step.stamped else found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return None, "no rows written"
    if not step.stamped and not found.get("complete", True):
        return None, "some of its rows are missing"
    return found, ""


def peer_versions() -> dict[str, str]:
    """What could have taken part, by module; not every copy of a package brings its version along."""
    found = {}
    for module, distribution in PEERS.items():
        if importlib.util.find_spec(module) is not None:
            try:
                found[module] = version(distribution)
            except PackageNotFoundError:
                found[module] = "unknown"
    return found


def write_json(path: Path, content: Any) -> None:
    """Replace a file by a complete new one, or leave it alone."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refresh(chosen: Sequence[Step], out: Path, stamp: dict[str, Any]) -> list[str]:
    """Run the steps in turn and replace the records of those that succeed; the names of those that did not."""
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for step in chosen:
        print(f"== {step.name}", flush=True)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        clock = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / f"{step.name}.json"
            reason = run_step(step, output)
            content, unusable = (None, reason) if reason else read_output(step, output)
        seconds = time.monotonic() - clock
        if unusable:
            failed.append(step.name)
            print(f"{step.name}: {unusable}; its record is left as it was", file=sys.stderr, flush=True)
            continue
        if step.stamped:
            content = {"schema": SCHEMA, "operation": step.name, "started": started, **stamp, "rows": content}
        write_json(out / f"{step.name}.json", content)
        print(f"== {step.name}: {out / step.name}.json, {seconds:.0f} s", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    known = {step.name: step for step in steps()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records (default: results/h200)")
    parser.add_argument("--only", nargs="+", choices=list(known), metavar="NAME", help=", ".join(known))
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"bench-h200 needs an NVIDIA GPU, and PyTorch {torch.__version__} sees none here", file=sys.stderr)
        return 2

    device = torch.device("cuda")
    ceilings = measure_ceilings(device)
    print(
        f"{ceilings.device}: copy {ceilings.copy_bytes_per_s * 1e-12:.2f} TB/s, "
        f"read {ceilings.read_bytes_per_s * 1e-12:.2f} TB/s, {ceilings.flops_per_s * 1e-12:.0f} TFLOP/s in bf16",
        flush=True,
    )
    torch.cuda.empty_cache()
    stamp = {
        "environment": describe_environment(device_info(device)),
        "ceilings": asdict(ceilings),
        "peers": peer_versions(),
    }
    failed = refresh([known[name] for name in args.only or known], args.out, stamp)
    if failed:
        print(f"not refreshed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
