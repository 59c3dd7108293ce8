"""`mlakit recommend`: which backend, with which settings, for each workload on this machine.

Every backend runs as it comes; those close to the best try their own settings; the finalists run again on other data.
Who is not faster in each of these rounds, beyond the noise, ties.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlakit.studies.num_splits import PARAMETERS as SPLITS
from mlakit.studies.num_splits import measure_until_worse, values_for

if TYPE_CHECKING:
    from mlakit.bench.results import BenchmarkResult
    from mlakit.studies.bench_rows import Rows
    from mlakit.studies.recommend_report import Advice, Setting

NAME = "recommend"
_CONTENDERS = 1.3  # backends this close to the best try their settings
_FINALISTS = 1.1  # settings this close to the best are measured again
_MOST_FINALISTS = 5
_ROUNDS = 3


def thresholds_for(backend: str, spec: str) -> list[int]:
    """Values of reorder_batch_threshold that divide a batch otherwise than the backend's own does; none where both of
    its pipelines are the same.
    """
    from mlakit.backends import registry
    from mlakit.bench.batch_spec import parse_batch_spec

    loaded = registry.load(backend)
    lens = sorted({request.q_len for request in parse_batch_spec(spec)})
    if lens == [1] or loaded.decode_mode == loaded.prefill_mode:
        return []
    own = max((q_len for q_len in lens if q_len <= loaded.default_reorder_batch_threshold), default=0)
    return [threshold for threshold in (0, *lens) if threshold != own]


def scope_for(spec: str, asked: str | None, attention: str) -> str:
    """What to time: the projections count where backends may send a request through either pipeline."""
    from mlakit.bench.batch_spec import parse_batch_spec

    if asked or attention == "standard":
        return asked or "attention"
    return "attention" if all(request.is_decode for request in parse_batch_spec(spec)) else "pipeline"


def advise(rows: Rows, spec: str, backends: Sequence[str], *, scope: str, tune: bool, name: str | None) -> Advice:
    """Measure one workload."""
    from mlakit.studies.recommend_report import Advice, Setting

    def measure(setting: Setting, seed: int = 0) -> BenchmarkResult:
        fields: dict[str, Any] = {"parameters": dict(setting.parameters), "scope": scope, "seed": seed}
        if setting.threshold is not None:
            fields["reorder_batch_threshold"] = setting.threshold
        return rows.measure(setting.backend, spec, label=str(setting), batch_name=name, **fields)

    found = {setting: [measure(setting)] for setting in map(Setting, backends)}
    timed = {s: r[0].timing.median for s, r in found.items() if r[0].timing}
    best = min(timed.values(), default=None)
    if tune and best is not None:
        for setting in [s for s, time in timed.items() if time <= _CONTENDERS * best]:
            for tuned, row in _tune(setting, spec, measure):
                found[tuned] = [row]
    advice = Advice(spec, name or spec, scope, found)
    for setting in advice.close(_FINALISTS, _MOST_FINALISTS):
        for seed in range(1, _ROUNDS):
            found[setting].append(measure(setting, seed))
    return advice


def _tune(setting: Setting, spec: str, measure: Any) -> list[tuple[Setting, BenchmarkResult]]:
    """Rows of a backend's settings, one changed at a time."""
    from mlakit.backends import registry
    from mlakit.studies.recommend_report import Setting

    tried: list[tuple[Setting, BenchmarkResult]] = []

    def attempt(changed: Setting) -> BenchmarkResult:
        row: BenchmarkResult = measure(changed)
        tried.append((changed, row))
        return row

    parameters = registry.load(setting.backend).parameters
    for name, parameter in parameters.items():
        if name in SPLITS:
            measure_until_worse(
                lambda n, name=name: attempt(Setting(setting.backend, ((name, n),))),  # type: ignore[misc]
                values_for(setting.backend, spec, None),
                None,
            )
        elif name == "reorder_batch_threshold":
            for threshold in thresholds_for(setting.backend, spec):
                attempt(Setting(setting.backend, (), threshold))
        elif parameter.tunes:
            for value in parameter.candidates():
                attempt(Setting(setting.backend, ((name, value),)))
    return tried


def workloads(args: argparse.Namespace) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """The workloads on a GPU and on a CPU, spec to name, from the flags or a config; its models go into `args.models`.

    Raises:
        ValueError: none is given, a spec is malformed, or there is no such config.
    """
    from mlakit.bench import config_file
    from mlakit.bench.batch_spec import parse_batch_spec

    if args.batch_specs and args.config:
        raise ValueError("give --batch-specs or --config, not both")
    if args.config:
        loaded = config_file.load(args.config)
        args.models = (loaded.content.model.name, loaded.on_cpu.model.name)
        gpu, cpu = (
            {spec: content.mix_names().get(spec) for spec in content.specs()}
            for content in (loaded.content, loaded.on_cpu)
        )
        return gpu, cpu
    if not args.batch_specs:
        raise ValueError('give your workloads, as --batch-specs 64q1s4k "2q2k_32q1s1k", or a --config')
    for spec in args.batch_specs:
        parse_batch_spec(spec)
    given: dict[str, str | None] = dict.fromkeys(args.batch_specs)
    return given, given


def run(args: argparse.Namespace) -> int:
    """Measure and print the advice; returns the exit code: 0, or 1 if nothing could be measured.

    Raises:
        ValueError: bad input.
    """
    from mlakit.backends import registry
    from mlakit.bench.config import infer_attention
    from mlakit.bench.table import make_console
    from mlakit.studies.bench_rows import open_rows, print_findings
    from mlakit.studies.recommend_report import findings, print_advice

    on_gpu, on_cpu = workloads(args)
    named = [registry.check_name(name) for name in args.backends or []]
    model = args.model or getattr(args, "models", (None,))[0]
    attention = infer_attention(model, [registry.attention_kinds(name) for name in named])
    backends = named or [name for name in registry.names() if attention in registry.attention_kinds(name)]
    wrong = [name for name in backends if attention not in registry.attention_kinds(name)]
    if wrong:
        raise ValueError(f"--backends: {wrong[0]} computes no {attention} attention")
    advice: list[Advice] = []
    with open_rows(args, NAME, "Which backend, with which settings, for each workload?") as rows:
        todo = on_cpu if rows.device.name == "cpu" else on_gpu
        reasons: dict[str, str] = {}
        for spec, name in todo.items():
            there = [backend for backend in backends if backend not in reasons]
            scope = scope_for(spec, args.scope, attention)
            advice.append(advise(rows, spec, there, scope=scope, tune=args.tune, name=name))
            reasons |= advice[-1].unavailable()
        lines = findings(advice)
        rows.finish(lines)
    out = make_console()
    print_advice(out, advice, f"recommended for {rows.title}")
    print_findings(out, lines, reasons)
    if not any(each.winner for each in advice):
        print("mlakit: no row succeeded", file=sys.stderr)
        return 1
    return 0
