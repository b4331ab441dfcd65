"""An image set as a run sees it: whole, on the device, as one uint8 tensor a part."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from src.config import DataConfig
from src.data.augment import augment
from src.data.catalogue import CATALOGUE, Source
from src.data.datasets import read
from src.data.fetch import fetch
from src.data.files import complete, data_root, on_disk, verify
from src.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Images, pixels 0..255, and their labels, 0..classes-1."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """The images that a run trains and tests on.

    Attributes:
        name: the set that was loaded.
        requested: the set that was asked for.
        train: the training images used.
        test: the test images used.
        classes: the number of classes.
        shape: (channels, height, width) of an image.
        sha256: of each whole part as loaded ("train", "test"), images then labels, before any subset is taken.
        mean: of each channel over the training images used, pixels scaled to [0, 1].
        std: the same's standard deviation.
        augment: how a training's batches are augmented, by name.
    """

    name: str
    requested: str
    train: Split
    test: Split
    classes: int
    shape: tuple[int, int, int]
    sha256: dict[str, str]
    mean: Float32[Tensor, " c"]
    std: Float32[Tensor, " c"]
    augment: tuple[str, ...] = ()

    @property
    def is_fallback(self) -> bool:
        """Say whether another set stands in for the one that was asked for."""
        return self.name != self.requested

    def standardise(self, images: UInt8[Tensor, "n c h w"]) -> Float32[Tensor, "n c h w"]:
        """Return (x/255 − mean)/std by channel."""
        return images.float().div_(255).sub_(self.mean[:, None, None]).div_(self.std[:, None, None])

    def augmented(self, images: UInt8[Tensor, "n c h w"], order: torch.Generator, step: int) -> UInt8[Tensor, "n c h w"]:
        """Return the batch of a training's step as configured; what cutout fills in is the mean pixel."""
        return augment(images, self.augment, self.mean.mul(255).round().to(torch.uint8), order, step) if self.augment else images


def load(config: DataConfig, device: torch.device) -> Data:
    """Find or fetch the configured set, check its files, and put it on the device.

    Args:
        config: the set, its root and mirrors, what stands in for it, and how many images are used.
        device: where the tensors go.

    Returns: the data; `is_fallback` if another set had to stand in. `train_size` and `test_size` are upper limits: a smaller set is
        used whole.

    Raises: UserError if a file is corrupted, or the set cannot be had.
    """
    requested = CATALOGUE[config.name]
    with TemporaryDirectory() as scratch:
        source, root = _obtain(requested, config, Path(scratch))
        verify(source, root)
        whole = {part: Split(*read(source, root, train=part == "train")) for part in ("train", "test")}
    train, test = _first(whole["train"], config.train_size), _first(whole["test"], config.test_size)
    mean, std = channel_moments(train.images)
    return Data(
        name=source.name,
        requested=requested.name,
        train=Split(train.images.to(device), train.labels.to(device)),
        test=Split(test.images.to(device), test.labels.to(device)),
        classes=source.classes,
        shape=source.shape,
        sha256={part: _sha256(split) for part, split in whole.items()},
        mean=mean.to(device),
        std=std.to(device),
        augment=tuple(config.augment),
    )


def channel_moments(images: UInt8[Tensor, "n c h w"]) -> tuple[Float32[Tensor, " c"], Float32[Tensor, " c"]]:
    """Return mean and standard deviation of each channel, pixels scaled to [0, 1].

    With k_v the number of pixels of value v among n: μ = Σ_v k_v v/255 / n, σ² = Σ_v k_v (v/255 − μ)² / n.
    """
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    weights = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64, device=images.device) / 255
    mean = weights @ values
    variance = (weights * (values - mean[:, None]).square()).sum(1)
    return mean.float(), variance.sqrt().float()


def _obtain(source: Source, config: DataConfig, scratch: Path) -> tuple[Source, Path]:
    """Return the set, or what stands in for it, and the folder under which its files lie."""
    root = data_root(config)
    if complete(source, root):
        return source, root
    # Archives that are on this machine anyway are unpacked for this run only: the root need not be writable.
    place = scratch if on_disk(source, config.mirrors) else root
    try:
        fetch(source, place, config.mirrors)
    except UserError as reason:
        if config.fallback == "none":
            raise
        log.warning("FALLBACK: %s stands in for %s, since %s", config.fallback, source.name, reason)
        return CATALOGUE[config.fallback], root
    return source, place


def _first(split: Split, size: int | None) -> Split:
    return Split(split.images[:size], split.labels[:size])


def _sha256(split: Split) -> str:
    digest = hashlib.sha256(split.images.numpy().data)
    digest.update(split.labels.numpy().data)
    return digest.hexdigest()
