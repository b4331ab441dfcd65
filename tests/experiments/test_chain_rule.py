"""chain_rule: the product against naive references, the coupling of samples, the order of the factors, the rank of long products."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments import chain_rule as claim
from src.chain import cut
from src.config import ModelConfig
from src.data.load import Split
from src.jacobian.materialised import layer_jacobian
from src.rows import pick
from tests.experiments.measured import config, put, small_context, small_rows, verdicts
from tests.jacobian import naive
from tests.jacobian.networks import SMALL as STAGES
from tests.jacobian.networks import normal, seeded, small

NAME = "chain_rule"
SMALL = (
    "grid.depths=[4]",
    "grid.activations=[tanh]",
    "grid.certified_seeds=2",
    "grid.seeds=2",
    "grid.rate_depth=18",
    "grid.batch_sizes=[3,5]",
    "grid.samples=2",
    "grid.product_width=8",
    "model.width=8",
)
GAUSSIAN, ORTHOGONAL = {"init": "gaussian"}, {"init": "orthogonal"}


def as_predicted(rows):
    return [claim.predicted_kept_rank(net.width, net.factors) for net in rows.itertuples()]


# criterion, what is changed in the measured rows, verdict
CASES = [
    ("chain_rule", [], "holds_if"),
    ("chain_rule", [put("error_own", 0.0)], "holds"),
    ("chain_rule", [put("error", 1e-6, part="per sample", family="vgg", norm="batch")], "refuted"),
    ("operators", [], "holds"),
    ("operators", [put("error", 1e-6, part="batch", family="mlp", batch_size=5)], "refuted"),
    ("operators", [put("error", 1e-6, part="per sample", family="mlp", norm="layer")], "refuted"),
    ("gradient_chain", [], "refuted"),
    ("gradient_chain", [put("error_without_parameters", 0.0)], "holds"),
    ("order", [], "holds"),
    ("order", [put("error_reversed", 1e-14, norm="layer")], "refuted"),
    ("degenerates", [put("kept_rank", 1.0)], "refuted"),
    ("degenerates", [put("kept_rank", 1.0), put("kept_rank", 0.5, activation="relu", factors=16, **ORTHOGONAL)], "holds"),
    ("degenerates", [put("kept_rank", 1.0), put("kept_rank", 0.5, factors=8)], "refuted"),
    ("degenerate_where", [put("kept_rank", 0.5)], "refuted"),
    ("degenerate_where", [put("kept_rank", 0.5, **GAUSSIAN), put("kept_rank", 1.0, **ORTHOGONAL)], "holds_if"),
    ("degenerate_where", [put("kept_rank", 0.5), put("kept_rank", 1.0, activation="relu", **GAUSSIAN)], "refuted"),
    ("lyapunov", [put("kept_rank", as_predicted, activation="linear", **GAUSSIAN)], "holds"),
    ("lyapunov", [put("kept_rank", lambda rows: np.array(as_predicted(rows)) - 0.2, activation="linear", **GAUSSIAN)], "refuted"),
]


def test_exact_statements_come_out_on_real_rows() -> None:
    found = {name: verdict.verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items()}
    assert [found[name] for name in ("chain_rule", "operators", "gradient_chain", "order")] == ["holds_if", "holds", "refuted", "holds"]


@pytest.mark.parametrize("scale", ["smoke", "quick", "paper"])
def test_there_are_two_hundred_random_chains_of_every_kind(scale: str) -> None:
    chains = claim._random(config(NAME, f"scale={scale}"))
    assert len({(model, seed) for model, seed in chains}) == len(chains) >= 200
    assert {(model.family, model.skip, model.norm) for model, _ in chains} == set(claim.KINDS)
    assert sum(model.family in claim.CONVOLUTIONAL for model, _ in chains) >= 8 * 4
    assert {model.activation for model, _ in chains} == {"linear", "tanh", "sigmoid", "relu"}
    assert {model.family for model, _ in chains} == set(ModelConfig.__annotations__["family"].__args__)
    coupled = {(model.family, model.skip) for model, _, _ in claim._coupled(config(NAME, f"scale={scale}"))}
    assert coupled == {(family, skip) for family, skip, _ in claim.KINDS}


def test_every_chain_has_a_gradient_and_rounds_it() -> None:
    """A dead chain would obey every form: its errors would be exactly nothing."""
    errors = pick(small_rows(NAME), "error")
    assert len(pick(errors, "error", part="per sample")) == len(claim.KINDS) * 2  # seeds of one activation
    assert (errors["value"] > 0).all()


LABELS = torch.tensor([0, 2, 1, 1, 2])


@pytest.mark.parametrize("name", STAGES)
def test_the_product_of_naive_jacobians_is_the_gradient(name: str) -> None:
    """g_lᵀP_l with every matrix from autograd's own jacobian; a factor that is 0.1% off is seen."""
    network, x = small(name), normal(5, 1, 4, 4)
    stages = list(naive.as_measured(network))
    truth = claim.autograd_gradients(network, zip(x.split(1), LABELS.split(1), strict=True), training=False)[::-1]
    links, jacobians = claim.written_out(cut(network.eval(), None, torch.float64, "eval"), x, LABELS)
    signals = list(claim.pulled_back(jacobians, links[0]))[::-1]
    assert claim.worst_error(links, signals[::-1], truth[::-1]) < 1e-12
    for n in range(5):
        states = [state[0] for state in naive.states(stages, x[n : n + 1].double())]
        covector = states[-1].softmax(0) - nn.functional.one_hot(LABELS[n], 3)  # ∇ of the cross-entropy, in closed form
        for index in range(len(stages) - 1, -1, -1):
            np.testing.assert_allclose(signals[index][n], covector, rtol=1e-9, atol=1e-13)
            expected = covector.numpy() @ naive.parameter_jacobian(stages[index], states[index])
            np.testing.assert_allclose(truth[index][n], expected, rtol=1e-9, atol=1e-13)
            covector = torch.as_tensor(covector.numpy() @ naive.layer_jacobian(stages[index], states[index]))
    off = claim.pulled_back([1.001 * jacobians[0], *jacobians[1:]], links[0])
    assert claim.worst_error(links, off, truth[::-1]) == pytest.approx(1e-3, rel=1e-6)


def normalised(norm: type[nn.Module]) -> nn.Sequential:
    first = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), norm(4), nn.Tanh())
    return seeded(nn.Sequential(first, nn.Sequential(nn.Linear(4, 4), norm(4)), nn.Linear(4, 3)))


def on_batch(network: nn.Sequential, inputs: torch.Tensor) -> tuple[float, float]:
    """The errors of the operator on the batch and of the samples' own Jacobians."""
    truth = claim.autograd_gradients(network, [(inputs, LABELS)], training=True)
    links, jacobians = claim.written_out(cut(network, None, torch.float64, "train"), inputs, LABELS)
    own = [claim.own_blocks(J, len(inputs)) for J in jacobians]
    first, second = (claim.worst_error(links, claim.pulled_back(factors, links[0]), truth) for factors in (jacobians, own))
    return first, second


def test_batch_normalisation_couples_samples_and_layer_normalisation_does_not() -> None:
    """Without coupling a sample's own Jacobian is all there is, so that the same measure finds nothing wrong."""
    operator, own = on_batch(normalised(nn.BatchNorm1d), normal(5, 1, 4, 4))
    assert operator < 1e-12
    assert own > 0.01
    assert max(on_batch(normalised(nn.LayerNorm), normal(5, 1, 4, 4))) < 1e-12


def test_own_blocks_are_the_derivatives_of_a_sample_by_itself() -> None:
    stage, x = nn.BatchNorm1d(3, track_running_stats=False).double().requires_grad_(False), normal(4, 3).double()
    J = layer_jacobian(nn.Sequential(nn.Unflatten(1, (4, 3)), nn.Flatten(0, 1), stage, nn.Unflatten(0, (1, 4))), x.reshape(1, 12))
    blocks = claim.own_blocks(J, 4)[0].reshape(4, 3, 4, 3)
    for n in range(4):
        for other in range(4):
            expected = J[0].reshape(4, 3, 4, 3)[n, :, other] if n == other else torch.zeros(3, 3)
            np.testing.assert_array_equal(blocks[n, :, other], expected)
    # ∂x̂_n/∂x_n = (1 − 1/N − x̂_n²/N)/σ per channel
    normal_x = (x - x.mean(0)) / x.var(0, correction=0).add(1e-5).sqrt()
    diagonal = (1 - 1 / 4 - normal_x.square() / 4) / x.var(0, correction=0).add(1e-5).sqrt()
    np.testing.assert_allclose(torch.stack([blocks[n, :, n].diagonal() for n in range(4)]), diagonal, rtol=1e-10)


def test_the_kept_rank_is_that_of_the_naive_product() -> None:
    draws = np.random.default_rng(0)
    jacobians = draws.normal(size=(32, 2, 6, 6))
    jacobians[3, 1, :, 0] = 0
    found = dict(claim.kept_ranks([torch.as_tensor(J) for J in jacobians]))
    assert list(found) == [1, 2, 4, 8, 16, 32]
    for factors, kept in found.items():
        shares = []
        for sample in range(2):
            product, least = np.eye(6), 6
            for J in jacobians[:factors, sample]:
                product, least = J.T @ product, min(least, naive.rank(J))
            shares.append(naive.rank(product) / least)
        assert kept == pytest.approx(np.mean(shares)), factors
    assert found[32] < found[1] == 1


def test_a_dead_layer_leaves_no_rank_to_lose() -> None:
    """Of two samples one loses everything at the second factor, the other half of its rank there."""
    eye, half = torch.eye(4, dtype=torch.float64), torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    turned = torch.flip(half, (0, 1))
    samples = [[eye, 0 * eye, eye, eye], [half, turned, eye, eye]]
    found = dict(claim.kept_ranks([torch.stack(factors) for factors in zip(*samples, strict=True)]))
    assert found == {1: 1.0, 2: 0.5, 4: 0.5}


def test_two_by_two_gaussian_products_lose_a_direction_after_51_factors() -> None:
    """λ_1 − λ_2 = ½(ψ(1) − ψ(½)) = ln 2 and nε = 2⁻⁵¹."""
    assert [claim.predicted_kept_rank(2, m) for m in (1, 50.9, 51.1)] == [1, 1, 0.5]


def test_lyapunov_exponents_of_gaussian_matrices() -> None:
    """λ_i from the QR decompositions of 2,000 factors (Newman 1986), through the factors at which each direction is lost."""
    n, steps, draws = 5, 2000, np.random.default_rng(0)
    Q, sums = np.eye(n), np.zeros(n)
    for _ in range(steps):
        Q, R = np.linalg.qr(draws.normal(size=(n, n)) / np.sqrt(n) @ Q)
        sums += np.log(np.abs(np.diag(R)))
    exponents = sums / steps
    lost = np.log(n * np.finfo(float).eps) / (exponents - exponents[0])[1:]  # factors
    for factors in lost:
        kept = [claim.predicted_kept_rank(n, share * factors) for share in (0.9, 1.1)]
        assert kept[0] - kept[1] == pytest.approx(1 / n)


def test_a_dead_gradient_is_no_error_of_nothing() -> None:
    found = claim.relative(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.0, 2.0, 0.0]))
    assert found.tolist() == [0.0, 0.5, float("inf")]


def test_a_sample_without_a_gradient_tells_nothing_of_the_order() -> None:
    """A loss of exactly 0 has none: with a large readout bias, first the sample of one class, then both, labelled alike."""
    lab = small_context(NAME)
    network = lab.network(claim._net(lab.config, ("mlp", "none", "none"), 4, 1, activation="tanh"), 0)
    targets = lab.samples(lab.data.test, 2)[1]
    assert targets[0] != targets[1]
    assert claim._compared(lab, network, reversible=True)["error_reversed"] > 0.1
    with torch.no_grad():
        network.readout.bias[targets[0]] += 1e3
    assert claim._compared(lab, network, reversible=True)["error_reversed"] > 0.1
    relabelled = Split(lab.data.test.images, torch.full_like(lab.data.test.labels, int(targets[0])))
    one_class = replace(lab, data=replace(lab.data, test=relabelled))
    found = claim._compared(one_class, network, reversible=True)
    assert "error_reversed" not in found
    assert found["error"] == 0


def test_the_samples_own_loss_is_the_reference() -> None:
    """A batch mean in place of each sample's own loss would be a factor N off."""
    network, x = small("dense"), normal(3, 1, 4, 4)
    own = claim.autograd_gradients(network, zip(x.split(1), LABELS[:3].split(1), strict=True), training=False)
    mean = claim.autograd_gradients(network, [(x, LABELS[:3])], training=False)
    for rows, row in zip(own, mean, strict=True):
        torch.testing.assert_close(rows.mean(0), row[0])
    network.zero_grad()
    cross_entropy(network.double()(x.double()), LABELS[:3]).backward()
    torch.testing.assert_close(mean[-1][0], torch.cat([parameter.grad.flatten() for parameter in network[0].parameters()]))
