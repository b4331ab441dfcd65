"""forward_backward: verdicts follow the rows, locks against naive references and closed forms, what the remedies do at initialisation."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments import forward_backward as claim
from src import mean_field
from src.config import ModelConfig
from src.diversity import dissimilarity
from src.experiment import Context
from src.models.start import latch
from tests.experiments.measured import Change, after, context, put, small_rows, verdicts

NAME = "forward_backward"
SMALL = (
    "model.width=16",
    "grid.train_width=16",
    "model.depth=8",
    "grid.seeds=2",
    "grid.samples=6",
    "grid.calibration=64",
    "training.max_steps=1",
    "data.train_size=256",
    "data.test_size=100",
)


def lock(forward: float, backward: float, **where: object) -> list[Change]:
    return [put("forward_lock", forward, **where), put("backward_lock", backward, **where)]


def chain(name: str, forward: float, backward: float) -> list[Change]:
    return lock(forward, backward, part="chain", chain=name)


def remedied(remedy: str, forward: float, backward: float, **where: object) -> list[Change]:
    """Every plain chain locked by three decades either way, and the locks that a remedy leaves."""
    return [*lock(3.0, 3.0, part="remedy"), *lock(forward, backward, part="remedy", remedy=remedy, **where)]


def at_rates(forward: float, backward: float, **where: object) -> list[Change]:
    """Rates of random plain chains, in nats a layer."""
    return [put("forward_rate", forward, **where), put("backward_rate", backward, **where)]


def diverging(remedy: str, **where: object) -> Change:
    """One of the trainings with a remedy diverges."""
    return put("diverged", 1.0, remedy=remedy, net_seed=0, **where)


def learned(remedy: str, plain: float, treated: float) -> list[Change]:
    """Accuracies of chains locked backwards, and of those that are not, on which nothing is gained."""
    accuracies = [put("test_accuracy", value, remedy=name) for name, value in (("plain", plain), (remedy, treated))]
    return [*WELL, *accuracies, put("test_accuracy", plain, patient=RELU["patient"])]


def told(measure: str, locked: float, unlocked: float) -> list[Change]:
    """A measure of the chains locked its way, and of the others."""
    way = claim.MEASURES[measure]
    return [put(measure, locked if way in ways else unlocked, part="chain", chain=chain) for chain, ways in claim.LOCKED.items()]


LATER, TANH, RELU = {"when": "trained"}, {"patient": "tanh, σw²=1"}, {"patient": "ReLU, σw²=2"}
APART = [*chain("forwards", 2.0, 0.1), *chain("backwards", 0.1, 2.0)]
UNLOCKED = lock(0.0, 0.0, part="remedy")
# every chain locked but one patient's; that patient's with every remedy locked as in `remedied`, by three decades
WELL = [*lock(3.0, 3.0, part="remedy"), *lock(0.0, 0.0, part="remedy", remedy="plain", **RELU)]

# criterion, what is changed in the measured rows, verdict
CASES = [
    ("distinct", APART, "holds"),
    ("distinct", [*APART, *chain("backwards", 2.0, 2.0)], "refuted"),
    ("distinct", [*APART, *chain("backwards", 0.1, 0.1)], "refuted"),
    ("distinct", [*APART, *chain("forwards", 2.0, 2.0)], "refuted"),
    ("distinct", [*APART, put("forward_lock", 0.5, part="chain", chain="forwards", net_seed=0)], "inconclusive"),
    ("both_present", chain("both", 2.0, 2.0), "holds"),
    ("both_present", chain("both", 2.0, 0.9), "refuted"),
    ("neither", chain("neither", 0.1, 0.1), "holds"),
    ("neither", chain("neither", 1.1, 0.1), "refuted"),
    ("one_rate", at_rates(-0.2, -0.2), "holds"),
    ("one_rate", [*at_rates(-0.2, -0.22), *at_rates(-0.02, -0.2, activation="relu")], "holds_if"),
    ("one_rate", at_rates(-0.1, -0.2, activation="tanh"), "refuted"),
    ("one_rate", at_rates(-0.2, 0.2, activation="tanh"), "refuted"),
    *((f"{measure}_tells", told(measure, 3.0, 6.1), "holds") for measure in ("participation", "state_rank", "signal_rank")),
    *((f"{measure}_tells", told(measure, 3.0, 5.9), "refuted") for measure in ("participation", "state_rank", "signal_rank")),
    ("participation_tells", [*told("participation", 3.0, 7.0), put("participation", 3.0, chain="neither", layer=7)], "refuted"),
    ("severity_tells", told("severity", 0.99, 0.9), "holds"),
    ("severity_tells", told("severity", 0.9, 0.99), "refuted"),
    ("severity_tells", [*told("severity", 0.99, 0.9), put("severity", 0.9, chain="both", layer=1)], "refuted"),
    ("skips_help_backward", remedied("skip", 3.0, 1.0), "holds"),
    ("skips_help_backward", remedied("skip", 3.0, -1.0), "holds"),
    ("skips_help_backward", remedied("skip", 0.0, 3.5, **LATER, **TANH), "refuted"),
    ("skips_help_backward", remedied("skip", 0.0, -3.5, **LATER, **TANH), "refuted"),
    ("skips_help_backward", UNLOCKED, "inconclusive"),
    ("skips_help_backward", [*remedied("skip", 3.0, 1.0), diverging("skip", **TANH)], "inconclusive"),
    ("skips_help_backward", [*remedied("skip", 3.0, 1.0), diverging("plain", **TANH)], "inconclusive"),
    ("skips_help_backward", [*remedied("skip", 3.0, 1.0), *WELL[2:], diverging("skip", **RELU)], "holds_if"),
    ("skips_help_forward", remedied("skip", 1.0, 5.0), "holds"),
    ("skips_help_forward", remedied("skip", 3.5, 0.0, **LATER, **TANH), "refuted"),
    ("normalisation_helps_both", remedied("batch", 1.0, 1.0), "holds"),
    ("normalisation_helps_both", remedied("batch", 1.0, 3.5, **TANH), "refuted"),
    ("normalisation_helps_both", remedied("batch", 3.5, 1.0, **TANH), "refuted"),
    ("layer_normalisation_helps_both", remedied("layer", 1.0, 1.0), "holds"),
    ("layer_normalisation_helps_both", remedied("layer", 3.5, 1.0, **TANH), "refuted"),
    ("exits_help_backward", remedied("exits", 3.0, 1.0), "holds"),
    ("exits_help_backward", remedied("exits", 3.0, 3.5, **LATER), "refuted"),
    ("exits_leave_forward", [*WELL, *lock(2.0, 1.0, remedy="exits", **RELU)], "holds"),
    ("exits_leave_forward", remedied("exits", 3.0, 1.0), "holds"),
    ("exits_leave_forward", remedied("exits", 3.5, 1.0), "holds"),
    ("exits_leave_forward", remedied("exits", 2.5, 1.0, **LATER, **TANH), "refuted"),
    ("exits_leave_forward_untrained", [*remedied("exits", 3.0, 1.0), *lock(1.0, 1.0, remedy="exits", **LATER)], "holds_if"),
    ("exits_leave_forward_untrained", remedied("exits", 2.5, 1.0, when="initial", **TANH), "refuted"),
    ("exits_open_the_chain", [*remedied("exits", 3.0, 1.0), put("main_lock", 1.0)], "holds"),
    ("exits_open_the_chain", [*remedied("exits", 3.0, 1.0), put("main_lock", 3.5)], "refuted"),
    ("exits_open_the_chain", [*remedied("exits", 3.0, 1.0), put("main_lock", 1.0), diverging("exits", **TANH)], "inconclusive"),
    *((form, learned(remedy, 0.2, 0.3), "holds_if") for form, remedy in claim.LEARNING.items()),
    *((form, learned(remedy, 0.2, 0.22), "refuted") for form, remedy in claim.LEARNING.items()),
    ("unneeded", [*UNLOCKED, *(put("backward_lock", -2.0, part="remedy", remedy=remedy) for remedy in ("skip", "batch"))], "holds"),
    ("unneeded", [*UNLOCKED, put("backward_lock", 0.9, part="remedy", remedy="plain")], "refuted"),
    ("schedule", [], "holds_if"),
    ("schedule", [put("schedule_lock", 0.0)], "holds"),
    (
        "schedule",
        [put("schedule_lock", 1e-9, remedy="local", net_seed=0), put("schedule_lock", 1.0, remedy="local", net_seed=1)],
        "refuted",
    ),
]


@pytest.fixture(scope="module")
def lab() -> Context:
    return context(NAME, "grid.samples=16", "model.depth=34")


def model(lab: Context, **changes: object) -> ModelConfig:
    return replace(lab.config.model, **changes)


def patient(lab: Context, name: str, remedy: str, **changes: object) -> ModelConfig:
    settings = {"family": "residual_mlp", **claim.PATIENTS[name], **claim.REMEDIES[remedy], **changes}
    return model(lab, **settings)


def test_exact_statements_come_out_on_real_rows() -> None:
    found = {name: verdict.verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items()}
    assert found["schedule"] == "holds_if"


@pytest.mark.parametrize("remedy", ["plain", "skip", "batch", "layer"])
def test_signals_are_those_of_the_walk_back(lab: Context, remedy: str) -> None:
    network = lab.calibrated(patient(lab, "ReLU, σw²=2", remedy, depth=8), 0)
    walked = lab.error_signals(network)
    signals = claim.passing(lab, network).signals
    assert [signal.log_rms() for signal in signals] == pytest.approx([walked[layer] for layer in sorted(walked)], rel=1e-9)
    with torch.no_grad():
        claim.readout_of(network).weight.mul_(2)
    moved = claim.passing(lab, network).signals[-2]
    assert moved.log_rms() != pytest.approx(walked[len(walked) - 1], rel=1e-3)


def test_signals_of_the_total_loss_are_each_samples_own(lab: Context) -> None:
    network, objective = claim._with_losses(lab, patient(lab, "tanh, σw²=1", "exits", depth=8), "exits", 0)
    passed = claim.passing(lab, network, objective)
    _, targets = lab.samples(lab.data.test, 16)
    twin = network.double()
    for sample in (0, 7):
        state = passed.states[0][sample : sample + 1].requires_grad_()
        target, total, after = targets[sample : sample + 1], 0.0, state
        names = list(dict(twin.chain.named_children()))
        for index, name in enumerate(names):
            after = after if index == 0 else twin.chain[index](after)
            if name in twin.exits:
                total = total + claim.ALPHA * cross_entropy(twin.exits[name](after), target)
        (direct,) = torch.autograd.grad(total + cross_entropy(after, target), state, retain_graph=True)
        signal = passed.signals[0].direction[sample] * passed.signals[0].log_norm[sample].exp()
        np.testing.assert_allclose(signal, direct[0], rtol=1e-10, atol=1e-16)
        (main,) = torch.autograd.grad(cross_entropy(after, target), state)
        assert not np.allclose(signal, main[0])
    assert set(names) - set(twin.exits) == {names[-2], names[-1]}


def test_what_the_readout_reads_is_behind_the_last_activation(lab: Context) -> None:
    plain = claim.passing(lab, lab.network(patient(lab, "ReLU, σw²=2", "plain", depth=8), 0))
    assert torch.equal(plain.features, plain.states[-2])
    skipping = claim.passing(lab, lab.network(patient(lab, "ReLU, σw²=2", "skip", depth=8), 0))
    assert torch.equal(skipping.features, skipping.states[-2].relu())
    assert not torch.equal(skipping.features, skipping.states[-2])
    assert plain.forward_lock() == pytest.approx(-math.log10(dissimilarity(plain.states[-2])), rel=1e-12)


def exhibit(lab: Context, name: str, seed: int = 0, **changes: object) -> torch.nn.Sequential:
    return lab.network(replace(claim._exhibited(lab.config)[name], **changes), seed)


def test_orthogonal_layers_keep_angles_and_gradients(lab: Context) -> None:
    network = exhibit(lab, "neither")
    passed = claim.passing(lab, network)
    apart = [dissimilarity(state) for state in passed.states[:-1]]
    assert apart == pytest.approx([apart[0]] * 33, rel=1e-5)
    assert passed.backward_lock() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        network[5].linear.weight.mul_(0.1)
    assert claim.passing(lab, network).backward_lock() == pytest.approx(1, abs=1e-5)


def attractor(gain: float) -> float:
    """The positive h = tanh(gain·h)."""
    h = 1.0
    for _ in range(200):
        h = math.tanh(gain * h)
    return h


@pytest.mark.parametrize("width", [16, 64])
def test_latched_states_stay_apart_and_lose_a_known_share_of_the_gradient_a_layer(lab: Context, width: int) -> None:
    """gain·(1 − h²) at the attractor h; at gain 2 it is .1667… for every width."""
    network = exhibit(lab, "backwards", width=width)
    latch(network, 2.0)
    passed = claim.passing(lab, network)
    falls = [passed.signals[layer].log_rms() - passed.signals[layer - 1].log_rms() for layer in range(25, 32)]
    known = -math.log(2 * (1 - attractor(2.0) ** 2))
    assert falls == pytest.approx([known] * 7, rel=1e-6)
    assert known == pytest.approx(1.79, abs=0.01)
    h = passed.states[31]
    np.testing.assert_allclose(h.abs(), attractor(2.0), rtol=1e-6)
    assert torch.equal(h.sign(), passed.states[0].sign())
    assert passed.forward_lock() < 0.5
    latch(network, 1.5)
    passed = claim.passing(lab, network)
    assert passed.signals[31].log_rms() - passed.signals[30].log_rms() != pytest.approx(known, rel=0.1)


def arc_cosine(c: np.ndarray) -> np.ndarray:
    """The cosine of two ReLU states from that of the states before, σb = 0 (Cho & Saul 2009, degree 1)."""
    return (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c) / np.pi


def test_states_of_relu_chains_draw_together_while_the_gradient_is_kept() -> None:
    """Each pair's cosine by the arc-cosine map, layer by layer, to O(l/width); E‖g‖² the same at every layer."""
    lab = context(NAME, "grid.samples=8", "model.depth=34", "model.width=512")
    passes = [claim.passing(lab, exhibit(lab, "forwards", seed)) for seed in range(4)]
    inputs = lab.samples(lab.data.test, 8)[0].double().flatten(1)
    directions = (inputs / inputs.norm(dim=1, keepdim=True)).numpy()
    cosines = (directions @ directions.T)[~np.eye(8, dtype=bool)]
    for layer in range(1, 14):
        cosines = arc_cosine(cosines)
        if layer in (1, 5, 9, 13):
            apart = np.mean([dissimilarity(passed.states[layer - 1]) for passed in passes])
            assert apart == pytest.approx(1 - cosines.mean(), rel=0.2)
            deeper = np.mean([dissimilarity(passed.states[2 * layer + 1]) for passed in passes])
            assert deeper != pytest.approx(1 - cosines.mean(), rel=0.2)
    assert abs(np.mean([passed.backward_lock() for passed in passes])) < 0.25
    shrinking = claim.passing(lab, exhibit(lab, "forwards", weight_var=1.0))
    assert shrinking.backward_lock() == pytest.approx(16 * math.log10(2), abs=0.5)


def mean_rates(activation: str, weight_var: float, bias_var: float) -> pd.Series:
    lab = context(NAME, "grid.samples=8", "model.depth=64", "model.width=256")
    random = model(lab, family="mlp", activation=activation, weight_var=weight_var, bias_var=bias_var)
    found = [claim.rates(claim.passing(lab, lab.network(random, seed))) for seed in range(3)]
    return pd.DataFrame(found, columns=["forward", "backward"]).mean()


@pytest.mark.parametrize("weight_var", [1.0, 1.3])
def test_both_rates_of_the_ordered_phase_are_chi(weight_var: float) -> None:
    """σb² = .05: χ = .759 at σw² = 1, .880 at 1.3, whose depth scale is 7.83 layers."""
    chi = mean_field.chi("tanh", weight_var, 0.05)
    assert chi == pytest.approx({1.0: 0.759, 1.3: 0.880}[weight_var], abs=5e-4)
    other = mean_field.chi("tanh", 2.3 - weight_var, 0.05)
    for rate in mean_rates("tanh", weight_var, 0.05):
        assert math.exp(rate) == pytest.approx(chi, rel=0.05)
        assert math.exp(rate) != pytest.approx(other, rel=0.05)


def test_relu_chains_without_bias_have_two_rates() -> None:
    found = mean_rates("relu", 1.0, 0.0)
    assert math.exp(found["backward"]) == pytest.approx(0.5, rel=0.05)
    # d ln l⁻²/dl = −2/l at l ≈ 48
    assert found["forward"] == pytest.approx(-2 / 48, abs=0.03)


def mean_lock(lab: Context, name: str, remedy: str) -> float:
    nets = [lab.calibrated(patient(lab, name, remedy, width=256), seed) for seed in range(3)]
    return float(np.mean([claim.passing(lab, net).backward_lock() for net in nets]))


@pytest.mark.parametrize(
    ("name", "remedy", "a_layer"),
    [
        ("ReLU, σw²=1", "plain", 1 / 2),
        ("ReLU, σw²=1", "skip", (1 + 1 / 4) ** 0.5),
        ("ReLU, σw²=2", "plain", 1.0),
        ("ReLU, σw²=2", "skip", 2**0.5),
        ("ReLU, σw²=2", "batch", math.pi / (math.pi - 1)),
        ("ReLU, σw²=1", "batch", math.pi / (math.pi - 1)),
    ],
)
def test_growth_of_the_gradient_under_each_remedy(lab: Context, name: str, remedy: str, a_layer: float) -> None:
    """‖g‖² goes by χ = σw²/2 a plain layer, 1 + χ² a pre-activation block, π/(π−1) a BN–ReLU layer; 32 layers, ± ⅓ decade."""
    assert mean_lock(lab, name, remedy) == pytest.approx(-16 * math.log10(a_layer), abs=1 / 3)


def test_auxiliary_losses_leave_the_untrained_chain_alone(lab: Context) -> None:
    nets = {}
    for remedy in ("plain", "exits"):
        network, objective = claim._with_losses(lab, patient(lab, "ReLU, σw²=1", remedy), remedy, 0)
        nets[remedy] = claim.passing(lab, network, objective)
        main = claim.passing(lab, network)
        assert main.backward_lock() == nets["plain"].backward_lock()
    assert nets["exits"].forward_lock() == nets["plain"].forward_lock()
    # α times the gradient of an exit of its own reaches the first stage
    assert nets["exits"].backward_lock() < 1 < nets["plain"].backward_lock()


def test_the_schedule_is_lifted_by_local_losses_alone(lab: Context) -> None:
    for remedy in claim.REMEDIES:
        network, objective = claim._with_losses(lab, patient(lab, claim.SCHEDULED, remedy, depth=8), remedy, 0)
        assert claim.schedule_lock(lab, network, objective) > 1e-3
    assert claim.schedule_lock(lab, network, claim.first_exit) == 0


def test_chains_compared_have_equal_depth_and_parameters(lab: Context) -> None:
    def dense(remedy: str) -> list[torch.Tensor]:
        network, _ = claim._with_losses(lab, patient(lab, "ReLU, σw²=1", remedy, depth=8), remedy, 0)
        return [module.weight for module in claim.chain_of(network).modules() if isinstance(module, torch.nn.Linear)]

    plain = dense("plain")
    assert len(plain) == 8
    for remedy in claim.REMEDIES:
        assert all(torch.equal(a, b) for a, b in zip(plain, dense(remedy), strict=True))


def test_a_training_that_diverges_gains_minus_infinity_is_counted_and_decides_nothing() -> None:
    rows = after(small_rows(NAME), [*remedied("skip", 1.0, 1.0), diverging("skip", **TANH)])
    lost = (rows["when"] == "trained") & (rows["remedy"] == "skip") & (rows["patient"] == TANH["patient"]) & (rows["net_seed"] == 0)
    for rest in (rows, rows[~(lost & rows["quantity"].isin(claim.LOCKS))]):
        gains = claim.remedy_gains(rest).query("remedy == 'skip' and when == 'trained' and patient == @TANH['patient']")
        assert gains.set_index(["way", "net_seed"])["value"].get(("forward", 0)) == -math.inf
        cells = claim.gain_cells(rest, claim.remedy_gains(rest)).query("diverged == 1")
        assert cells[["way", "when", "remedy"]].values.tolist() == [[way, "trained", "skip"] for way in ("backward", "forward")]
        found = verdicts(NAME, rest)["skips_help_backward"]
        assert (found.verdict, found.estimate, found.n) == ("inconclusive", None, 2)
        assert "diverged=1: -inf" in found.evidence


def test_a_plain_chain_that_diverges_has_every_remedy_gain_infinitely_unless_that_diverges_too() -> None:
    rows = after(small_rows(NAME), [diverging("plain", **TANH), diverging("layer", **TANH)])
    gains = claim.remedy_gains(rows).query("when == 'trained' and patient == @TANH['patient'] and net_seed == 0")
    assert gains.groupby("remedy")["value"].unique().map(list).to_dict() == {
        "skip": [math.inf],
        "batch": [math.inf],
        "layer": [-math.inf],
        "exits": [math.inf],
    }


def test_who_is_ill_is_settled_at_initialisation() -> None:
    rows = after(small_rows(NAME), [*lock(3.0, 3.0, part="remedy"), *lock(0.0, 0.0, part="remedy", **LATER)])
    cells = claim.gain_cells(rows, claim.remedy_gains(rows))
    assert set(cells["plain_lock"]) == {3.0}
    assert set(cells["when"]) == {"initial", "trained"}
