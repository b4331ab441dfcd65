"""A tiny image set in MNIST's format, and a web server on this machine that offers it."""

import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from src.data.catalogue import Source

TRAIN, TEST, HEIGHT, WIDTH = 12, 6, 3, 2


def arrays() -> dict[str, np.ndarray]:
    """Return the set's four arrays by file name."""
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": rng.integers(0, 256, (TRAIN, HEIGHT, WIDTH), dtype=np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, TRAIN, dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (TEST, HEIGHT, WIDTH), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, TEST, dtype=np.uint8),
    }


def idx(array: np.ndarray) -> bytes:
    """Encode an array of bytes as IDX: two zeros, the type 8, the number of axes, their lengths, the bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


RAW = {name: idx(array) for name, array in arrays().items()}
ARCHIVES = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in RAW.items()}

SOURCE = Source(
    name="mnist",
    train_size=TRAIN,
    test_size=TEST,
    classes=10,
    shape=(1, HEIGHT, WIDTH),
    archives=dict.fromkeys(ARCHIVES, "MNIST/raw"),
    files={f"MNIST/raw/{name}": f"sha256:{hashlib.sha256(content).hexdigest()}" for name, content in RAW.items()},
    note="made here",
)


class MNIST(datasets.MNIST):
    """torchvision's class, with the tiny archives' hashes."""

    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in ARCHIVES.items()]  # noqa: RUF012


def write_archives(folder: Path) -> Path:
    """Write what a mirror offers."""
    folder.mkdir(parents=True)
    for name, content in ARCHIVES.items():
        (folder / name).write_bytes(content)
    return folder


def write_files(root: Path) -> Path:
    """Write the set unpacked, as a data root holds it."""
    (root / "MNIST/raw").mkdir(parents=True)
    for name, content in RAW.items():
        (root / "MNIST/raw" / name).write_bytes(content)
    return root


@dataclass
class Server:
    """Serves a folder; counts what is asked for; holds back one file while told to."""

    url: str = ""
    requests: list[str] = field(default_factory=list)
    held: str = ""
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, state: Server, **kwargs: Any) -> None:
        self.state = state
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.state.requests.append(name)
        if name == self.state.held:
            self.state.reached.set()
            self.state.release.wait(30)
            return
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder on 127.0.0.1 for as long as the context lasts."""
    state = Server()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, state=state, directory=str(folder))) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}/"
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield state
        finally:
            state.release.set()
            server.shutdown()
            thread.join()
