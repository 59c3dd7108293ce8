"""Tables and plots in documents, made from records between markers: a document never says what its record does not.

    <!-- mlakit report
    record: ../results/h200/dense_decode.json
    operation: mla_decode
    columns: {ours: [hopper, triton], FlashMLA: flash_mla}
    baseline: FlashMLA
    -->
    (here the table is written)
    <!-- mlakit end -->

Keys are `record`, `operation`, `columns`, `baseline`, `jobs`, `select` and `value` (see `grid.TableOptions`); one
value needs no list. Paths are relative to the document. With `plot: FILE.png` the fractions of the limit are drawn into
that file, and what is written is the image, with `title` as its words. Markers in blocks of code are left alone.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mlakit.bench.files import write_atomically
from mlakit.report.grid import Shown, TableOptions
from mlakit.report.load import Value, load_records
from mlakit.report.markdown import markdown_report

_MARKED = re.compile(
    r"^```.*?^```"  # a block of code, whatever is in it
    r"|(?P<head>^<!-- mlakit report\n(?P<asked>(?:(?!-->).)*)-->\n)"
    r"(?:(?!^<!-- mlakit report).)*?(?P<end>^<!-- mlakit end -->)"
    r"|(?P<open>^<!-- mlakit report)",  # and nothing that ends it
    re.DOTALL | re.MULTILINE,
)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


_Words = Annotated[tuple[str, ...], BeforeValidator(_listed)]
_Values = Annotated[tuple[Value, ...], BeforeValidator(_listed)]


class _Asked(BaseModel):
    """What a marker says."""

    model_config = ConfigDict(extra="forbid")

    records: _Words = Field(alias="record")
    operations: _Words = Field(default=(), alias="operation")
    columns: dict[str, _Words] = {}
    baseline: _Words = ()
    jobs: _Words = ()
    select: dict[str, _Values] = {}
    value: Shown = "time"
    plot: str | None = None
    title: str = ""

    def options(self) -> TableOptions:
        return TableOptions(self.operations, self.columns, self.baseline, self.jobs, self.select, self.value)


def update_documents(paths: Sequence[Path], *, check: bool = False) -> list[Path]:
    """Make anew what stands between markers, and the plots that they name; `check` changes nothing.

    Returns:
        the documents and plots that were stale, each of them.

    Raises:
        ValueError: a document that cannot be read, no marker in any, a marker that cannot be meant, or a record that is
            missing or malformed; the message names document and line. Nothing has been written then.
    """
    texts = {path: _read(path) for path in paths}
    if not any(match["head"] or match["open"] for text in texts.values() for match in _MARKED.finditer(text)):
        raise ValueError(f"no `<!-- mlakit report` marker in {', '.join(map(str, paths))}")
    plots: dict[Path, bytes] = {}
    new = {path: _fill(path, text, plots) for path, text in texts.items()}
    for path, text in texts.items():
        if text != new[path] and not check:
            write_atomically(path, new[path])
    for path, drawn in plots.items():
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(drawn)
    return [path for path in paths if texts[path] != new[path]] + list(plots)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _fill(path: Path, text: str, plots: dict[Path, bytes]) -> str:
    def made(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 1
        if match["open"]:
            raise ValueError(f"{path}, line {line}: a marker without `<!-- mlakit end -->` after it")
        if not match["head"]:
            return match[0]
        try:
            return f"{match['head']}\n{_content(path, match['asked'], plots)}\n{match['end']}"
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error

    return _MARKED.sub(made, text)


def _content(path: Path, asked: str, plots: dict[Path, bytes]) -> str:
    wanted = _parse(asked)
    records = load_records([path.parent / name for name in wanted.records])
    if wanted.plot is None:
        return markdown_report(records, wanted.options())
    from mlakit.report.plot_limit import draw_limits, is_current

    file = path.parent / wanted.plot
    if not is_current(file, records, wanted.options(), wanted.title):
        plots[file] = draw_limits(records, wanted.options(), wanted.title)
    return f"![{wanted.title}]({wanted.plot})\n"


def _parse(asked: str) -> _Asked:
    try:
        content = yaml.safe_load(asked)
    except yaml.YAMLError as error:
        raise ValueError(f"the marker is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"the marker must hold keys and values, `record: FILE` at least; got {content!r}")
    try:
        return _Asked.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        known = ", ".join(field.alias or name for name, field in _Asked.model_fields.items())
        raise ValueError(f"{name}: {first['msg']}, got {first['input']!r}; keys are {known}") from error
