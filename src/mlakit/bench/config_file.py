"""YAML configs: what they may say, and errors that name the file, the line and the nearest valid key. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import product
from math import exp
from pathlib import Path
from random import Random
from statistics import NormalDist
from string import Formatter
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mlakit.backends.registry import check_name, is_known, normalize
from mlakit.bench.batch_spec import BatchRequest, multiply_batch, parse_batch_spec, to_batch_spec
from mlakit.dims import nearest, preset

AUTO = "auto"
DEFAULT_LABEL = "{backend}_{param_name}_{value}"


def _check_spec(spec: str) -> str:
    parse_batch_spec(spec)
    return spec


def _check_model(name: str) -> str:
    preset(name)
    return name


ModelName = Annotated[str, AfterValidator(_check_model)]


def _check_value(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("must be a whole number or text")
    return value


Value = Annotated[int | str, BeforeValidator(_check_value)]
BackendName = Annotated[str, AfterValidator(check_name)]  # in our spelling from here on
BatchSpec = Annotated[str, AfterValidator(_check_spec)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSection(_Section):
    """Dimensions: a preset's `name`, and whatever is given beside it."""

    name: ModelName | None = None
    num_layers: int | None = None
    num_q_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    block_size: int | None = None


class RangeVariable(_Section):
    """Values from `start` to `stop` in steps of `step`, `stop` included unless `end_inclusive` is false."""

    start: int
    stop: int
    step: int = Field(default=1, ge=1)
    end_inclusive: bool = True

    def values(self) -> list[int]:
        """The values."""
        return list(range(self.start, self.stop + (1 if self.end_inclusive else 0), self.step))


class SpecRange(BaseModel):
    """A `template` such as "q{q_len}s1k" and its variables; several variables give the product."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, RangeVariable] = Field(init=False)

    template: str

    @model_validator(mode="after")
    def _fits(self) -> "SpecRange":
        wanted = {name for _, name, _, _ in Formatter().parse(self.template) if name is not None}
        given = set(self.__pydantic_extra__)
        if wanted != given:
            has, got = (", ".join(sorted(names)) or "none" for names in (wanted, given))
            raise ValueError(f"template {self.template!r} has the variables {has}; given are {got}")
        if not self.specs():
            raise ValueError(f"the ranges of {self.template!r} hold no value: stop lies before start")
        for spec in self.specs():
            parse_batch_spec(spec)
        return self

    def specs(self) -> list[str]:
        """The batch specs, the last variable fastest."""
        variables = self.__pydantic_extra__
        choices = product(*(variable.values() for variable in variables.values()))
        return [self.template.format(**dict(zip(variables, values, strict=True))) for values in choices]


class Sweep(_Section):
    """Values of one parameter to go through; `label_format` names each row with {backend}, {param_name} and {value}."""

    param_name: str
    values: list[Value] = Field(min_length=1)
    include_auto: bool = False
    label_format: str = DEFAULT_LABEL

    @model_validator(mode="after")
    def _label(self) -> "Sweep":
        try:
            self.label_format.format(backend="", param_name="", value="")
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ValueError(
                f"label_format may use {{backend}}, {{param_name}} and {{value}}, got {self.label_format!r}"
            ) from None
        return self

    def all_values(self) -> list[int | str]:
        """The values, "auto" first if it is asked for."""
        return [*([AUTO] if self.include_auto and AUTO not in self.values else []), *self.values]


class Lengths(_Section):
    """Lengths drawn from a distribution, rounded, and kept within `min` and `max`.

    "lognormal" has a `median` and a `sigma` (of the logarithm): many short ones and a long tail, as requests have.
    "normal" has a `mean` and a `std`. "uniform" needs `min` and `max` alone.
    """

    distribution: Literal["lognormal", "normal", "uniform"] = "lognormal"
    median: float | None = Field(default=None, gt=0)
    sigma: float | None = Field(default=None, ge=0)
    mean: float | None = Field(default=None, gt=0)
    std: float | None = Field(default=None, ge=0)
    min: int = Field(default=1, ge=0)
    max: int = Field(ge=0)

    @model_validator(mode="after")
    def _complete(self) -> "Lengths":
        given = {name for name in ("median", "sigma", "mean", "std") if getattr(self, name) is not None}
        wanted = _SHAPE[self.distribution]
        if given != set(wanted):
            has = ", ".join(sorted(given)) or "none"
            raise ValueError(
                f"{self.distribution} wants {' and '.join(wanted) or 'min and max alone'}; given are {has}"
            )
        if self.min > self.max:
            raise ValueError(f"min must not be above max, got {self.min} and {self.max}")
        return self

    def draw(self, rng: Random) -> int:
        """One length."""
        quantile = min(max(rng.random(), 1e-12), 1 - 1e-12)  # random() and inv_cdf: the same on every machine
        if self.distribution == "uniform":
            return self.min + int(quantile * (self.max - self.min + 1))
        normal = NormalDist().inv_cdf(quantile)
        if self.distribution == "lognormal":
            assert self.median is not None
            assert self.sigma is not None
            value = self.median * exp(self.sigma * normal)
        else:
            assert self.mean is not None
            assert self.std is not None
            value = self.mean + self.std * normal
        return min(max(round(value), self.min), self.max)


_SHAPE: dict[str, tuple[str, ...]] = {"lognormal": ("median", "sigma"), "normal": ("mean", "std"), "uniform": ()}


def _lengths(value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return {"distribution": "uniform", "min": value, "max": value} if is_number else value


class MixPart(_Section):
    """Requests of one kind: `q_len` new tokens each behind `context` tokens, both `Lengths`, or a number."""

    requests: int = Field(ge=1)
    q_len: Annotated[Lengths, BeforeValidator(_lengths)] = Lengths(distribution="uniform", min=1, max=1)
    context: Annotated[Lengths, BeforeValidator(_lengths)] = Lengths(distribution="uniform", min=0, max=0)

    @model_validator(mode="after")
    def _some_tokens(self) -> "MixPart":
        if self.q_len.min < 1:
            raise ValueError(f"q_len must be at least 1, got {self.q_len.min}")
        return self


class BatchMix(_Section):
    """A batch of many lengths, drawn once from `seed`: the same requests on every machine, in the order of `parts`."""

    name: str = Field(min_length=1)
    seed: int = 0
    parts: list[MixPart] = Field(min_length=1)

    def spec(self) -> str:
        """Its batch spec, which holds every request."""
        rng = Random(self.seed)
        requests = []
        for part in self.parts:
            for _ in range(part.requests):
                q_len, context = part.q_len.draw(rng), part.context.draw(rng)
                requests.append(BatchRequest(q_len, q_len + context))
        return to_batch_spec(requests)


class BenchmarkSection(_Section):
    """How to measure; each field as the flag of that name."""

    attention: Literal["mla", "standard"] | None = None
    device: str | None = None
    dtype: Literal["bf16", "fp16", "fp32", "auto"] | None = None
    repeats: int | None = Field(default=None, ge=1)
    warmup_iters: int | None = Field(default=None, ge=0)
    profile_memory: bool | None = None
    l2: Literal["cold", "hot", "both"] | None = None
    cuda_graph: bool | None = None
    scope: Literal["attention", "pipeline"] | None = None
    check: bool | None = None
    timeout: float | None = Field(default=None, gt=0)
    seed: int | None = None


class OutputSection(_Section):
    """Where results go; what is not named goes to a folder of the run's own."""

    csv: str | None = None
    json_: str | None = Field(default=None, alias="json")
    plot: str | None = None
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


def _in_our_spelling(data: Mapping[str, Any]) -> dict[str, Any]:
    """Take what vLLM's own configs write: settings and backends' sections at the top, `model` as a mere name."""
    data = dict(data)
    if isinstance(data.get("model"), str):
        data["model"] = {"name": data["model"]}
    for name in ("device", "repeats", "warmup_iters", "profile_memory"):
        if name in data:
            section = dict(data.get("benchmark") or {})
            if name in section:
                raise ValueError(f"{name} is given twice: at the top and in benchmark")
            data["benchmark"] = {**section, name: data.pop(name)}
    sections: dict[str, Any] = {}
    at_top = [k for k in data if k not in ConfigFile.model_fields and isinstance(k, str) and is_known(normalize(k))]
    for name, section in [*(data.get("backend_parameters") or {}).items(), *((k, data.pop(k)) for k in at_top)]:
        known = normalize(name) if isinstance(name, str) else name
        if known in sections:
            raise ValueError(f"the parameters of {known} are given twice")
        sections[known] = {} if section is None else section
    if sections:
        data["backend_parameters"] = sections
    return data


class ConfigFile(_Section):
    """A whole config: what to measure, on what, and how."""

    description: str = ""
    mode: Literal["compare", "decode_vs_prefill"] = "compare"
    model: ModelSection = ModelSection()
    batch_specs: list[BatchSpec] = []
    batch_spec_ranges: list[SpecRange] = []
    batch_sizes: list[Annotated[int, Field(ge=1)]] = []
    batch_mixes: list[BatchMix] = []
    backends: list[BackendName] = []
    backend: BackendName | None = None
    backend_parameters: dict[BackendName, dict[str, Value]] = {}
    parameter_sweep: Sweep | None = None
    parameter_sweeps: list[Sweep] = []
    model_parameter_sweep: Sweep | None = None
    benchmark: BenchmarkSection = BenchmarkSection()
    output: OutputSection = OutputSection()
    on_cpu: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, data: Any) -> Any:
        return _in_our_spelling(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _sound(self) -> "ConfigFile":
        if self.backend and self.backends:
            raise ValueError("give backend or backends, not both")
        names = [mix.name for mix in self.batch_mixes]
        if len(set(names)) != len(names):
            raise ValueError(f"batch_mixes have a name twice: {', '.join(names)}")
        swept = [sweep.param_name for sweep in self.sweeps()]
        if len(set(swept)) != len(swept):
            raise ValueError(f"a parameter is swept twice: {', '.join(swept)}")
        for spec in self.specs():
            parse_batch_spec(spec)
        return self

    def backend_names(self) -> list[str]:
        """The backends asked for, without repeats."""
        return list(dict.fromkeys([self.backend] if self.backend else self.backends))

    def specs(self) -> list[str]:
        """Every batch spec: the list and the ranges, each times every batch size, and the mixes; without repeats."""
        specs = [*self.batch_specs, *(spec for r in self.batch_spec_ranges for spec in r.specs())]
        if self.batch_sizes:
            specs = [multiply_batch(spec, size) for size in self.batch_sizes for spec in specs]
        return list(dict.fromkeys([*specs, *self.mix_names()]))

    def mix_names(self) -> dict[str, str]:
        """The mixes' names, by spec."""
        return {mix.spec(): mix.name for mix in self.batch_mixes}

    def sweeps(self) -> list[Sweep]:
        """The sweeps of parameters, outermost first; a run goes through their product."""
        return [*([self.parameter_sweep] if self.parameter_sweep else []), *self.parameter_sweeps]


@dataclass(frozen=True)
class LoadedConfig:
    """A config, where it is from, and its variant for a CPU (the same if it has none)."""

    name: str
    content: ConfigFile
    on_cpu: ConfigFile
    cpu_changes: list[str] = field(default_factory=list)


def packaged() -> dict[str, Path]:
    """The configs that come with mlakit, by name."""
    folder = Path(str(resources.files("mlakit") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name_or_path: str) -> Path:
    """The file that `--config` means: an existing path, or a packaged config's name (also as vLLM writes it,
    `configs/mla_decode.yaml`).

    Raises:
        ValueError: neither; the message gives the nearest packaged name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = packaged()
    if path.stem in known and (name_or_path == path.stem or path.parts[-2:] == ("configs", f"{path.stem}.yaml")):
        return known[path.stem]
    if path.suffix or len(path.parts) > 1:
        raise ValueError(f"config file {name_or_path} does not exist")
    raise ValueError(f"unknown config {name_or_path!r}; {nearest(name_or_path, known)}")


def load(name_or_path: str) -> LoadedConfig:
    """Read and validate a config.

    Raises:
        ValueError: no such file, no YAML, or content that cannot be meant; one line with file, line number and what
            would be right.
    """
    path = find(name_or_path)
    shown = name_or_path if path.suffix and str(path) == name_or_path else path.name
    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{shown}{where}: no YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{shown}: a config is a mapping of keys such as batch_specs and backends, got {type(data).__name__}"
        )
    lines = _Lines(shown, node)
    content = _validate(data, lines, ())
    overrides = content.on_cpu
    if not overrides:
        return LoadedConfig(path.stem, content, content)
    base = _in_our_spelling({k: v for k, v in data.items() if k != "on_cpu"})
    try:
        overrides = _in_our_spelling(overrides)
    except ValueError as error:
        raise ValueError(f"{lines.where(('on_cpu',))}: on_cpu: {error}") from error
    for together in ({"batch_specs", "batch_spec_ranges", "batch_mixes"}, {"backend", "backends"}):
        if together & set(overrides):  # one of them replaces all
            base = {k: v for k, v in base.items() if k not in together}
    on_cpu = _validate(_merge(base, overrides), lines, ("on_cpu",))
    return LoadedConfig(path.stem, content, on_cpu, sorted(overrides))


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


class _Lines:
    """Line numbers of a YAML document's keys; finds duplicate keys, which YAML forbids and PyYAML takes."""

    def __init__(self, shown: str, node: yaml.Node | None) -> None:
        self.shown = shown
        self._lines: dict[tuple[Any, ...], int] = {}
        if node is not None:
            self._walk(node, (), ())

    def _walk(self, node: yaml.Node, path: tuple[Any, ...], above: tuple[yaml.Node, ...]) -> None:
        line = node.start_mark.line + 1
        if any(node is other for other in above):
            raise ValueError(f"{self.shown}:{line}: an alias refers to what it is part of")
        self._lines.setdefault(path, line)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line + 1
                if (*path, key.value) in self._lines:
                    raise ValueError(f"{self.shown}:{line}: key {key.value!r} is there twice")
                self._lines[(*path, key.value)] = line
                self._walk(value, (*path, key.value), (*above, node))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._walk(value, (*path, index), (*above, node))

    def where(self, path: tuple[Any, ...]) -> str:
        """File and line ("a.yaml:3") of a key, or of the nearest thing above it that the file holds."""
        return f"{self.shown}:{self._lines.get(self._known(path), 1)}"

    def where_first(self, *paths: tuple[Any, ...]) -> str:
        """The same for the one of several paths of which the file holds most."""
        return self.where(max(paths, key=lambda path: len(self._known(path)) - len(path)))

    def _known(self, path: tuple[Any, ...]) -> tuple[Any, ...]:
        while path and path not in self._lines:
            path = path[:-1]
        return path


def _validate(data: dict[str, Any], lines: _Lines, prefix: tuple[str, ...]) -> ConfigFile:
    try:
        return ConfigFile.model_validate(data)
    except ValidationError as error:
        # A misspelled key also leaves its right spelling missing: the first is the one to hear of.
        found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        loc = found[0]["loc"]
        tail = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        # benchmark and backend_parameters may have been written at the top, as vLLM does.
        paths = [(*prefix, *loc), loc, *([(*prefix, *loc[1:]), loc[1:]] if loc[:1] in _AT_TOP else [])]
        raise ValueError(f"{lines.where_first(*paths)}: {_explain(found[0])}{tail}") from None


_AT_TOP = (("benchmark",), ("backend_parameters",))


def _explain(error: Any) -> str:
    loc, kind = error["loc"], error["type"]
    name = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        section = _section(loc[:-1])
        inside = f" in {'.'.join(map(str, loc[:-1]))}" if loc[:-1] else ""
        return f"unknown key {str(loc[-1])!r}{inside}; {nearest(str(loc[-1]), section)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    given = "" if kind == "value_error" or kind == "missing" else f", got {error['input']!r}"
    return f"{name}: {message[:1].lower()}{message[1:]}{given}"


def _section(loc: tuple[Any, ...]) -> list[str]:
    """Valid keys of the section at a location."""
    model: Any = ConfigFile
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else RangeVariable
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return [f.alias or n for n, f in model.model_fields.items()]
