"""What a record says of where it was made."""

import subprocess

from mlakit.bench import environment


def test_the_caller_may_say_the_commit(monkeypatch):
    """Where the source was copied, its history may be missing or older than it."""
    monkeypatch.setenv("MLAKIT_COMMIT", "0123456789ab")
    assert environment.commit() == "0123456789ab"


def test_a_checkout_knows_its_commit_and_whether_it_was_changed(monkeypatch, tmp_path):
    monkeypatch.delenv("MLAKIT_COMMIT", raising=False)
    package = tmp_path / "mlakit"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(environment.mlakit, "__file__", str(package / "__init__.py"))
    assert environment.commit() is None
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = environment.commit()
    assert head is not None
    assert len(head) == 12
    (package / "__init__.py").write_text("changed = 1\n")
    assert environment.commit() == f"{head}+dirty"
