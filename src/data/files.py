"""The files of an image set on disk: are they all there, and are they what their authors published."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from src.config import DataConfig
from src.data.catalogue import CATALOGUE, Source
from src.errors import UserError


def present(config: DataConfig) -> bool:
    """Say whether the set can be had without a download, so that no fallback can come into play."""
    source = CATALOGUE[config.name]
    return complete(source, data_root(config)) or on_disk(source, config.mirrors)


def data_root(config: DataConfig) -> Path:
    """Return the folder under which image sets lie."""
    return Path(config.root).expanduser()


def complete(source: Source, root: Path) -> bool:
    """Say whether every file of the set exists under the root (trivially so for a bundled set, which has none)."""
    return all((root / path).is_file() for path in source.files)


def on_disk(source: Source, mirrors: Sequence[str]) -> bool:
    """Say whether a `file://` mirror, such as a system package's folder, offers every archive of the set."""
    folders = [folder for folder in map(local_folder, mirrors) if folder is not None]
    return any(all((folder / archive).is_file() for archive in source.archives) for folder in folders)


def local_folder(mirror: str) -> Path | None:
    """Return the folder that a `file://` mirror names, None for a mirror elsewhere."""
    url = urlsplit(mirror)
    return Path(url2pathname(url.path)) if url.scheme == "file" else None


def verify(source: Source, root: Path) -> None:
    """Hash every file of the set under the root.

    Raises: UserError, naming the first file that cannot be read or is not as published.
    """
    for path, published in source.files.items():
        file = root / path
        algorithm, _ = published.split(":")
        try:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, partial(hashlib.new, algorithm, usedforsecurity=False)).hexdigest()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); make it readable, or delete it and it is fetched again") from error
        if f"{algorithm}:{digest}" != published:
            raise UserError(
                f"{file}: corrupted or truncated ({algorithm} {digest}, published {published.split(':')[1]}); "
                "delete it and it is fetched again"
            )
