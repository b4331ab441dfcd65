import errno
import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import socket
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets
from torchvision.datasets import utils

from src.data import fetch as module
from src.data.catalogue import CATALOGUE, Source
from src.data.datasets import DATASETS, read
from src.data.fetch import fetch
from src.data.files import complete, verify
from src.errors import UserError
from tests.data import tiny

NOWHERE = "http://127.0.0.1:9/"  # the discard port: nothing listens there


def listing(root: Path) -> set[str]:
    """Everything under the root but its lock file."""
    return {str(path.relative_to(root)) for path in root.rglob("*")} - {".mnist.lock"}


def assert_fetched(source: Source, root: Path) -> None:
    verify(source, root)
    assert listing(root) == {"MNIST", "MNIST/raw", *source.files}


def run_in_processes(count: int, source: Source, root: Path, mirror: str) -> list[multiprocessing.Process]:
    processes = [multiprocessing.get_context("fork").Process(target=fetch, args=(source, root, [mirror])) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def test_from_a_web_server(source: Source, tmp_path: Path, server: tiny.Server) -> None:
    fetch(source, tmp_path / "a/root", [server.url])
    assert_fetched(source, tmp_path / "a/root")


def test_from_a_local_folder(source: Source, tmp_path: Path, archives: Path) -> None:
    fetch(source, tmp_path / "root", [archives.as_uri() + "/"])
    assert_fetched(source, tmp_path / "root")


def test_what_is_there_is_not_fetched_and_nothing_is_written(source: Source, tmp_path: Path) -> None:
    root = tiny.write_files(tmp_path / "root")
    before = set(root.rglob("*"))
    fetch(source, root, [NOWHERE])
    assert set(root.rglob("*")) == before


def test_a_deleted_file_is_fetched_again(source: Source, tmp_path: Path, server: tiny.Server) -> None:
    root = tiny.write_files(tmp_path / "root")
    (root / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    fetch(source, root, [server.url])
    assert_fetched(source, root)


@pytest.mark.usefixtures("refusals")
def test_mirrors_are_tried_in_turn(source: Source, tmp_path: Path, server: tiny.Server) -> None:
    fetch(source, tmp_path / "root", [NOWHERE, server.url + "nothing/here/", "file:///nothing/here/", server.url])
    assert_fetched(source, tmp_path / "root")


def test_a_silent_mirror_is_given_up(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match="timed out"):
        fetch(source, tmp_path / "root", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
    assert socket.getdefaulttimeout() is None


def test_no_network_is_one_line(source: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mnist could not be fetched into .*127\.0\.0\.1:9.*refused.*DATA_ROOT") as error:
        fetch(source, tmp_path / "root", [NOWHERE, "file:///nothing/here/"])
    assert "\n" not in str(error.value)
    assert listing(tmp_path / "root") == set()


def test_no_mirrors(source: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.mirrors is empty"):
        fetch(source, tmp_path / "root", [])


@pytest.mark.parametrize("scheme", ["http", "file"])
@pytest.mark.parametrize("damaged", tiny.ARCHIVES)
def test_a_truncated_archive_leaves_nothing(
    source: Source, tmp_path: Path, archives: Path, server: tiny.Server, scheme: str, damaged: str
) -> None:
    (archives / damaged).write_bytes(tiny.ARCHIVES[damaged][:-9])
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(source, tmp_path / "root", [server.url if scheme == "http" else archives.as_uri() + "/"])
    assert listing(tmp_path / "root") == set()


def test_what_unpacks_to_something_else_leaves_nothing(source: Source, tmp_path: Path, server: tiny.Server) -> None:
    other = replace(source, files=dict.fromkeys(source.files, f"sha256:{hashlib.sha256().hexdigest()}"))
    with pytest.raises(UserError, match="train-images-idx3-ubyte: corrupted"):
        fetch(other, tmp_path / "root", [server.url])
    assert listing(tmp_path / "root") == set()


def interrupted_by(error: BaseException):
    """A download that writes half a file and stops."""

    def urlretrieve(url: str, filename: str) -> None:
        Path(filename).write_bytes(b"half")
        raise error

    return urlretrieve


def test_an_interrupted_download_leaves_nothing(
    source: Source, tmp_path: Path, server: tiny.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "_urlretrieve", interrupted_by(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        fetch(source, tmp_path / "root", [server.url])
    assert listing(tmp_path / "root") == set()


def test_a_full_disk_is_said_and_leaves_nothing(
    source: Source, tmp_path: Path, server: tiny.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "_urlretrieve", interrupted_by(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(UserError, match=r"root: disk full while fetching mnist; free space, or set DATA_ROOT"):
        fetch(source, tmp_path / "root", [server.url, NOWHERE])
    assert listing(tmp_path / "root") == set()


def test_a_root_that_cannot_be_written_is_said(source: Source, tmp_path: Path, server: tiny.Server) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/root: cannot be written, so mnist cannot be fetched \(Not a directory\); set DATA_ROOT"):
        fetch(source, tmp_path / "file/root", [server.url])


def test_a_read_only_root_is_said(source: Source, tmp_path: Path, server: tiny.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(module, "FileLock", refuse)
    with pytest.raises(UserError, match=r"cannot be written.*Read-only file system"):
        fetch(source, tmp_path, [server.url])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_four_processes_download_once(source: Source, tmp_path: Path, server: tiny.Server) -> None:
    fetch(source, tmp_path / "alone", [server.url])
    once = sorted(server.requests)
    server.requests.clear()
    processes = run_in_processes(4, source, tmp_path / "root", server.url)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(server.requests) == once
    assert_fetched(source, tmp_path / "root")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_killed_download_puts_nothing_in_place_and_the_next_clears_up(source: Source, tmp_path: Path, server: tiny.Server) -> None:
    server.held = "t10k-images-idx3-ubyte.gz"
    (process,) = run_in_processes(1, source, tmp_path / "root", server.url)
    assert server.reached.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert listing(tmp_path / "root") & set(source.files) == set()
    server.held = ""
    fetch(source, tmp_path / "root", [server.url])
    assert_fetched(source, tmp_path / "root")


def test_silent_where_there_is_no_terminal(source: Source, tmp_path: Path, server: tiny.Server, capfd: pytest.CaptureFixture[str]) -> None:
    fetch(source, tmp_path / "root", [server.url])
    assert capfd.readouterr() == ("", "")


def tiny_cifar(folder: Path) -> tuple[Source, type[datasets.CIFAR10]]:
    """Write a CIFAR archive of two images a batch; return it as a source and torchvision's class for it."""

    def batch(start: int) -> dict[str, object]:
        return {"data": (np.arange(2 * 3072).reshape(2, 3072) + start).astype(np.uint8), "labels": [start, start + 1]}

    contents = {"data_batch_1": batch(0), "test_batch": batch(5), "batches.meta": {"label_names": ["a", "b"]}}
    files = {name: pickle.dumps(content) for name, content in contents.items()}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    folder.mkdir()
    with tarfile.open(folder / "tiny.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"tiny/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    members = {
        "base_folder": "tiny",
        "filename": "tiny.tar.gz",
        "tgz_md5": hashlib.md5((folder / "tiny.tar.gz").read_bytes()).hexdigest(),
        "train_list": [["data_batch_1", md5["data_batch_1"]]],
        "test_list": [["test_batch", md5["test_batch"]]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]},
    }
    source = replace(
        CATALOGUE["cifar10"], archives={"tiny.tar.gz": "."}, files={f"tiny/{name}": f"md5:{value}" for name, value in md5.items()}
    )
    return source, type("CIFAR10", (datasets.CIFAR10,), members)


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_cifar_from_a_web_server_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    cifar, dataset = tiny_cifar(tmp_path / "mirror")
    monkeypatch.setitem(DATASETS, "cifar10", dataset)
    monkeypatch.setenv("no_proxy", "*")
    with tiny.serve(tmp_path / "mirror") as server:
        fetch(cifar, tmp_path / "root", [NOWHERE, server.url if scheme == "http" else (tmp_path / "mirror").as_uri() + "/"])
    assert complete(cifar, tmp_path / "root")
    images, labels = read(cifar, tmp_path / "root", train=True)
    assert images.shape == (2, 3, 32, 32)
    assert images[0].flatten().tolist() == [pixel % 256 for pixel in range(3072)]
    assert labels.tolist() == [0, 1]
