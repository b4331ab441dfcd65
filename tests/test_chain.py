import copy
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

from src.chain import cut, require_finite
from src.errors import UserError
from tests.jacobian import naive
from tests.jacobian.networks import SMALL, dense, normal, seeded, small


def refusal(message):
    return pytest.raises(UserError, match=f"^{re.escape(message)}$")


def chain_of(model, stages=None, batch_norm="eval"):
    return cut(model, stages, torch.float64, batch_norm)


@pytest.mark.parametrize("name", SMALL)
def test_the_chain_is_the_network_in_float64_and_eval_mode(name):
    model, x = small(name).train(), normal(3, 1, 4, 4)
    chain = chain_of(model)
    states = chain.states(x.double())
    assert chain.names == tuple(name for name, _ in model.named_children())
    assert len(states) == len(model) + 1
    torch.testing.assert_close(states[-1], naive.as_measured(model)(x.double()), rtol=1e-14, atol=1e-15)
    assert torch.equal(
        cut(model, None, torch.float64, "eval", backpropagated=True).states(x.double())[-1], naive.as_measured(model)(x.double())
    )
    other = chain_of(seeded(small(name), seed=1)).states(x.double())
    assert not torch.allclose(states[-1], other[-1])


def test_stages_group_the_children_up_to_each_name():
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.Tanh(), c=nn.Linear(4, 4), d=nn.Tanh(), e=nn.Linear(4, 2)))
    x = normal(3, 4).double()
    whole, grouped = chain_of(model).states(x), chain_of(model, ["b", "d"])
    assert grouped.names == ("b", "d", "e")  # the last child closes the last stage, named or not
    for found, expected in zip(grouped.states(x), [whole[0], whole[2], whole[4], whole[5]], strict=True):
        assert torch.equal(found, expected)
    assert chain_of(model, ["d", "b"]).names == grouped.names
    assert chain_of(model, []).names == ("e",)


def test_a_module_standing_twice_is_two_stages():
    linear = nn.Linear(4, 4)
    chain = chain_of(nn.Sequential(linear, nn.Tanh(), linear))
    assert chain.names == ("0", "1", "2")
    assert chain.stages[0] is chain.stages[2]
    assert len(dict(nn.Sequential(linear, nn.Tanh(), linear).named_children())) == 2  # what torch alone would list


def test_in_place_modules_and_dropout_are_off_in_the_chain_only():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.LeakyReLU(0.1, inplace=True))
    x = normal(3, 4)
    states = chain_of(model).states(x.double())
    assert torch.equal(states[0], x.double())
    assert torch.equal(states[1], x.double().relu())
    assert torch.equal(states[2], states[1])
    assert all(module.inplace for module in model)
    model(x)
    assert torch.equal(x, states[3].float()) is False  # the model itself still overwrites its input, with dropout


def test_batch_statistics_make_the_batch_one_sample():
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()))
    x = normal(5, 4).double()
    chain = chain_of(model, batch_norm="train")
    out = chain.states(x.unsqueeze(0))[-1]
    assert chain.on_batch
    torch.testing.assert_close(out.squeeze(0), copy.deepcopy(model).double().train()(x))
    frozen = chain_of(model).states(x)[-1]
    assert not torch.allclose(frozen, out.squeeze(0), atol=0.1)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_cutting_leaves_the_model_alone(batch_norm):
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.1)))
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    chain_of(model, batch_norm=batch_norm).states(normal(1, 3, 4).double() if batch_norm == "train" else normal(3, 4).double())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_sequential_without_children_has_no_stages():
    with refusal("Sequential: nothing to certify, it has no stages"):
        chain_of(nn.Sequential())


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_sequential_with_a_forward_of_its_own_is_traced():
    model, x = Doubled(nn.Linear(2, 2), nn.Linear(2, 2)), normal(3, 2)
    chain = chain_of(model)
    assert chain.names == ("0", "1")
    torch.testing.assert_close(chain.states(x.double())[-1].float(), model(x))


def test_an_unknown_stage_is_named_beside_the_known():
    with refusal("no stage named 'second'; there are 0, 1"):
        chain_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), ["0", "second"])


def test_batch_norm_without_running_statistics_is_refused_in_eval_mode_only():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)))
    with refusal("1.0: BatchNorm without running statistics couples the samples; certify with batch_norm='train'"):
        chain_of(model)
    chain_of(model, batch_norm="train").states(normal(1, 3, 2).double())


def not_finite(where, sample):
    return refusal(f"certificate: {where} is not finite at sample {sample}; look at its weights and inputs there")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_sample_of_an_input_that_is_not_finite_is_named(value):
    x = normal(4, 3).double()
    x[2, 1] = value
    with not_finite("the input", 2):
        chain_of(dense(3, 3, 2)).states(x)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_stage_with_a_nan_weight_is_named(stage):
    model = dense(3, 3, 3, 2)
    with torch.no_grad():
        next(model[stage].parameters())[0, 0] = torch.nan
    with not_finite(f"stage '{stage}'", 0):
        chain_of(model).states(normal(4, 3).double())


def test_the_sample_at_which_a_stage_overflows_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity()).double()
    with torch.no_grad():
        model[0].weight.fill_(1e308)
    x = torch.full((4, 2), 0.1).double()
    x[3] = 10.0
    with not_finite("stage '0'", 3):
        chain_of(model).states(x)
    chain_of(model).states(x[:3])


def test_a_sample_may_be_a_single_number():
    require_finite(torch.zeros(3), "the output")
    with not_finite("the output", 1):
        require_finite(torch.tensor([0.0, torch.nan]), "the output")
