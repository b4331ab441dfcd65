"""Small image sets."""

import torch
from sklearn.datasets import load_digits

from src.data.load import Data, Split, channel_moments


def small_set(train: int = 50, test: int = 20, classes: int = 3) -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (train + test, 2, 3, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes, (train + test,), generator=generator)
    return as_data(images, labels, train)


def digits() -> Data:
    bundled = load_digits()
    images = torch.from_numpy(bundled.images).mul(15).to(torch.uint8).unsqueeze(1)
    return as_data(images, torch.from_numpy(bundled.target).long(), 1437)


def as_data(images: torch.Tensor, labels: torch.Tensor, train: int) -> Data:
    mean, std = channel_moments(images[:train])
    return Data(
        name="small",
        requested="small",
        train=Split(images[:train], labels[:train]),
        test=Split(images[train:], labels[train:]),
        classes=int(labels.max()) + 1,
        shape=tuple(images.shape[1:]),
        sha256={},
        mean=mean,
        std=std,
    )
