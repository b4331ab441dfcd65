"""Somebody's model gets the classes and the images that it takes; what is wrong with it, test_certify.py sees from the command line."""

import torch
from torch import nn

from src import user_model


def test_images_are_adapted_only_where_that_is_asked_for() -> None:
    grey, colour = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 8, 8)
    takes = {channels: nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Conv2d(4, 4, 3)) for channels in (1, 3)}
    adapted, changes = user_model.adapt(grey, takes[3], None)
    assert torch.equal(adapted, torch.cat([grey] * 3, 1))
    assert len(changes) == 1
    for images, model in ((grey, takes[1]), (colour, takes[3]), (colour, takes[1]), (grey, nn.Linear(64, 3))):
        adapted, changes = user_model.adapt(images, model, None)
        assert adapted is images
        assert changes == []
    ramp = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    smaller, changes = user_model.adapt(ramp, takes[1], 4)
    assert changes == ["resized from 8×8 to 4×4"]
    assert smaller.shape == (1, 1, 4, 4)
    torch.testing.assert_close(smaller[0, 0, :, 1:3], ramp[0, 0, ::2].unflatten(1, (4, 2)).mean(2)[:, 1:3])


def test_a_torchvision_model_has_the_classes_of_the_data() -> None:
    model = user_model.build("torchvision:squeezenet1_1", 7)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
