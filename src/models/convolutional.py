"""Convolutional nets for small images: the CIFAR nets of He et al. 2016, plain and residual, and a small VGG-like net."""

from collections.abc import Iterator

from torch import nn

from src.errors import UserError
from src.models.layers import Layers, stage
from src.models.residual import Value, block, ending, entry, subsample_and_pad


class GlobalMean(nn.Module):
    """The mean over all pixels; unlike adaptive pooling its gradient is deterministic on CUDA."""

    def forward(self, x: Value) -> Value:
        """[n, c, h, w] to [n, c]."""
        return x.mean((2, 3))


def cifar(layers: Layers, shape: tuple[int, int, int], classes: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield stem, block1 … block{3n} and the readout: 6n + 2 weight layers (He et al. 2016, CVPR, section 4.2).

    Three groups of n blocks have width, 2·width and 4·width channels; the second and third begin with stride 2.
    """
    channels, n = layers.config.width, (layers.config.depth - 2) // 6
    yield "stem", entry(layers, channels, conv=layers.conv(shape[0], channels))
    for index in range(3 * n):
        outputs = layers.config.width * 2 ** (index // n)
        widens = outputs > channels
        first = layers.conv(channels, outputs, stride=2 if widens else 1)
        second = layers.conv(outputs, outputs, scale=layers.branch_scale)
        yield f"block{index + 1}", block(layers, first, second, subsample_and_pad(outputs - channels) if widens else nn.Identity())
        channels = outputs
    yield "readout", ending(layers, channels, pool=GlobalMean(), linear=layers.linear(channels, classes))


def vgg(layers: Layers, shape: tuple[int, int, int], classes: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield conv1 … conv6 in three pairs, each closed by 2×2 max-pooling, a dense stage and the readout: 8 weight layers.

    The pairs have width, 2·width and 4·width channels (in the manner of Simonyan & Zisserman 2015).

    Raises: UserError where an image is smaller than 8×8 pixels, which three poolings leave empty.
    """
    channels, height, width = shape
    if min(height, width) < 8:
        raise UserError(f"the VGG-like net needs images of at least 8×8 pixels, got {height}×{width}; choose other data or another model")
    for index in range(6):
        outputs = layers.config.width * 2 ** (index // 2)
        conv = layers.conv(channels, outputs)
        pool = nn.MaxPool2d(2) if index % 2 else None
        yield f"conv{index + 1}", stage(conv=conv, norm=layers.norm(outputs), activation=layers.activation(), pool=pool)
        channels = outputs
    dense = layers.linear(channels, channels)
    yield "dense", stage(pool=GlobalMean(), linear=dense, activation=layers.activation())
    yield "readout", layers.linear(channels, classes)
