"""A run's record on disk: begun anew beside an earlier one, or gone on with."""

from pathlib import Path

from mlakit.bench.files import keep_earlier
from mlakit.bench.results import Record


def open_record(path: Path, fresh: Record, *, resume: bool) -> Record:
    """The record to fill and save at `path`: `fresh`, or with `resume` the one that is there, with `fresh`'s session.

    A record that is there and not gone on with keeps its content under another name, ending in .bak.

    Raises:
        ValueError: there is nothing to resume, it is no record, or it was measured on another device or by
            another executor.
    """
    if not path.exists():
        if resume:
            raise ValueError(f"nothing to resume: {path} does not exist")
        return fresh
    if not resume:
        keep_earlier(path)
        return fresh
    record = Record.load(path)
    (session,) = fresh.sessions
    if record.executor != fresh.executor:
        raise ValueError(
            f"{path} was measured with --executor {record.executor}; with {fresh.executor} rows may be on another GPU "
            f"than those they are compared with: resume with --executor {record.executor}, or start a new record"
        )
    before, now = record.sessions[-1].environment["device"]["name"], session.environment["device"]["name"]
    if before != now:
        raise ValueError(
            f"{path} was measured on {before}, and this is {now}: times would not compare; start a new record"
        )
    record.sessions.append(session)
    return record
