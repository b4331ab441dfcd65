"""A look at a normalised net against plain autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments import batchnorm_stabilization as claim
from src.experiment import Context
from src.locking import error_signals, growth
from src.train_mode import look, middle_norm
from src.trainings import Trainee, train_all
from tests.experiments.measured import context


@pytest.fixture(scope="module")
def lab() -> Context:
    return context("batchnorm_stabilization")


@pytest.mark.parametrize("norm", claim.NORMS)
def test_a_look_is_plain_autograd_in_train_mode(lab: Context, norm: str) -> None:
    examples = claim._batch(lab, 8)
    network = lab.network(claim._net(lab.config, depth=6, width=16, norm=norm), 0).double().train()
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
    found = look(network, examples)
    assert all(torch.equal(statistics[name], buffer) for name, buffer in network.named_buffers())
    states = [examples[0].double()]
    for stage in network:
        states.append(stage(states[-1]))
    gradients = torch.autograd.grad(cross_entropy(states[-1], examples[1]), states[1:6])
    logs = [float(gradient.norm().log()) for gradient in gradients]
    into = [stage.linear(state.flatten(1)).detach() for stage, state in zip(network[:5], states[:5], strict=True)]
    norms = [float((z.var(int(norm == "layer"), correction=0) + 1e-5).min()) ** -0.5 for z in into]
    expected = {"mean_norm": np.mean(norms), "rate": 2 * (logs[2] - logs[3]), "flow": logs[0] - logs[4], "range": max(logs) - min(logs)}
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("norm", claim.NORMS)
def test_the_middle_layers_norm_is_that_of_a_naive_jacobian(lab: Context, norm: str) -> None:
    inputs, _ = lab.samples(lab.data.train, 4)
    network = lab.network(claim._net(lab.config, depth=4, width=6, norm=norm), 0).double().train()
    state = network[1](network[0](inputs.double())).detach()
    J = torch.autograd.functional.jacobian(network[2], state).reshape(24, 24)
    assert middle_norm(network, inputs) == pytest.approx(float(torch.linalg.matrix_norm(J, 2)), rel=1e-10)


def test_the_last_hidden_layer_is_left_out_of_the_rate(lab: Context) -> None:
    """Its gradient has been through no normalisation: another readout changes the rate of the last layer alone."""
    network = lab.network(claim._net(lab.config, depth=14, width=64), 0)
    signals = error_signals(network, *claim._batch(lab, 64), batch_norm="train")
    assert look(network, claim._batch(lab, 64))["rate"] == growth({**signals, 13: 100.0, 14: 100.0}, last=12)


def test_looking_along_training_leaves_it_as_it_is(lab: Context) -> None:
    examples = claim._batch(lab, 16)
    config = replace(lab.config.training, max_steps=3, batch_size=32)
    networks = [lab.network(claim._net(lab.config, depth=6, width=16), 0) for _ in range(2)]
    train_all(lab, [Trainee(networks[0], "looked at", 0, on_step=lambda step: look(networks[0], examples), config=config)])
    train_all(lab, [Trainee(networks[1], "alone", 0, config=config)])
    assert all(torch.equal(a, b) for a, b in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True))
