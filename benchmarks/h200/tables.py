"""The tables of README and docs, made from the records in results/h200.

    python benchmarks/h200/tables.py           # rewrite them between their markers
    python benchmarks/h200/tables.py --check   # exit code 1, and the file's name, where one is stale

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of TABLES.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "h200"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record


def _by_row(record: dict[str, Any], op: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Timed rows of an operation: row -> implementation -> what was measured."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["op"] == op and row.get("median_s"):
            found.setdefault(row["row"], {})[row["impl"]] = row
    return found


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *[list(row) for row in rows]]
    lines.insert(1, ["--"] * len(lines[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _where(record: dict[str, Any]) -> str:
    made = record["environment"]
    return (
        f"\n{record['ceilings']['device']}, torch {made['torch']}, triton {made['triton']}, {record['started'][:10]}.\n"
    )


def _time(row: dict[str, Any] | None, unit: float, digits: int) -> str:
    return f"{row['median_s'] * unit:.{digits}f}" if row else ""


def _compared(record: dict[str, Any], op: str, ours: tuple[str, ...], peers: dict[str, str], unit: float) -> str:
    """Times of each, and how many times as fast as the fastest peer our fastest is."""
    lines = []
    for name, found in _by_row(record, op).items():
        mine = [found[impl]["median_s"] for impl in ours if impl in found]
        theirs = [found[impl]["median_s"] for impl in peers if impl in found]
        if not mine or not theirs:
            continue
        cells = [_time(found.get(impl), unit, 1 if unit == 1e6 else 3) for impl in (*ours, *peers)]
        lines.append([name, *cells, f"{min(theirs) / min(mine):.2f}"])
    names = [f"mlakit, {impl}" for impl in ours]
    return _markdown(["", *names, *peers.values(), "times the best peer's speed"], lines) + _where(record)


def decode() -> str:
    """Dense decode, microseconds; requests x heads x keys."""
    peers = {"flash_mla": "FlashMLA", "fa3": "FlashAttention-3", "vllm_triton": "vLLM's Triton"}
    return _compared(_record("decode"), "mla_decode", ("hopper", "triton"), peers, 1e6)


def prefill() -> str:
    """Dense prefill in MHA mode, milliseconds; requests x tokens x heads."""
    peers = {"fa3": "FlashAttention-3", "sdpa cudnn": "cuDNN"}
    return _compared(_record("prefill"), "mla_prefill", ("hopper", "triton"), peers, 1e3)


def layer() -> str:
    """The layer, milliseconds, beside DeepSeek's own."""
    record = _record("layer")
    lines = []
    for name, found in _by_row(record, "layer").items():
        graph = found.get("fused, CUDA graph") or found["fused"]
        base = found.get(f"{graph['peer']}, CUDA graph", found[graph["peer"]])
        cells = [_time(found.get(impl), 1e3, 2) for impl in ("naive", "absorb", "naive+flash")]
        speed = f"{base['median_s'] / graph['median_s']:.1f}"
        lines.append(
            [
                name,
                *cells,
                _time(graph, 1e3, 3),
                f"{_time(base, 1e3, 2)} ({base['impl'].removeprefix('deepseek ')})",
                speed,
            ]
        )
    header = [
        "",
        "naive",
        "absorb",
        "naive+flash",
        "fused (decode: a CUDA graph)",
        "DeepSeek's own",
        "fused is faster by",
    ]
    return _markdown(header, lines) + _where(record)


TABLES: dict[str, Callable[[], str]] = {"decode": decode, "prefill": prefill, "layer": layer}


def fill(text: str) -> str:
    """The text with every marked table made anew.

    Raises:
        ValueError: a marker names no table.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"unknown table {match[2]!r}; valid: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return _MARKED.sub(table, text)


def main() -> int:
    """Rewrite or check the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is stale")
    check = parser.parse_args().check
    stale = [path for path in DOCUMENTS if fill(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{'stale' if check else 'rewritten'}: {path.relative_to(ROOT)}", file=sys.stderr)
        if not check:
            path.write_text(fill(path.read_text()))
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
