"""From a config and the flags given beside it to the rows of a run. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from mlakit.backends import registry
from mlakit.backends.base import REORDER_BATCH_THRESHOLD, Attention, Parameter
from mlakit.bench.config import BenchmarkConfig, complete_dims, infer_attention
from mlakit.bench.config_file import LoadedConfig
from mlakit.bench.config_schema import AUTO, DEFAULT_LABEL, ConfigFile, Sweep
from mlakit.dims import nearest

# Sizes that a sweep may vary beside the backends' own parameters.
MODEL_PARAMETERS = (
    "num_q_heads", "num_kv_heads", "head_dim", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "num_layers", "block_size",
)  # fmt: skip
_DEFAULTS: dict[str, Any] = {"device": AUTO, "dtype": AUTO, "l2": "cold"}
# Every GPU from Ampere on computes bf16 fastest; most CPUs have no units for it and compute float32 faster.
_DEFAULT_DTYPE = {"cpu": "fp32", "cuda": "bf16"}


@dataclass(frozen=True)
class Plan:
    """The rows to measure, and what the user should know about how they came about."""

    rows: list[BenchmarkConfig]
    name: str
    description: str
    mode: Literal["compare", "decode_vs_prefill"]
    output: dict[str, str | None]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """A config file's content, or nothing, with the flags of the command line laid over it."""

    content: ConfigFile
    name: str
    notes: list[str]


def settings_for(loaded: LoadedConfig | None, flags: dict[str, Any], *, cpu: bool) -> Settings:
    """Lay flags over a config; flags win, and a note says which. `flags` has the sections of a config file.

    Raises:
        ValueError: the flags make no sense.
    """
    if loaded is None:
        return Settings(ConfigFile.model_validate(flags), "custom", [])
    notes = []
    base = loaded.content
    if cpu and loaded.cpu_changes:
        base = loaded.on_cpu
        notes.append(
            f"on a CPU {loaded.name} runs smaller: its on_cpu section replaces {', '.join(loaded.cpu_changes)}"
        )
    content = base.model_dump(exclude_unset=True, by_alias=True)
    if "batch_specs" in flags:
        replaced = [key for key in ("batch_spec_ranges", "batch_sizes", "batch_mixes") if content.pop(key, None)]
        notes += [f"--batch-specs replaces {key} of {loaded.name}" for key in replaced]
    if "backends" in flags and content.pop("backend", None):
        notes.append(f"--backends replaces backend of {loaded.name}")
    if "parameter_sweep" in flags and content.pop("parameter_sweeps", None):
        notes.append(f"--sweep-param replaces parameter_sweeps of {loaded.name}")
    for key, value in flags.items():
        before = content.get(key)
        another_sweep = key == "parameter_sweep" and before and before.get("param_name") != value["param_name"]
        if isinstance(value, dict) and isinstance(before, dict) and not another_sweep:
            for name, inner in value.items():
                _replace(content[key], name, inner, f"{key}.{name}", loaded.name, notes)
        else:
            _replace(content, key, value, key, loaded.name, notes)
    return Settings(ConfigFile.model_validate(content), loaded.name, notes)


def _replace(section: dict[str, Any], key: str, value: Any, shown: str, source: str, notes: list[str]) -> None:
    before = section.get(key)
    if before is not None and before != value:
        notes.append(f"the command line's {shown} ({_short(value)}) replaces {source}'s ({_short(before)})")
    section[key] = value


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value[:4])) + (f" and {len(value) - 4} more" if len(value) > 4 else "")
    return str(value.get("values", value)) if isinstance(value, dict) else str(value)


def planned_dtypes(loaded: LoadedConfig | None, flags: dict[str, Any]) -> dict[str, set[str]]:
    """By the kind of device, "cpu" or "cuda", the dtypes that a plan names on it: what to measure ceilings for.

    Raises:
        ValueError: there is no plan to make of it.
    """
    return {
        kind: {row.dtype for row in make_plan(settings_for(loaded, flags, cpu=kind == "cpu"), name).rows}
        for kind, name in (("cpu", "cpu"), ("cuda", "cuda:0"))
    }


def attention_of(content: ConfigFile, backends: Sequence[str]) -> Attention:
    """MLA or standard attention: as said, else as the model or its dimensions say, else as the backends do.

    Raises:
        ValueError: unknown model or backend.
    """
    if content.benchmark.attention:
        return content.benchmark.attention
    model = content.model
    if model.name is None and any(
        getattr(model, name) is not None
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    ):
        return "mla"
    return infer_attention(model.name, [registry.attention_kinds(name) for name in backends])


def make_plan(settings: Settings, device: str) -> Plan:
    """The rows of a run on a device ("cpu" or "cuda:0"), batch by batch so that what is compared is measured close
    together.

    Raises:
        ValueError: nothing to measure, an unknown parameter, or sizes that contradict each other.
    """
    content, notes = settings.content, list(settings.notes)
    specs = content.specs()
    if not specs:
        raise ValueError("no batch to measure: give --batch-specs or a --config (mlakit configs lists them)")
    backends = content.backend_names()
    kind = attention_of(content, backends)
    if not backends:
        backends = [name for name in registry.names() if kind in registry.attention_kinds(name)]
        notes.append(f"no backend was named; all that compute {kind} attention run: {', '.join(backends)}")
    parameters = _declared_parameters(backends)
    base = _base(content, kind, device)
    _check_sweeps(content, parameters, backends)
    outer = content.model_parameter_sweep
    inner = content.sweeps()
    # Sizes before batches and parameters within them, so that what is compared is measured close together.
    sizes = [sweep for sweep in inner if sweep.param_name in MODEL_PARAMETERS]
    inner = [sweep for sweep in inner if sweep not in sizes]
    sizes = [outer, *sizes] if outer is not None else sizes
    names = content.mix_names()

    rows = []
    for size_point in product(*(sweep.all_values() for sweep in sizes)):
        for spec in specs:
            for backend in backends:
                for point in product(*(sweep.all_values() for sweep in inner)):
                    row = {**base, "backend": backend, "batch_spec": spec, "batch_name": names.get(spec)}
                    _give_parameters(row, content, parameters[backend])
                    swept = [*zip(sizes, size_point, strict=True), *zip(inner, point, strict=True)]
                    rows += _expand_row(row, _apply(row, swept, parameters[backend]), content)
    rows = list({row.key: row for row in rows}.values())
    output = content.output.model_dump(by_alias=True)
    return Plan(rows, settings.name, content.description, content.mode, output, notes)


def _declared_parameters(backends: Sequence[str]) -> dict[str, dict[str, Parameter]]:
    found: dict[str, dict[str, Parameter]] = {}
    for name in backends:
        found[name] = registry.load(name).parameters if registry.has_adapter(name) else _AnyParameter()
    return found


class _AnyParameter(dict[str, Parameter]):
    """The parameters of a library that no adapter knows: whatever is named. Its rows say that there is no adapter."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Parameter:
        return REORDER_BATCH_THRESHOLD if name == REORDER_BATCH_THRESHOLD.name else Parameter(name, int, "")


def _base(content: ConfigFile, kind: Attention, device: str) -> dict[str, Any]:
    on = "cpu" if device == "cpu" else "cuda"
    given = {k: v for k, v in content.benchmark.model_dump().items() if v is not None}
    base = {**_DEFAULTS, **given, "device": device, "attention": kind}
    if base["dtype"] == AUTO:
        base["dtype"] = _DEFAULT_DTYPE[on]
    model = {k: v for k, v in content.model.model_dump().items() if v is not None and k != "name"}
    return {**base, **model, "model": content.model.name}


def _check_sweeps(content: ConfigFile, parameters: dict[str, dict[str, Parameter]], backends: Sequence[str]) -> None:
    model_sweep = content.model_parameter_sweep
    if model_sweep is not None and model_sweep.param_name not in MODEL_PARAMETERS:
        raise ValueError(
            f"model_parameter_sweep of unknown {model_sweep.param_name!r}; "
            f"{nearest(model_sweep.param_name, MODEL_PARAMETERS)}"
        )
    known = [MODEL_PARAMETERS, *parameters.values()]
    for sweep in content.sweeps():
        if not any(sweep.param_name in names for names in known):
            having = "; ".join(f"{name} has {', '.join(parameters[name]) or 'none'}" for name in backends)
            raise ValueError(
                f"no selected backend has a parameter {sweep.param_name!r} ({having}); "
                f"a sweep may also vary {', '.join(MODEL_PARAMETERS)}"
            )
        if model_sweep is not None and sweep.param_name == model_sweep.param_name:
            raise ValueError(f"a parameter is swept twice: {sweep.param_name}")


def _give_parameters(row: dict[str, Any], content: ConfigFile, known: dict[str, Parameter]) -> None:
    """Set what the config's section of the row's backend says."""
    backend = row["backend"]
    for name, given in content.backend_parameters.get(backend, {}).items():
        if name not in known:
            raise ValueError(f"{backend} has no parameter {name!r}; {nearest(name, known)}")
        _set_parameter(row, known[name], given)


def _apply(row: dict[str, Any], swept: Sequence[tuple[Sweep, Any]], known: dict[str, Parameter]) -> list[str]:
    """Set one point of the sweeps; returns their labels."""
    labels: list[str] = []
    for sweep, value in swept:
        if sweep.param_name in MODEL_PARAMETERS:
            if value != AUTO:
                row[sweep.param_name] = value
        elif sweep.param_name in known:
            _set_parameter(row, known[sweep.param_name], value)
        else:
            continue  # another backend's parameter: this one runs once, unswept, for comparison
        label_format = sweep.label_format
        if labels and label_format == DEFAULT_LABEL:
            label_format = label_format.removeprefix("{backend}_")  # the first label has named it
        labels.append(label_format.format(backend=row["backend"], param_name=sweep.param_name, value=value))
    return labels


def _set_parameter(row: dict[str, Any], parameter: Parameter, value: Any) -> None:
    parsed = parameter.parse(value)
    if parameter.name == REORDER_BATCH_THRESHOLD.name:
        row[parameter.name] = parsed
    else:
        row["parameters"] = {**row.get("parameters", {}), parameter.name: parsed}


def _expand_row(row: dict[str, Any], labels: list[str], content: ConfigFile) -> list[BenchmarkConfig]:
    """One row a variant: cold and hot L2, both pipelines."""
    label = " ".join(labels) or None
    row = complete_dims({k: v for k, v in row.items() if v is not None})
    rows = []
    for l2 in ("cold", "hot") if row["l2"] == "both" else (row["l2"],):
        title = f"{label or row['backend']} hot" if row["l2"] == "both" and l2 == "hot" else label
        if content.mode == "decode_vs_prefill":
            if row["attention"] != "mla":
                raise ValueError(
                    "mode decode_vs_prefill compares MLA's two pipelines; what is measured is standard attention"
                )
            for pipeline in ("decode", "prefill"):
                shown = f"{title or row['backend']}_{pipeline}"
                # The two pipelines start from the same query and cache only when their projections count.
                variant = {"scope": "pipeline", **row, "l2": l2, "pipeline": pipeline, "label": shown}
                rows.append(BenchmarkConfig(**variant))
        else:
            rows.append(BenchmarkConfig(**{**row, "l2": l2, "label": title}))
    return rows
