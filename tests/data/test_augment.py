"""Augmentation of whole batches against one image after the other in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from src.data.augment import AUGMENTATIONS, PAD, augment
from src.seeds import generator
from src.training.loop import Keeper, train
from tests.training.sets import small_set
from tests.training.test_loop import config, network

FILL = torch.tensor([7, 99], dtype=torch.uint8)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(height: int, width: int, count: int = 200) -> torch.Tensor:
    return torch.randint(256, (count, 2, height, width), generator=rng(1), dtype=torch.uint8)


def cropped(images: np.ndarray, draws: torch.Generator) -> np.ndarray:
    shifts = torch.randint(-PAD, PAD + 1, (len(images), 2), generator=draws).numpy()
    padded = np.pad(images, ((0, 0), (0, 0), (PAD, PAD), (PAD, PAD)), mode="reflect")
    height, width = images.shape[2:]
    return np.stack([one[:, PAD - y : PAD - y + height, PAD - x : PAD - x + width] for one, (y, x) in zip(padded, shifts, strict=True)])


def flipped(images: np.ndarray, draws: torch.Generator) -> np.ndarray:
    mirrored = torch.randint(2, (len(images), 1, 1, 1), generator=draws, dtype=torch.bool).flatten().tolist()
    return np.stack([one[:, :, ::-1] if mirror else one for one, mirror in zip(images, mirrored, strict=True)])


def cut_out(images: np.ndarray, draws: torch.Generator) -> np.ndarray:
    rows, columns = (torch.randint(size, (len(images), 1), generator=draws).flatten().tolist() for size in images.shape[2:])
    side, found = images.shape[2] // 2, images.copy()
    for one, row, column in zip(found, rows, columns, strict=True):
        top, left = row - side // 2, column - side // 2
        one[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = FILL.numpy()[:, None, None]
    return found


NAIVE = {"crop": cropped, "flip": flipped, "cutout": cut_out}


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12)])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_batch_is_augmented_as_its_images_are_one_by_one(name: str, height: int, width: int) -> None:
    images = batch(height, width)
    before = images.clone()
    found = AUGMENTATIONS[name](images, rng(), FILL)
    np.testing.assert_array_equal(found.numpy(), NAIVE[name](images.numpy(), rng()))
    assert torch.equal(images, before)
    assert not torch.equal(found, images)
    assert not np.array_equal(found.numpy(), NAIVE[name](images.numpy(), rng(1)))


def test_crops_reach_every_shift_and_flips_either_side() -> None:
    where = torch.arange(100, dtype=torch.uint8).view(1, 1, 10, 10).expand(3000, 1, 10, 10)
    centres = AUGMENTATIONS["crop"](where, rng(), FILL[:1])[:, 0, 5, 5].bincount()
    shifts = centres[centres > 0]
    assert len(shifts) == (2 * PAD + 1) ** 2
    assert shifts.max() < 3 * shifts.float().mean()
    left = AUGMENTATIONS["flip"](where, rng(), FILL[:1])[:, 0, 0, 0]
    assert set(left.tolist()) == {0, 9}
    assert 0.45 < (left == 0).float().mean() < 0.55


def test_they_are_done_in_the_order_given_from_one_generator() -> None:
    images, order = batch(8, 8), rng(3)
    draws = generator(3, "augment", 5)
    expected = AUGMENTATIONS["cutout"](AUGMENTATIONS["flip"](images, draws, FILL), draws, FILL)
    assert torch.equal(augment(images, ["flip", "cutout"], FILL, order, 5), expected)
    assert not torch.equal(augment(images, ["cutout", "flip"], FILL, order, 5), expected)


def test_seed_and_step_decide_and_the_order_is_not_moved() -> None:
    images, order = batch(8, 8), rng(3)
    state = order.get_state()

    def of(order: torch.Generator, step: int) -> torch.Tensor:
        return augment(images, ["crop"], FILL, order, step)

    first = of(order, 1)
    assert torch.equal(order.get_state(), state)
    torch.randperm(10, generator=order)
    assert torch.equal(of(order, 1), first)
    assert not torch.equal(of(order, 2), first)
    assert not torch.equal(of(rng(4), 1), first)


def trained(names: tuple[str, ...], seed: int = 0, keeper: Keeper | None = None) -> torch.Tensor:
    model, data = network(18, 8, 3), replace(small_set(), augment=names)
    train(model, data, config(), rng(seed), keeper=keeper)
    return parameters_to_vector(model.parameters()).detach()


def test_a_training_sees_what_is_configured_and_nothing_by_default() -> None:
    assert small_set().augment == ()
    plain, mirrored = trained(()), trained(("flip",))
    assert torch.equal(trained(("flip",)), mirrored)
    assert not torch.equal(plain, mirrored)


def test_cutout_fills_with_the_mean_pixel() -> None:
    data = replace(small_set(), augment=("cutout",))
    seen: list[torch.Tensor] = []

    def looking(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return model(images).square().mean()

    train(network(18, 3), data, config(max_steps=1), rng(), objective=looking)
    covered = (seen[0].abs() < 0.01).all(1).flatten(1).sum(1)
    assert covered.min() >= 0
    assert covered.max() == 1  # of nine pixels: side 1
    assert (covered == 1).float().mean() > 0.8
