"""Downloads an image set once, however many processes ask for it, and leaves nothing half-written."""

import errno
import logging
import os
import shutil
import socket
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import extract_archive

from src.data.catalogue import Source
from src.data.datasets import DATASETS
from src.data.files import complete, local_folder, verify
from src.errors import UserError

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds without a byte after which a mirror is given up

_FULL = {errno.ENOSPC, errno.EDQUOT}


def fetch(source: Source, root: Path, mirrors: Sequence[str]) -> None:
    """Make sure that all files of a set lie under the root, downloading them if they don't.

    A lock lets one process download while the others wait; files are moved into place whole, after their hashes were checked.

    Args:
        source: the set.
        root: the data root; written to only if files are missing.
        mirrors: base URLs, tried in turn.

    Raises: UserError if no mirror delivers, the root cannot be written or the disk is full.
    """
    if complete(source, root):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{source.name}.lock", fallback_to_soft=False):
            if not complete(source, root):
                _download(source, root, mirrors)
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{root}: disk full while fetching {source.name}; free space, or set DATA_ROOT to a folder on another disk"
            ) from error
        raise UserError(
            f"{root}: cannot be written, so {source.name} cannot be fetched ({error.strerror or error}); "
            "set DATA_ROOT to a folder that can be written or that has the data"
        ) from error


def _download(source: Source, root: Path, mirrors: Sequence[str]) -> None:
    """Try the mirrors in turn; move the files of the first that delivers into place."""
    failures = []
    for mirror in mirrors:
        log.info("fetching %s from %s", source.name, mirror)
        with _temporary(root / f".{source.name}.part") as folder:
            try:
                _download_from(mirror, source, folder)
                verify(source, folder)
            except (OSError, RuntimeError, ValueError, HTTPException, EOFError, zlib.error, UserError) as error:
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise
                failures.append(f"{mirror}: {_reason(error)}")
            else:
                return _move(source, folder, root)
    raise UserError(
        f"{source.name} could not be fetched into {root} ({'; '.join(failures) or 'data.mirrors is empty'}); "
        "check the network or data.mirrors, or set DATA_ROOT to a folder that has the data"
    )


def _download_from(mirror: str, source: Source, folder: Path) -> None:
    """Download and unpack the set with torchvision's class, or unpack the archives of a local folder."""
    origin = local_folder(mirror)
    if origin is not None:
        for archive, target in source.archives.items():
            (folder / target).mkdir(parents=True, exist_ok=True)
            extract_archive(origin / archive, folder / target)
        return
    dataset = DATASETS[source.name]
    location = {"url": mirror + dataset.filename} if issubclass(dataset, CIFAR10) else {"mirrors": [mirror]}
    with _quiet(), _patience(PATIENCE):
        type(dataset.__name__, (dataset,), location)(root=folder, download=True)


def _move(source: Source, folder: Path, root: Path) -> None:
    for path in source.files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / path, root / path)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Make an empty folder, and remove it whatever happens.

    Its name is fixed: under the lock, what is found there is what a killed process left.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error: Exception) -> str:
    """Return the last line of an error: torchvision reports a mirror's failure there."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Show torchvision's messages and progress bar on a terminal only."""
    with ExitStack() as stack:
        if not sys.stderr.isatty():
            sink = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(sink))
            stack.enter_context(redirect_stderr(sink))
        yield


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Give up on sockets that stay silent, for which torchvision would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
