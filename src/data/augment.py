"""Augmentation of a batch at once, on whatever device its images are: random crop, horizontal flip, cutout.

What is drawn is drawn on the CPU, so that every device sees the same images; it was never seen on a GPU.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from src.seeds import generator

PAD = 4  # pixels that a crop may be off the centre (He et al. 2016, CVPR, section 4.2, who pad with zeros)


def crop(images: UInt8[Tensor, "n c h w"], draws: torch.Generator, fill: UInt8[Tensor, " c"]) -> UInt8[Tensor, "n c h w"]:
    """Each image moved by −4 … 4 pixels down and to the right; what comes in is its own reflection at the border pixels."""
    n, _, height, width = images.shape
    shifts = torch.randint(-PAD, PAD + 1, (n, 2), generator=draws).to(images.device, non_blocking=True)
    rows, columns = (_reflected(size, shifts[:, axis : axis + 1]) for axis, size in enumerate((height, width)))
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    return moved.gather(3, columns[:, None, None, :].expand_as(images))


def _reflected(size: int, shifts: Int64[Tensor, "n 1"]) -> Int64[Tensor, "n size"]:
    """Where the pixels 0 … size−1 of each image come from."""
    sources = (torch.arange(size, device=shifts.device) - shifts).abs()
    return torch.where(sources < size, sources, 2 * (size - 1) - sources)


def flip(images: UInt8[Tensor, "n c h w"], draws: torch.Generator, fill: UInt8[Tensor, " c"]) -> UInt8[Tensor, "n c h w"]:
    """Each image mirrored left to right with probability ½."""
    mirrored = torch.randint(2, (len(images), 1, 1, 1), generator=draws, dtype=torch.bool).to(images.device, non_blocking=True)
    return torch.where(mirrored, images.flip(3), images)


def cutout(images: UInt8[Tensor, "n c h w"], draws: torch.Generator, fill: UInt8[Tensor, " c"]) -> UInt8[Tensor, "n c h w"]:
    """Each image with a square of half its height filled, its centre anywhere in the image (DeVries & Taylor 2017, 16 of 32 pixels)."""
    n, _, height, width = images.shape
    centres = [torch.randint(size, (n, 1), generator=draws).to(images.device, non_blocking=True) for size in (height, width)]
    side = height // 2
    down, across = (_covered(size, centre, side) for size, centre in zip((height, width), centres, strict=True))
    return torch.where((down[:, :, None] & across[:, None, :])[:, None], fill[:, None, None], images)


def _covered(size: int, centres: Int64[Tensor, "n 1"], side: int) -> Bool[Tensor, "n size"]:
    """Which of the pixels 0 … size−1 lie in [centre − side/2, centre + side/2)."""
    distance = torch.arange(size, device=centres.device) - centres + side // 2
    return (distance >= 0) & (distance < side)


AUGMENTATIONS: Mapping[str, Callable[[Tensor, torch.Generator, Tensor], Tensor]] = {"crop": crop, "flip": flip, "cutout": cutout}


def augment(
    images: UInt8[Tensor, "n c h w"], names: Sequence[str], fill: UInt8[Tensor, " c"], order: torch.Generator, step: int
) -> UInt8[Tensor, "n c h w"]:
    """The batch of a training's step, augmented: a function of its images, of the seed of their order, and of the step alone.

    Args:
        images: a batch.
        names: of the augmentations, in the order that they are done.
        fill: the pixel that cutout fills with.
        order: draws the order of the images; its seed is read, no number is drawn of it.
        step: of the training.
    """
    draws = generator(order.initial_seed(), "augment", step)
    for name in names:
        images = AUGMENTATIONS[name](images, draws, fill)
    return images
