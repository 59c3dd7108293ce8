"""`mlakit study NAME`: the named experiments."""

from importlib import import_module
from typing import Any

# Name, module, what `mlakit study --help` says of it, and its own first words.
_STUDIES = (
    (
        "k-concat",
        "k_concat",
        "torch.cat against direct copy against our kernel for building MLA's keys",
        "Time torch.cat, slice assignment and mlakit's kernel building MLA's keys [B, heads, nope + rope].",
    ),
    (
        "layers",
        "layers",
        "naive, absorb, naive+flash and fused: latency, throughput and memory of the layer",
        "Time the implementations of the MLA layer, each checked against float64 first, and say which to use where.",
    ),
    (
        "correctness",
        "correctness",
        "do the implementations of the layer agree, with each other and with float64?",
        "Compare the implementations of the MLA layer with each other and with float64, in prefill and decode.",
    ),
    (
        "fast-path",
        "fast_path",
        "what the layer's path for short sequences gains",
        "Time the layer's standard path, its short path and the fused layer on short sequences.",
    ),
    (
        "sparse-prefill",
        "sparse_prefill",
        "attention to selected keys against attention to all: the DeepSeek Sparse Attention demonstration",
        "Time naive PyTorch, dense attention in three forms and sparse kernels, each checked first.",
    ),
    (
        "reorder-threshold",
        "reorder_threshold",
        "up to how many new tokens the decode pipeline is faster than the prefill pipeline",
        "Time both pipelines of MLA over the number of new tokens, find where they cross for each batch size, and "
        "recommend a reorder_batch_threshold.",
    ),
    (
        "num-splits",
        "num_splits",
        "the best number of pieces to cut a request's keys into, and what auto costs",
        "Time numbers of pieces against auto, for every backend that declares the parameter.",
    ),
    (
        "parallel",
        "parallel",
        "several GPUs: heads over the ranks, keys over the ranks, or both",
        "Time a decode batch over several ranks, by heads, by keys and both, split into attention, merge and links.",
    ),
)


def add_parser(subparsers: Any, *, studies: bool = True) -> None:
    """Add the subcommand; without `studies`, by its name alone."""
    parser = subparsers.add_parser(
        "study",
        help="run a named experiment",
        description="Run a named experiment; each prints a conclusion computed from what it measured.",
        allow_abbrev=False,
    )
    if not studies:
        return
    named = parser.add_subparsers(title="studies", metavar="NAME", dest="study", required=True)
    for name, module_name, summary, description in _STUDIES:
        module = import_module(f"mlakit.studies.{module_name}")
        study = named.add_parser(name, help=summary, description=description, allow_abbrev=False)
        module.add_arguments(study)
        study.set_defaults(run=module.run)
