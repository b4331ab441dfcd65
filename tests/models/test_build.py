import itertools
import math

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from src.config import ModelConfig
from src.errors import UserError
from src.models import Residual, build
from src.paths import depth, skip_depth

DEPTH = {"mlp": 3, "residual_mlp": 6, "cifar": 8, "vgg": 8}
ACTIVATIONS = ("tanh", "sigmoid", "relu", "linear")
SHAPES = [(1, 28, 28), (3, 32, 32)]


def config(family="mlp", **changes):
    plain = {"width": 8, "activation": "relu", "init": "gaussian", "weight_var": 2.0, "bias_var": 0.0}
    plain |= {"norm": "none", "skip": "none", "branch_scale": 1.0}
    return ModelConfig(**{"family": family, "depth": DEPTH[family]} | plain | changes)


def network(family="mlp", shape=(1, 8, 8), seed=0, **changes):
    return build(config(family, **changes), shape, 10, torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def combinations():
    for family in DEPTH:
        norms = ("none", "batch") if family in ("cifar", "vgg") else ("none", "batch", "layer")
        skips = ("none",) if family in ("mlp", "vgg") else ("none", "original", "preactivation")
        yield from itertools.product([family], norms, skips)


def weight_layers(net):
    return [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def parameter_count(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("family", "norm", "skip"), list(combinations()))
def test_every_network_runs_forward_and_backward_and_is_traceable(family, norm, skip, shape):
    for activation in ACTIVATIONS:
        net = network(family, shape, norm=norm, skip=skip, activation=activation, width=4)
        images = normal(4, *shape)
        logits = net(images)
        functional.cross_entropy(logits, torch.arange(4)).backward()
        assert logits.shape == (4, 10)
        assert logits.dtype == torch.float32
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
        net.eval()
        torch.testing.assert_close(fx.symbolic_trace(net)(images), net(images))


@pytest.mark.parametrize("family", DEPTH)
def test_small_images(family):
    assert network(family)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_vgg_refuses_images_that_pooling_would_empty():
    with pytest.raises(UserError, match="8×8 pixels, got 7×9"):
        network("vgg", (1, 7, 9))


@pytest.mark.parametrize(
    ("family", "layers", "names"),
    [
        ("mlp", 1, ["readout"]),
        ("mlp", 3, ["layer1", "layer2", "readout"]),
        ("residual_mlp", 6, ["embed", "block1", "block2", "readout"]),
        ("cifar", 8, ["stem", "block1", "block2", "block3", "readout"]),
        ("vgg", 8, ["conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "dense", "readout"]),
    ],
)
def test_stages_are_named_and_depth_counts_weight_layers(family, layers, names):
    net = network(family, depth=layers)
    assert list(dict(net.named_children())) == names
    assert len(weight_layers(net)) == layers


@pytest.mark.parametrize(("family", "norm", "skip"), list(combinations()))
def test_stages_hold_one_weight_layer_or_one_block_of_two(family, norm, skip):
    net = network(family, norm=norm, skip=skip)
    for name, stage in net.named_children():
        assert len(weight_layers(stage)) == (2 if name.startswith("block") else 1)
        assert isinstance(stage, Residual) == (name.startswith("block") and skip != "none")


@pytest.mark.parametrize(("family", "norm", "skip"), list(combinations()))
def test_skips_leave_the_readout_alone_on_the_shortest_path(family, norm, skip):
    net = network(family, norm=norm, skip=skip)
    assert depth(net) == DEPTH[family] - 1
    assert skip_depth(net) == (DEPTH[family] - 1 if skip == "none" else 1)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("family", DEPTH)
def test_the_generator_alone_decides_the_weights(family, init):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (network(family, init=init, bias_var=1.0, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", DEPTH)
def test_gaussian_weights_and_biases_have_the_given_variance(family):
    """(n-1)s²/σ² is χ²(n-1), so that s²/σ² lies within 1 ± 6√(2/n)."""
    net = network(family, width=128, weight_var=1.7, bias_var=0.3)
    for layer in weight_layers(net):
        fan_in = layer.weight[0].numel()
        assert layer.weight.var().item() * fan_in / 1.7 == pytest.approx(1, abs=6 * math.sqrt(2 / layer.weight.numel()))
    biases = torch.cat([layer.bias for layer in weight_layers(net)])
    assert biases.var().item() / 0.3 == pytest.approx(1, abs=6 * math.sqrt(2 / biases.numel()))


@pytest.mark.parametrize("family", DEPTH)
def test_orthogonal_weights_are_semi_orthogonal_times_the_scale(family):
    net = network(family, width=16, init="orthogonal", weight_var=1.7)
    for layer in weight_layers(net):
        W = layer.weight.flatten(1).double()
        gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
        torch.testing.assert_close(gram, 1.7 * torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)


def test_gaussian_weights_fail_the_test_of_orthogonality():
    W = network(width=16).layer2.linear.weight
    assert not torch.allclose(W.T @ W, 2 * torch.eye(16), atol=0.1)


def test_normalisation_starts_as_the_identity_map():
    for norm, kind in (("batch", nn.BatchNorm1d), ("layer", nn.LayerNorm)):
        layer = network(norm=norm).layer1.norm
        assert isinstance(layer, kind)
        assert torch.equal(layer.weight, torch.ones(8))
        assert torch.equal(layer.bias, torch.zeros(8))


@pytest.mark.parametrize("family", ["cifar", "vgg"])
def test_convolutions_have_a_bias_only_without_normalisation(family):
    for norm in ("none", "batch"):
        convolutions = [layer for layer in weight_layers(network(family, norm=norm)) if isinstance(layer, nn.Conv2d)]
        assert all((layer.bias is None) == (norm == "batch") for layer in convolutions)


@pytest.mark.parametrize("family", ["residual_mlp", "cifar"])
def test_branch_scale_multiplies_the_last_weights_of_residual_branches_only(family):
    for skip in ("original", "preactivation", "none"):
        whole = dict(network(family, skip=skip, norm="batch").named_parameters())
        for name, weight in network(family, skip=skip, norm="batch", branch_scale=0.25).named_parameters():
            factor = 0.25 if skip != "none" and "weight2" in name else 1.0
            torch.testing.assert_close(weight, factor * whole[name])


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("family", ["residual_mlp", "cifar"])
def test_plain_original_and_preactivation_have_equally_many_parameters(family, norm):
    counts = {parameter_count(network(family, skip=skip, norm=norm)) for skip in ("none", "original", "preactivation")}
    assert len(counts) == 1


@pytest.mark.parametrize(("layers", "millions"), [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")])
def test_published_sizes_of_the_cifar_resnets(layers, millions):
    net = network("cifar", (3, 32, 32), depth=layers, width=16, norm="batch", skip="original")
    assert f"{parameter_count(net) / 1e6:.{len(millions) - 2}f}" == millions


def batch_norm(x):
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("skip", "equation"),
    [
        ("preactivation", lambda x, W1, W2: x + batch_norm(batch_norm(x).tanh() @ W1.T).tanh() @ W2.T),
        ("original", lambda x, W1, W2: (x + batch_norm(batch_norm(x @ W1.T).tanh() @ W2.T)).tanh()),
        ("none", lambda x, W1, W2: batch_norm(batch_norm(x @ W1.T).tanh() @ W2.T).tanh()),
    ],
)
def test_blocks_follow_their_equations(skip, equation):
    block = network("residual_mlp", skip=skip, norm="batch", activation="tanh").block1
    x = normal(16, 8)
    torch.testing.assert_close(block(x), equation(x, block.branch.weight1.weight, block.branch.weight2.weight))


def test_the_shortcut_without_parameters_subsamples_and_pads_channels():
    shortcut = network("cifar", skip="original").block2.shortcut
    x = normal(2, 8, 7, 8)
    assert not list(shortcut.parameters())
    assert torch.equal(shortcut(x), functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 8)))


def second_moments(net, x):
    """E[x²] over batch and units after each stage."""
    moments = []
    for stage in net:
        x = stage(x)
        moments.append(x.square().mean().item())
    return torch.tensor(moments)


def test_a_thousand_layers_keep_order():
    net = network(depth=1000, width=16, init="orthogonal", activation="linear", weight_var=1.0)
    assert len(net) == 1000
    assert second_moments(net[1:-1], torch.ones(1, 16)) == pytest.approx(torch.ones(998), rel=1e-3)  # an isometry


@pytest.mark.parametrize(("weight_var", "rate"), [(2.0, 1.0), (1.0, 0.5)])
def test_relu_multiplies_the_variance_by_half_the_weight_variance(weight_var, rate):
    """q_{l+1} = ½ σw² q_l (He et al. 2015); the mean log over 8 layers of width 512 within 5%, where 12 seeds spread by 3%."""
    moments = second_moments(network(depth=10, width=512, weight_var=weight_var)[:-1], normal(8, 1, 8, 8, seed=1000))
    assert ((moments[-1] / moments[0]).log() / 8).exp().item() == pytest.approx(rate, rel=0.05)


def residual_moments(norm, seeds, **changes):
    """Second moments after each of 8 pre-activation blocks from x_0 ~ N(0, I), a row per seed."""
    rows = []
    for seed in range(seeds):
        net = network("residual_mlp", depth=18, width=256, norm=norm, skip="preactivation", seed=seed, **changes)
        x = normal(128, 256, seed=1000 + seed)
        with torch.no_grad():
            rows.append(second_moments(net[1:-1], x))
    return torch.stack(rows)


def test_normalised_branches_add_one_to_the_variance_per_block():
    """Var(x_l) = 1 + l for BN–ReLU–W branches with σw² = 2 (De & Smith 2020); within 5% at width 256, 4 seeds."""
    expected = torch.arange(2.0, 10.0)
    assert residual_moments("batch", 4).mean(0) == pytest.approx(expected, rel=0.05)
    assert residual_moments("batch", 1, weight_var=1.0)[0] != pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("weight_var", "rate"), [(2.0, 2.0), (1.0, 1.25)])
def test_unnormalised_branches_multiply_the_variance_per_block(weight_var, rate):
    """E x_l² = (1 + (σw²/2)²)^l: doubled for He's σw² = 2; the mean log over 4 seeds within 0.1 log₂ units a block at width 256."""
    growth = residual_moments("none", 4, weight_var=weight_var).log2().mean(0) / torch.arange(1.0, 9.0)
    assert growth == pytest.approx(torch.full((8,), math.log2(rate)), abs=0.1)
