"""Models that nothing can trace, with stages named by hand."""

import re

import pandas as pd
import pytest
import torch
from torch import nn

from src.certificate import certify
from src.chain import cut
from src.errors import UserError
from tests.jacobian.networks import normal, seeded

LABELS = torch.tensor([0, 2, 1])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, scale, *, shift=None):
        return self.inner(x) * scale + shift


class Deciding(nn.Module):
    """Looks at its values: no graph. Calls a layer twice, another with more arguments; flattens between two."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.scaled, self.head = (
            nn.Linear(4, 4),
            nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            Scaled(),
            nn.Linear(8, 3),
        )
        self.glue = self.between = None

    def forward(self, x):
        x = self.first(x)
        if x.sum() > 1e9:
            return x
        x = self.scaled(self.shared(self.shared(x)), 3.0, shift=torch.ones(4, dtype=x.dtype))
        x = x.flatten(1)
        return self.head(x if self.glue is None else self.glue(x))


NAMES = ["first", "shared", "scaled", "head"]


@pytest.fixture
def net():
    return seeded(Deciding())


def refusal(message):
    return pytest.raises(UserError, match=re.escape(message))


def test_the_stages_are_the_calls_of_the_named_modules(net):
    x = normal(3, 2, 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    certificate = certify(net, x, LABELS, stages=NAMES)
    assert list(certificate.severity["stage"]) == ["first", "shared", "shared@2", "scaled", "head"]
    assert (certificate.skip_depth, certificate.depth) == (4, 4)
    chain = cut(net, NAMES, torch.float32, "eval", inputs=x)
    torch.testing.assert_close(chain.states(x)[-1], net(x))
    other = normal(1, 2, 4, seed=1)  # another batch, of another size
    torch.testing.assert_close(chain.states(other)[-1], net(other))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_certificate_is_that_of_a_sequential_of_the_same(net):
    class Last(nn.Module):
        def forward(self, x):
            return self.inner(x, 3.0, shift=torch.ones(4, dtype=x.dtype))

    scaled = Last()
    scaled.inner = net.scaled
    x = normal(3, 2, 4)
    found = certify(net, x, LABELS, stages=NAMES).layers
    expected = certify(nn.Sequential(net.first, net.shared, net.shared, scaled, nn.Sequential(nn.Flatten(), net.head)), x, LABELS).layers
    pd.testing.assert_frame_equal(found.drop(columns="stage"), expected.drop(columns="stage"), rtol=1e-9)


def test_something_computed_between_two_stages_is_refused(net):
    net.glue = torch.sin
    with refusal("something is computed between stage 'scaled' and stage 'head'; wrap it in a module"):
        certify(net, normal(3, 2, 4), LABELS, stages=NAMES)
    with refusal("something is computed between the model's input and stage 'shared'"):
        certify(net, normal(3, 2, 4), LABELS, stages=["shared", "scaled", "head"])
    net.glue = None
    with refusal("something is computed between stage 'scaled' and the model's output"):
        certify(net, normal(3, 2, 4), LABELS, stages=["first", "shared", "scaled"])


def test_unknown_and_uncalled_stages_are_refused(net):
    net.idle = nn.Linear(4, 4)
    with refusal("no submodule named 'second'; there are first, shared, shared.0"):
        certify(net, normal(3, 2, 4), LABELS, stages=["first", "second"])
    with refusal("stage 'idle' is never called"):
        certify(net, normal(3, 2, 4), LABELS, stages=["first", "idle"])


def test_a_stage_of_two_states_is_refused():
    class Joining(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.join = nn.Linear(3, 3), nn.Bilinear(3, 3, 3)

        def forward(self, x):
            y = self.first(x)
            return self.join(x, y) if y.sum() < 1e9 else y

    with refusal("stage 'join' takes 2 tensors that depend on the model's input and returns a Tensor; wrap it in a module"):
        certify(Joining(), normal(3, 3), LABELS, stages=["first", "join"])


def test_a_stage_may_write_over_its_input():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)

        def forward(self, x):
            y = self.act(self.first(x))
            return self.last(y) if y.sum() < 1e9 else y

    model, x = seeded(Overwriting()), normal(3, 4)
    chain = cut(model, ["first", "act", "last"], torch.float32, "eval", inputs=x)
    torch.testing.assert_close(chain.states(x)[-1], model(x))
