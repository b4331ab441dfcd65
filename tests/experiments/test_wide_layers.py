"""wide_layers: the ranks against naive matrices, the caps on the rank, the known stable ranks of random Jacobians."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments import wide_layers as claim
from src.config import ModelConfig
from src.experiment import Context
from src.models import build
from src.rows import pick
from tests.experiments.measured import context, put, small_context, small_rows, verdicts
from tests.jacobian import naive

NAME = "wide_layers"
SMALL = (
    "grid.seeds=2",
    "grid.train_seeds=2",
    "grid.widths=[8,16,32]",
    "grid.batch_sizes=[8,24]",
    "grid.samples=2",
    "model.depth=4",
    "training.max_steps=2",
    "data.train_size=256",
    "data.test_size=100",
)


def share_of_width(share: float):
    return lambda rows: share * rows["width"]


def capped(cap: int):
    return lambda rows: np.minimum(rows["width"], cap)


def up_to_the_batch(rows: pd.DataFrame) -> pd.Series:
    return np.minimum(rows["width"], rows["batch_size"])


def as_predicted(rows: pd.DataFrame) -> list[int]:
    return [claim.predicted_sample_rank(net.width, net.batch_size, 10) for net in rows.itertuples()]


LINEAR, TANH = {"activation": "linear"}, {"activation": "tanh"}
GROWING = [put("gradient_rank", share_of_width(0.5))]
IDEAL = [put("gradient_rank", up_to_the_batch), put("gradient_rank", capped(8), **LINEAR)]

# criterion, what is changed in the measured rows, verdict
CASES = [
    ("jacobian_rank", [put("jacobian_rank", share_of_width(0.5))], "holds"),
    ("jacobian_rank", [put("jacobian_rank", share_of_width(0.5)), put("jacobian_rank", 4.0, when="trained", **TANH)], "refuted"),
    ("gradient_rank", GROWING, "holds"),
    ("gradient_rank", [], "refuted"),
    ("gradient_rank", [*GROWING, put("gradient_rank", 9.0, **LINEAR)], "refuted"),
    ("sample_gradients_rank", [put("sample_gradients_rank", share_of_width(1.0))], "holds"),
    ("sample_gradients_rank", [], "refuted"),
    ("share_of_the_width", [], "refuted"),
    ("share_of_the_width", [put(f"{matrix}_rank", lambda rows: rows["width"] ** 1.2) for matrix in ("jacobian", "gradient")], "holds"),
    ("jacobian_stable_rank", [put("jacobian_stable_rank", share_of_width(0.25))], "holds"),
    ("jacobian_stable_rank", [put("jacobian_stable_rank", 3.0, when="initial")], "refuted"),
    ("gradient_stable_rank", [put("gradient_stable_rank", share_of_width(0.25))], "holds"),
    ("gradient_stable_rank", [put("gradient_stable_rank", 1.5)], "refuted"),
    ("softmax_cap", [], "holds_if"),
    ("softmax_cap", [put("gradient_rank", 9.0)], "holds"),
    ("softmax_cap", [put("gradient_rank", 10.0, layer=2, width=32, batch_size=24, net_seed=1, **LINEAR)], "refuted"),
    ("softmax_cap", [put("gradient_rank", 10.0, layer=4, width=32, batch_size=24, net_seed=1, **TANH)], "refuted"),
    ("beyond_the_cap", IDEAL, "holds_if"),
    ("beyond_the_cap", [*IDEAL, put("gradient_rank", 9.0, **TANH)], "refuted"),
    ("batch_cap", [], "holds"),
    ("batch_cap", [put("gradient_rank", 9.0, batch_size=8, layer=1, width=32, net_seed=0, **TANH)], "refuted"),
    ("beyond_the_batch", IDEAL, "holds_if"),
    ("beyond_the_batch", [put("gradient_rank", 4.0)], "holds"),
    ("beyond_the_batch", GROWING, "refuted"),
    ("linear_sample_gradients", [put("sample_gradients_rank", as_predicted)], "holds"),
    ("linear_sample_gradients", [put("sample_gradients_rank", 8.0, **LINEAR)], "refuted"),
]


def test_exact_statements_come_out_on_real_rows() -> None:
    found = {name: verdict.verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items()}
    assert [found[name] for name in ("softmax_cap", "batch_cap", "gradient_rank")] == ["holds_if", "holds", "refuted"]


@pytest.fixture(scope="module")
def lab() -> Context:
    return small_context(NAME)


def net(lab: Context, activation: str, width: int, depth: int = 4, seed: int = 0) -> tuple[ModelConfig, torch.nn.Sequential]:
    model = next(model for model in claim._models(lab.config) if model.activation == activation)
    model = ModelConfig(**{**vars(model), "width": width, "depth": depth})
    return model, build(model, lab.data.shape, lab.data.classes, torch.Generator().manual_seed(seed))


def ranks(lab: Context, network: torch.nn.Sequential) -> pd.DataFrame:
    return pd.DataFrame(claim._ranks(lab, network, {}))


@pytest.mark.parametrize("activation", ["linear", "tanh", "relu"])
def test_every_rank_is_that_of_the_naive_matrix(lab: Context, activation: str) -> None:
    """∇W_l by autograd of the mean loss of the batch, N×P_l row by row, J_l of each sample."""
    _, network = net(lab, activation, 8)
    found = ranks(lab, network)
    inputs, targets = lab.samples(lab.data.train, 24)
    stages = list(naive.as_measured(network))
    for size in (8, 24):
        x, y = inputs[:size], targets[:size]
        twin = naive.as_measured(network)
        cross_entropy(twin(x.double()), y).backward()
        weights = [parameter.grad.numpy() for parameter in twin.parameters() if parameter.ndim == 2]
        for layer in range(1, 5):
            at = {"layer": layer, "batch_size": size}
            rank, stable = (pick(found, f"gradient_{kind}", **at)["value"].item() for kind in ("rank", "stable_rank"))
            s = naive.singular_values(weights[layer - 1])
            assert rank == naive.rank(weights[layer - 1]), at
            assert stable == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-9)
            matrix = naive.gradient_matrix(network, x, y, cross_entropy, layer)
            s = naive.singular_values(matrix / np.linalg.norm(matrix, axis=1, keepdims=True))
            assert pick(found, "sample_gradients_rank", **at)["value"].item() == (s > np.sqrt(size * 2.0**-52) * s[0]).sum()
            s = naive.singular_values(matrix)
            assert pick(found, "sample_gradients_stable_rank", **at)["value"].item() == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-9)
    for layer in (2, 3):
        jacobians = [naive.layer_jacobian(stages[layer - 1], naive.states(stages, x[None].double())[layer - 1][0]) for x in inputs[:2]]
        assert pick(found, "jacobian_rank", layer=layer)["value"].item() == np.mean([naive.rank(J) for J in jacobians])


def test_the_softmax_caps_a_linear_net_at_c_minus_1_at_every_width(lab: Context) -> None:
    """Nine at width 64; a tanh net has more, and so has the linear net under a loss whose gradients do not sum to zero."""
    _, network = net(lab, "linear", 64)
    gradients = pick(ranks(lab, network), "gradient_rank", batch_size=24)
    assert (gradients["value"] == 9).all()
    _, nonlinear = net(lab, "tanh", 64)
    of_tanh = pick(ranks(lab, nonlinear), "gradient_rank", batch_size=24).set_index("layer")["value"]
    assert of_tanh.loc[[2, 3]].tolist() == [24, 24]
    assert of_tanh.loc[4] == 9
    inputs, targets = lab.samples(lab.data.train, 24)
    twin = naive.as_measured(network)
    twin(inputs.double()).square().sum(1).mul(1 + targets).sum().backward()
    assert naive.rank(twin.layer2.linear.weight.grad.numpy()) == 10


def test_per_sample_gradients_of_a_linear_net_have_the_rank_of_their_factors(lab: Context) -> None:
    """min(w, C−1)(w+1) while there are more samples: 9 · 10 = 90 at width 9, 2 · 3 at width 2."""
    wide = context(NAME, "grid.batch_sizes=[200]", "data.train_size=256", "data.test_size=100")
    for width, rank in ((2, 6), (4, 20), (9, 90)):
        assert claim.predicted_sample_rank(width, 200, 10) == rank
        _, network = net(lab, "linear", width)
        found = pick(ranks(wide, network), "sample_gradients_rank")
        assert found[found["layer"].isin([2, 3])]["value"].tolist() == [rank, rank]
    assert claim.predicted_sample_rank(9, 50, 10) == 50


def test_stable_ranks_of_wide_random_jacobians(lab: Context) -> None:
    """Σσ²/σ₁² = w/4 for a square Gaussian matrix (σ₁² = 4, Marchenko & Pastur 1967); ReLU keeps half the rows: (w/2)/(1+√½)²."""
    for activation, share in (("linear", 1 / 4), ("relu", 1 / 2 / (1 + np.sqrt(0.5)) ** 2)):
        stable = [pick(ranks(lab, net(lab, activation, 256, seed=s)[1]), "jacobian_stable_rank")["value"].mean() for s in range(3)]
        assert np.mean(stable) / 256 == pytest.approx(share, rel=0.06), activation


def test_relu_leaves_half_the_rank_of_a_jacobian(lab: Context) -> None:
    for activation, share in (("linear", 1.0), ("tanh", 1.0), ("relu", 0.5)):
        found = pick(ranks(lab, net(lab, activation, 256)[1]), "jacobian_rank")["value"].mean() / 256
        assert found == pytest.approx(share, abs=0 if share == 1 else 0.06), activation


def test_a_dead_network_has_no_rank(lab: Context) -> None:
    _, network = net(lab, "relu", 8)
    with torch.no_grad():
        network.layer2.linear.bias.fill_(-1e3)
    found = ranks(lab, network)
    dead = found[found["layer"] == 2]
    assert (dead["value"] == 0).all()
    assert found["value"].notna().all()
