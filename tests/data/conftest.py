import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.data.catalogue import CATALOGUE, Source
from src.data.datasets import DATASETS
from src.data.files import complete
from tests.data import tiny


@pytest.fixture
def real_root() -> Path:
    """The folder with the real MNIST and CIFAR-10."""
    root = Path(os.environ.get("DATA_ROOT", "data"))
    missing = [name for name in ("mnist", "cifar10") if not complete(CATALOGUE[name], root)]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not in {root}: set DATA_ROOT, or run python -m src.data fetch {' '.join(missing)}")
    return root


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    """The tiny set in MNIST's place."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setitem(CATALOGUE, "mnist", tiny.SOURCE)
    monkeypatch.setitem(DATASETS, "mnist", tiny.MNIST)
    return tiny.SOURCE


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    return tiny.write_archives(tmp_path / "mirror")


@pytest.fixture
def server(archives: Path) -> Iterator[tiny.Server]:
    with tiny.serve(archives) as state:
        yield state


@pytest.fixture
def refusals() -> Iterator[None]:
    """For requests that are refused: torchvision leaves their sockets to the garbage collector."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unclosed <socket", ResourceWarning)
        yield
        gc.collect()
