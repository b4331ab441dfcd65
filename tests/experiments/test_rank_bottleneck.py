"""rank_bottleneck: the ranks against naive matrices, the example, exact ranks in rational arithmetic, frozen and thawed directions."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from experiments import rank_bottleneck as claim
from src.config import ModelConfig
from src.errors import UserError
from src.experiment import Context
from src.models import build
from src.models.bottleneck import dense_layer, factorised, replace_dense
from src.rows import pick
from src.training.loop import Outcome
from src.trainings import Trainee
from tests.experiments.measured import config, context, digits, put, small_context, small_rows, verdicts
from tests.jacobian import naive

NAME = "rank_bottleneck"
SMALL = (
    "grid.seeds=2",
    "grid.samples=3",
    "grid.batch_sizes=[1,16,256]",
    "training.max_steps=3",
    "data.train_size=256",
    "data.test_size=100",
)
LINEAR, RELU, TANH = ({"activation": activation} for activation in ("linear", "relu", "tanh"))
FULL = {"part": "ranks", "batch": 256}
AT_START = {**FULL, "source": "images", "steps": 0, "rank": 4}
TRAINED = {**FULL, "trained": "all", "steps": 3}
SMALLEST = [put("gradient_rank", 1.0)]
EXACT = [put("exact_rank", 20.0), put("product_rank", 20.0)]
SHORT = put("product_rank", 15.0, precision="float32", depth=20)
TWO_DEAD = [
    *(put(quantity, 64.0, part="example", **RELU) for quantity in ("live_units", "gradient_rank")),
    put("live_units", 62.0, layer=4, **RELU),
    *(put("gradient_rank", 62.0, part="example", layer=layer, **RELU) for layer in (4, 5)),
]

# criterion, what is changed in the measured rows, verdict
CASES = [
    ("lower_layers", [], "refuted"),
    ("lower_layers", SMALLEST, "holds"),
    ("lower_layers", [*SMALLEST, put("gradient_rank", 5.0, layer=2, **AT_START, **TANH)], "refuted"),
    ("lower_layers", [*SMALLEST, put("gradient_rank", 5.0, layer=2, **TRAINED, **TANH)], "refuted"),
    ("lower_layers", [*SMALLEST, put("gradient_rank", 64.0, layer=3, **AT_START, **TANH)], "refuted"),  # J_5 is 10×64: deficient too
    ("every_layer", [], "refuted"),
    ("every_layer", SMALLEST, "holds"),
    ("every_layer", [*SMALLEST, put("gradient_rank", 9.0, layer=3, **AT_START, **LINEAR)], "refuted"),
    ("product", [], "holds"),
    ("product", [put("product_excess", 1.0, layer=0, rank=1, source="gaussian", **TANH)], "refuted"),
    ("product", [put("product_excess", 1.0, layer=2, trained="all", steps=3, **RELU)], "refuted"),
    ("batch_linear", [], "holds_if"),
    ("batch_linear", SMALLEST, "holds"),
    ("batch_linear", [put("gradient_rank", 5.0, layer=1, **AT_START, **LINEAR)], "refuted"),
    ("batch_linear", [put("gradient_rank", 5.0, layer=1, **TRAINED, **LINEAR)], "refuted"),
    ("layers_below", [], "holds_if"),
    ("layers_below", [put("gradient_rank", 4.0, layer=2, **AT_START, **TANH)], "refuted"),
    ("layers_below", [put("gradient_rank", 4.0, layer=1, **TRAINED, **RELU)], "refuted"),
    ("layers_below", [put("gradient_rank", 4.0, layer=3, **AT_START, **TANH)], "holds_if"),
    ("itself", [], "holds_if"),
    ("itself", [put("gradient_rank", 4.0, layer=3, **AT_START, **LINEAR)], "refuted"),
    ("itself", [put("gradient_rank", 4.0, layer=2, **AT_START, **TANH)], "holds_if"),
    ("layers_above", [], "holds_if"),
    ("layers_above", [put("gradient_rank", 4.0, layer=5, **AT_START, **TANH)], "refuted"),
    ("layers_above", [put("gradient_rank", 1.0, layer=5, **{**AT_START, "rank": 1}, **TANH)], "refuted"),
    ("layers_above", [put("gradient_rank", 1.0, layer=5, **{**AT_START, "rank": 1}, **RELU)], "holds_if"),
    ("linear_ranks", [], "holds"),
    ("linear_ranks", [put("gradient_rank", 62.0, layer=3, source="gaussian", **FULL, **LINEAR)], "refuted"),
    ("linear_ranks", [put("gradient_rank", 5.0, layer=4, **TRAINED, **LINEAR)], "refuted"),
    ("example_linear", [], "holds"),
    ("example_linear", [put("gradient_rank", 5.0, part="example", layer=4, net_seed=1, **LINEAR)], "refuted"),
    ("dead_units", [], "holds"),
    ("dead_units", TWO_DEAD, "holds"),
    ("dead_units", [*TWO_DEAD, put("gradient_rank", 61.0, part="example", layer=5, net_seed=1, **RELU)], "refuted"),
    ("computed_rank", EXACT, "holds"),
    ("computed_rank", [*EXACT, SHORT], "holds"),
    ("computed_rank", [*EXACT, put("product_rank", 15.0, precision="float64", depth=20)], "holds_if"),
    ("computed_rank", [*EXACT, put("product_rank", 21.0, precision="float64", depth=5, sample=2, net_seed=1)], "refuted"),
    ("computed_rank", [*EXACT, put("product_rank", 19.0, precision="float64", depth=5, sample=2, net_seed=1)], "refuted"),
    ("float32", EXACT, "refuted"),
    ("float32", [*EXACT, SHORT], "holds_if"),
    ("float32", [*EXACT, put("product_rank", 15.0)], "holds"),
    ("float32", [*EXACT, put("product_rank", 15.0, precision="float32", depth=20, net_seed=1)], "inconclusive"),
    ("remaining_frozen", [], "refuted"),
    ("remaining_frozen", [put("outside_any", 1e-20)], "holds"),
    ("remaining_frozen", [put("outside_any", 1e-20), put("outside_any", 1e-9, layer=2, trained="all", steps=3, **LINEAR)], "refuted"),
    ("frozen_linear", [], "holds_if"),
    ("frozen_linear", [put("outside", 0.0)], "holds"),
    ("frozen_linear", [put("outside", 1e-9, steps=1, trained="all", layer=1, **LINEAR)], "refuted"),
    ("frozen_linear", [put("outside", 1e-9, steps=3, trained="all but the bottleneck", layer=2, **LINEAR)], "refuted"),
    ("frozen_linear", [put("outside", 0.5, steps=3, trained="all but the bottleneck", layer=1, **LINEAR)], "holds_if"),
    ("thawed", [], "holds_if"),
    ("thawed", [put("outside", 1.0)], "holds"),
    ("thawed", [put("outside", 1e-20, steps=1, trained="only layer 1", **TANH)], "refuted"),
    ("thawed", [put("outside", 1e-20, steps=2, trained="all", layer=2, **LINEAR)], "refuted"),
]


@pytest.fixture(scope="module")
def lab() -> Context:
    return small_context(NAME)


def model_of(activation: str, width: int = 64, depth: int = 5) -> ModelConfig:
    return claim._model(config(NAME), activation, depth, width)


def small_net(activation: str, width: int, depth: int = 5, seed: int = 0, classes: int | None = None) -> nn.Sequential:
    """A net on width×1 inputs with as many classes."""
    draws = torch.Generator().manual_seed(seed)
    return build(model_of(activation, width, depth), (1, width, 1), classes or width, draws).double()


def batch(count: int, width: int, classes: int | None = None, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, width, 1, generator=draws, dtype=torch.float64)
    return inputs, torch.arange(count) % (classes or width)


def ranks_of(network: nn.Sequential, inputs: torch.Tensor, targets: torch.Tensor) -> list[int]:
    """Of every ∇W_l. The rounding of five products leaves more than the 2ε·σ₁ that a 2×2 matrix is usually held to."""
    return [int(np.linalg.matrix_rank(gradient, rtol=1e-11)) for gradient in written_out(network, inputs, targets)]


def written_out(network: nn.Sequential, inputs: torch.Tensor, targets: torch.Tensor) -> list[np.ndarray]:
    """∇W_l = Δ_lᵀ H_{l−1} with δ_L = (softmax − one-hot)/N and δ_l = φ'(z_l) ⊙ W_{l+1}ᵀ δ_{l+1}, in NumPy."""
    weights = [dense_layer(stage).weight.detach().numpy() for stage in network]
    names = [type(stage[-1]).__name__ if isinstance(stage, nn.Sequential) else "Identity" for stage in network]
    phi = {"Identity": lambda z: z, "ReLU": lambda z: np.maximum(z, 0), "Tanh": np.tanh}
    slope = {"Identity": np.ones_like, "ReLU": lambda z: (z > 0).astype(float), "Tanh": lambda z: 1 - np.tanh(z) ** 2}
    hidden, slopes = [inputs.flatten(1).numpy()], []
    for W, name in zip(weights, names, strict=True):
        z = hidden[-1] @ W.T
        hidden.append(phi[name](z))
        slopes.append(slope[name](z))
    probabilities = np.exp(hidden[-1] - hidden[-1].max(1, keepdims=True))
    delta = probabilities / probabilities.sum(1, keepdims=True)
    delta[np.arange(len(targets)), targets] -= 1
    found = []
    for layer in range(len(weights), 0, -1):
        found.append(delta.T @ hidden[layer - 1] / len(targets))
        if layer > 1:
            delta = delta @ weights[layer - 1] * slopes[layer - 2]
    return found[::-1]


# the numbers against naive references


@pytest.mark.parametrize("activation", claim.NETS)
def test_the_gradients_are_those_written_out_and_those_of_single_samples(activation: str) -> None:
    network, (inputs, targets) = claim.narrowed(small_net(activation, 6), 3, 2), batch(9, 6)
    found = claim.gradients(network, inputs, targets)
    stages = list(naive.as_measured(network))
    single = [naive.gradients(stages, x, y, cross_entropy)[1] for x, y in zip(inputs, targets, strict=True)]
    for layer, (gradient, expected) in enumerate(zip(found, written_out(network, inputs, targets), strict=True)):
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-14)
        mean = np.mean([gradients[layer][: expected.size].reshape(expected.shape) for gradients in single], axis=0)
        np.testing.assert_allclose(gradient, mean, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("activation", "source"), [*product(claim.NETS, claim.SOURCES)])
def test_every_rank_is_that_of_the_naive_matrix(lab: Context, activation: str, source: str) -> None:
    model = model_of(activation)
    drawn = claim.square_net(lab, model, 0) if source == "gaussian" else lab.network(model, 0).double()
    network = claim.narrowed(drawn, 3, 4)
    found = pd.DataFrame(claim._ranks(lab, network, source, [1, 16, 256], {}))
    inputs, targets = claim.gaussian(lab, 256) if source == "gaussian" else lab.samples(lab.data.train, 256)
    for size in (1, 16, 256):
        for layer, gradient in enumerate(written_out(network, inputs[:size].double(), targets[:size]), start=1):
            at = {"layer": layer, "batch": size}
            assert pick(found, "gradient_rank", **at)["value"].item() == naive.rank(gradient), at
            tolerance = max(gradient.shape) * 2.0**-52 * naive.singular_values(gradient)[0]
            assert pick(found, "gradient_tolerance", **at)["value"].item() == pytest.approx(tolerance, rel=1e-8)
    stages = list(naive.as_measured(network))
    factors = [[naive.layer_jacobian(*pair) for pair in zip(stages, states_of(stages, x), strict=True)] for x in inputs[:3].double()]
    for layer in range(1, 6):
        assert pick(found, "jacobian_rank", layer=layer)["value"].item() == max(naive.rank(J[layer - 1]) for J in factors)
        excesses = [known_rank(J[layer - 1 :]) - min(map(naive.rank, J[layer - 1 :])) for J in factors]
        assert pick(found, "product_excess", layer=layer - 1)["value"].item() == max(excesses)
    assert found["classes"].unique().tolist() == [64 if source == "gaussian" else 10]


def states_of(stages: list[nn.Module], sample: torch.Tensor) -> list[torch.Tensor]:
    return [state[0] for state in naive.states(stages, sample[None])[:-1]]


def chain(factors: list[np.ndarray]) -> np.ndarray:
    through = np.eye(factors[0].shape[1])
    for J in factors:
        through = J @ through
    return through


def known_rank(factors: list[np.ndarray]) -> int:
    """Singular values of the product above max(m, d)·ε·∏‖J‖."""
    through = chain(factors)
    norms = np.prod([naive.singular_values(J)[0] for J in factors])
    return int((naive.singular_values(through) > max(through.shape) * 2.0**-52 * norms).sum())


def test_the_whole_grid_is_measured_once(lab: Context) -> None:
    """Sources × nets × ranks × (batches × layers of gradients, layers of Jacobians); five layers after each of three kept steps of nine."""
    rows, settings, kept = small_rows(NAME), 2 * 3 * 3, 3 * 3 * 3
    assert len(pick(rows, "gradient_rank", part="ranks")) == settings * 3 * 5 + kept * 5
    assert len(pick(rows, "jacobian_rank")) == len(pick(rows, "product_excess")) == (settings + kept) * 5
    assert len(pick(rows, "gradient_rank", part="example")) == 3 * 2 * 5
    assert len(pick(rows, "outside")) == len(pick(rows, "outside_any")) == 3 * 3 * (1 + 2 + 2)
    for rank in ("gradient", "jacobian"):
        assert len(pick(rows, f"{rank}_rank")) == len(pick(rows, f"{rank}_tolerance"))
    assert not rows.drop(columns="value").duplicated().any()


def test_bounds_are_the_least_ranks_above_and_anywhere() -> None:
    rows = small_rows(NAME)
    ranks = claim.against_bounds(rows)
    assert len(ranks) == len(pick(rows, "gradient_rank", part="ranks"))
    jacobians = pick(rows, "jacobian_rank")
    for net in ranks.sample(40, random_state=0).itertuples():
        at = {key: getattr(net, key) for key in [*claim.SETTING, "net_seed"]}
        J = {layer: pick(jacobians, "jacobian_rank", layer=layer, **at)["value"].item() for layer in range(1, 6)}
        assert net.everywhere == min(J.values())
        assert net.above == min((J[layer] for layer in J if layer > net.layer), default=net.above) or np.isnan(net.above)
        assert np.isnan(net.above) == (net.layer == 5)
        most = min(net.batch, 64, net.classes - 1 if net.activation == "linear" or net.layer == 5 else 64)
        assert net.room == most - net.rank
        assert net.predicted == (most if net.layer == net.place else min(most, net.rank))


# the example


def test_the_linear_example_is_4_4_63_4_4(lab: Context) -> None:
    inputs, targets = claim.gaussian(lab, 512)
    for seed in range(3):
        network = claim.narrowed(claim.square_net(lab, model_of("linear"), seed), 3, 4)
        assert ranks_of(network, inputs, targets) == [4, 4, 63, 4, 4]
        random = torch.randint(0, 64, (512,), generator=torch.Generator().manual_seed(seed))
        assert ranks_of(network, inputs, random) == [4, 4, 63, 4, 4]
    (verdict,) = (verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items() if name == "example_linear")
    assert "layer=3, measured=63, published=63" in verdict.evidence


def test_two_dead_units_make_the_relu_example_64_64_64_62_62(lab: Context) -> None:
    inputs, targets = claim.gaussian(lab, 512)
    for seed in range(20):
        network = claim.narrowed(claim.square_net(lab, model_of("relu"), seed), 3, 4)
        if ((network[:4](inputs) > 0).any(0)).all():
            break
    assert [int(gradient) for gradient in map(naive.rank, written_out(network, inputs, targets))] == [64, 64, 64, 64, 63]
    with torch.no_grad():
        dense_layer(network[3]).weight[[5, 50]] = -dense_layer(network[3]).weight[[5, 50]].abs()  # their inputs are ≥ 0
    assert ranks_of(network, inputs, targets) == [64, 64, 64, 62, 62]
    rows = pd.DataFrame(claim._gradient_ranks(network, inputs, targets, {}))
    assert pick(rows, "gradient_rank")["value"].tolist() == [64, 64, 64, 62, 62]


def test_live_units_are_counted_over_the_whole_batch(lab: Context) -> None:
    live = pick(small_rows(NAME), "live_units", net_seed=0)
    inputs, _ = claim.gaussian(lab, 512)
    for activation in claim.NETS:
        network = claim.narrowed(claim.square_net(lab, model_of(activation), 0), 3, 4)
        expected = [int((state.numpy() != 0).any(0).sum()) for state in naive.states(list(network), inputs.flatten(1))]
        assert pick(live, "live_units", activation=activation).sort_values("layer")["value"].tolist() == expected
    assert pick(live, "live_units", activation="relu", layer=4)["value"].item() < 64


def test_every_batch_bears_as_many_labels_as_it_can(lab: Context) -> None:
    """So that 64 samples suffice for all of the softmax's rank: P − Y then contains the identity."""
    inputs, targets = claim.gaussian(lab, 100)
    assert inputs.shape == (100, 1, 8, 8)
    assert [len(targets[:count].unique()) for count in (1, 16, 64, 100)] == [1, 16, 64, 64]
    network = claim.narrowed(claim.square_net(lab, model_of("linear"), 0), 3, 1)
    assert ranks_of(network, inputs[:64], targets[:64]) == [1, 1, 63, 1, 1]


# the mathematics


def test_the_smallest_counterexample_to_the_bound_as_stated() -> None:
    """Two ReLU units, each open for one of two samples, behind them W_2 = (1 0)ᵀ(1 1) of rank 1: rank ∇W_1 = 2; linear: 1."""
    for activation, rank in ((nn.ReLU(), 2), (nn.Identity(), 1)):
        network = nn.Sequential(nn.Sequential(nn.Linear(2, 2), activation), nn.Sequential(nn.Linear(2, 2), nn.Identity())).double()
        with torch.no_grad():
            for stage, weight in zip(network, ([[1.0, -1.0], [-1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]), strict=True):
                dense_layer(stage).weight.copy_(torch.tensor(weight))
                dense_layer(stage).bias.zero_()
        inputs, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64), torch.tensor([0, 1])
        first, _ = claim.gradients(network, inputs, targets)
        assert torch.linalg.matrix_rank(first) == rank
        assert [int(torch.linalg.matrix_rank(J).max()) for J in claim.jacobians(network, inputs)] == [1, 1]


WIDTHS, SEEDS = st.integers(2, 7), st.integers(0, 10_000)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(list(claim.NETS)), st.integers(2, 5), st.integers(1, 7), WIDTHS, SEEDS)
def test_no_sample_s_product_has_more_rank_than_its_factors(activation: str, place: int, rank: int, width: int, seed: int) -> None:
    network, (inputs, _) = claim.narrowed(small_net(activation, width, seed=seed), place, rank), batch(3, width)
    J = claim.jacobians(network, inputs)
    for sample in range(3):
        factors = [matrices[sample].numpy() for matrices in J]
        for k in range(5):
            assert known_rank(factors[k:]) <= min(map(naive.rank, factors[k:])) <= width
        assert naive.rank(factors[place - 1]) <= rank
    rows = pd.DataFrame(claim._jacobian_ranks(network, inputs, {}))
    assert (pick(rows, "product_excess")["value"] <= 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.integers(1, 7), st.integers(1, 12), st.integers(2, 7), WIDTHS, SEEDS)
def test_a_linear_chain_has_the_predicted_ranks(place: int, rank: int, count: int, classes: int, width: int, seed: int) -> None:
    """Labels that take turns; as in `predicted`, with the classes for the width of the last layer."""
    network = claim.narrowed(small_net("linear", width, seed=seed, classes=classes), place, rank)
    inputs, targets = batch(count, width, classes, seed)
    at_most = min(count, classes - 1, width)
    expected = [at_most if layer == place else min(at_most, rank) for layer in range(1, 6)]
    assert ranks_of(network, inputs, targets) == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 4), WIDTHS, SEEDS)
def test_relu_maps_a_line_to_two_rays(place: int, width: int, seed: int) -> None:
    """Behind a bottleneck of rank 1 all states lie on two rays, so that no gradient above has more rank than 2."""
    network, (inputs, targets) = claim.narrowed(small_net("relu", width, seed=seed), place, 1), batch(20, width)
    for state in naive.states(list(network), inputs)[place:]:
        assert np.linalg.matrix_rank(state.numpy()) <= 2
    assert max(np.linalg.matrix_rank(gradient) for gradient in written_out(network, inputs, targets)[place:]) <= 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 5), WIDTHS, SEEDS)
def test_the_rank_of_a_relu_product_is_its_least_number_of_active_units(depth: int, width: int, seed: int) -> None:
    """In rational arithmetic, without rounding: only which units are active is found in float64."""
    network, (inputs, _) = small_net("relu", width, depth, seed), batch(2, width)
    active = claim.active_units(network, inputs)
    through = claim.chained(claim.jacobians(network, inputs))
    for sample in range(2):
        factors = []
        for stage, state in zip(network, naive.states(list(network), inputs[sample : sample + 1])[1:], strict=True):
            weight = [[Fraction(float(w)) for w in row] for row in dense_layer(stage).weight.detach()]
            open_ = [True] * width if stage is network[-1] else (state[0] > 0).tolist()
            factors.append([row if is_open else [Fraction(0)] * width for row, is_open in zip(weight, open_, strict=True)])
        matrix = factors[0]
        for factor in factors[1:]:
            matrix = [
                [sum((a * b for a, b in zip(row, column, strict=True)), Fraction(0)) for column in zip(*matrix, strict=True)]
                for row in factor
            ]
        assert rational_rank(matrix) == active[sample]
        np.testing.assert_allclose(through[sample].numpy(), np.array(matrix, dtype=float), rtol=1e-9, atol=1e-12)


def rational_rank(matrix: list[list[Fraction]]) -> int:
    """Rank by exact elimination."""
    rows, rank = [list(row) for row in matrix], 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


def test_float32_computes_less_of_a_deep_product(lab: Context) -> None:
    rows = small_rows(NAME)
    mean = rows[rows["part"] == "precision"].groupby(["quantity", "precision", "depth"], dropna=False)["value"].mean()
    exact = pick(rows, "exact_rank").groupby("depth")["value"].mean()
    assert mean["product_rank", "float64", 5] == exact[5]
    assert mean["product_rank", "float32", 20] < exact[20] - 2
    assert mean["product_tolerance", "float32", 5] / mean["product_tolerance", "float64", 5] == pytest.approx(2.0**29, rel=1e-3)
    network = claim.square_net(lab, model_of("relu", depth=20), 0)
    inputs, _ = claim.gaussian(lab, 3)
    stages = list(naive.as_measured(network))
    for sample, x in enumerate(inputs):
        states = states_of(stages, x)
        at = {"depth": 20, "net_seed": 0, "sample": sample}
        assert pick(rows, "exact_rank", **at)["value"].item() == min(int((state > 0).sum()) for state in states[1:])
        through = chain([naive.layer_jacobian(*pair) for pair in zip(stages, states, strict=True)])
        assert pick(rows, "product_rank", precision="float64", **at)["value"].item() == naive.rank(through)


# frozen and thawed directions


def with_factors(lab: Context, activation: str) -> nn.Sequential:
    network = lab.network(model_of(activation), 0).double()
    replace_dense(network, "layer3", factorised(dense_layer(network[2]), 4))
    return network


def test_in_a_linear_chain_the_range_of_the_layers_above_is_accessible(lab: Context) -> None:
    network = with_factors(lab, "linear")
    V, U = network[2].linear.encoder.weight, network[2].linear.decoder.weight
    for layer, matrix in ((1, U @ V @ dense_layer(network[1]).weight), (2, U @ V)):
        found = claim.accessible(lab, network, layer, 3, 4)
        range_of_transpose = torch.linalg.svd(matrix.detach())[2][:4].T
        torch.testing.assert_close(found @ found.T, range_of_transpose @ range_of_transpose.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_elsewhere_those_that_random_signals_reach_most(activation: str) -> None:
    lab = context(NAME, *SMALL, "training.batch_size=8")
    network = with_factors(lab, activation)
    inputs, _ = lab.samples(lab.data.train, 8)
    stages = list(naive.as_measured(network))
    signals = torch.randn(8, 64, generator=lab.generator("signals"), dtype=torch.float64).numpy()
    gradient = np.zeros((64, 64))
    for x, signal in zip(inputs.double(), signals, strict=True):
        first, second = states_of(stages, x)[1:3]
        covector = signal @ naive.layer_jacobian(stages[2], second) @ naive.layer_jacobian(stages[1], first)
        gradient += (covector @ naive.parameter_jacobian(stages[0], x))[: 64 * 64].reshape(64, 64)
    U, s, _ = np.linalg.svd(gradient)
    found = claim.accessible(lab, network, 1, 3, 4).numpy()
    np.testing.assert_allclose(found @ found.T, U[:, :4] @ U[:, :4].T, atol=1e-9)
    assert claim.share_outside(torch.tensor(gradient), torch.tensor(found)) == pytest.approx((s[4:] ** 2).sum() / (s**2).sum(), rel=1e-9)
    assert (s[4:] ** 2).sum() > 1e-3 * (s**2).sum()


def test_shares_outside_in_closed_form() -> None:
    update = torch.zeros(5, 7, dtype=torch.float64)
    update[0, 1], update[1, 3], update[2, 2] = 3.0, -4.0, 12.0
    axes = torch.eye(5, dtype=torch.float64)
    for chosen, share in (([0], 160 / 169), ([0, 1], 144 / 169), ([2, 1], 9 / 169), ([4], 1.0)):
        assert claim.share_outside(update, axes[:, chosen]) == pytest.approx(share)
    assert claim.share_outside(update, axes[:, [0, 1, 2]]) == 0
    for rank, share in ((1, 25 / 169), (2, 9 / 169), (3, 0.0)):
        assert claim.least_share_outside(update, rank) == pytest.approx(share, abs=1e-30)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_no_directions_leave_less_outside_than_the_update_s_own(m: int, d: int, rank: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    update = torch.randn(m, d, generator=draws, dtype=torch.float64)
    directions, _ = torch.linalg.qr(torch.randn(m, min(rank, m), generator=draws, dtype=torch.float64))
    least, share = claim.least_share_outside(update, rank), claim.share_outside(update, directions)
    assert -1e-14 <= least <= share + 1e-14 <= 1 + 1e-13
    assert claim.share_outside(-3 * update, directions) == pytest.approx(share, abs=1e-14)
    own = torch.linalg.svd(update)[0][:, :rank]
    assert claim.share_outside(update, own) == pytest.approx(least, abs=1e-14)
    assert claim.share_outside(directions @ directions.T @ update, directions) < 1e-28


def test_one_layer_merges_two(lab: Context) -> None:
    """The same map, of rank 4, and ∇U = ∇W Vᵀ, ∇V = Uᵀ∇W."""
    network = with_factors(lab, "tanh").requires_grad_(False)
    inputs, targets = lab.samples(lab.data.train, 16)
    merged = claim.merged(network, 3)
    torch.testing.assert_close(merged(inputs.double()), network(inputs.double()))
    gradient = claim.gradients(merged, inputs.double(), targets)[2]
    assert naive.rank(dense_layer(merged[2]).weight.detach().numpy()) == 4
    V, U = (factor.weight.requires_grad_() for factor in (network[2].linear.encoder, network[2].linear.decoder))
    of_U, of_V = torch.autograd.grad(cross_entropy(network(inputs.double()), targets), [U, V])
    torch.testing.assert_close(of_U, gradient @ V.T)
    torch.testing.assert_close(of_V, U.T @ gradient)


def test_only_the_weights_of_the_layers_named_are_trained(lab: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[nn.Module, nn.Module]] = {}
    train_all = claim.train_all

    def spy(context: Context, trainees: Sequence[Trainee]) -> list[Outcome]:
        starts = {each.name: copy.deepcopy(each.network) for each in trainees}
        outcomes = train_all(context, trainees)
        seen.update({each.name: (starts[each.name], each.network) for each in trainees})
        return outcomes

    monkeypatch.setattr(claim, "train_all", spy)
    list(claim._trainings(lab))
    assert len(seen) == 9
    for name, (start, end) in seen.items():
        moved = {key for (key, before), after in zip(start.named_parameters(), end.parameters(), strict=True) if not before.equal(after)}
        factors = {"layer3.linear.encoder.weight", "layer3.linear.decoder.weight"}
        all_but = {"layer1.linear.weight", "layer2.linear.weight", "layer4.linear.weight", "readout.linear.weight", "readout.weight"}
        expected = {"only layer 1": {"layer1.linear.weight"}, "all but the bottleneck": all_but, "all": all_but | factors}
        assert moved == expected[name.split(", ")[1].removesuffix(" trained")] & {key for key, _ in start.named_parameters()}, name


def test_updates_of_linear_chains_stay_inside_and_those_of_the_others_do_not() -> None:
    rows = small_rows(NAME)
    outside, any_ = pick(rows, "outside"), pick(rows, "outside_any")
    where = ["activation", "trained", "layer", "steps", "net_seed"]
    both = outside.set_index(where)["value"], any_.set_index(where)["value"]
    assert (both[1] <= both[0] * (1 + 1e-9) + 1e-25).all()
    moving = outside.groupby(["trained", "layer"])["moving"].unique().map(list).to_dict()
    assert moving == {
        ("only layer 1", 1): [0],
        ("all but the bottleneck", 1): [1],
        ("all but the bottleneck", 2): [0],
        ("all", 1): [2],
        ("all", 2): [1],
    }
    frozen = outside[(outside["activation"] == "linear") & ((outside["moving"] == 0) | (outside["steps"] == 1))]
    assert (frozen["value"] < 1e-22).all()
    assert (any_[any_["activation"] != "linear"]["value"] > 1e-3).all()
    thawed = outside[(outside["activation"] == "linear") & (outside["moving"] > 0)].groupby("steps")["value"].min()
    assert 1e-22 < thawed[2] < thawed[3] < 0.1


def test_one_step_of_a_linear_chain_is_written_out() -> None:
    """ΔW_1 = −η ∇W_1 and range ∇W_1 ⊂ range (W_3W_2)ᵀ: nothing outside; with W_2 stepped as well, the second step leaves it."""
    network, (inputs, targets) = claim.narrowed(small_net("linear", 7), 3, 2), batch(20, 7)
    directions = torch.linalg.svd((dense_layer(network[2]).weight @ dense_layer(network[1]).weight).detach())[2][:2].T
    start = [dense_layer(stage).weight.detach().clone() for stage in network]
    shares: dict[tuple[int, ...], list[float]] = {(1,): [], (1, 2): []}
    for layers, found in shares.items():
        twin = copy.deepcopy(network)
        for _ in range(2):
            gradients = written_out(twin, inputs, targets)
            with torch.no_grad():
                for layer in layers:
                    dense_layer(twin[layer - 1]).weight.sub_(0.5 * torch.tensor(gradients[layer - 1]))
            found.append(claim.share_outside(dense_layer(twin[0]).weight.detach() - start[0], directions))
    assert max(*shares[1,], shares[1, 2][0]) < 1e-26
    assert shares[1, 2][1] > 1e-8


def test_a_training_that_diverges_leaves_its_ranks_out(lab: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    train_all = claim.train_all
    monkeypatch.setattr(claim, "train_all", lambda *asked: [replace(outcome, status="diverged") for outcome in train_all(*asked)])
    rows = pd.DataFrame(claim._trainings(lab))
    assert set(rows["quantity"]) == {"train_accuracy", "test_accuracy", "diverged"}
    assert (pick(rows, "diverged")["value"] == 1).all()
    with pytest.raises(UserError, match=r"^training.lr: lower than 0.01, at which every training diverged"):
        claim.measure(lab)


def test_exact_statements_come_out_on_real_rows() -> None:
    found = {name: verdict.verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items()}
    exact = ("product", "batch_linear", "linear_ranks", "example_linear", "dead_units", "frozen_linear", "lower_layers", "every_layer")
    words = ["holds", "holds_if", "holds", "holds", "holds", "holds_if", "refuted", "refuted"]
    assert [found[name] for name in exact] == words
    product = verdicts(NAME, small_rows(NAME))["product"]
    assert "tolerance=" in product.evidence


# the grid


def test_the_grid_at_paper_is_the_one_asked_for() -> None:
    grid = config(NAME, "scale=paper").grid
    assert (min(grid.bottleneck_ranks), max(grid.bottleneck_ranks)) == (1, 64)
    assert (min(grid.batch_sizes), max(grid.batch_sizes)) == (1, 1024)
    assert grid.places == [2, 3, 4, 5]
    assert list(claim.NETS) == ["linear", "relu", "tanh"]
    assert config(NAME, "scale=quick").grid.places == grid.places
    assert config(NAME, "scale=quick").grid.seeds >= 10


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.width=3", "model.width"),
        ("model.width=65", "model.width"),
        ("grid.places=[1,3]", "grid.places: layers 2 to 5"),
        ("grid.places=[3,6]", "grid.places: layers 2 to 5"),
        ("grid.places=[2]", "grid.places: 3 among them"),
        ("grid.bottleneck_ranks=[4,65]", "grid.bottleneck_ranks: at most 64"),
        ("grid.bottleneck_ranks=[1,2]", "grid.bottleneck_ranks: 4 among them"),
        ("grid.batch_sizes=[1,641]", "grid.batch_sizes: at most 640"),
        ("grid.samples=257", "grid.samples: at most the largest"),
        ("training.optimizer=adam", "training.optimizer: sgd"),
        ("training.weight_decay=0.1", "training.weight_decay: 0"),
        ("training.precision=bf16", "training.precision: float32"),
    ],
)
def test_a_grid_that_cannot_be_measured_is_refused(override: str, key: str) -> None:
    asked = config(NAME, override)
    with pytest.raises(UserError, match=f"^{key}"):
        claim.check(asked, digits(asked.data.train_size, asked.data.test_size))
    claim.check(config(NAME), digits(640, 200))
