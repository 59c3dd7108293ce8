"""`mlakit study NAME`: the named experiments."""

from typing import Any

from mlakit.studies import correctness, fast_path, k_concat, layers, sparse_prefill


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "study",
        help="run a named experiment",
        description="Run a named experiment; each prints a conclusion computed from what it measured.",
        allow_abbrev=False,
    )
    studies = parser.add_subparsers(title="studies", metavar="NAME", dest="study", required=True)
    concat = studies.add_parser(
        "k-concat",
        help="torch.cat against direct copy against our kernel for building MLA's keys",
        description="Time torch.cat, slice assignment and mlakit's kernel building MLA's keys [B, heads, nope + rope].",
        allow_abbrev=False,
    )
    k_concat.add_arguments(concat)
    concat.set_defaults(run=k_concat.run)
    layer = studies.add_parser(
        "layers",
        help="naive, absorb, naive+flash and fused: latency, throughput and memory of the layer",
        description="Time the implementations of the MLA layer, each checked against float64 first, and say which to "
        "use where.",
        allow_abbrev=False,
    )
    layers.add_arguments(layer)
    layer.set_defaults(run=layers.run)
    agreement = studies.add_parser(
        "correctness",
        help="do the implementations of the layer agree, with each other and with float64?",
        description="Compare the implementations of the MLA layer with each other and with float64, in prefill and "
        "decode.",
        allow_abbrev=False,
    )
    correctness.add_arguments(agreement)
    agreement.set_defaults(run=correctness.run)
    short = studies.add_parser(
        "fast-path",
        help="what the layer's path for short sequences gains",
        description="Time the layer's standard path, its short path and the fused layer on short sequences.",
        allow_abbrev=False,
    )
    fast_path.add_arguments(short)
    short.set_defaults(run=fast_path.run)
    sparse = studies.add_parser(
        "sparse-prefill",
        help="attention to selected keys against attention to all: the DeepSeek Sparse Attention demonstration",
        description="Time naive PyTorch, dense attention in three forms and sparse kernels, each checked first.",
        allow_abbrev=False,
    )
    sparse_prefill.add_arguments(sparse)
    sparse.set_defaults(run=sparse_prefill.run)
