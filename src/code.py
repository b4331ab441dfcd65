"""The code that runs: its commit, what differs from that, and a fingerprint by which a job knows the code that was submitted.

Imports nothing heavy.
"""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from src.results import write_atomically

ROOT = Path(__file__).resolve().parent.parent
# what decides a run; who runs it where, and who is told of it, doesn't
SOURCES = ("src/**/*.py", "experiments/**/*.py", "paper_figures/*.py", "conf/**/*.yaml")
INDECISIVE = ("conf/cluster", "conf/tracker")
# in the environment of a submitted run: what `commit` answers, as JSON
SUBMITTED = "BACKLOCK_SUBMITTED"


@dataclass(frozen=True)
class Code:
    """The code of a submission.

    Attributes:
        fingerprint: of the files that decide a run.
        commit: of the repository, and dirty: what `commit` answers, as JSON.
        root: the folder that runs import it from.
    """

    fingerprint: str
    commit: str
    root: str


def commit() -> dict[str, object]:
    """Commit of this repository ("unknown" without one) and dirty, whether files differ from it.

    A submitted run tells what was so at its submission, for its code was checked to be still the same.
    """
    if submitted := os.environ.get(SUBMITTED):
        return json.loads(submitted)
    return {"commit": _git("rev-parse", "HEAD").strip() or "unknown", "dirty": bool(_git("status", "--porcelain"))}


def fingerprint(root: Path) -> str:
    """The first ten hexadecimal digits of sha256 over the names and contents of the sources that decide a run."""
    digest = hashlib.sha256()
    for file in _sources(root):
        if file.relative_to(root).as_posix().startswith(INDECISIVE):
            continue
        digest.update(f"{file.relative_to(root).as_posix()}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:10]


def submit(place: Path, snapshot: bool) -> Code:
    """Record the code as it is now: commit.json, dirty.diff and, if asked for, a copy to run from.

    Args:
        place: the folder to keep it in, under its fingerprint.
        snapshot: whether to copy it.
    """
    code = Code(fingerprint(ROOT), json.dumps(commit()), str(ROOT))
    folder = place / code.fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "commit.json", code.commit + "\n")
    write_atomically(folder / "dirty.diff", _difference())
    if not snapshot:
        return code
    copy = folder / "snapshot"
    if not copy.exists():
        _copy(copy)
    return Code(code.fingerprint, code.commit, str(copy.resolve()))


def _copy(copy: Path) -> None:
    """Copy the sources to a temporary name, and rename it."""
    unfinished = copy.with_name(f".{copy.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    for file in _sources(ROOT):
        target = unfinished / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    unfinished.rename(copy)


def _sources(root: Path) -> list[Path]:
    # editors leave links to nowhere whose names begin with a dot
    return sorted(file for pattern in SOURCES for file in root.glob(pattern) if file.is_file() and not file.name.startswith("."))


def _difference() -> str:
    """The patch from the commit to the files as they are, new ones included."""
    new = _git("ls-files", "--others", "--exclude-standard", "--", *(pattern.partition("/")[0] for pattern in SOURCES)).splitlines()
    # git says 1 when files differ
    diff = ("diff", "--no-ext-diff", "--no-textconv", "--binary")
    patches = [_git(*diff, "HEAD"), *(_git(*diff, "--no-index", "/dev/null", file, code=1) for file in new)]
    return "".join(patches)


def _git(*arguments: str, code: int = 0) -> str:
    """What git answers; "" where there is no git or repository, or it exits with another code."""
    try:
        command = ["git", "-c", "color.ui=false", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == code else ""
