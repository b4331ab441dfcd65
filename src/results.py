"""The run folder: written atomically, read back as one table.

`<results_dir>/<experiment>/<data>/<scale>/seed<k>-<hash>/` holds config.yaml, rows.parquet, verdicts.json, provenance.json,
status.json, figure.png and log.txt. Imports neither torch nor wandb.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import yaml
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from src.config import Config
from src.errors import UserError

CONFIG = TypeAdapter(Config)
AGAIN = "move its folder away, or run the experiment again with force=true"
# what decides where and how a run is made, but none of its numbers
INDECISIVE = ("results_dir", "force", "device", "tracker", "claim", "model_keys", "cluster", "detach", "snapshot")


def to_plain(config: Config) -> dict[str, Any]:
    """A config as plain containers, without the axes that its experiment has not."""
    plain = asdict(config)
    plain["grid"] = {axis: value for axis, value in plain["grid"].items() if value is not None}
    return plain


def decisive(config: Config) -> dict[str, Any]:
    """The part of a config that decides the numbers, as plain containers."""
    plain = {key: value for key, value in to_plain(config).items() if key not in INDECISIVE}
    plain["experiment"] = config.claim.name
    plain["data"] = {key: value for key, value in plain["data"].items() if key not in ("root", "mirrors", "fallback")}
    return plain


def run_hash(config: Config) -> str:
    """The hash that names the run of a config."""
    return hash_of(decisive(config))


def hash_of(plain: Mapping[str, Any]) -> str:
    """The first ten hexadecimal digits of sha256 over the decisive part of a config."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]


def from_plain(plain: object) -> Config:
    """The config that `to_plain` made plain.

    Raises: ValueError when it is none.
    """
    return CONFIG.validate_python(plain)


def read_config(file: Path) -> Config:
    """The config of a run, from the file in its folder.

    Raises: OSError when it can't be read; ValueError when it holds none.
    """
    try:
        return from_plain(yaml.load(file.read_bytes(), yaml.CSafeLoader))  # safe, and ten times as fast as the one in Python
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def folder_of(config: Config, seed: int, run: str) -> Path:
    """Where the run of that seed and id lies, of a config or of its like with another seed."""
    return Path(config.results_dir) / config.claim.name / config.data.name / config.scale.name / f"seed{seed}-{run}"


class RunError(Exception):
    """A run crashed: says with what, and which file holds the traceback."""


class RunFolder:
    """One run on disk. Every file is written to a temporary name and renamed."""

    def __init__(self, config: Config, data: str | None = None):
        """Name the folder of a config; `data` is the set really loaded where it is a fallback for the one asked for."""
        self.config = config
        fallback = f"-fallback-{data}" if data not in (None, config.data.name) else ""
        self.id = run_hash(config) + fallback
        self.path = folder_of(config, config.seed, self.id)
        place = self.path.parent
        # what a run that was killed goes on from; gone when it is finished
        self.checkpoint = place / f".{self.path.name}.checkpoint"
        self._new, self._previous, self._failed, self._lock = (
            place / f".{self.path.name}.{beside}" for beside in ("new", "previous", "failed", "lock")
        )

    @property
    def status(self) -> str | None:
        """running, done, failed or interrupted; None where there is no folder."""
        return read_status(self.path)

    @property
    def answers(self) -> bool:
        """Whether the run is finished and need not be made again."""
        return self.status == "done" and not self.config.force

    @property
    def owned(self) -> bool:
        """Whether a living process is at this run, on whatever node: the lock dies with its owner."""
        try:
            with filelock.FileLock(self._lock, timeout=0, fallback_to_soft=False):
                return False
        except filelock.Timeout:
            return True
        except OSError:  # no folder for it yet, or none that can be written
            return False

    def verdicts(self) -> list[dict[str, Any]]:
        """The verdicts of a finished run.

        Raises: UserError when the file is missing or damaged.
        """
        file = self.path / "verdicts.json"
        try:
            return json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: missing or damaged; run the experiment again with force=true") from error

    def refuse_another_config(self) -> None:
        """Raise UserError when the folder there belongs to another config."""
        if not self.path.exists():
            return
        with suppress(OSError, ValueError):
            if decisive(read_config(self.path / "config.yaml")) == decisive(self.config):
                return
        raise UserError(f"{self.path}: holds a run of another config (see its config.yaml); move it away or choose another results_dir")

    @contextmanager
    def running(self) -> Iterator["RunFolder"]:
        """Own the folder while a run lasts; leave it done, failed or interrupted, and never lose a finished run to one that is not.

        Raises: UserError when another process runs it, the place can't be written, or the disk is full; RunError when the run crashes.
        """
        with self._owned():
            try:
                yield self
                self._end("done")
            except KeyboardInterrupt:
                self._end("interrupted")
                raise
            except BaseException as error:
                if _disk_full(error):
                    shutil.rmtree(self.path, ignore_errors=True)
                    self._restore()
                    raise UserError(f"{self.path}: no space left on the disk; the run was removed, free some and run it again") from error
                reason = f"{type(error).__name__}: {error}"
                told = self._end("failed", reason=reason, traceback=traceback.format_exc())
                if isinstance(error, UserError):
                    raise
                raise RunError(f"{self.config.claim.name} crashed with {reason}; the traceback is in {told}") from error

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file of the folder atomically."""
        write_atomically(self.path / name, content)

    def write_json(self, name: str, content: object) -> None:
        """Write a JSON file of the folder atomically."""
        self.write(name, _to_json(content))

    def digests(self, *names: str) -> dict[str, str]:
        """The sha256 of files of the folder."""
        return {name: sha256(self.path / name) for name in names}

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Hold the lock, with a fresh folder in place."""
        # where the disk knows no flock a mere file would stand for it, which outlives its owner
        lock = filelock.FileLock(self._lock, timeout=0, fallback_to_soft=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            self._begin()
        except filelock.Timeout as error:
            raise UserError(f"{self.path}: another process is at this run; wait for it or choose another results_dir") from error
        except OSError as error:
            lock.release()
            raise UserError(f"{self.path.parent}: can't be written ({error.strerror}); choose another results_dir") from error
        try:
            yield
        finally:
            lock.release()

    def _begin(self) -> None:
        shutil.rmtree(self._new, ignore_errors=True)
        if self.config.force:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
        try:
            self._new.mkdir()
            write_atomically(self._new / "config.yaml", OmegaConf.to_yaml(to_plain(self.config)))
            write_atomically(self._new / "status.json", _to_json({"status": "running", "host": socket.gethostname(), "pid": os.getpid()}))
            self._set_aside()
            self._new.rename(self.path)
        finally:
            shutil.rmtree(self._new, ignore_errors=True)

    def _end(self, status: str, **details: str) -> Path:
        """Write how the run ended; where it doesn't replace a finished one, beside that. Return the file that tells."""
        self.write_json("status.json", {"status": status, **details})
        if status == "done":
            for superseded in (self._previous, self.checkpoint):
                shutil.rmtree(superseded, ignore_errors=True)
        elif read_status(self._previous) == "done":
            for superseded in (self._failed, self.checkpoint):
                shutil.rmtree(superseded, ignore_errors=True)
            self.path.rename(self._failed)
            self._restore()
            return self._failed / "status.json"
        return self.path / "status.json"

    def _set_aside(self) -> None:
        """Keep a finished run until the new one is finished too; drop one that is not."""
        if self.status != "done":
            shutil.rmtree(self.path, ignore_errors=True)
            self._restore()
        shutil.rmtree(self._previous, ignore_errors=True)
        if self.path.exists():
            self.path.rename(self._previous)

    def _restore(self) -> None:
        if self._previous.exists():
            self._previous.rename(self.path)


def read_status(folder: Path) -> str | None:
    """The status of a run folder; None where there is none that can be read."""
    try:
        return str(json.loads((folder / "status.json").read_bytes())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse_changed(file: Path, name: str, provenance: Path) -> None:
    """Refuse a file of a run, by name, that is not as the run left it: by the sha256 in its provenance.

    Raises: UserError when it is not, or the provenance can't be read.
    """
    try:
        left = json.loads(provenance.read_bytes()).get("sha256", {}).get(name)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{provenance}: missing or damaged; {AGAIN}") from error
    if left is not None and left != sha256(file):
        raise UserError(f"{file}: not as the run left it, by {provenance}; {AGAIN}")


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _to_json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all."""
    atomically(path, lambda temporary: temporary.write_bytes(content.encode() if isinstance(content, str) else content))


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written under a temporary name beside `path`, flush it to the disk, and rename it."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
