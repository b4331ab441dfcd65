import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.config import DataConfig
from src.data.catalogue import CATALOGUE, Source
from src.data.load import channel_moments, load
from src.errors import UserError
from tests.data import tiny

CPU = torch.device("cpu")
NOWHERE = "http://127.0.0.1:9/"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def config(root: Path, **changes: Any) -> DataConfig:
    plain = DataConfig(name="mnist", root=str(root), mirrors=[NOWHERE], fallback="none", train_size=None, test_size=None)
    return replace(plain, **changes)


def naive_moments(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, from the definition in float64."""
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    return pixels.mean(1).tolist(), pixels.std(1, unbiased=False).tolist()


def test_loads_what_is_there(source: Source, tmp_path: Path) -> None:
    data = load(config(tiny.write_files(tmp_path / "root")), CPU)
    assert (data.name, data.requested, data.is_fallback) == ("mnist", "mnist", False)
    assert (len(data.train), len(data.test)) == (tiny.TRAIN, tiny.TEST)
    assert (data.classes, data.shape) == (10, tuple(data.train.images.shape[1:]))
    assert data.train.images.squeeze(1).tolist() == tiny.arrays()["train-images-idx3-ubyte"].tolist()


def test_fetches_what_is_missing(source: Source, tmp_path: Path, server: tiny.Server) -> None:
    data = load(config(tmp_path / "root", mirrors=[server.url]), CPU)
    assert data.sha256 == load(config(tmp_path / "root"), CPU).sha256


def test_hashes_are_of_the_whole_set_images_then_labels(source: Source, tmp_path: Path) -> None:
    root, arrays = tiny.write_files(tmp_path / "root"), tiny.arrays()
    expected = {
        part: hashlib.sha256(
            arrays[f"{file}-images-idx3-ubyte"].tobytes() + arrays[f"{file}-labels-idx1-ubyte"].astype("<i8").tobytes()
        ).hexdigest()
        for part, file in (("train", "train"), ("test", "t10k"))
    }
    assert load(config(root), CPU).sha256 == expected
    assert load(config(root, train_size=3, test_size=1), CPU).sha256 == expected


def test_a_subset_is_the_first_images(source: Source, tmp_path: Path) -> None:
    root = tiny.write_files(tmp_path / "root")
    whole, part = load(config(root), CPU), load(config(root, train_size=5, test_size=2), CPU)
    assert (len(part.train), len(part.test)) == (5, 2)
    assert part.train.images.equal(whole.train.images[:5])
    assert part.test.labels.equal(whole.test.labels[:2])
    assert part.mean.tolist() == pytest.approx(naive_moments(part.train.images)[0])


def test_sizes_are_upper_limits(source: Source, tmp_path: Path) -> None:
    data = load(config(tiny.write_files(tmp_path / "root"), train_size=tiny.TRAIN + 1, test_size=tiny.TEST + 1), CPU)
    assert (len(data.train), len(data.test)) == (tiny.TRAIN, tiny.TEST)


@pytest.mark.parametrize("damaged", tiny.SOURCE.files)
def test_a_flipped_bit_is_named_and_never_falls_back(source: Source, tmp_path: Path, damaged: str) -> None:
    file = tiny.write_files(tmp_path / "root") / damaged
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{damaged}: corrupted or truncated"):
        load(config(tmp_path / "root", fallback="digits"), CPU)


def test_without_data_or_network_digits_stand_in_loudly(source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = load(config(tmp_path / "root", fallback="digits", test_size=6), CPU)
    assert (data.name, data.requested, data.is_fallback) == ("digits", "mnist", True)
    assert (len(data.train), len(data.test), data.shape) == (1437, 6, (1, 8, 8))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("FALLBACK: digits stands in for mnist, since mnist could not be fetched")


def test_without_a_fallback_it_is_an_error(source: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mnist could not be fetched"):
        load(config(tmp_path / "root"), CPU)


def test_digits_asked_for_are_no_fallback(tmp_path: Path) -> None:
    data = load(config(tmp_path, name="digits"), CPU)
    assert not data.is_fallback
    assert data.sha256 == {
        "train": "e04a88bba1e6e7d7b38c553e8fb573e54c35e5666f87bfa2e75167c8d4b606fb",
        "test": "4b46076173905c8f9d595b78eb4278c93568a2bec8505cdb9cb0f1e60b22ccaf",
    }


def test_archives_on_disk_need_no_writable_root(source: Source, tmp_path: Path, archives: Path) -> None:
    (tmp_path / "file").touch()
    data = load(config(tmp_path / "file/root", mirrors=[archives.as_uri() + "/"]), CPU)
    assert data.train.images.squeeze(1).tolist() == tiny.arrays()["train-images-idx3-ubyte"].tolist()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist(tmp_path: Path) -> None:
    data = load(config(tmp_path / "none", name="fashion_mnist", mirrors=[DEBIAN.as_uri() + "/"]), CPU)
    assert not (tmp_path / "none").exists()
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.mean.item() == pytest.approx(0.2860, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "mean", "std", "train"),
    [
        ("mnist", [0.1307], [0.3081], "d18cfd466eb143ac1097fde604dba9eec4116885869d04cc648b510949f9e88c"),
        (
            "cifar10",
            [0.4914, 0.4822, 0.4465],
            [0.2470, 0.2435, 0.2616],
            "973ef2abb5897efc795681a4d79a6f5f642fa2bcb1a828f7476017c89db53a57",
        ),
    ],
)
def test_the_real_sets_have_their_known_moments(real_root: Path, name: str, mean: list[float], std: list[float], train: str) -> None:
    data = load(config(real_root, name=name), CPU)
    assert data.mean.tolist() == pytest.approx(mean, abs=1e-4)
    assert data.std.tolist() == pytest.approx(std, abs=1e-4)
    assert data.sha256["train"] == train
    assert (len(data.train), len(data.test)) == (CATALOGUE[name].train_size, CATALOGUE[name].test_size)
    assert data.shape == CATALOGUE[name].shape == tuple(data.train.images.shape[1:])


def test_standardised_training_images_have_mean_0_and_std_1(tmp_path: Path) -> None:
    data = load(config(tmp_path, name="digits"), CPU)
    before = data.train.images.clone()
    std, mean = torch.std_mean(data.standardise(data.train.images).double(), unbiased=False)
    assert mean.item() == pytest.approx(0, abs=1e-6)
    assert std.item() == pytest.approx(1, abs=1e-6)
    assert data.train.images.equal(before)
    assert data.standardise(data.test.images).mean().abs() > 1e-3


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_moments_are_those_of_the_definition(seed: int, images: int, channels: int) -> None:
    pixels = torch.randint(0, 256, (images, channels, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    mean, std = channel_moments(pixels)
    expected_mean, expected_std = naive_moments(pixels)
    assert mean.tolist() == pytest.approx(expected_mean, rel=1e-6)
    assert std.tolist() == pytest.approx(expected_std, rel=1e-6)
