"""vanishing_products: verdicts follow the rows, the numbers of mean-field theory are measured, rows repeat bit for bit."""

import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments import vanishing_products as claim
from src import mean_field
from src.chain import cut
from src.config import ModelConfig
from src.experiment import Context
from src.locking import growth, walk_back
from src.models import build
from src.rows import measured
from tests.experiments.measured import context, put, small_context, small_rows, swap, verdicts
from tests.jacobian import naive

NAME = "vanishing_products"
SMALL = (
    "model.width=32",
    "grid.product_width=32",
    "grid.seeds=2",
    "grid.samples=3",
    "training.max_steps=2",
    "data.train_size=256",
    "data.test_size=100",
)


def predicted(nets: pd.DataFrame) -> np.ndarray:
    return np.array([mean_field.chi(net.activation, net.weight_var, net.bias_var) for net in nets.itertuples()])


def log_predicted(nets: pd.DataFrame) -> np.ndarray:
    return np.log(predicted(nets))


def edge(accuracy: dict[int, float], shallow: float = 0.0, deep: float = 0.0) -> pd.DataFrame:
    """Short trainings at σw² = 1.3 (ξ = 7.83) and 2.5, the latter right in every image, by depth; lags below and beyond 6ξ = 47 layers."""
    lines = []
    for weight_var, values in ((1.3, accuracy), (2.5, dict.fromkeys(accuracy, 1.0))):
        for depth, value in values.items():
            for seed in range(2):
                at = {"activation": "tanh", "bias_var": 0.05, "depth": depth, "net_seed": seed, "weight_var": weight_var}
                lag = (deep if depth > 47 else shallow) + 0.1 * seed if weight_var == 1.3 else 0.0
                lines += measured(at, train_accuracy=value, lag=lag)
    return pd.DataFrame(lines)


DEPTHS = {8: 1.0, 32: 0.9, 64: 0.1}
ONE_DRAW = {"activation": "relu", "depth": 8, "sample": 1, "net_seed": 0}
TANH = {"activation": "tanh", "weight_var": 1.3}
HIDDEN = {"part": "hiding"}
UNIFORM, OTHER = {"part": "scaled", "chain": "uniform"}, {"part": "scaled", "chain": "not uniform"}

# criterion, what is changed in the measured rows, verdict
CASES = [
    ("bound_as_stated", [put("gradient", -100.0)], "holds"),
    ("bound_as_stated", [put("gradient", -100.0), put("gradient", 100.0, **ONE_DRAW)], "refuted"),
    ("bound", [put("gradient", -100.0)], "holds"),
    ("bound", [put("gradient", 100.0, **ONE_DRAW)], "refuted"),
    ("orthogonal_violation", [], "holds"),
    ("orthogonal_violation", [put("input_norm", lambda rows: rows["value"] * (1 + 1e-8), sample=1)], "refuted"),
    ("small_norms_vanish", [put("error_signal", lambda rows: -rows["depth"], **OTHER, layer=1)], "holds"),
    ("small_norms_vanish", [], "refuted"),
    ("uniform_norms_vanish", [put("error_signal", lambda rows: -rows["depth"], **OTHER, layer=1)], "holds"),
    ("uniform_norms_vanish", [], "holds_if"),
    ("uniform_norms_vanish", [put("error_signal", 0.0, **UNIFORM)], "refuted"),
    ("large_norms_vanish", [put("rate", -0.1, **TANH), put("mean_norm", 1.9, **TANH)], "holds"),
    ("large_norms_vanish", [put("rate", 0.1, **TANH), put("mean_norm", 1.9, **TANH)], "refuted"),
    ("large_norms_vanish", [put("rate", -0.1, **TANH), put("mean_norm", 0.9, **TANH)], "inconclusive"),
    ("chi", [put("chi", predicted)], "holds"),
    ("chi", [put("chi", predicted), put("chi", lambda nets: 1.1 * predicted(nets), **TANH)], "refuted"),
    ("chi", [put("chi", predicted), put("chi", 0.0, **TANH, net_seed=0)], "inconclusive"),
    ("rate", [put("rate", log_predicted)], "holds"),
    ("rate", [put("rate", log_predicted), put("rate", lambda nets: log_predicted(nets) - 0.1, **TANH)], "refuted"),
    ("chi_decides", [put("rate", -0.1)], "holds"),
    ("chi_decides", [put("rate", log_predicted)], "holds_if"),
    ("chi_decides", [put("rate", log_predicted), put("rate", 0.1, **TANH)], "refuted"),
    ("depth_scale", [put("rate", log_predicted)], "holds"),
    ("depth_scale", [put("rate", lambda nets: 1.2 * log_predicted(nets), **TANH)], "refuted"),
    ("trainable_depth", [swap("edge", edge(DEPTHS))], "holds"),
    ("trainable_depth", [swap("edge", edge({8: 0.2, 32: 0.1, 64: 0.1}))], "refuted"),
    ("trainable_depth", [swap("edge", edge({8: 1.0, 32: 0.9, 128: 0.9}))], "refuted"),
    ("trainable_depth", [swap("edge", edge({8: 1.0, 32: 0.1}))], "inconclusive"),
    ("early_layers_locked", [swap("edge", edge(DEPTHS, deep=-5.0))], "holds_if"),
    ("early_layers_locked", [swap("edge", edge(DEPTHS, shallow=-5.0, deep=-1.0))], "refuted"),
    ("early_layers_locked", [swap("edge", edge({8: 1.0, 32: 0.9}, shallow=-5.0))], "inconclusive"),
    ("weight_gradient_hides", [put("error_signal", lambda rows: rows["layer"], **HIDDEN), put("weight_gradient", 0.0, **HIDDEN)], "holds"),
    (
        "weight_gradient_hides",
        [put(signal, lambda rows: rows["layer"], **HIDDEN) for signal in ("error_signal", "weight_gradient")],
        "refuted",
    ),
]


def test_exact_statements_come_out_on_real_rows() -> None:
    found = {name: verdict.verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items()}
    assert (found["bound_as_stated"], found["bound"], found["orthogonal_violation"]) == ("refuted", "holds", "holds")
    assert (found["small_norms_vanish"], found["uniform_norms_vanish"]) == ("refuted", "holds_if")


def test_a_lag_is_the_ratio_of_relative_movements(lab: Context) -> None:
    before = lab.network(model(lab, width=16, depth=5), 0)
    for moved, expected in ((0.01, math.log(0.01 / 0.1)), (0.0, math.log(2.0**-23 / 0.1))):
        after = copy.deepcopy(before)
        with torch.no_grad():
            after.layer1.linear.weight.mul_(7)
            after.layer2.linear.weight.mul_(1 + moved)
            after.layer4.linear.weight.mul_(1.1)
        assert claim.lag(claim.second_and_last(before), claim.second_and_last(after)) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def lab() -> Context:
    return context(NAME, "grid.samples=8")


def model(lab: Context, **changes: object) -> ModelConfig:
    return replace(lab.config.model, **{"width": 256, **changes})


def measured_chi(lab: Context, seeds: int = 3, **changes: object) -> float:
    """Mean over nets of the mean squared singular value."""
    inputs, _ = lab.samples(lab.data.test, 2)
    asked = model(lab, depth=14, **changes)
    return float(np.mean([claim.mean_squared_singular_value(lab.network(asked, seed), inputs.double()) for seed in range(seeds)]))


@pytest.mark.parametrize(("weight_var", "known"), [(1.3, 0.880), (1.761, 1.000), (2.5, 1.1335)])
def test_chi_of_tanh_nets(lab: Context, weight_var: float, known: float) -> None:
    assert measured_chi(lab, weight_var=weight_var) == pytest.approx(known, rel=0.025)
    assert measured_chi(lab, seeds=1, weight_var=1.2 * weight_var) != pytest.approx(known, rel=0.025)


def test_chi_of_relu_nets_at_their_critical_variance(lab: Context) -> None:
    assert measured_chi(lab, activation="relu", weight_var=2.0, bias_var=0.0) == pytest.approx(1, rel=0.03)
    assert measured_chi(lab, seeds=1, activation="relu", weight_var=1.8, bias_var=0.0) != pytest.approx(1, rel=0.03)


def crossing(lab: Context, bias_var: float, around: float) -> float:
    """The σw² at which the measured χ of tanh nets crosses 1, between two that enclose it."""
    low, high = 0.85 * around, 1.15 * around
    below, above = (measured_chi(lab, seeds=12, weight_var=weight_var, bias_var=bias_var) for weight_var in (low, high))
    assert below < 1 < above
    return low + (high - low) * (1 - below) / (above - below)


def test_critical_line(lab: Context) -> None:
    measured = [crossing(lab, bias_var, known) for bias_var, known in ((0.01, 1.4242), (0.05, 1.7610), (0.25, 2.4015))]
    assert measured == pytest.approx([1.4242, 1.7610, 2.4015], rel=0.03)
    # the line of another activation is another one
    assert measured_chi(lab, seeds=1, activation="sigmoid", weight_var=1.4242, bias_var=0.01) < 0.5


def test_the_mean_squared_singular_value_is_that_of_the_naive_jacobians(lab: Context) -> None:
    """Stages 3 … 5 of six, by NumPy's SVD."""
    for activation in claim.ACTIVATIONS:
        network = lab.network(model(lab, width=12, depth=6, activation=activation), 0)
        inputs, _ = lab.samples(lab.data.test, 3)
        stages = list(naive.as_measured(network))
        squares = []
        for x in inputs.double():
            states = naive.states(stages, x[None])
            squares += [naive.singular_values(naive.layer_jacobian(stages[index], states[index][0])) ** 2 for index in (3, 4)]
        assert claim.mean_squared_singular_value(network, inputs.double()) == pytest.approx(np.mean(squares), rel=1e-12)


def depth_scale(lab: Context, weight_var: float, seeds: int = 8) -> float:
    """−1/slope of ln ‖g_l‖² against the distance from the loss, mean slope over nets."""
    asked = model(lab, depth=40, weight_var=weight_var)
    return -1 / float(np.mean([growth(lab.error_signals(lab.network(asked, seed))) for seed in range(seeds)]))


def test_depth_scale_of_the_error_signal(lab: Context) -> None:
    assert depth_scale(lab, 1.3) == pytest.approx(7.83, rel=0.15)
    assert depth_scale(lab, 1.0, seeds=2) != pytest.approx(7.83, rel=0.15)


def test_depth_scale_near_the_critical_line(lab: Context) -> None:
    """ξ = 74.9 at σw² = 1.7, through the mean squared singular value: one net's slope scatters by twice ln χ = −.0133."""
    inputs, _ = lab.samples(lab.data.test, 8)
    asked = model(lab, depth=40, weight_var=1.7)
    chi = np.mean([claim.mean_squared_singular_value(lab.network(asked, seed), inputs.double()) for seed in range(60)])
    assert mean_field.depth_scale(float(chi)) == pytest.approx(74.9, rel=0.15)


def gradient_ratio(lab: Context, network: torch.nn.Sequential) -> float:
    """ln ‖g_0‖/‖g_{L−1}‖, mean over samples."""
    inputs, targets = lab.samples(lab.data.test, 8)
    last, *_, first = walk_back(cut(network, None, torch.float64, "eval"), inputs.double(), targets, cross_entropy)
    return float((first.signal_before.log_norm - last.signal_before.log_norm).mean())


def test_large_norms_do_not_prevent_vanishing(lab: Context) -> None:
    """σw² = 1.3, 20 hidden layers: mean ‖J_l‖ ≈ 1.9, ∏‖J_l‖ ≈ 5e5, and yet ‖g_0‖/‖g_20‖ ≈ .15, geometric means over nets and samples."""
    networks = [lab.network(model(lab, width=128, depth=21, weight_var=1.3), seed) for seed in range(6)]
    norms = pd.concat([lab.certify(network).layers.query("index <= 20") for network in networks[:3]])["norm"]
    assert norms.mean() == pytest.approx(1.9, rel=0.03)
    assert math.exp(20 * np.log(norms).mean()) == pytest.approx(5e5, rel=0.15)
    assert math.exp(np.mean([gradient_ratio(lab, network) for network in networks])) == pytest.approx(0.15, rel=0.2)
    # at the critical σw² the norms are larger still, and the gradient stays
    critical = [lab.network(model(lab, width=128, depth=21, weight_var=1.761), seed) for seed in range(6)]
    assert math.exp(np.mean([gradient_ratio(lab, network) for network in critical])) > 0.4


def orthogonal(lab: Context) -> ModelConfig:
    return model(lab, width=32, depth=8, activation="linear", init="orthogonal", weight_var=1.0, bias_var=0.0)


def violation(lab: Context, network: torch.nn.Sequential) -> np.ndarray:
    """By how much each sample breaks the bound as stated, as a factor."""
    bound = lab.certify(network).bound()
    return np.exp((bound["lhs"] - bound["rhs_as_stated"]).to_numpy())


def test_the_stated_bound_is_broken_by_the_norm_of_the_input_and_its_bias(lab: Context) -> None:
    inputs, _ = lab.samples(lab.data.test, 8)
    known = inputs.double().flatten(1).square().sum(1).add(1).sqrt().numpy()
    network = claim.exact_network(lab, orthogonal(lab), 0)
    assert known.min() > 1
    np.testing.assert_allclose(violation(lab, network), known, rtol=1e-9)
    # ‖x‖ itself, but for the bias
    np.testing.assert_allclose(violation(lab, network), np.sqrt(known**2 - 1), rtol=0.02)
    with torch.no_grad():
        claim.linears(network)[3].weight[0].mul_(0.5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(violation(lab, network), known, rtol=1e-9)


@pytest.mark.parametrize("depth", [2, 8, 32])
def test_norms_below_one_whose_product_stays(lab: Context, depth: int) -> None:
    """∏_{l≤L} (1 − 1/(l+1)²) = (L+2)/(2(L+1)) → ½ (.515 at L = 32), and the gradient with it."""
    asked = model(lab, width=32, depth=depth, activation="linear", init="orthogonal", weight_var=1.0, bias_var=0.0)
    products = {}
    for kind, norm in claim.SCALED.items():
        network = claim.exact_network(lab, asked, 0)
        claim.scale_layers(network, norm)
        certificate = lab.certify(network)
        assert certificate.layers["norm"].max() < 1
        products[kind] = float(certificate.log_attenuation.mean().exp())
        signal = lab.error_signals(network)
        assert signal[1] - signal[depth] == pytest.approx(math.log(products[kind] / norm(1)), rel=1e-9)
    assert products == pytest.approx({"uniform": 0.9**depth, "not uniform": (depth + 2) / (2 * (depth + 1))}, rel=1e-12)


def test_weight_gradients_hide_what_becomes_of_the_error_signal(lab: Context) -> None:
    found = pd.DataFrame(claim._hiding(context(NAME, "model.width=256", "grid.rate_depth=16", "grid.seeds=3")))
    ends = found[found["layer"].isin([2, 15])].groupby(["quantity", "layer"])["value"].mean()
    fall = {quantity: ends[quantity, 15] - ends[quantity, 2] for quantity in ("error_signal", "weight_gradient")}
    # 13 layers of χ = ½
    assert fall["error_signal"] == pytest.approx(13 * math.log(2) / 2, rel=0.15)
    assert abs(fall["weight_gradient"]) < 0.15 * fall["error_signal"]


def test_networks_of_one_seed_are_one_network(lab: Context) -> None:
    asked = model(lab, width=32, depth=4)
    first, second = (build(asked, lab.data.shape, lab.data.classes, lab.generator("init", seed)).state_dict() for seed in (0, 1))
    again = lab.network(asked, 0).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["layer1.linear.weight"], second["layer1.linear.weight"])


def test_another_weight_variance_leaves_the_other_rows_as_they_were() -> None:
    more = claim.measure(small_context(NAME, "grid.weight_vars=[0.7,1.3,2.5]"))
    assert (more["weight_var"] == 0.7).any()
    pd.testing.assert_frame_equal(more[more["weight_var"] != 0.7].reset_index(drop=True), small_rows(NAME), check_exact=True)
