"""Do the adapters measure what others measured? The bench's times of the peers beside times taken without it.

    python benchmarks/h200/anchors.py            # the table of docs/backends.md, from results/h200/backends_decode.json
    python benchmarks/h200/anchors.py RECORD     # of another record of benchmarks/h200/backends.yaml

The anchors were measured on 2026-11-22 on other H200s with `triton.testing.do_bench` (median, cold L2), each library
called by hand: vLLM 0.20.2's FlashMLA and FlashAttention-3, FlashInfer 0.6.8. Exit code: 0, or 1 if a row is further
than 10% from its anchor.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

RECORD = Path(__file__).parents[2] / "results" / "h200" / "backends_decode.json"
NEAR = 0.1
BACKENDS = {"flashmla": "FlashMLA", "flashinfer_mla": "FlashInfer", "flashattn_mla": "FlashAttention-3"}
# (batch spec, heads): microseconds of each of BACKENDS, None where it was not measured.
ANCHORS: dict[tuple[str, int], tuple[float, float, float | None]] = {
    ("q1s8k", 16): (37.3, 26.9, None),
    ("q1s128k", 16): (94.5, 83.4, None),
    ("16q1s1k", 16): (28.1, 20.6, None),
    ("32q1s8k", 16): (104.5, 90.7, None),
    ("64q1s4k", 16): (107.7, 92.1, 98.0),
    ("128q1s2k", 16): (104.6, 89.6, None),
    ("128q1s8k", 16): (319.9, 301.1, 307.6),
    ("q1s8k", 128): (42.4, 26.2, None),
    ("q1s128k", 128): (106.4, 89.3, 93.8),
    ("16q1s1k", 128): (40.5, 26.2, None),
    ("32q1s8k", 128): (143.6, 145.0, None),
    ("64q1s4k", 128): (139.6, 141.5, 142.1),
    ("128q1s2k", 128): (153.3, 148.6, None),
    ("128q1s8k", 128): (529.6, 505.7, 544.9),
}


def compare(record: dict) -> Iterator[tuple[str, int, str, float, float]]:
    """Batch spec, heads, backend, its microseconds in the record, and its anchor; rows without a time are left out."""
    for row in record["rows"]:
        config = row["config"]
        where = (config["batch_spec"], config["num_q_heads"])
        if row["timing"] is None or where not in ANCHORS or config["backend"] not in BACKENDS:
            continue
        anchor = ANCHORS[where][list(BACKENDS).index(config["backend"])]
        if anchor is not None:
            yield *where, config["backend"], row["timing"]["median"] * 1e6, anchor


def table(record: dict) -> str:
    """Markdown: the record's time and what part of its anchor it is, a line a batch."""
    cells = {
        (spec, heads, name): f"{time:.1f} ({time / anchor:.2f})" for spec, heads, name, time, anchor in compare(record)
    }
    lines = [f"| batch | heads | {' | '.join(BACKENDS.values())} |", "|--|--|" + "--|" * len(BACKENDS)]
    for spec, heads in ANCHORS:
        found = [cells.get((spec, heads, name), "") for name in BACKENDS]
        if any(found):
            lines.append(f"| `{spec}` | {heads} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Command line; see the module's text."""
    record = json.loads(Path(arguments[0] if arguments else RECORD).read_text())
    print(table(record), end="")
    far = [row for row in compare(record) if abs(row[3] / row[4] - 1) > NEAR]
    for spec, heads, name, time, anchor in far:
        print(f"{name} on {spec} with {heads} heads: {time:.1f} us, anchor {anchor:.1f}", file=sys.stderr)
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
