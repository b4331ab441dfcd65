import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from src.data.catalogue import CATALOGUE, Source
from src.data.datasets import read
from tests.data import tiny


@pytest.mark.parametrize(("train", "part"), [(True, "train"), (False, "t10k")])
def test_tiny_mnist_is_read_as_written(source: Source, tmp_path: Path, train: bool, part: str) -> None:
    images, labels = read(source, tiny.write_files(tmp_path / "root"), train)
    assert images.squeeze(1).tolist() == tiny.arrays()[f"{part}-images-idx3-ubyte"].tolist()
    assert labels.tolist() == tiny.arrays()[f"{part}-labels-idx1-ubyte"].tolist()


def test_the_real_class_ignores_an_old_processed_copy(tmp_path: Path) -> None:
    processed = tiny.write_files(tmp_path / "root") / "MNIST/processed"
    processed.mkdir()
    for file in ("training.pt", "test.pt"):
        torch.save((torch.zeros(1, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)), processed / file)
    images, _ = read(CATALOGUE["mnist"], tmp_path / "root", train=True)
    assert len(images) == tiny.TRAIN


def test_digits_are_scaled_to_bytes_and_split_in_order() -> None:
    bundled = load_digits()
    train, test = (read(CATALOGUE["digits"], Path(), train=part) for part in (True, False))
    images, labels = (torch.cat(both).tolist() for both in zip(train, test, strict=True))
    assert [len(train[1]), len(test[1])] == [1437, 360]
    assert images == [[[[round(255 * p / 16) for p in row] for row in image]] for image in bundled.images.tolist()]
    assert labels == bundled.target.tolist()


def test_real_mnist_against_the_bytes(real_root: Path) -> None:
    images, labels = read(CATALOGUE["mnist"], real_root, train=False)
    content = (real_root / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()
    assert struct.unpack(">4I", content[:16]) == (2051, 10_000, 28, 28)
    assert images.numpy().tobytes() == content[16:]
    assert bytes(labels.tolist()) == (real_root / "MNIST/raw/t10k-labels-idx1-ubyte").read_bytes()[8:]


def test_real_cifar10_against_the_pickle(real_root: Path) -> None:
    images, labels = read(CATALOGUE["cifar10"], real_root, train=False)
    batch = pickle.loads((real_root / "cifar-10-batches-py/test_batch").read_bytes(), encoding="bytes")
    assert np.array_equal(images.numpy().reshape(10_000, -1), batch[b"data"])
    assert labels.tolist() == batch[b"labels"]
