import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from src.config import DataConfig
from src.data.catalogue import CATALOGUE, Source
from src.data.files import complete, local_folder, on_disk, present, verify
from src.errors import UserError
from tests.data import tiny


def config(root: Path, name: str = "mnist", mirrors: tuple[str, ...] = ()) -> DataConfig:
    return DataConfig(name=name, root=str(root), mirrors=list(mirrors), fallback="none", train_size=None, test_size=None)


def test_present_in_the_root_or_bundled_or_on_disk(source: Source, tmp_path: Path, archives: Path) -> None:
    assert present(config(tiny.write_files(tmp_path / "root")))
    assert present(config(tmp_path / "empty", name="digits"))
    assert present(config(tmp_path / "empty", mirrors=(archives.as_uri() + "/",)))
    assert not present(config(tmp_path / "empty", mirrors=("http://127.0.0.1:9/",)))


def test_home_is_expanded(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.write_files(tmp_path / "root")
    assert present(config(Path("~/root")))


@pytest.mark.parametrize("missing", tiny.SOURCE.files)
def test_one_missing_file_is_incomplete(source: Source, tmp_path: Path, missing: str) -> None:
    root = tiny.write_files(tmp_path / "root")
    (root / missing).unlink()
    assert not complete(source, root)


def test_one_missing_archive_is_not_on_disk(source: Source, archives: Path) -> None:
    (archives / "t10k-labels-idx1-ubyte.gz").unlink()
    assert not on_disk(source, [archives.as_uri()])


def test_local_folder() -> None:
    assert local_folder("file:///a%20b/c/") == Path("/a b/c")
    assert local_folder("https://host/c/") is None


def test_verify_passes_published_files(source: Source, tmp_path: Path) -> None:
    verify(source, tiny.write_files(tmp_path / "root"))


def flip_a_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
@pytest.mark.parametrize("damaged", tiny.SOURCE.files)
def test_verify_names_a_damaged_file(source: Source, tmp_path: Path, damaged: str, damage: Callable[[bytes], bytes]) -> None:
    file = tiny.write_files(tmp_path / "root") / damaged
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"corrupted or truncated .* delete it and it is fetched again$") as error:
        verify(source, tmp_path / "root")
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_verify_names_an_unreadable_file(source: Source, tmp_path: Path) -> None:
    file = tiny.write_files(tmp_path / "root") / "MNIST/raw/t10k-labels-idx1-ubyte"
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte: cannot be read \(Is a directory\)"):
        verify(source, tmp_path / "root")


def test_verify_knows_md5(source: Source, tmp_path: Path) -> None:
    root = tiny.write_files(tmp_path / "root")
    files = {f"MNIST/raw/{name}": f"md5:{hashlib.md5(content).hexdigest()}" for name, content in tiny.RAW.items()}
    verify(replace(source, files=files), root)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_real_files_are_as_published(real_root: Path, name: str) -> None:
    verify(CATALOGUE[name], real_root)
