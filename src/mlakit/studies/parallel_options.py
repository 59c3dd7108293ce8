"""Flags of the study `parallel`, and what they mean. No torch here: the ranks look at their devices themselves."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlakit.bench.batch_spec import BatchRequest, parse_batch_spec
from mlakit.dims import MLA_PRESETS, MLADims, nearest
from mlakit.studies.flag_values import positive, whole, whole_numbers
from mlakit.studies.layer_options import MODELS, Model

SCOPES = ("attention", "layer")
STRATEGIES = ("one", "tp", "cp", "cp-own", "both")
GPU_BATCHES, CPU_BATCHES = ("q1s1024k", "32q1s128k"), ("q1s4k", "4q1s512_q1s64")
GPU_MODEL, CPU_MODEL = "deepseek-v3", "tiny"
TIMEOUT = 120.0


@dataclass(frozen=True)
class Link:
    """What carries a message between ranks: seconds for an empty one, and bytes a second that leave a rank."""

    latency: float
    bandwidth: float

    def seconds(self, bytes_: float) -> float:
        """Predicted time of a message."""
        return self.latency + bytes_ / self.bandwidth


@dataclass(frozen=True)
class Options:
    """What the ranks need to know."""

    model: str
    dims: MLADims
    hidden: Model
    batch_specs: tuple[str, ...]
    scopes: tuple[str, ...]
    strategies: tuple[str, ...]
    context_ranks: tuple[int, ...]
    simulate: tuple[int, ...]
    link: Link | None
    device: str
    mode: str
    l2: str
    repeats: int | None
    page_size: int
    seed: int
    check: bool
    timeout: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's flags to a parser."""
    parser.add_argument(
        "--batch-specs",
        nargs="+",
        metavar="SPEC",
        help="decode batches, as for `mlakit bench`; lengths may differ, new tokens may not "
        f"(default: {' '.join(GPU_BATCHES)}; on a CPU {' '.join(CPU_BATCHES)})",
    )
    parser.add_argument(
        "--scope",
        choices=(*SCOPES, "both"),
        default="both",
        help="attention alone, or a layer's decode step (default: %(default)s)",
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        metavar="NAME",
        default=list(STRATEGIES),
        help="one (a GPU alone), tp (heads over the ranks, all keys on each), cp (keys over the ranks, all heads on "
        "each), cp-own (as cp, each with the results of its own heads; attention alone), both (weights by heads, cache "
        "by keys) (default: all)",
    )
    parser.add_argument(
        "--context-ranks",
        nargs="+",
        metavar="N",
        help="of `both`: ranks that share the pages of one cache, each number in turn (default: all)",
    )
    parser.add_argument("--model", help=f"{', '.join(MODELS)} (default: {GPU_MODEL}; on a CPU {CPU_MODEL})")
    group = parser.add_argument_group("the ranks")
    group.add_argument(
        "--ranks", metavar="N", help="processes to start where torchrun did not (default: one a GPU; on a CPU 2)"
    )
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    group.add_argument(
        "--timeout",
        metavar="S",
        default=f"{TIMEOUT:g}",
        help="seconds after which a rank that is not heard of ends the others (default: %(default)s)",
    )
    group.add_argument(
        "--simulate-ranks",
        nargs="+",
        metavar="N",
        help="predict attention over N ranks from parts measured here: a shard's attention and the merge as they are, "
        "communication by the link",
    )
    group.add_argument("--link-latency", metavar="US", help="microseconds, where there is no second rank to measure it")
    group.add_argument("--link-bandwidth", metavar="GB/S", help="as --link-latency, GB/s that leave a rank")
    group = parser.add_argument_group("the measuring")
    group.add_argument(
        "--mode",
        choices=("graph", "eager"),
        help="replay CUDA graphs, or launch each time (default: graph; on a CPU eager)",
    )
    group.add_argument("--l2", choices=("cold", "hot"), default="cold", help="default: %(default)s")
    group.add_argument("--repeats", metavar="N", help="timed calls (default: as many as fit in half a second)")
    group.add_argument("--page-size", metavar="N", default="64", help="tokens of a page (default: %(default)s)")
    group.add_argument("--seed", metavar="N", default="0", help="of the random weights and inputs (default: 0)")
    group.add_argument("--no-check", action="store_true", help="time results without comparing them with float64")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="made if need be (default: mlakit-runs/parallel-DATE-TIME)"
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="the record (default: DIR/record.json)")


def parse(args: argparse.Namespace, *, is_cuda: bool, ranks: int) -> Options:
    """Check the flags and fill in the defaults of the device.

    Raises:
        ValueError: a flag's value makes no sense; the message names it.
    """
    model = args.model or (GPU_MODEL if is_cuda else CPU_MODEL)
    if model not in MODELS:
        raise ValueError(f"--model: unknown model {model!r}; {nearest(model, MODELS)}")
    dims, hidden = MLA_PRESETS[model], MODELS[model]
    specs = tuple(dict.fromkeys(args.batch_specs or (GPU_BATCHES if is_cuda else CPU_BATCHES)))
    for spec in specs:
        requests_of(spec)
    strategies = tuple(dict.fromkeys(args.strategies))
    for name in strategies:
        if name not in STRATEGIES:
            raise ValueError(f"--strategies: unknown name {name!r}; {nearest(name, STRATEGIES)}")
    context = tuple(whole_numbers("--context-ranks", args.context_ranks or (), 1))
    simulate = tuple(whole_numbers("--simulate-ranks", args.simulate_ranks or (), 2))
    for size in context:
        if all(count % size for count in (ranks, *simulate)):
            raise ValueError(f"--context-ranks: expected a divisor of the {ranks} ranks, got {size}")
    for count in (ranks, *simulate):
        if dims.num_heads % count:
            raise ValueError(f"{dims.num_heads} heads of {model} cannot be divided over {count} ranks")
    link = _link(args)
    if simulate and ranks == 1 and link is None:
        raise ValueError(
            "--simulate-ranks: one rank has no link to measure; start two, or give --link-latency and --link-bandwidth"
        )
    if args.mode == "graph" and not is_cuda:
        raise ValueError("--mode: CUDA graphs need GPUs, got a CPU")
    page_size = whole("--page-size", args.page_size, 1)
    if page_size & (page_size - 1):
        raise ValueError(f"--page-size: expected a power of two, got {page_size}")
    return Options(
        model=model,
        dims=dims,
        hidden=hidden,
        batch_specs=specs,
        scopes=SCOPES if args.scope == "both" else (args.scope,),
        strategies=strategies,
        context_ranks=context,
        simulate=simulate,
        link=link,
        device=args.device,
        mode=args.mode or ("graph" if is_cuda else "eager"),
        l2=args.l2,
        repeats=None if args.repeats is None else whole("--repeats", args.repeats, 1),
        page_size=page_size,
        seed=whole("--seed", args.seed, 0),
        check=not args.no_check,
        timeout=positive("--timeout", args.timeout),
    )


def requests_of(spec: str) -> Sequence[BatchRequest]:
    """A batch's requests, all with as many new tokens.

    Raises:
        ValueError: no such grammar, or another kind of batch.
    """
    requests = parse_batch_spec(spec)
    new = sorted({request.q_len for request in requests})
    if len(new) > 1:
        raise ValueError(
            f"--batch-specs: {spec!r} has requests of {new[0]} and of {new[1]} new tokens; expected one number"
        )
    if any(request.context_len == 0 for request in requests):
        raise ValueError(
            f"--batch-specs: {spec!r} has a request without earlier tokens; expected decode steps, as q1s1k"
        )
    return requests


def _link(args: argparse.Namespace) -> Link | None:
    given = (args.link_latency, args.link_bandwidth)
    if given == (None, None):
        return None
    if None in given:
        raise ValueError("--link-latency and --link-bandwidth belong together, got one of them")
    return Link(positive("--link-latency", given[0]) * 1e-6, positive("--link-bandwidth", given[1]) * 1e9)
