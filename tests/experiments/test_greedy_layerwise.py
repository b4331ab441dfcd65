"""greedy_layerwise: verdicts follow the rows; influence, gradients, separation and cost against closed forms."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments import greedy_layerwise as claim
from experiments import greedy_rules
from experiments.greedy_rules import Rule
from src.config import ModelConfig
from src.errors import UserError
from src.experiment import Context
from src.mean_field import chi
from src.rows import pick
from src.training.local import all_blocks, gradients, later_influence
from src.training.loop import Outcome
from src.trainings import Trainee
from tests.experiments.measured import after, config, context, put, small_context, small_rows, verdicts

NAME = "greedy_layerwise"
SMALL = (
    "model.width=8",
    "grid.train_depths=[3,4]",
    "grid.block_sizes=[1,2]",
    "grid.similarity_blocks=[1,2]",
    "grid.samples=8",
    "training.max_steps=4",
    "training.batch_size=32",
    "data.train_size=128",
    "data.test_size=20",
)


def accuracy(value: float, **coordinates: object):
    return put("test_accuracy", value, part="training", **coordinates)


def probed(value: float, **coordinates: object):
    """The probe of every hidden layer."""
    return put("probe_accuracy", value, **coordinates)


# every rule is alike; the depth 3 is not locked, nor is the critical chain of depth 4. Of the others, which are all of depth 4, the latched
# one is locked backwards only
OPEN_STATES = [put("flow", -10.0), put("flow", -1.0, chain="critical"), put("scale", -1.0), put("separation", -1.0)]
ALIKE = [
    *OPEN_STATES,
    put("scale", -10.0, chain="vanishing"),
    put("separation", -10.0, chain="collapsing"),
    accuracy(0.9),
    probed(0.9),
]
LOCKED = ("vanishing", "collapsing", "latched")
LIFTED = [*ALIKE, *(accuracy(0.1, loss="backprop", chain=chain) for chain in LOCKED)]
ONE_WAY = [*ALIKE, accuracy(0.1, loss="backprop", chain="latched")]
LEARNT = [*ALIKE, *(probed(0.4, loss="backprop", chain=chain) for chain in LOCKED)]
DULL = [*ALIKE, *(accuracy(0.5, chain=chain) for chain in ("vanishing", "collapsing"))]
VANISHING = {"chain": "vanishing", "depth": 4}
OPEN = {"chain": "critical", "depth": 3}
SINGLE = {"block": 1, "hidden": 0}
HIGH, LOW = put("log_gradient", 0.0), {"layer": 1, "chain": "vanishing"}

# criterion, what is changed in the measured rows, verdict
CASES = [
    ("no_backprop_through", [], "holds_if"),
    ("no_backprop_through", [put("later_influence", 0.0)], "holds"),
    ("no_backprop_through", [put("later_influence", 1e-12, loss="sim", block=1, depth=4, border=2)], "refuted"),
    ("no_gradient_across_borders", [], "holds_if"),
    ("no_gradient_across_borders", [put("later_influence", 1e-12, loss="pred", block=2, depth=4, border=2)], "refuted"),
    ("equal_parameters", [], "holds"),
    ("equal_parameters", [put("parameters", 1.0, loss="sim", depth=4)], "refuted"),
    ("gradient_still_reaches_first", [HIGH, put("log_gradient", -10.0, layer=1, moment="before")], "holds"),
    ("gradient_still_reaches_first", [HIGH, put("log_gradient", -10.0, layer=1, loss="sim", moment="after")], "refuted"),
    ("lock_lasts", ALIKE, "holds_if"),
    ("lock_lasts", [*ALIKE, put("flow", -1.0, **VANISHING, loss="backprop", moment="after")], "refuted"),
    ("gradient_reaches_first", [HIGH], "holds"),
    ("gradient_reaches_first", [HIGH, put("log_gradient", -10.0, **LOW, loss="backprop")], "holds_if"),
    ("gradient_reaches_first", [HIGH, put("log_gradient", -10.0, **LOW, loss="pred", block=2)], "refuted"),
    ("avoids_locking", LIFTED, "holds_if"),
    ("avoids_locking", ALIKE, "refuted"),
    ("avoids_locking", [*LIFTED, accuracy(0.1, **VANISHING, loss="pred", schedule="sequential")], "refuted"),
    ("avoids_locking", [*LIFTED, put("flow", -10.0, chain="critical")], "refuted"),
    *((f"avoids_locking_{loss}", LIFTED, "holds_if") for loss in ("pred", "sim", "predsim")),
    *(
        (f"avoids_locking_{loss}", [*LIFTED, accuracy(0.1, **VANISHING, **SINGLE, loss=loss)], "refuted")
        for loss in ("pred", "sim", "predsim")
    ),
    ("avoids_locking_sim", [*LIFTED, accuracy(0.1, **VANISHING, **SINGLE, loss="pred")], "holds_if"),
    ("avoids_backward_only", ONE_WAY, "holds_if"),
    ("avoids_backward_only", [*ONE_WAY, accuracy(0.1, chain="latched", schedule="sequential")], "holds_if"),
    ("avoids_backward_only", [*ONE_WAY, accuracy(0.1, chain="latched", loss="pred", block=2)], "refuted"),
    ("avoids_backward_only", LIFTED, "inconclusive"),
    ("avoids_backward_only", [*ONE_WAY, put("scale", -1.0, chain="vanishing")], "refuted"),
    ("avoids_backward_only", [*ONE_WAY, put("separation", -1.0, chain="collapsing")], "refuted"),
    ("layers_learn", LEARNT, "holds_if"),
    ("layers_learn", [*LEARNT, accuracy(0.1)], "holds_if"),
    ("layers_learn", [*LEARNT, probed(0.4, **VANISHING, loss="sim", layer=1)], "holds_if"),
    ("layers_learn", [*LEARNT, probed(0.4, **VANISHING, loss="sim", layer=3)], "refuted"),
    ("better_than_untrained", [*ALIKE, probed(0.7, moment="before")], "holds"),
    ("better_than_untrained", [*ALIKE, probed(0.7, moment="before"), probed(0.6, loss="sim", chain="latched", layer=3)], "refuted"),
    ("readout_tells", ALIKE, "holds"),
    ("readout_tells", DULL, "holds_if"),
    ("readout_tells", [*DULL, accuracy(0.5, chain="latched", loss="sim")], "refuted"),
    ("readout_tells", [*DULL, accuracy(0.5, chain="latched", loss="backprop")], "holds_if"),
    ("suboptimal", [*ALIKE, accuracy(0.8, **OPEN, **SINGLE, loss="pred", schedule="sequential")], "holds"),
    ("suboptimal", ALIKE, "refuted"),
    ("suboptimal", [*ALIKE, *(accuracy(0.8, chain=chain, schedule="sequential") for chain in LOCKED)], "refuted"),
    ("suboptimal", [*ALIKE, accuracy(0.8, schedule="simultaneous", loss="pred")], "refuted"),
    ("suboptimal_simultaneous", [*ALIKE, accuracy(0.8, **OPEN, **SINGLE, loss="sim", schedule="simultaneous")], "holds"),
    ("suboptimal_simultaneous", [*ALIKE, accuracy(0.8, schedule="sequential")], "refuted"),
    ("costs_little_unlocked", [*ALIKE, accuracy(0.1, **VANISHING), accuracy(0.1, schedule="sequential")], "holds"),
    ("costs_little_unlocked", [*ALIKE, accuracy(0.8, **OPEN, loss="predsim", block=2)], "refuted"),
    ("larger_blocks", [*ALIKE, accuracy(0.1, **VANISHING, block=2)], "holds"),
    ("larger_blocks", [*ALIKE, accuracy(0.8, **OPEN, loss="pred", block=2, schedule="sequential")], "refuted"),
    ("deeper_heads", [*ALIKE, accuracy(0.95, hidden=1)], "holds"),
    ("deeper_heads", [*ALIKE, accuracy(0.95, hidden=1), accuracy(0.8, **OPEN, hidden=1)], "refuted"),
]


def test_exact_statements_come_out_on_real_rows() -> None:
    found = {name: verdict.verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items()}
    assert (found["no_backprop_through"], found["no_gradient_across_borders"]) == ("holds_if", "holds_if")


def test_every_row_names_the_local_loss_and_the_block_size() -> None:
    rows = small_rows(NAME)
    assert rows[["loss", "block", "hidden", "schedule"]].notna().all(axis=None)
    assert set(rows["loss"]) == {"backprop", "pred", "sim", "predsim"}


def test_a_deficit_counts_only_beyond_the_width_of_all_its_intervals_together() -> None:
    """Two seeds 2 points apart: the mean deficit of 9 points is beyond 1 in a single interval of 90%, not among two of 95%."""

    def scattered(nets: pd.DataFrame) -> pd.Series:
        return 0.8 + 0.02 * nets["net_seed"]

    rows = after(small_rows(NAME), [*ALIKE, accuracy(scattered, **OPEN, **SINGLE, loss="pred", schedule="sequential")])
    verdict = verdicts(NAME, rows)["suboptimal"]
    assert verdict.verdict == "inconclusive"
    assert verdict.estimate == pytest.approx(0.09)
    # the chain that is not locked has two depths: t with one degree of freedom at 1 − .05/4 is 1/tan(.05π/4)
    assert verdict.interval[1] == pytest.approx(0.09 + 0.01 / math.tan(0.05 * math.pi / 4), abs=1e-6)
    assert "rules_and_settings=2, chain=critical, depth=3, loss=pred" in verdict.evidence


@pytest.mark.parametrize("trust", ["edge", "chance"])
def test_a_rate_that_is_not_to_be_trusted_is_told_beside_its_verdict(trust: str) -> None:
    doubts = [
        *(put(quantity, 0.0) for quantity in ("at_edge", "at_chance")),
        put(f"at_{trust}", 1.0, **VANISHING, loss="sim"),
        put("at_edge", 1.0, **VANISHING, loss="backprop"),
    ]
    rows = after(small_rows(NAME), [*LIFTED, accuracy(0.1, **VANISHING, loss="sim"), *doubts])
    assert f"tuned={trust}, tuned_other=edge" in verdicts(NAME, rows)["avoids_locking_sim"].evidence


@pytest.fixture(scope="module")
def lab() -> Context:
    return context(NAME, "model.width=16", "grid.samples=8", "training.batch_size=16")


def model(lab: Context, chain: str = "critical", **changes: object) -> ModelConfig:
    weight_var, bias_var = claim.CHAINS[chain]
    return replace(lab.config.model, weight_var=weight_var, bias_var=bias_var, **{"depth": 6, **changes})


def applied(lab: Context, rule: Rule, seed: int = 0):
    shape = model(lab)
    return greedy_rules.applied(lab, rule, lab.network(shape, seed).double(), shape, seed)


def batch(lab: Context) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = lab.samples(lab.data.test, 8)
    return inputs.double(), labels


RULES = [Rule(loss, size) for loss in ("pred", "sim", "predsim") for size in (1, 2, 3)]


@pytest.mark.parametrize("rule", RULES)
def test_later_layers_have_no_influence_beyond_their_block(lab: Context, rule: Rule) -> None:
    here, there = applied(lab, rule), applied(lab, rule, seed=1)
    influence = {border: later_influence(here, there, border, *batch(lab)) for border in range(1, 6)}
    assert all((value == 0) == (border in here.borders) for border, value in influence.items()), influence


def test_without_the_cut_they_have(lab: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
    for rule in RULES:
        here, there = applied(lab, rule), applied(lab, rule, seed=1)
        assert min(later_influence(here, there, border, *batch(lab)) for border in range(1, 6)) > 1e-3


def test_under_backpropagation_they_have(lab: Context) -> None:
    here, there = (applied(lab, Rule("backprop", 6), seed) for seed in range(2))
    assert min(later_influence(here, there, border, *batch(lab)) for border in range(1, 6)) > 1e-3
    assert max(later_influence(here, here, border, *batch(lab)) for border in range(1, 6)) == 0


def test_the_gradient_of_a_layer_is_that_of_its_own_loss_written_out(lab: Context) -> None:
    blocks, (inputs, labels) = applied(lab, Rule("pred", 1)), batch(lab)
    found, state = gradients(blocks, inputs, labels), inputs
    for index, stage in enumerate(blocks.stages):
        features = stage(state)
        logits = blocks.heads[index].classifier(features)
        own = torch.autograd.grad(cross_entropy(logits, labels), list(stage.parameters()))
        torch.testing.assert_close(found[index], torch.cat([g.flatten() for g in own]), rtol=1e-10, atol=0)
        state = features.detach()


def test_separation_is_the_share_that_differs_between_images() -> None:
    states = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    common = torch.full((5,), 3.0, dtype=torch.float64)
    centred = states - states.mean(0)
    share = (centred**2).sum() / ((centred + common) ** 2).sum()
    assert claim.separation(centred + common) == pytest.approx(math.log(share) / 2, rel=1e-12)
    assert claim.separation(1e-9 * (centred + common)) == pytest.approx(math.log(share) / 2, rel=1e-9)
    assert claim.separation(centred) == pytest.approx(0, abs=1e-12)


def test_scale_is_the_root_mean_square() -> None:
    states = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert claim.scale(states) == pytest.approx(math.log(math.sqrt((states.numpy() ** 2).mean())), rel=1e-12)
    assert claim.scale(1e-9 * states) == pytest.approx(claim.scale(states) + math.log(1e-9), rel=1e-12)


def looked(lab: Context, chain: str, depth: int) -> pd.Series:
    """What passes through a wide chain, by quantity, the mean over seeds."""
    shape = model(lab, chain, depth=depth, width=128)
    rows = [row for seed in range(3) for row in claim._looks(lab, claim._network(lab, chain, shape, seed), {})]
    return pd.DataFrame(rows).groupby("quantity")["value"].mean()


@pytest.mark.parametrize(
    ("chain", "depth", "locked", "locked_forwards"),
    [
        ("critical", 4, False, False),
        ("critical", 10, False, False),
        ("vanishing", 10, True, True),
        ("collapsing", 10, True, True),
        ("latched", 10, True, False),
    ],
)
def test_the_chains_are_locked_as_their_names_say(lab: Context, chain: str, depth: int, locked: bool, locked_forwards: bool) -> None:
    found = looked(lab, chain, depth)
    assert (found["flow"] < claim.THOUSANDTH) == locked
    assert (found["scale"] + found["separation"] < claim.THOUSANDTH) == locked_forwards
    if chain in ("vanishing", "collapsing"):  # χ of the critical chain is reached like 1/l
        assert found["flow"] == pytest.approx((depth - 2) / 2 * math.log(chi("tanh", *claim.CHAINS[chain])), rel=0.1)
    # small, or alike
    assert (found["scale"] < claim.THOUSANDTH) == (chain == "vanishing")
    assert (found["separation"] < claim.THOUSANDTH) == (chain == "collapsing")


def test_a_chain_is_locked_forwards_by_the_absolute_difference_of_its_images() -> None:
    """A thousandth, be it the size of the states or what of it differs; and half the way each."""
    for scale, separation, expected in ((-6.8, 0.0, False), (0.0, -6.8, False), (-3.5, -3.5, True), (-7.0, 0.0, True), (0.0, -7.0, True)):
        rows = after(small_rows(NAME), [put("scale", scale), put("separation", separation)])
        nets = claim._with_labels(pick(rows, "test_accuracy", part="training"), rows)
        assert (nets["locked_forwards"] == expected).all()


def test_probes_see_what_the_layers_hold_whatever_its_size(lab: Context) -> None:
    """A layer of zeros tells nothing, and neither does what follows; a small one tells as much as a large one."""
    network = lab.network(model(lab), 0)
    before = claim.probes(lab, network)
    with torch.no_grad():
        network[4][0].weight.mul_(1e-6)
        network[4][0].bias.zero_()
    small = claim.probes(lab, network)
    assert small[:4] == before[:4]
    assert small[4] > 0.5
    with torch.no_grad():
        network[2][0].weight.zero_()
    common = lab.data.train.labels.bincount().argmax()
    nothing = float((lab.data.test.labels == common).double().mean())
    assert claim.probes(lab, network)[2:] == pytest.approx([nothing] * 3)


def steps_cost(lab: Context, rule: Rule) -> float:
    return greedy_rules.multiply_adds(lab, applied(lab, rule), all_blocks)


def test_multiply_adds_are_those_counted_by_hand(lab: Context) -> None:
    """Forwards, weights and inputs take n·d·d' each; no one asks for the gradient of a block's input."""
    pixels, width, classes, n = math.prod(lab.data.shape), 16, lab.data.classes, 16
    first, between, readout = n * pixels * width, n * width * width, n * width * classes
    assert steps_cost(lab, Rule("backprop", 6)) == 2 * first + 3 * (4 * between + readout)
    head = 3 * readout
    assert steps_cost(lab, Rule("pred", 1)) == 2 * (first + 4 * between + readout) + 5 * head
    matching = 3 * between + 3 * n * n * width + n * n * classes  # A H, S(A H) twice differentiated, S(Y)
    assert steps_cost(lab, Rule("sim", 1)) == 2 * (first + 4 * between + readout) + 5 * matching


def test_rules_have_equal_chains_and_their_heads_are_counted_apart() -> None:
    rows = small_rows(NAME)
    for depth, chains in pick(rows, "parameters").groupby("depth"):
        assert chains["value"].min() == chains["value"].max()
        heads = pick(rows, "auxiliary_parameters", depth=depth, schedule="simultaneous", hidden=0).set_index(["loss", "block"])["value"]
        hidden = depth - 1
        assert heads[("backprop", depth)] == 0
        assert heads[("pred", 1)] == hidden * (8 * 10 + 10)
        assert heads[("sim", 1)] == hidden * 8 * 8
        assert heads[("predsim", 1)] == heads[("pred", 1)] + heads[("sim", 1)]


def train(lab: Context, rule: Rule) -> tuple[int, list[torch.Tensor], list[torch.Tensor], greedy_rules.Trained]:
    """Steps done, a parameter of every stage before and after, and how it came out."""
    blocks = applied(lab, rule).float()
    before = [next(stage.parameters()).clone() for stage in blocks.stages]
    start = lab.tally["steps"]
    (outcome,) = greedy_rules.train_by(lab, rule, [Trainee(blocks, "rule", 0)])
    return lab.tally["steps"] - start, before, [next(stage.parameters()) for stage in blocks.stages], outcome


@pytest.mark.parametrize("rule", [Rule(loss, size, schedule="sequential") for loss in ("pred", "sim", "predsim") for size in (1, 2, 3)])
def test_sequential_training_gives_every_block_all_steps_and_trains_every_stage(lab: Context, rule: Rule) -> None:
    steps, before, after_it, outcome = train(lab, rule)
    blocks = math.ceil(5 / rule.block) + 1
    assert greedy_rules.turn_count(rule, 6) == blocks
    assert steps == blocks * lab.config.training.max_steps
    assert not any(torch.equal(old, new) for old, new in zip(before, after_it, strict=True))
    turns = [seconds for name, seconds in lab.seconds.items() if name.startswith(f"rule, {rule}, seed 0, turn ")]
    assert outcome.seconds == pytest.approx(sum(turns))
    assert min(turns) > 0


def test_a_turn_leaves_what_was_trained_before_it_as_it_is(lab: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage after all turns is the first stage after the first turn."""
    rule = Rule("pred", 1, schedule="sequential")
    *_, (first, *_), _ = train(lab, rule)
    monkeypatch.setattr(greedy_rules, "turns", lambda rule, blocks: [greedy_rules.OneBlock(0)])
    *_, (alone, *_), _ = train(lab, rule)
    assert torch.equal(first, alone)


def test_multiply_adds_of_sequential_training_are_those_of_all_its_turns(lab: Context) -> None:
    """Every turn: forwards through what is frozen, twice through the block (no gradient of its input), three times through its head."""
    pixels, width, classes, n = math.prod(lab.data.shape), 16, lab.data.classes, 16
    first, between, readout = n * pixels * width, n * width * width, n * width * classes
    rule = Rule("pred", 1, schedule="sequential")
    layers = [first, *[between] * 4]
    turns = [sum(layers[:index]) + 2 * layer + 3 * readout for index, layer in enumerate(layers)] + [sum(layers) + 2 * readout]
    counted = greedy_rules.costs(lab, applied(lab, rule), rule)["multiply_adds"]
    assert counted == lab.config.training.max_steps * sum(turns)


def test_the_time_of_every_training_is_kept_by_its_name_and_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    asked = small_context(NAME, "grid.train_depths=[4]", "grid.train_seeds=1")
    with caplog.at_level("INFO"):
        rows = claim.measure(asked)
    took = {name for name, seconds in asked.seconds.items() if seconds > 0}
    rules = pick(rows, "test_accuracy", part="training", chain="vanishing")[claim.RULE]
    names = {f"vanishing, depth 4, {' '.join(map(str, rule))}, seed 0, turn 1" for rule in rules.itertuples(index=False)}
    assert len(names) == len(rules) == 6
    assert names <= took
    (told,) = caplog.messages
    assert told.startswith("seconds of all steps of a training at depth 4, backpropagation = 1: backprop 4 0 simultaneous 1.00, pred 1 0 ")
    assert all(" ".join(map(str, rule)) in told for rule in rules.itertuples(index=False))


def test_times_are_told_in_units_of_backpropagation() -> None:
    seconds = {(4, Rule("backprop", 4)): [1.0, 3.0], (4, Rule("sim", 1)): [5.0], (9, Rule("backprop", 9)): [1.0]}
    four, nine = greedy_rules.paces(seconds)
    assert four.endswith("at depth 4, backpropagation = 1: backprop 4 0 simultaneous 1.00, sim 1 0 simultaneous 2.50")
    assert nine.endswith("at depth 9, backpropagation = 1: backprop 9 0 simultaneous 1.00")


def test_rules_that_are_trained() -> None:
    """Where backpropagation works, pred at every block size and both schedules, the rest at once; where locked, single layers and pred."""
    for scale, similarity in (("quick", [1]), ("paper", [1, 2, 3])):
        asked = config(NAME, f"scale={scale}")
        free, locked = (set(greedy_rules.trained(asked, 12, locked)) for locked in (False, True))
        pred = {Rule("pred", size) for size in (1, 2, 3)}
        single = {Rule("backprop", 12), Rule("sim", 1), Rule("predsim", 1), Rule("pred", 1, schedule="sequential")}
        assert locked == pred | single
        assert free == locked | {
            *(Rule(loss, size) for loss, size in itertools.product(("sim", "predsim"), similarity)),
            *(Rule("pred", 1, hidden) for hidden in (1, 2)),
            *(Rule("pred", size, schedule="sequential") for size in (1, 2, 3)),
        }


def test_every_rule_is_trained_at_the_rate_that_tells_most_training_images_right(monkeypatch: pytest.MonkeyPatch) -> None:
    used, train_all = {}, greedy_rules.train_all

    def recorded(lab: Context, trainees: Sequence[Trainee]) -> list[Outcome]:
        for each in trainees:
            if each.seed == 0:  # the network that rates are tried on is the next
                used[each.name.rpartition(", seed")[0]] = (float(each.config.optimizer == "adam"), each.config.lr)
        return train_all(lab, trainees)

    monkeypatch.setattr(greedy_rules, "train_all", recorded)
    rows = claim.measure(small_context(NAME, "grid.train_depths=[4]", "grid.train_seeds=1"))
    keys = ["chain", "depth", *claim.RULE]
    tried = pick(rows, "train_accuracy", part="rates")
    assert set(tried["net_seed"]) == {1}
    assert tried.groupby(keys).size().unique() == [2]
    assert set(tried["optimizer"]) == {"sgd", "adam"}
    best = tried.loc[tried.groupby(keys)["value"].idxmax()]
    expected = {
        f"{row.chain}, depth {row.depth}, {row.loss} {row.block} {row.hidden} {row.schedule}": (float(row.optimizer == "adam"), row.rate)
        for row in best.itertuples()
    }
    assert used == expected
    told = claim.chosen_rates(rows).reset_index()
    names = told.apply(lambda row: f"{row.chain}, depth {row.depth}, {row.loss} {row.block} {row.hidden} {row.schedule}", axis=1)
    assert dict(zip(names, zip(told["adam"], told["learning_rate"], strict=True), strict=True)) == expected


def test_at_quick_every_rule_is_tried_at_four_rates_of_each_optimiser() -> None:
    tried = greedy_rules.rates(config(NAME, "scale=quick"))
    rates = {optimizer: [rate.lr for rate in tried if rate.optimizer == optimizer] for optimizer in ("sgd", "adam")}
    assert rates["sgd"] == pytest.approx([0.01, 0.05, 0.25, 1.25])
    assert rates["adam"] == [0.0005, 0.0025, 0.0125, 0.0625]
    assert [rate.at_edge for rate in tried] == [True, False, False, True] * 2
    assert tried[-1].of(config(NAME).training) == replace(config(NAME).training, optimizer="adam", lr=0.0625)


@pytest.mark.parametrize(
    ("accuracies", "chosen", "trust"),
    [
        ((0.3, 0.9, 0.5), 1, "inner"),
        ((0.9, 0.3, 0.5), 0, "edge"),
        ((0.3, 0.5, 0.9), 2, "edge"),
        ((0.9, 0.9, 0.9), 0, "edge"),
        ((0.11, 0.19, 0.12), 1, "chance"),
        ((0.19, 0.12, 0.12), 0, "chance"),
    ],
)
def test_how_far_a_rate_is_to_be_trusted(accuracies: tuple[float, ...], chosen: int, trust: str) -> None:
    """Of rates that tie the first is taken; with ten classes, guessing tells a tenth right."""
    tried = [greedy_rules.Rate("sgd", lr, at_edge) for lr, at_edge in ((0.1, True), (1.0, False), (10.0, True))]
    found = dict(zip(tried, accuracies, strict=True))
    assert greedy_rules.best(found) == tried[chosen]
    told = greedy_rules.told(found, 10)
    assert (told["learning_rate"], told["adam"], told["at_edge"]) == (tried[chosen].lr, 0.0, float(tried[chosen].at_edge))
    rows = after(small_rows(NAME), [put(quantity, value) for quantity, value in told.items()])
    assert set(claim.chosen_rates(rows)["tuned"]) == {trust}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid.train_depths=[2,4]", "grid.train_depths: 3 to 32"),
        ("grid.train_depths=[4,33]", "grid.train_depths: 3 to 32"),
        ("grid.block_sizes=[2,3]", "grid.block_sizes: 1 among them"),
        ("grid.block_sizes=[1,4]", "grid.block_sizes: less than the smallest"),
        ("grid.samples=101", "grid.samples: at most 100"),
        ("training.max_steps=1", "training.max_steps: at least 2"),
        ("grid.similarity_blocks=[1,2]", "grid.similarity_blocks: of grid.block_sizes"),
    ],
)
def test_impossible_grids_are_refused(override: str, message: str) -> None:
    refused = context(NAME, override)
    with pytest.raises(UserError, match=message):
        claim.check(refused.config, refused.data)
