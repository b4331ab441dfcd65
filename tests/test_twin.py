"""Copies to measure on: what they keep, what they leave behind, and what can't be left behind."""

import re
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from src.certificate import certify
from src.errors import UserError
from src.twin import bare, twin
from tests.jacobian.networks import normal, seeded

LABELS = torch.tensor([0, 1, 2])


def chain():
    return seeded(nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)))


class Keeps(nn.Module):
    """Keeps what it computed last."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        self.last = torch.tanh(x) * self.linear.weight.sum()
        return self.linear(self.last)


class Watcher:
    """A hook that holds what can't be copied."""

    def __init__(self):
        self.lock, self.seen = threading.Lock(), []

    def __call__(self, module, arguments, output):
        self.seen.append(output.detach().numpy().copy())


def test_states_that_were_kept_are_copied():
    model = seeded(Keeps())
    model(normal(3, 8))
    copied = twin(model)
    assert copied.last is not model.last
    assert torch.equal(copied.last, model.last)
    assert certify(model, normal(3, 8), LABELS).rank.tolist() == [3] * 3


def test_hooks_that_watch_are_left_behind_and_stay_where_they_are():
    model, watcher = chain(), Watcher()
    model[0][0].register_forward_hook(watcher)
    model[0][0].register_full_backward_hook(lambda *_: None)
    assert not twin(model)[0][0]._forward_hooks
    found = certify(model, normal(3, 8), LABELS)
    assert found.log_attenuation.tolist() == certify(chain(), normal(3, 8), LABELS).log_attenuation.tolist()
    assert len(watcher.seen) == 1  # one run, to see that it changes nothing
    assert list(model[0][0]._forward_hooks.values()) == [watcher]


def test_a_hook_that_changes_the_model_is_refused():
    model = chain()
    model[0][0].register_forward_hook(lambda module, arguments, output: 3 * output)
    model.train()
    message = "Sequential: a hook changes what it computes, which a certificate does not see; make it part of a forward"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        certify(model, normal(3, 8), LABELS)
    assert model.training
    assert model[0][1].training


def test_torchs_own_hooks_are_part_of_the_model():
    model = chain()
    prune.l1_unstructured(model[0][0], "weight", amount=0.5)
    model(normal(3, 8))
    copied = twin(model)
    assert len(copied[0][0]._forward_pre_hooks) == 1
    assert torch.equal(copied(normal(3, 8)), model(normal(3, 8)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_wrappers_are_taken_off(wrap):
    model = chain()
    assert bare(wrap(model)) is model
    assert certify(wrap(model), normal(3, 8), LABELS).layers["stage"].unique().tolist() == ["0", "1"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.jit.trace(chain(), normal(3, 8)), "TorchScript can't be taken apart"),
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), "its weights have no values yet"),
        (lambda: chain().to("meta"), "its weights have no values yet"),
    ],
)
def test_what_cannot_be_taken_apart_or_has_no_values_is_refused(make, reason):
    model = make()
    with pytest.raises(UserError, match=reason):
        certify(model, normal(3, 8), LABELS)
