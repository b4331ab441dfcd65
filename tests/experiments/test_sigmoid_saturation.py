"""sigmoid_saturation: verdicts follow the rows, E[φ'²], rates and the critical σw² are measured, mapped nets are one net."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import linregress, t

from experiments import sigmoid_saturation as claim
from src import mean_field
from src.config import ModelConfig
from src.errors import UserError
from src.experiment import Context
from src.locking import growth
from src.models.logistic import logistic_twin
from tests.experiments.measured import Change, after, context, put, small_context, small_rows, swap, verdicts

NAME = "sigmoid_saturation"
SMALL = (
    "model.width=16",
    "grid.seeds=2",
    "grid.samples=2",
    "grid.rate_depth=4",
    "grid.weight_vars=[0.3333333333333333,64.0,160.0]",
    "grid.bias_vars=[0.0,64.0]",
    "grid.train_seeds=2",
    "grid.train_width=16",
    "grid.long_depths=[5,6]",
    "grid.long_width=8",
    "grid.long_steps=12",
    "training.max_steps=2",
    "data.train_size=256",
    "data.test_size=300",
)


def course(top: list[float], depth: int = 5, every: int = 10_000, seeds: range = range(3), apart: float = 0.001) -> pd.DataFrame:
    """Long trainings, a little apart: the 98th percentile of the top hidden layer's activations, looked at every so many steps."""
    at = [{"depth": depth, "layer": depth - 1, "net_seed": seed} for seed in seeds]
    lines = [
        {"quantity": "activation_p98", "value": value * (1 + apart * net["net_seed"]), "step": every * k, **net}
        for net in at
        for k, value in enumerate(top)
    ]
    return pd.DataFrame(lines)


def courses(*found: pd.DataFrame) -> Change:
    return swap("long", pd.concat(found))


def mapped(**accuracies: float) -> Change:
    """Trainings of the mapped nets: .9 but where it is given."""
    kinds = {"tanh net": 0.9, "tanh": 0.9, "logistic": 0.9, "usual": 0.1} | accuracies
    lines = [
        {"quantity": "test_accuracy", "value": value + 0.001 * seed, "coordinates": kind, "net_seed": seed}
        for (kind, value), seed in product(kinds.items(), range(3))
    ]
    return swap("mapped training", pd.DataFrame(lines))


def of_seed(function):
    """Values that a function gives a row, a little apart from seed to seed."""
    return lambda rows: [function(row) * (1 + 1e-4 * row.net_seed) for row in rows.itertuples()]


def predicted(net) -> float:
    return mean_field.chi("sigmoid", net.weight_var, net.bias_var)


def log_predicted(net) -> float:
    return math.log(predicted(net))


def square(net) -> float:
    return mean_field.mean_square_derivative(net.activation, net.weight_var)


def share(net) -> float:
    """Saturation that rises with what is varied."""
    return 0.9 * (1 - 1 / (1 + net.weight_var * (1 + net.bias_var) / 40))


def learnt(factor_weight: float, factor_bias: float) -> list[Change]:
    """Accuracies of ½ and a multiple of the saturated share."""
    both = (("weight_var", factor_weight), ("bias_var", factor_bias))
    of_learning = {"part": "learning"}
    return [
        put("saturated", of_seed(share), **of_learning),
        *(
            put("test_accuracy", of_seed(lambda net, factor=factor: 0.5 + factor * share(net)), varied=varied, **of_learning)
            for varied, factor in both
        ),
    ]


def norms(factor_weight: float, factor_bias: float) -> list[Change]:
    """ln ‖J‖ as a multiple of the saturated share."""
    both = (("weight_var", factor_weight), ("bias_var", factor_bias))
    return [
        put("saturated", of_seed(share), **JACOBIAN),
        *(put("log_norm", of_seed(lambda net, factor=factor: factor * share(net)), varied=varied, **JACOBIAN) for varied, factor in both),
    ]


JACOBIAN = {"part": "jacobian"}
LARGE, ONE = {"weight_var": 160.0, **JACOBIAN}, {"weight_var": 64.0, "net_seed": 1, **JACOBIAN}
THEORY = [
    put("rate", of_seed(log_predicted), **JACOBIAN),
    put("chi", of_seed(predicted), **JACOBIAN),
    put("saturated", of_seed(share), **JACOBIAN),
]
# by σb² = 64: half of the units, near zero norms and slopes
MANY = {"bias_var": 64.0, **JACOBIAN}
UNSATURATED = put("saturated", of_seed(lambda net: 0.3 * share(net)), **JACOBIAN)
SATURATED_BY_BIAS = [put("saturated", 0.7, **MANY), put("norm", 0.05, **MANY), put("rate", -1.0, **MANY)]
DOUBLED = put("chi", of_seed(lambda net: 2 * predicted(net)), **JACOBIAN)
FALLING = put("chi", of_seed(lambda net: net.weight_var * math.exp(-share(net))), **JACOBIAN)
ONE_SEED, LAST_SEED = range(1), range(3, 4)
ESCAPED, STUCK, NEVER_LOW = [0.5, 0.04, 0.05, 0.2], [0.5, 0.04, 0.04, 0.06], [0.5, 0.4, 0.4, 0.4]

# criterion, what is changed in the measured rows, verdict
CASES = [
    ("flat_tails", [put("tail_slope", 0.2), put("tail_slope", 0.005, threshold=5.0), put("tail_slope", 0.0003, threshold=8.0)], "holds_if"),
    ("flat_tails", [put("tail_slope", 0.001)], "holds"),
    ("flat_tails", [put("tail_slope", 0.02, threshold=5.0, weight_var=160.0, net_seed=1)], "refuted"),
    ("jacobian_equation", [], "holds"),
    ("jacobian_equation", [put("equation_error", 1e-9, **ONE)], "refuted"),
    ("norm_bound", [], "holds"),
    ("norm_bound", [put("norm_bound", 1.001, **ONE)], "refuted"),
    ("quarter_bound", [], "holds"),
    ("quarter_bound", [put("quarter_bound", 1.001, **ONE)], "refuted"),
    ("saturated_contribution", [put("contribution", 0.005)], "holds"),
    ("saturated_contribution", [put("contribution", 0.02, **LARGE)], "refuted"),
    ("near_zero_jacobian", [put("norm", 0.05, **JACOBIAN)], "holds"),
    (
        "near_zero_jacobian",
        [UNSATURATED, *SATURATED_BY_BIAS, put("norm", 3.0, **JACOBIAN, varied="weight_var")],
        "holds_if",
    ),
    ("near_zero_jacobian", [put("saturated", 0.6, **LARGE), put("norm", 3.0, **LARGE)], "refuted"),
    ("norm_falls", norms(-1, -1), "holds"),
    ("norm_falls", norms(3, -1), "refuted"),
    ("norm_falls_at_fixed_weights", norms(3, -1), "holds_if"),
    ("norm_falls_at_fixed_weights", norms(-1, -1), "holds"),
    ("norm_falls_at_fixed_weights", norms(-1, 1), "refuted"),
    ("slopes_fall", [*THEORY, FALLING], "holds"),
    ("slopes_fall", [*THEORY, put("chi", of_seed(lambda net: net.weight_var * (1 + share(net))), **JACOBIAN)], "refuted"),
    ("mean_square_slope", [put("square_slope", of_seed(square))], "holds"),
    ("mean_square_slope", [put("square_slope", of_seed(lambda net: 1.1 * square(net)))], "refuted"),
    ("rate", THEORY, "holds"),
    ("rate", [*THEORY, put("rate", of_seed(lambda net: log_predicted(net) + 0.1), **JACOBIAN)], "refuted"),
    ("saturation_locks", [put("rate", of_seed(lambda net: -1 / net.weight_var), **JACOBIAN)], "holds"),
    ("saturation_locks", [put("rate", 0.1, **JACOBIAN), UNSATURATED, *SATURATED_BY_BIAS], "holds_if"),
    ("saturation_locks", THEORY, "refuted"),
    ("large_norms_vanish", [*THEORY, put("norm", 2.0, **JACOBIAN)], "holds_if"),
    ("large_norms_vanish", [*THEORY, put("norm", 2.0, **JACOBIAN), put("rate", 0.1, **{**JACOBIAN, "weight_var": 64.0})], "refuted"),
    ("large_norms_vanish", [*THEORY, put("norm", 2.0, **JACOBIAN), put("rate", -0.1, **LARGE)], "holds"),
    ("large_norms_vanish", [*THEORY, put("norm", 0.5, **JACOBIAN)], "inconclusive"),
    ("chi_decides", THEORY, "holds_if"),
    ("chi_decides", [*THEORY, put("rate", 0.1, **{**JACOBIAN, "weight_var": 64.0})], "refuted"),
    ("chi_decides", [*THEORY, put("rate", -0.1, **LARGE)], "refuted"),
    ("critical_variance", THEORY, "holds"),
    ("critical_variance", [*THEORY, DOUBLED], "refuted"),
    ("learning_falls", learnt(-0.4, -0.4), "holds"),
    ("learning_falls", learnt(0.4, -0.4), "refuted"),
    ("learning_falls_at_fixed_weights", learnt(0.4, -0.4), "holds_if"),
    ("learning_falls_at_fixed_weights", learnt(-0.4, -0.4), "holds"),
    ("learning_falls_at_fixed_weights", learnt(-0.4, 0.4), "refuted"),
    (
        "learning_falls_at_fixed_weights",
        [*learnt(-0.4, 0.4), put("test_accuracy", 0.1, part="learning", varied="bias_var")],
        "inconclusive",
    ),
    ("mapped_signal", [], "holds"),
    ("mapped_signal", [put("error_signal", lambda rows: rows["value"] + 1e-6, start="mapped", layer=2.0, net_seed=1)], "refuted"),
    ("mapped_flow", [put("rate", 0.0, start="mapped"), put("rate", -2.9, start="usual")], "holds_if"),
    ("mapped_flow", [put("rate", 0.0, start="mapped"), put("rate", 0.0, start="usual")], "holds"),
    ("mapped_flow", [put("rate", -0.2, start="mapped")], "refuted"),
    ("mapped_training", [mapped(logistic=0.5)], "holds_if"),
    ("mapped_training", [mapped()], "holds"),
    ("mapped_training", [mapped(tanh=0.8)], "refuted"),
    ("mapped_gain", [mapped()], "holds"),
    ("mapped_gain", [mapped(usual=0.9)], "refuted"),
    ("top_layer_saturates", [courses(course(ESCAPED), course(ESCAPED, depth=6))], "holds"),
    ("top_layer_saturates", [courses(course(ESCAPED), course(NEVER_LOW, depth=6))], "holds_if"),
    ("top_layer_saturates", [courses(course(NEVER_LOW))], "refuted"),
    ("top_layer_saturates", [courses(course([0.5, 0.4, 0.4, 0.04]))], "refuted"),
    ("top_layer_saturates", [courses(course(NEVER_LOW, every=10))], "inconclusive"),
    # a single training, or trainings of both kinds, decide nothing
    ("top_layer_saturates", [courses(course(ESCAPED, seeds=ONE_SEED))], "inconclusive"),
    ("top_layer_saturates", [courses(course(ESCAPED), course(NEVER_LOW, seeds=LAST_SEED))], "inconclusive"),
    ("top_layer_escapes", [courses(course(ESCAPED), course(ESCAPED, depth=6))], "holds"),
    ("top_layer_escapes", [courses(course(ESCAPED), course(STUCK, depth=6))], "holds_if"),
    ("top_layer_escapes", [courses(course(STUCK))], "refuted"),
    ("top_layer_escapes", [courses(course(STUCK, every=10))], "inconclusive"),
    ("top_layer_escapes", [courses(course(NEVER_LOW))], "inconclusive"),
    ("top_layer_escapes", [courses(course(ESCAPED, seeds=ONE_SEED))], "inconclusive"),
    ("top_layer_escapes", [courses(course(ESCAPED), course(STUCK, seeds=LAST_SEED))], "inconclusive"),
    ("five_never_escape", [courses(course(ESCAPED), course(STUCK, depth=6))], "holds_if"),
    ("five_never_escape", [courses(course(STUCK), course(STUCK, depth=6))], "holds"),
    ("five_never_escape", [courses(course(STUCK), course(ESCAPED, depth=6))], "refuted"),
    ("five_never_escape", [courses(course(ESCAPED))], "inconclusive"),
    ("five_never_escape", [courses(course(STUCK, depth=6, every=10))], "inconclusive"),
    ("five_never_escape", [courses(course(STUCK, depth=6, seeds=ONE_SEED))], "inconclusive"),
    ("five_never_escape", [courses(course(STUCK, depth=6), course(ESCAPED, depth=6, seeds=LAST_SEED))], "inconclusive"),
]


def test_exact_statements_come_out_on_real_rows() -> None:
    found = {name: verdict.verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items()}
    exact = ("jacobian_equation", "norm_bound", "quarter_bound", "mapped_signal")
    assert {found[name] for name in exact} == {"holds"}


@pytest.fixture(scope="module")
def lab() -> Context:
    return context(NAME, "grid.samples=4")


@pytest.fixture(scope="module")
def slopes() -> pd.DataFrame:
    return pd.DataFrame(claim._square_slopes(context(NAME, "grid.samples=4", "grid.seeds=6", "model.width=256")))


@pytest.mark.parametrize(
    ("activation", "values"),
    [("sigmoid", (0.0625, 0.05136, 0.04484, 0.02903)), ("tanh", (1.0, 0.59243, 0.46440, 0.25595))],
)
def test_mean_square_slopes(slopes: pd.DataFrame, activation: str, values: tuple[float, ...]) -> None:
    means = slopes[slopes["activation"] == activation].groupby("weight_var")["value"].mean()
    assert list(means.index) == [0, 0.5, 1, 4]
    np.testing.assert_allclose(means, values, rtol=0.03)
    # σ'(z) squared on average, not the average σ' squared, nor that of another variance
    assert not np.allclose(means.iloc[1:], values[:-1], rtol=0.03)


def model(lab: Context, **changes: object) -> ModelConfig:
    chosen = {"activation": "sigmoid", "width": 192, "depth": 14, "bias_var": 0.0}
    return replace(lab.config.model, **(chosen | changes))


def measured_growth(lab: Context, seeds: int, **changes: object) -> float:
    """e^(mean slope of ln ‖g‖²) over nets."""
    asked = model(lab, **changes)
    return math.exp(np.mean([growth(lab.error_signals(lab.network(asked, seed))) for seed in range(seeds)]))


@pytest.mark.parametrize(("weight_var", "known"), [(1 / 3, 0.0200), (1.0, 0.0557)])
def test_rates_of_sigmoid_nets(lab: Context, weight_var: float, known: float) -> None:
    assert measured_growth(lab, 8, weight_var=weight_var) == pytest.approx(known, rel=0.06)
    assert measured_growth(lab, 2, weight_var=1.5 * weight_var) != pytest.approx(known, rel=0.06)


def test_the_gradient_stops_vanishing_where_chi_is_one(lab: Context) -> None:
    """σw² = 103.0 at σb² = 0 (mean field); half and twice that are on either side."""
    critical = mean_field.critical_weight_var("sigmoid", 0.0)
    assert critical == pytest.approx(103.0, abs=0.05)
    assert measured_growth(lab, 3, weight_var=critical / 2) < 0.9
    assert measured_growth(lab, 3, weight_var=2 * critical) > 1.1


def test_a_large_norm_and_a_gradient_that_vanishes_are_measured_together() -> None:
    """σw² = 64: ‖J‖ > 1, χ = .79; at σw² = 160 the norms are larger still and the gradient grows."""
    measuring = ("model.width=96", "grid.seeds=4", "grid.samples=2", "grid.rate_depth=12", "grid.weight_vars=[1.0,64.0,160.0]")
    rows = pd.DataFrame(claim._jacobians(context(NAME, *measuring, "grid.bias_vars=[0.0,64.0]")))
    nets = claim.jacobian_nets(rows).query("varied == 'weight_var'").set_index("weight_var")
    assert nets.loc[1.0, "norm"].max() < 1 < nets.loc[64.0, "norm"].min() < nets.loc[160.0, "norm"].min()
    assert nets.loc[64.0, "rate"].max() < 0 < nets.loc[160.0, "rate"].min()
    everything = after(small_rows(NAME), [lambda small: pd.concat([small[small["part"] != "jacobian"], rows])])
    assert verdicts(NAME, everything)["large_norms_vanish"].verdict == "holds_if"


def test_the_regression_is_told_with_its_interval_over_settings() -> None:
    shares, log_norms = np.array([0.0, 0.2, 0.4, 0.8]), np.array([0.0, -0.3, -0.1, -0.9])
    nets = pd.DataFrame(
        {"varied": "bias_var", "weight_var": 1.0, "bias_var": float(k), "net_seed": seed, "saturated": x, "log_norm": y * (1 + 0.01 * seed)}
        for k, (x, y) in enumerate(zip(shares, log_norms, strict=True))
        for seed in range(3)
    )
    cell = claim.falls(nets, ["varied"], "log_norm").iloc[0]
    fit = linregress(shares, 1.01 * log_norms)
    half = t.ppf(0.975, 2) * fit.stderr
    assert cell["estimate"] == pytest.approx(fit.slope)
    assert cell["hi"] - cell["lo"] < 0.2 * half
    assert (cell["settings_lo"], cell["settings_hi"]) == pytest.approx((fit.slope - half, fit.slope + half))
    assert (cell["settings"], cell["r_squared"]) == pytest.approx((4, fit.rvalue**2))


def test_a_mapped_net_passes_the_gradient_that_the_usual_start_loses(lab: Context) -> None:
    critical = model(lab, depth=24, **claim.CRITICAL)
    rates = [growth(lab.error_signals(logistic_twin(lab.network(critical, seed).double()))) for seed in range(6)]
    assert np.mean(rates) == pytest.approx(0, abs=0.06)
    usual = lab.network(model(lab, depth=24, **claim.USUAL), 0)
    assert growth(lab.error_signals(usual)) == pytest.approx(math.log(0.0557), abs=0.3)


def test_signals_of_mapped_and_tanh_net_differ_by_two(lab: Context) -> None:
    tanh = lab.network(model(lab, depth=5, width=32, **claim.CRITICAL), 0).double()
    twin = logistic_twin(tanh)
    pairs = [lab.error_signals(net) for net in (tanh, twin)]
    assert [math.exp(pairs[1][layer] - pairs[0][layer]) for layer in range(1, 6)] == pytest.approx([2, 2, 2, 2, 1], rel=1e-9)
    with torch.no_grad():
        twin[2].linear.weight.mul_(1.001)
    moved = lab.error_signals(twin)
    assert math.exp(moved[1] - pairs[0][1]) != pytest.approx(2, rel=1e-6)


def test_in_tanh_coordinates_the_mapped_net_trains_as_the_tanh_net() -> None:
    longer = ("training.max_steps=60", "training.epochs=10", "data.train_size=1024", "grid.train_seeds=1", "grid.train_width=32")
    rows = pd.DataFrame(claim._mapped_trainings(small_context(NAME, *longer)))
    accuracy = rows[rows["quantity"] == "test_accuracy"].set_index("coordinates")["value"]
    assert accuracy["tanh"] == pytest.approx(accuracy["tanh net"], abs=0.005)
    assert accuracy["tanh net"] > accuracy["usual"] + 0.1


@pytest.mark.parametrize(
    ("override", "axis"),
    [
        ("grid.weight_vars=[1.0,2.0]", "grid.weight_vars"),
        ("grid.weight_vars=[0.0,200.0]", "grid.weight_vars"),
        ("grid.bias_vars=[1.0]", "grid.bias_vars"),
        ("grid.rate_depth=3", "grid.rate_depth"),
        ("grid.long_depths=[1]", "grid.train_depths, grid.long_depths"),
        ("grid.samples=500", "grid.samples"),
        ("data.test_size=100", "data.test_size"),
    ],
)
def test_impossible_grids_are_refused_in_a_line(override: str, axis: str) -> None:
    lab = small_context(NAME, override)
    with pytest.raises(UserError, match=f"^{axis}: ".replace(".", r"\.")):
        claim.check(lab.config, lab.data)
