"""The image sets as tensors, read by torchvision's own classes and scikit-learn."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision import datasets

from src.data.catalogue import CATALOGUE, Source


class MNIST(datasets.MNIST):
    """torchvision's MNIST, read from the raw files whose hashes are published, never from an old `processed` copy."""

    def _check_legacy_exist(self) -> bool:
        return False


class FashionMNIST(datasets.FashionMNIST):
    """torchvision's Fashion-MNIST, read from the raw files as MNIST is."""

    _check_legacy_exist = MNIST._check_legacy_exist


DATASETS: dict[str, Any] = {
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}


def read(source: Source, root: Path, train: bool) -> tuple[UInt8[Tensor, "n c h w"], Int64[Tensor, " n"]]:
    """Read the training or the test images of a set and their labels, in the published order.

    Args:
        source: the set; `digits` comes with scikit-learn, the others lie under the root.
        root: the data root.
        train: whether the training part is meant.

    Returns: the images, pixels 0..255, and the labels, 0..classes-1.
    """
    if source.name == "digits":
        return _read_digits(train)
    dataset = DATASETS[source.name](root=root, train=train, download=False)
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(dataset.targets, dtype=torch.int64)


def _read_digits(train: bool) -> tuple[UInt8[Tensor, "n c h w"], Int64[Tensor, " n"]]:
    """Read scikit-learn's digits: round(255·p/16) of pixels p = 0..16; the last 360 images are the test set."""
    from sklearn.datasets import load_digits  # a second that the other sets can do without

    bundled, size = load_digits(), CATALOGUE["digits"].train_size
    part = slice(size) if train else slice(size, None)
    images = torch.from_numpy(bundled.images[part]).mul(255 / 16).round().to(torch.uint8)
    return images.unsqueeze(1), torch.from_numpy(bundled.target[part]).to(torch.int64)
