"""The report as a page: one file that needs no network, with plotly.js, the data and the scripts inside."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from mlakit import __version__
from mlakit.report.circumstances import Column, brief, environments, warnings
from mlakit.report.load import LoadedRecord
from mlakit.report.rows import page_data

_SCRIPTS = (
    "data.js", "tables.js", "figures.js", "compare.js", "roofline.js", "curves.js", "maps.js", "main.js",
)  # fmt: skip


class MissingPackageError(ValueError):
    """A package that only reports need is not installed."""


def render_html(records: Sequence[LoadedRecord], *, baseline: str | None = None, title: str | None = None) -> str:
    """The page's text.

    Args:
        records: what to show; at least one row in all.
        baseline: the backend that speed-ups refer to at first; the page's reader may choose another.
        title: the page's head line; by default the records' names.

    Raises:
        ValueError: no record has a row, the baseline is in none of them, or plotly or jinja2 is not installed.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackageError(
            f"an HTML report needs {error.name}, which is not installed: pip install 'mlakit[report]'"
        ) from error
    data = page_data(records, baseline)
    script = "\n".join(_part(name) for name in _SCRIPTS)
    plotly = _in_a_script(get_plotlyjs())
    templates = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    safe = jinja2.utils.markupsafe.Markup
    devices = dict.fromkeys(session.device for record in records for session in record.sessions)
    started = sorted(session.started[:10] for record in records for session in record.sessions if session.started)
    names = [record.name for record in records]
    columns = environments(records)
    return templates.from_string(_part("page.html")).render(
        title=title or (f"mlakit: {names[0]}" if len(names) == 1 else f"mlakit: {len(names)} records"),
        devices=", ".join(devices),
        when=" to ".join(dict.fromkeys((started[0], started[-1]))) if started else "",
        summary=_summary(records, data),
        warnings=warnings(records),
        columns=columns,
        facts=_facts(columns),
        brief=brief(columns),
        conclusions=data["conclusions"],
        thresholds=data["thresholds"],
        differences=data["differences"],
        version=__version__,
        style=safe(_part("style.css")),
        data=safe(_json(data)),
        plotly=safe(plotly),
        script=safe(script),
        script_hashes=safe(" ".join(f"'{_hash(text)}'" for text in (plotly, script))),
    )


def _part(name: str) -> str:
    return (resources.files("mlakit.report") / "page" / name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that may stand in a script element: no `<` can end it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _in_a_script(text: str) -> str:
    """JavaScript that may stand in a script element."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(text: str) -> str:
    """What the page's policy knows a script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _summary(records: Sequence[LoadedRecord], data: dict[str, Any]) -> str:
    timed = sum(1 for row in data["rows"] if row["time"])
    names = ", ".join(record.name for record in records) if len(records) <= 6 else f"{len(records)} records"
    return f"{timed} times of {len(data['jobs'])} batches in {names}"


def _facts(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Rows of the table of environments: a fact's word, its text in each column, whether those differ."""
    return [
        {
            "word": word,
            "texts": [column.texts.get(word, "") for column in columns],
            "differs": len({column.texts.get(word) for column in columns}) > 1,
        }
        for word in dict.fromkeys(word for column in columns for word in column.texts)
    ]
