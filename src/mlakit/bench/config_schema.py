"""What a YAML config may say: its sections, their keys and values. No torch here."""

from collections.abc import Mapping
from itertools import product
from math import exp
from random import Random
from statistics import NormalDist
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mlakit.backends.registry import check_name, is_known, normalize
from mlakit.bench.batch_spec import BatchRequest, multiply_batch, parse_batch_spec, to_batch_spec
from mlakit.dims import preset

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


def in_our_spelling(data: Mapping[str, Any]) -> dict[str, Any]:
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
        return in_our_spelling(data) if isinstance(data, dict) else data

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
