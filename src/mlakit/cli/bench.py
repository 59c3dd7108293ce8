"""`mlakit bench`: measure backends on batches."""

import argparse
import sys
from typing import Any

_GRAMMAR = """\
batch specs: (<count>?) q<q_len>(k?) (s<seq_len>(k?))?, joined by _
  q2k            one prefill of 2048 tokens
  8q1s1k         8 decode requests with 1024 keys each
  16q4s1k        16 requests of 4 new tokens on 1024 (speculative decoding)
  2q2k_32q1s1k   a mixed batch: 2 prefills and 32 decodes

examples:
  mlakit bench --config quickstart
  mlakit bench --backends torch_absorb sdpa --batch-specs 64q1s1k 64q1s4k --output-csv mla.csv
  mlakit bench --model llama-3-8b --batch-specs q2k 8q1s1k 2q2k_32q1s1k
  mlakit bench --model deepseek-v3 --backend sdpa --batch-specs q4s1k q8s2k \\
      --sweep-param reorder_batch_threshold --sweep-values 1 4 16

Times are per layer. A result is compared with float64 before it is timed; a backend that is wrong, crashes, hangs
or runs out of memory costs its own row. Exit codes: mlakit --help
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="measure attention backends on batches",
        description="Measure attention backends, MLA or standard, on batches: check each result, time it, compare it "
        "with the device's limit.",
        epilog=_GRAMMAR,
        allow_abbrev=False,
    )
    add_measuring(parser)
    where = parser.add_argument_group("where to measure")
    where.add_argument(
        "--executor",
        choices=["local", "ray"],
        default="local",
        help="ray: spread the rows over the GPUs of a Ray cluster, those that are compared on one GPU; needs "
        "mlakit[distributed] (default: local)",
    )
    where.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="auto for the cluster that this machine is part of, HOST:PORT, or local for this machine's GPUs alone "
        "(default: auto if there is one, else local)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output-csv", metavar="FILE", help="save the rows as CSV")
    output.add_argument("--output-json", metavar="FILE", help="save the whole record as JSON")
    output.add_argument("--output-plot", metavar="FILE", help="save a plot as PNG")
    output.add_argument(
        "--resume",
        action="store_true",
        help="go on with the record that an interrupted run left: only missing rows run",
    )
    output.add_argument("--quiet", action="store_true", help="no progress; the table and errors only")
    parser.set_defaults(run=run)


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what to measure and how; `flags` reads them."""
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="a packaged config (mlakit configs) or a YAML file; flags beside it win over it",
    )
    what.add_argument(
        "--backends",
        nargs="+",
        metavar="BACKEND",
        help="backends to compare (mlakit backends), or module:Class of your own",
    )
    what.add_argument("--backend", metavar="BACKEND", help="a single backend")
    what.add_argument("--batch-specs", nargs="+", metavar="SPEC", help="batches; the grammar is below")
    what.add_argument(
        "--attention",
        choices=["mla", "standard"],
        help="what is measured (default: as the model says, else the backends)",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="PRESET",
        help="dimensions by name: deepseek-v3, deepseek-v2-lite, kimi-k2, glm-5, llama-3-8b, ...",
    )
    model.add_argument("--num-layers", type=int, metavar="N", help="layers, each with a cache of its own (default: 4)")
    model.add_argument("--head-dim", type=int, metavar="N", help="head dimension; for MLA the latent's width")
    model.add_argument("--num-q-heads", type=int, metavar="N", help="query heads")
    model.add_argument("--num-kv-heads", type=int, metavar="N", help="KV heads; for MLA 1")
    model.add_argument(
        "--block-size", type=int, metavar="N", help="tokens in a page of the cache, a power of two (default: 64)"
    )
    model.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32", "auto"], help="default: bf16 on a GPU, fp32 on a CPU"
    )

    how = parser.add_argument_group("how to measure")
    how.add_argument("--device", metavar="DEVICE", help="cuda:0, cpu, or auto: cuda:0 if there is one (default: auto)")
    how.add_argument(
        "--repeats", type=int, metavar="N", help="passes over the layers (default: as many as half a second holds)"
    )
    how.add_argument("--warmup-iters", type=int, metavar="N", help="untimed calls first (default: 3)")
    how.add_argument(
        "--l2", choices=["cold", "hot", "both"], help="flush the cache before each call, or run from it (default: cold)"
    )
    how.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, default=None, help="time the replay of a CUDA graph"
    )
    how.add_argument(
        "--scope",
        choices=["attention", "pipeline"],
        help="attention alone, or with the projections that tell MQA from MHA mode apart",
    )
    how.add_argument(
        "--profile-memory", action=argparse.BooleanOptionalAction, default=None, help="measure peak memory too"
    )
    how.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare with float64 before timing (default: yes)",
    )
    how.add_argument("--timeout", type=float, metavar="SECONDS", help="patience for one row (default: 300)")
    how.add_argument("--seed", type=int, metavar="N", help="seed of the random data (default: 0)")

    sweep = parser.add_argument_group("parameter sweeps")
    sweep.add_argument(
        "--sweep-param",
        action="append",
        metavar="PARAM",
        help="a backend's parameter (reorder_batch_threshold) or a size (num_q_heads, for tensor parallelism); "
        "given several times, each with its --sweep-values, all combinations run",
    )
    sweep.add_argument(
        "--sweep-values", action="append", nargs="+", metavar="VALUE", help="its values: whole numbers, words or auto"
    )


def flags(args: argparse.Namespace) -> dict[str, Any]:
    """What was given on the command line, in the sections of a config file.

    Raises:
        ValueError: flags that do not go together.
    """
    if args.backend and args.backends:
        raise ValueError("give --backend or --backends, not both")
    swept, values = args.sweep_param or [], args.sweep_values or []
    if len(swept) != len(values):
        raise ValueError(
            f"--sweep-param and --sweep-values go together, one of each; given are {len(swept)} and {len(values)}"
        )
    model = ("num_layers", "head_dim", "num_q_heads", "num_kv_heads", "block_size")
    how = (
        "device", "repeats", "warmup_iters", "l2", "cuda_graph", "scope", "profile_memory", "check", "timeout", "seed",
        "dtype", "attention",
    )  # fmt: skip
    sections: dict[str, Any] = {
        "model": {**({"name": args.model} if args.model else {}), **_given(args, model)},
        "benchmark": _given(args, how),
        "batch_specs": args.batch_specs,
        "backends": [args.backend] if args.backend else args.backends,
    }
    sweeps = [
        {"param_name": name, "values": [int(v) if v.lstrip("-").isdigit() else v for v in given]}
        for name, given in zip(swept, values, strict=True)
    ]
    if sweeps:
        sections["parameter_sweep"], *sections["parameter_sweeps"] = sweeps
    return {key: value for key, value in sections.items() if value}


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def run(args: argparse.Namespace) -> int:
    """Run it."""
    from mlakit.cli.bench_run import execute

    files = {"csv": args.output_csv, "json": args.output_json, "plot": args.output_plot}
    output = {kind: path for kind, path in files.items() if path}
    given = {**flags(args), **({"output": output} if output else {})}
    how = {"config": args.config, "resume": args.resume, "quiet": args.quiet, "command": sys.argv[1:]}
    return execute(given, _executor(args), **how)


def _executor(args: argparse.Namespace) -> Any:
    if args.executor == "ray":
        from mlakit.distributed.ray_executor import RayExecutor

        return RayExecutor(args.ray_address)
    if args.ray_address is not None:
        raise ValueError("--ray-address goes with --executor ray")
    from mlakit.bench.executor import LocalExecutor

    return LocalExecutor()
