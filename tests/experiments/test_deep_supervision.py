"""deep_supervision: verdicts follow the rows; ∇θ_1 against backpropagation by hand; opposite heads; a severed chain; rates."""

import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments import deep_supervision as claim
from src import mean_field
from src.config import ModelConfig
from src.errors import UserError
from src.experiment import Context
from src.models.exits import MultiExit
from src.rows import pick
from src.training.objectives import DeepSupervision
from src.trainings import Trainee, train_all
from tests.experiments.measured import Change, after, context, put, small_context, small_rows, swap, verdicts

NAME = "deep_supervision"
SMALL = ("model.width=16", "grid.seeds=2", "grid.samples=16", "training.max_steps=2", "data.train_size=256", "data.test_size=100")

TRAINED, INITIAL = {"part": "training"}, {"part": "gradient"}
RANDOM, OPPOSED, LOCKED = {"heads": "random"}, {"heads": "opposed"}, {"weight_var": 0.5, "depth": 16}
NEAREST = {**INITIAL, "every": 1, "alpha": 1.0}
CONSTANT, NONE = {"schedule": "constant"}, {"schedule": "none"}
EQUAL = put("test_accuracy", 0.9, **TRAINED)
SAME, FASTER = put("early_accuracy", 0.5), put("early_accuracy", 0.6, **CONSTANT)
LAWFUL = put("final", lambda nets: 0.5 * nets["depth"] * np.log([mean_field.chi("tanh", w, 0.05) for w in nets["weight_var"]]), **NEAREST)
BETTER = {"adam": 1e-2}
BETTER_IN_TRAINING = put("train_accuracy", 1.0, **TRAINED, **LOCKED, **NONE, **BETTER)
UNLOCKED = [EQUAL, put("test_accuracy", 0.25, **TRAINED, **LOCKED, **NONE)]


def published(early_gain: float) -> Change:
    """Convolutional nets on CIFAR-10, as they are trained at scale=paper."""
    conv = {"activation": "relu", "weight_var": 2.0, "bias_var": 0.0, "depth": 8, "width": 64, "heads": "random", "boost": 1.0}
    noise = [-1e-3, 0.0, 1e-3]
    nets = [{**conv, **asdict(setting), "net_seed": seed} for setting in claim.CONVOLUTIONAL for seed in range(3)]
    early = [{**net, "quantity": "early_accuracy", "value": 0.5 + noise[net["net_seed"]]} for net in nets]
    for row in early:
        row["value"] += early_gain * (row["schedule"] == "constant") * (1 + row["net_seed"] / 100)
    return swap("published", pd.DataFrame(early))


# criterion, what is changed in the measured rows, verdict
CASES = [
    ("direct_path", [], "holds_if"),
    ("direct_path", [put("total", 0.0, part="severed")], "holds"),
    ("direct_path", [put("total", -50.0, part="severed", alpha=1.0)], "refuted"),
    ("provides_gradient", [], "refuted"),
    ("provides_gradient", [put("total", 0.0, **OPPOSED), put("direct", 0.0, **OPPOSED)], "holds"),
    ("triangle", [], "holds"),
    ("triangle", [put("direct", 0.0, **NEAREST), put("rest", -5.0, **NEAREST), put("total", -5.0, **NEAREST)], "refuted"),
    ("unless_opposed", [], "holds_if"),
    ("unless_opposed", [put("total", 0.0, **OPPOSED), put("direct", 0.0, **OPPOSED)], "holds"),
    ("unless_opposed", [put("total", -10.0, **RANDOM, depth=4), put("direct", 0.0, **RANDOM, depth=4)], "refuted"),
    ("angle", [put("cosine", 0.1, **RANDOM)], "holds"),
    ("angle", [put("cosine", 0.1, **RANDOM), put("cosine", -0.9, **RANDOM, when="trained")], "holds_if"),
    ("angle", [put("cosine", 0.1, **RANDOM), put("cosine", -0.9, **RANDOM, when="initial", depth=4)], "refuted"),
    ("direct_share", [put("direct", 0.0, **NEAREST), put("final", -3.0, **NEAREST)], "holds"),
    ("direct_share", [put("direct", 0.0, **NEAREST), put("final", lambda nets: -0.4 * nets["depth"], **NEAREST)], "holds_if"),
    ("direct_share", [put("direct", 0.0, **NEAREST), put("final", -1.0, **NEAREST)], "refuted"),
    ("share_rate", [put("direct", 0.0, **NEAREST), LAWFUL], "holds"),
    ("share_rate", [put("direct", 0.0, **NEAREST), LAWFUL, put("final", -3.0, **NEAREST, weight_var=0.5)], "refuted"),
    ("unlocks", UNLOCKED, "holds_if"),
    ("unlocks", [EQUAL, put("test_accuracy", 0.1, **TRAINED, **NONE)], "holds"),
    ("unlocks", [*UNLOCKED, put("test_accuracy", 0.27, **TRAINED, **LOCKED, **CONSTANT, every=8)], "refuted"),
    ("unlocks_within_reach", [*UNLOCKED, put("test_accuracy", 0.27, **TRAINED, **LOCKED, **CONSTANT, every=8)], "holds_if"),
    ("unlocks_within_reach", [*UNLOCKED, put("test_accuracy", 0.27, **TRAINED, **LOCKED, **CONSTANT, every=1, alpha=0.1)], "refuted"),
    ("unlocks", [put("test_accuracy", 0.1, **TRAINED)], "inconclusive"),
    ("more_than_the_step", UNLOCKED, "holds"),
    ("more_than_the_step", [*UNLOCKED, put("test_accuracy", 0.88, **TRAINED, **LOCKED, **NONE, boost=16.0)], "refuted"),
    ("more_than_the_optimiser", UNLOCKED, "holds"),
    (
        "more_than_the_optimiser",
        [*UNLOCKED, put("test_accuracy", 0.88, **TRAINED, **LOCKED, **NONE, **BETTER), BETTER_IN_TRAINING],
        "refuted",
    ),
    ("no_harm", [EQUAL], "holds"),
    ("no_harm", [EQUAL, put("test_accuracy", 0.1, **TRAINED, **LOCKED, **CONSTANT)], "holds_if"),
    ("no_harm", [EQUAL, put("test_accuracy", 0.8, **TRAINED, **RANDOM, **CONSTANT, depth=4)], "refuted"),
    ("no_faster_early", [SAME], "holds"),
    ("no_faster_early", [SAME, put("early_accuracy", 0.6, **LOCKED, **CONSTANT)], "holds_if"),
    ("no_faster_early", [SAME, FASTER], "refuted"),
    ("fading", [EQUAL], "holds"),
    ("fading", [EQUAL, put("test_accuracy", 0.8, **TRAINED, **LOCKED, schedule="fading")], "refuted"),
    ("later_exits", [put("exit_accuracy", 0.9)], "holds"),
    ("later_exits", [put("exit_accuracy", 0.9), put("exit_accuracy", 0.5, **LOCKED, layer=16)], "holds_if"),
    ("later_exits", [put("exit_accuracy", 0.9), put("exit_accuracy", 0.5, depth=4, layer=4)], "refuted"),
    ("published_early", [published(0.01)], "holds"),
    ("published_early", [published(0.03)], "refuted"),
    ("published_early", [], "inconclusive"),
]


def test_exact_statements_come_out_on_real_rows() -> None:
    found = {name: verdict.verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items()}
    assert (found["direct_path"], found["provides_gradient"], found["triangle"]) == ("holds_if", "refuted", "holds")
    assert found["unless_opposed"] == "holds_if"


@pytest.fixture(scope="module")
def lab() -> Context:
    return context(NAME, "model.width=12", "grid.samples=9", "training.max_steps=6")


def supervised(lab: Context, depth: int, every: int = 1, **changes: object) -> tuple[ModelConfig, MultiExit]:
    model = replace(lab.config.model, weight_var=1.3, depth=depth, **changes)
    return model, claim.supervise(lab, lab.network(model, 0), model, every, 0)


def measured(lab: Context, network: MultiExit, alpha: float) -> dict[str, float]:
    return {row["quantity"]: row["value"] for row in claim.gradient_rows(lab, network, [alpha], {})}


def by_hand(lab: Context, network: MultiExit) -> list[np.ndarray]:
    """∇θ_1 of the losses of exits 1 and 2 and of the chain of three layers, each sample's backward pass written out."""
    images, labels = lab.samples(lab.data.train, 9)
    (W1, b1), (W2, b2), (W3, b3), (V1, c1), (V2, c2) = (
        (linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy())
        for linear in network.modules()
        if isinstance(linear, nn.Linear)
    )
    totals = [np.zeros(W1.size + b1.size) for _ in range(3)]
    for x, y in zip(images.flatten(1).double().numpy(), labels.tolist(), strict=True):
        h1 = np.tanh(W1 @ x + b1)
        h2 = np.tanh(W2 @ h1 + b2)

        def residual(z: np.ndarray, y: int = y) -> np.ndarray:
            p = np.exp(z) / np.exp(z).sum()
            p[y] -= 1
            return p

        back = W2.T * (1 - h2**2)
        signals = (V1.T @ residual(V1 @ h1 + c1), back @ V2.T @ residual(V2 @ h2 + c2), back @ W3.T @ residual(W3 @ h2 + b3))
        for total, g1 in zip(totals, signals, strict=True):
            delta = (1 - h1**2) * g1
            total += np.concatenate([np.outer(delta, x).ravel(), delta]) / len(labels)
    return totals


@pytest.mark.parametrize("alpha", [0.1, 0.7, 1.0])
def test_the_parts_of_the_gradient_are_those_of_backpropagation_by_hand(lab: Context, alpha: float) -> None:
    _, network = supervised(lab, 3)
    first, second, final = by_hand(lab, network)
    rest = final + alpha * second
    found = measured(lab, network, alpha)
    norm = np.linalg.norm
    expected = {"direct": alpha * first, "rest": rest, "final": final, "total": alpha * first + rest}
    for quantity, gradient in expected.items():
        assert math.exp(found[quantity]) == pytest.approx(norm(gradient), rel=1e-10)
    assert found["cosine"] == pytest.approx(first @ rest / norm(first) / norm(rest), rel=1e-8)
    assert norm(expected["total"]) >= alpha * norm(first) - norm(rest)


@pytest.mark.parametrize(("optimizer", "decay"), [("sgd", 0.0), ("adam", 0.1)])
def test_opposite_heads_freeze_the_first_layer_for_ever(lab: Context, optimizer: str, decay: float) -> None:
    """∇θ_1 = 0 exactly, at initialisation and after every step, although each head alone has a gradient for it."""
    training = replace(lab.config.training, optimizer=optimizer, weight_decay=decay)
    moved = {}
    for alpha in (0.0, 1.0):
        _, network = supervised(lab, 2)
        claim.oppose(network)
        if alpha:
            assert measured(lab, network, alpha)["total"] == -math.inf
        assert measured(lab, network, 1.0)["direct"] > -math.inf
        train_all(lab, [Trainee(network, "opposed", 0, DeepSupervision.alike(network, alpha), config=training)])
        moved[alpha] = max(float(parameter.detach().abs().max()) for parameter in network.chain[0].parameters())
    assert moved[1.0] == 0
    assert moved[0.0] > 0
    assert measured(lab, supervised(lab, 2)[1], 1.0)["total"] > -math.inf


@pytest.mark.parametrize("spoilt", ["exit", "bias", "first layer", "α"])
def test_heads_that_are_not_quite_opposite_do_not_cancel(lab: Context, spoilt: str) -> None:
    _, network = supervised(lab, 2)
    claim.oppose(network)
    (exit_,) = network.exits.values()
    assert measured(lab, network, 1.0)["total"] == -math.inf
    assert measured(lab, network, 1.0)["cosine"] == pytest.approx(-1, abs=1e-12)
    with torch.no_grad():
        if spoilt == "first layer":
            next(network.chain[0].parameters())[0] += 0.01
        elif spoilt != "α":
            (exit_.weight if spoilt == "exit" else exit_.bias)[0] += 0.01
    assert math.isfinite(measured(lab, network, 0.99 if spoilt == "α" else 1.0)["total"])


def test_a_severed_chain_leaves_the_first_exit_alone() -> None:
    """Its gradient is α‖∇θ_1 ℒ_1‖ to the last digit, and nothing without it; a chain in one piece has more."""
    rows = small_rows(NAME)
    severed = pick(rows, "total", part="severed").set_index(["alpha", "net_seed"])["value"]
    direct = pick(rows, "direct", part="severed").set_index(["alpha", "net_seed"])["value"]
    pd.testing.assert_series_equal(severed, direct, rtol=1e-13)
    np.testing.assert_allclose(np.exp(severed[1.0] - severed[0.1]), 10)
    assert (severed[0.0] == -math.inf).all()
    assert (pick(rows, "rest", part="severed")["value"] == -math.inf).all()
    whole = pick(rows, "rest", part="gradient")["value"]
    assert np.isfinite(whole).all()


def test_the_direct_part_gains_half_the_log_of_chi_a_layer() -> None:
    """At σw² = 0.5 by 0.42 nats; a rate for another σw² would be refused."""
    axes = ("grid.depths=[4,8,16]", "grid.seeds=6", "grid.weight_vars=[0.5,1.0]", "grid.exit_weights=[1.0]", "grid.exit_spacings=[1]")
    lab = context(NAME, "model.width=128", *axes)
    rows = pd.DataFrame(claim._gradients(lab))
    nets = claim.shares(rows)
    by_chain = nets.groupby("weight_var")
    rates = by_chain[["depth", "value"]].apply(lambda chain: np.polyfit(chain["depth"], chain["value"], 1)[0])
    loss = by_chain["loss"].first()
    assert (rates - loss / 2).abs().max() < 0.05
    assert loss[0.5] == pytest.approx(-math.log(mean_field.chi("tanh", 0.5, 0.05)))
    assert abs(rates[0.5] - loss[1.0] / 2) > 0.2


def test_exits_stand_at_every_kth_stage_before_the_last(lab: Context) -> None:
    for every, names in ((1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (0, [])):
        _, network = supervised(lab, 7, every)
        assert list(network.exits) == [f"layer{layer}" for layer in names]
        if every:
            assert claim.total_weight(0.5, every, 7) == 1 + 0.5 * len(names)


def test_the_control_has_the_learning_rate_of_all_losses_together() -> None:
    rows = small_rows(NAME)
    of_chain = pick(rows, "test_accuracy", part="training", heads="random", depth=16, weight_var=0.5)
    assert set(of_chain[of_chain["schedule"] == "none"]["boost"]) == {1.0, 2.5, 16.0}
    usual = pick(rows, "test_accuracy", part="training", heads="random", weight_var=1.761)
    assert (set(usual["boost"]), set(usual["adam"])) == ({1.0}, {0.0})
    assert set(of_chain["adam"]) == {0.0, *claim.ADAM_RATES}
    gains = claim.gain_cells(rows, "test_accuracy").query("heads == 'random' and depth == 16 and weight_var == 0.5")
    assert set(gains.query("against == 'same weight'")["every"]) == {1}
    assert set(gains.query("against == 'same rate'")["every"]) == {1, 8}
    assert set(gains.query("against == 'Adam'")["every"]) == {1}


def test_adam_has_the_rate_that_trains_best() -> None:
    rows = small_rows(NAME)
    slower = {"adam": 1e-3}
    worse = [put("train_accuracy", 0.9, **TRAINED, **LOCKED, **slower), put("train_accuracy", 0.1, **TRAINED, **LOCKED, **BETTER)]
    told = [put("test_accuracy", 0.25, **TRAINED, **LOCKED, **slower), put("test_accuracy", 0.0, **TRAINED, **LOCKED, **BETTER)]
    gains = claim.gain_cells(after(rows, [EQUAL, *worse, *told]), "test_accuracy").query("against == 'Adam'")
    np.testing.assert_allclose(gains["estimate"], 0.9 - 0.25)


def test_a_training_that_diverges_has_no_early_lead_and_no_gradient_after_it() -> None:
    lab = small_context(NAME, "training.lr=1e30", "training.max_steps=2")
    model = replace(lab.config.model, weight_var=1.761, depth=4, activation="relu")
    rows = pd.DataFrame(claim._taught(lab, [claim.Lesson.of(lab, model, claim.Supervision(1.0, 1, "constant"), 0)]))
    assert pick(rows, "diverged")["value"].tolist() == [1.0]
    assert pick(rows, "early_accuracy")["value"].tolist() == pick(rows, "test_accuracy")["value"].tolist()
    assert set(rows["when"].dropna()) == {"initial"}
    assert len(pick(rows, "exit_accuracy")) == 4


def test_convolutional_nets_are_trained_on_cifar10_where_the_grid_asks_for_them() -> None:
    """Plain, and with the exit half-way of Inception-v3."""
    small = ("grid.conv_widths=[2]", "grid.depths=[3,4]", "grid.train_depths=[3]", "grid.exit_spacings=[1]", "grid.samples=4")
    lab = small_context(NAME, *small)
    assert not [model for model in claim._trained(lab) if model.family == "vgg"]
    lab = replace(lab, data=replace(lab.data, name="cifar10"))
    ((model, settings),) = ((model, settings) for model, settings in claim._trained(lab).items() if model.family == "vgg")
    assert [(work.networks, work.steps) for work in claim.plan(lab) if work.model.family == "vgg"] == [(2 * 2, 2)]
    rows = pd.DataFrame(claim._taught(lab, [claim.Lesson.of(lab, model, setting, 0) for setting in settings]))
    assert (set(rows["part"]), set(rows["every"])) == ({"published"}, {0, 4})
    assert len(pick(rows, "test_accuracy")) == len(pick(rows, "early_accuracy")) == 2
    plain, supervised = (claim.supervise(lab, lab.network(model, 0), model, setting.every, 0) for setting in settings)
    assert [list(network.exits) for network in (plain, supervised)] == [[], ["conv4"]]
    found = verdicts(NAME, pd.concat([small_rows(NAME), rows]))
    assert found["published_early"].n == 1


def test_every_published_value_is_told_beside_the_measured() -> None:
    found = verdicts(NAME, after(small_rows(NAME), [published(0.01)]))
    assert "published=0: 0.0" in found["published_early"].evidence


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid.depths=[16]", "grid.depths: at least two"),
        ("grid.depths=[2,4]", "grid.depths: at least two, each of at least 3"),
        ("grid.train_depths=[2,16]", "grid.train_depths: each of at least 3"),
        ("grid.exit_weights=[0.0,1.0]", "grid.exit_weights: above 0, at most 1"),
        ("grid.exit_weights=[0.1,2.0]", "grid.exit_weights: above 0, at most 1"),
        ("grid.exit_spacings=[2]", "grid.exit_spacings: 1 among them"),
        ("grid.exit_spacings=[1,16]", "grid.exit_spacings: each below"),
        ("grid.weight_vars=[0.0,1.0]", "grid.weight_vars, grid.train_weight_vars: σw² above 0"),
        ("grid.samples=257", "grid.samples: at most 256"),
    ],
)
def test_an_impossible_grid_is_refused(override: str, message: str) -> None:
    lab = small_context(NAME, override)
    with pytest.raises(UserError, match=f"^{message}"):
        claim.check(lab.config, lab.data)


def test_another_weight_leaves_the_other_rows_as_they_were() -> None:
    more = claim.measure(small_context(NAME, "grid.exit_weights=[0.1,0.5,1.0]"))
    added = (more["alpha"] == 0.5) | (more["boost"] == 1 + 0.5 * (more["depth"] - 1)) & (more["schedule"] == "none")
    assert added.any()
    pd.testing.assert_frame_equal(more[~added].reset_index(drop=True), small_rows(NAME), check_exact=True)
