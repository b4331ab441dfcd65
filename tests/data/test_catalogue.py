import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from torchvision import datasets

from src.config import DataConfig
from src.data.catalogue import CATALOGUE

HEAVY = {"torch", "torchvision", "numpy", "pandas", "sklearn"}


def test_light_modules_import_nothing_heavy() -> None:
    code = "import sys, src.data.catalogue, src.data.files; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert not HEAVY & set(loaded.stdout.split())


def test_every_configurable_set_is_catalogued() -> None:
    assert set(get_args(get_type_hints(DataConfig)["name"])) == set(CATALOGUE)
    assert all(name == source.name for name, source in CATALOGUE.items())


@pytest.mark.parametrize(("name", "dataset"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifar_is_torchvisions(name: str, dataset: type[datasets.CIFAR10]) -> None:
    listed = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
    assert CATALOGUE[name].files == {f"{dataset.base_folder}/{file}": f"md5:{md5}" for file, md5 in listed}
    assert CATALOGUE[name].archives == {dataset.filename: "."}


@pytest.mark.parametrize(("name", "dataset"), [("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)])
def test_mnist_is_torchvisions(name: str, dataset: type[datasets.MNIST]) -> None:
    folder = f"{dataset.__name__}/raw"
    assert CATALOGUE[name].archives == {archive: folder for archive, _ in dataset.resources}
    assert set(CATALOGUE[name].files) == {f"{folder}/{archive.removesuffix('.gz')}" for archive, _ in dataset.resources}
