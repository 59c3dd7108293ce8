"""Files that a command writes: looked at before anything is measured, and written in one step."""

import os
import tempfile
from datetime import datetime
from pathlib import Path

RUNS = Path("mlakit-runs")


def run_folder(name: str) -> Path:
    """A folder for a run that begins now, not made yet."""
    return RUNS / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def output_folder(path: Path | None, name: str, flag: str) -> Path:
    """The folder to write into, made if need be: as told, else that of a run of this name.

    Raises:
        ValueError: it cannot be made, or nothing can be written into it; the message begins with `flag`.
    """
    folder = path or run_folder(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag}: cannot make the folder {str(folder)!r}: {error.strerror or error}") from None
    try:
        # Written, as permission bits say nothing of a file system that is read-only or makes its own files.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".mlakit."):
            pass
    except OSError as error:
        raise ValueError(f"{flag}: cannot write into {str(folder)!r}: {error.strerror or error}") from None
    return folder


def output_file(path: Path | None, flag: str) -> Path | None:
    """The file to write, None if there is to be none; its folder is made if need be.

    Raises:
        ValueError: it is a folder or a device, which `write_atomically` would put a file in the place of, or nothing
            can be written there; the message begins with `flag`.
    """
    if path is None:
        return None
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise ValueError(f"{flag}: {str(path)!r} is {kind}; expected a file to write to")
    output_folder(path.parent, "", flag)
    return path


def keep_earlier(path: Path) -> None:
    """Give a file that a new one is to replace another name, ending in .bak: no measurement is lost at once."""
    if path.exists():
        path.replace(path.with_name(path.name + ".bak"))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step, creating its folder if need be. A link stays, and what it names is written.

    Raises:
        OSError: it cannot be written; `filename` is the path.
    """
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)  # mkstemp's 0600 is for secrets
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:  # of the user's file, not of the one beside it
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
