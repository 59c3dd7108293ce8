"""YAML configs read from files, with errors that name the file, the line and the nearest valid key. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mlakit.bench.config_schema import ConfigFile, RangeVariable, in_our_spelling
from mlakit.dims import nearest


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
    base = in_our_spelling({k: v for k, v in data.items() if k != "on_cpu"})
    try:
        overrides = in_our_spelling(overrides)
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
