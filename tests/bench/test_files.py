"""Files that a command writes."""

import os
import stat
from pathlib import Path

import pytest

from mlakit.bench.files import output_file, write_atomically


def test_a_reader_never_sees_half(tmp_path, monkeypatch):
    path = tmp_path / "r.txt"
    write_atomically(path, "old")
    seen = []
    real = os.replace

    def watched(source, target):
        seen.append((Path(source).read_text(), path.read_text()))
        real(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_atomically(path, "new" * 10_000)
    assert seen == [("new" * 10_000, "old")]  # whole beside the old one, then in its place
    assert path.read_text() == "new" * 10_000


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "r.txt", "x")
        assert os.umask(umask) == umask  # reading the umask must not change it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "r.txt").stat().st_mode) == 0o666 & ~umask


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "r.txt", tmp_path / "elsewhere" / "kept.txt"
    link.symlink_to(target)
    write_atomically(link, "x")
    assert link.is_symlink()
    assert target.read_text() == "x"


def test_an_error_names_the_file_that_was_asked_for():
    with pytest.raises(OSError, match="No such file") as found:
        write_atomically(Path("/proc/r.txt"), "x")
    assert found.value.filename == "/proc/r.txt"


# A folder; a device, which root could put a file in the place of; a file system that takes no files, whatever its
# permission bits say; a file where a folder would have to be.
@pytest.mark.parametrize(
    ("path", "words"),
    [
        (".", "--out: '.' is a folder; expected a file"),
        ("/dev/null", "--out: '/dev/null' is no regular file; expected a file"),
        ("/proc/r.txt", "--out: cannot write into '/proc': "),
        ("file/r.txt", "--out: cannot make the folder 'file': "),
    ],
)
def test_what_cannot_be_written_is_said_beforehand(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    with pytest.raises(ValueError, match=words):
        output_file(Path(path), "--out")


def test_a_file_that_can_be_written_is_not_touched(tmp_path):
    path = tmp_path / "new" / "r.txt"
    assert output_file(path, "--out") == path
    assert list((tmp_path / "new").iterdir()) == []
    path.write_text("old")
    output_file(path, "--out")
    assert path.read_text() == "old"
    assert output_file(None, "--out") is None
