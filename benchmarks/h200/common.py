"""What the speed scripts share: arguments, measuring that one failure does not end, a table, JSON rows.

A script lists its jobs and calls `run`; each job holds its candidates, ours and the peers', and can tell whether an
answer is right.
"""

import argparse
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mlakit.bench.timing import Timing, time_calls
from mlakit.testing import poison_

CUDA = torch.device("cuda")
Tensors = tuple[torch.Tensor, ...]
Candidate = tuple[str, Callable[[], Tensors]]  # a name, and the whole operation as a caller calls it


@dataclass
class Job:
    """One batch or shape of an operation.

    Args:
        op: the operation's public name.
        name: what distinguishes the job, for the table and for `--rows`.
        fields: its sizes, for the JSON rows.
        flops, least_bytes: what the operation cannot do without.
        wrong: why a candidate's result is wrong; empty if it is right.
        candidates: in any order, peers included.
        peer: the candidate that ratios refer to.
        rounds: the candidates are timed in turns, so many times, a share of the samples each time and in another order
            each time (`order_of_turn`): a GPU at its power limit gives them unlike shares of its clock.
    """

    op: str
    name: str
    fields: dict[str, Any]
    flops: float
    least_bytes: float
    wrong: Callable[[Tensors], str]
    candidates: list[Candidate] = field(default_factory=list)
    peer: str = ""
    rounds: int = 4


def parse_arguments(
    description: str | None, repeats: int, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The arguments that every speed script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file, written anew after each job")
    parser.add_argument("--tune", action="store_true", help="time every launch configuration worth a try")
    parser.add_argument("--rows", help="only jobs whose name starts so")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--no-peers", action="store_true")
    return parser.parse_args(arguments)


def attempt(action: Callable[[], str]) -> str:
    """Do something that a candidate may fail in; why it failed.

    Raises:
        Exception: what the candidate raised, if it leaves the device in a state that nothing after can be believed in.
    """
    try:
        with warnings.catch_warnings():  # peers explain at length which of their kernels they did not take
            warnings.simplefilter("ignore")
            return action()
    except Exception as error:  # a peer may fail in any way; the table then says how
        if "illegal" in str(error) or "unspecified launch" in str(error):
            raise
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:150]


def check(job: Job, call: Callable[[], Tensors]) -> str:
    """Why a candidate's result is wrong; empty if it is right."""
    for x in call():  # the last call's answer may lie in the memory that the next one gets
        if x.is_contiguous() and not x.requires_grad:
            poison_(x)
    reason = job.wrong(tuple(x.detach() for x in call()))
    return f"WRONG: {reason}" if reason else ""


def order_of_turn(count: int, turn: int) -> list[int]:
    """In which order so many candidates go in a turn: the rows of a Williams design.

    What ran just before counts where a GPU is at its power limit: at 1x4096 tokens dense prefill was at 0.94 of
    FlashAttention-3's speed where it always went after cuDNN's, and at 0.99 where they changed. In `count` turns, or
    twice as many where `count` is odd, each candidate begins equally often and follows each other one equally often.
    """
    steps = [(i + 1) // 2 * (1 if i % 2 else -1) for i in range(count)]  # 0, 1, -1, 2, -2, ...
    mirrored = -1 if count % 2 and turn % 2 else 1  # else an odd number of candidates would have the same pairs again
    return [(turn + mirrored * step) % count for step in steps]


def measure(job: Job, repeats: int) -> dict[str, Timing]:
    """Time the candidates that run and are right; say of the others why not."""
    found: dict[str, list[Timing]] = {}
    failed: set[str] = set()
    for turn in range(job.rounds):
        left = [candidate for candidate in job.candidates if candidate[0] not in failed]
        for name, call in (left[i] for i in order_of_turn(len(left), turn)):

            def action(name: str = name, call: Callable[[], Tensors] = call, first: bool = turn == 0) -> str:
                if first and (reason := check(job, call)):
                    return reason
                found.setdefault(name, []).append(time_calls([call], CUDA, repeats=-(-repeats // job.rounds)))
                return ""

            if reason := attempt(action):
                print(f"{job.name:28} {name:28} {reason}", flush=True)
                failed.add(name)
                found.pop(name, None)
    return {
        name: Timing(tuple(sample for timing in timings for sample in timing.samples), timings[-1].host)
        for name, timings in found.items()
    }


def run(jobs: Iterable[Job], output: Path, repeats: int) -> None:
    """Measure every job, print a table and write the rows, best candidate first, after each job."""
    rows: list[dict[str, Any]] = []
    for job in jobs:
        found = measure(job, repeats)
        peer = found[job.peer].median if job.peer in found else None
        for name, timing in sorted(found.items(), key=lambda item: item[1].median):
            row = as_row(job, name, timing, peer)
            rows.append(row)
            ratio = f"{row['ratio_to_peer']:5.2f}x {job.peer}" if peer else ""
            print(
                f"{job.name:28} {name:28} {timing.median * 1e3:9.3f} ms {row['tflop_per_s']:6.0f} TFLOP/s "
                f"{row['tb_per_s']:6.2f} TB/s  {ratio}",
                flush=True,
            )
        write_rows(output, rows)
        torch.cuda.empty_cache()


def as_row(job: Job, name: str, timing: Timing, peer: float | None) -> dict[str, Any]:
    """A candidate's JSON row. `peer` is the median that its ratio refers to: above 1 is faster than the peer."""
    return {
        "op": job.op,
        "row": job.name,
        **job.fields,
        "impl": name,
        "median_s": timing.median,
        "ci95_s": list(timing.ci95),
        "host_s": timing.host,
        "tb_per_s": job.least_bytes / timing.median * 1e-12,
        "tflop_per_s": job.flops / timing.median * 1e-12,
        "peer": job.peer if peer else None,
        "ratio_to_peer": peer / timing.median if peer else None,
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace the file in one step: a run that is cut short leaves whole rows."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(rows, indent=1))
    os.replace(temporary, path)
