"""What a run has made so far, on disk: one that was killed goes on from there, on whatever node, and gives the same rows.

A checkpoint holds the rows of the experiment's finished parts, and the trainings of the part that is under way: finished ones as they
ended, the last one in mid-course. What that part measured beside its trainings is measured again.
"""

import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.results import write_atomically

EVERY = 30.0  # seconds after which what is kept is written, and a training in mid-course is kept
PAUSE = 1.0  # seconds between two looks at whether that is so
log = logging.getLogger(__name__)


class Checkpoint:
    """Named entries of tensors, numbers and texts, written a few at a time.

    Within `with` they are also written while nothing new is kept, and when that ends with an error.

    Args:
        folder: that they lie in.
        made_by: what the numbers depend on and the config doesn't say: code, versions, device. Entries made by anything else are removed.

    Attributes:
        resumed: whether there were entries at the start.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, object]):
        self.folder = folder
        self.made_by = json.dumps(made_by, sort_keys=True).encode()
        self._written = time.monotonic()
        self._lock = threading.RLock()
        self._left = threading.Event()
        self._failure: OSError | None = None
        # an entry that is to be removed waits for those that take its place
        self._waiting: dict[str, bytes | None] = {}
        maker = folder / "made_by.json"
        if folder.exists() and not (maker.is_file() and maker.read_bytes() == self.made_by):
            log.warning("%s: made by other code or on another kind of device; begun again", folder)
            shutil.rmtree(folder)
        self.resumed = folder.exists()

    def __enter__(self) -> "Checkpoint":
        threading.Thread(target=self._keep_writing, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:  # nothing is being written now, nor will be
            self._left.set()
            if kind and self._waiting:
                with suppress(OSError):
                    self.write()

    @property
    def due(self) -> bool:
        """Whether what is waiting should be written."""
        return time.monotonic() - self._written >= EVERY

    def load(self, name: str) -> Any:
        """The entry of a name, its tensors where they were; None where there is none, or none that can be read."""
        file = self._file(name)
        try:
            return torch.load(file, weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:
            # whatever a node that crashed has left of it
            log.warning("%s: can't be read (%s); made again", file, str(error).partition("\n")[0])
            return None

    def keep(self, name: str, content: object) -> None:
        """Keep an entry as it is now; all that is kept is written when that is due.

        Raises: TypeError for what can't be read back; OSError when it can't be written, or something before it couldn't.
        """
        if self._failure:
            raise self._failure
        buffer = io.BytesIO()
        torch.save(plain(content), buffer)
        with self._lock:
            self._waiting[name] = buffer.getvalue()
            if self.due:
                self.write()

    def write(self) -> None:
        """Write all that is waiting, and only then remove what is no longer kept."""
        with self._lock:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / "made_by.json", self.made_by)
            for name, content in sorted(self._waiting.items(), key=lambda item: item[1] is None):
                if content is None:
                    self._file(name).unlink(missing_ok=True)
                else:
                    write_atomically(self._file(name), content)
            self._waiting.clear()
            self._written = time.monotonic()

    def _keep_writing(self) -> None:
        """Write what is waiting whenever that is due, until the end; a long measurement keeps nothing new."""
        while not self._left.wait(PAUSE):
            with self._lock:
                if self._left.is_set() or not (self.due and self._waiting):
                    continue
                try:
                    self.write()
                except OSError as error:
                    self._failure = error
                    return

    def drop(self, name: str) -> None:
        """Keep an entry no longer, once all that was kept before is written."""
        with self._lock:
            self._waiting[name] = None

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


def plain(content: object) -> Any:
    """The same out of tensors, numbers, texts, lists, tuples and dictionaries alone: NumPy's numbers become Python's.

    Raises: TypeError when there is anything else in it.
    """
    if isinstance(content, np.generic):
        return content.item()
    if content is None or isinstance(content, bool | int | float | str | torch.Tensor):
        return content
    if isinstance(content, Mapping):
        return {plain(key): plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(plain, content))
    raise TypeError(f"{type(content).__name__} can't be kept in a checkpoint")


@dataclass(frozen=True)
class Training:
    """The entry of a run's n-th training, which the loop reads and writes."""

    checkpoint: Checkpoint
    n: int

    @property
    def name(self) -> str:
        """Of the entry."""
        return f"training-{self.n:06}"

    @property
    def due(self) -> bool:
        """Whether the checkpoint is to be written."""
        return self.checkpoint.due

    def load(self) -> dict[str, Any] | None:
        """The training as it was kept."""
        return self.checkpoint.load(self.name)

    def keep(self, training: dict[str, Any]) -> None:
        """Keep it as it is."""
        self.checkpoint.keep(self.name, training)

    def drop(self) -> None:
        """Keep it no longer."""
        self.checkpoint.drop(self.name)
