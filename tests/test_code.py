"""The code of a submission: recorded, copied, recognised."""

import json
import subprocess
from pathlib import Path

import pytest

from src import code


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one module and one configuration, committed."""
    place = tmp_path / "repository"
    for name, content in {
        "src/a.py": "a = 1\n\n\nb = 1\n",
        "conf/b.yaml": "b: 1\n",
        "notes.txt": "n\n",
        ".gitignore": "results/\n",
    }.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content)
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*who, "commit", "-qm", "all")):
        subprocess.run(["git", *command], cwd=place, check=True)
    monkeypatch.setattr(code, "ROOT", place)
    return place


def test_the_fingerprint_is_of_the_sources_only(repository: Path) -> None:
    before = code.fingerprint(repository)
    (repository / "notes.txt").write_text("other\n")
    assert code.fingerprint(repository) == before
    (repository / "conf/b.yaml").write_text("b: 2\n")
    changed = code.fingerprint(repository)
    (repository / "conf/b.yaml").rename(repository / "conf/c.yaml")
    assert len({before, changed, code.fingerprint(repository)}) == 3


def test_who_runs_it_where_is_not_in_the_fingerprint_nor_what_editors_leave(repository: Path) -> None:
    before = code.fingerprint(repository)
    (repository / "conf/cluster").mkdir()
    (repository / "conf/cluster/mysite.yaml").write_text("jobs: 1\n")
    (repository / "src/.#a.py").symlink_to("me@host.1:1")
    assert code.fingerprint(repository) == before


def test_a_submission_holds_the_commit_and_what_differs(repository: Path, tmp_path: Path) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True).stdout.strip()
    clean = code.submit(tmp_path / "code", snapshot=False)
    assert json.loads(clean.commit) == {"commit": head, "dirty": False}
    assert (tmp_path / "code" / clean.fingerprint / "dirty.diff").read_text() == ""
    assert clean.root == str(repository)

    (repository / "src/a.py").write_text("a = 2\n\n\nb = 1\n")
    (repository / "src/new.py").write_text("new = 1\n")
    subprocess.run(["git", "config", "color.ui", "always"], cwd=repository, check=True)
    dirty = code.submit(tmp_path / "code", snapshot=False)
    assert json.loads(dirty.commit) == {"commit": head, "dirty": True}
    patch = tmp_path / "code" / dirty.fingerprint / "dirty.diff"
    subprocess.run(["git", "stash", "-qu"], cwd=repository, check=True)
    subprocess.run(["git", "apply", patch], cwd=repository, check=True)
    assert code.fingerprint(repository) == dirty.fingerprint


def test_a_snapshot_is_the_code_as_it_was(repository: Path, tmp_path: Path) -> None:
    taken = code.submit(tmp_path / "code", snapshot=True)
    (repository / "src/a.py").write_text("a = 2\n")
    assert code.fingerprint(Path(taken.root)) == taken.fingerprint != code.fingerprint(repository)
    assert not (Path(taken.root) / "notes.txt").exists()
    (repository / "src/a.py").write_text("a = 1\n\n\nb = 1\n")
    assert code.submit(tmp_path / "code", snapshot=True) == taken


def test_a_submitted_run_tells_the_commit_of_its_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code.SUBMITTED, '{"commit": "c", "dirty": true}')
    assert code.commit() == {"commit": "c", "dirty": True}


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(code, "ROOT", tmp_path)
    monkeypatch.delenv(code.SUBMITTED, raising=False)
    assert code.commit() == {"commit": "unknown", "dirty": False}
    monkeypatch.setenv("PATH", "")
    assert code.commit() == {"commit": "unknown", "dirty": False}
