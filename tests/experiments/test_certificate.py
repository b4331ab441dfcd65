"""certificate: verdicts follow the rows; K_back, its enclosures and its rivals against naive references and closed forms."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments import certificate as claim
from src import cost, mean_field
from src.certificate import certify
from src.errors import UserError
from src.experiment import Context
from src.prediction import association
from src.rows import pick
from src.statistics import Estimate
from tests.experiments.measured import Change, after, config, context, put, small_context, small_rows, verdicts

NAME = "certificate"
SMALL = (
    "grid.seeds=8",
    "grid.activations=[tanh,relu]",
    "grid.depths=[4]",
    "grid.gains=[1.0]",
    "grid.widths=[4,12]",
    "grid.calibration=64",
    "training.max_steps=2",
    "training.batch_size=64",
    "data.train_size=128",
    "data.test_size=100",
)


def rising(rows: pd.DataFrame) -> np.ndarray:
    """1, 2, … within each kind, in the order in which the networks stand: the same order for every quantity."""
    return rows.groupby("kind").cumcount().to_numpy() + 1.0


def falling(rows: pd.DataFrame) -> np.ndarray:
    return -rising(rows)


def read(reading: str, values) -> Change:
    """Give a reading these values: what the quantity must be for it."""
    quantity, taken = claim.READINGS[reading]
    of = "median" if quantity in ("log_attenuation", "rank", "conditioning") else "batch"
    # below zero, more is nearer to zero
    below = taken is claim._nearer_zero
    end = {"end": "value"} if of == "median" else {}
    return put(quantity, lambda rows: (-1 if taken is claim._less else 1) * (values(rows) - below * (len(rows) + 1)), of=of, **end)


def trained(values=rising) -> Change:
    return put("accuracy", values, of="batch")


def by_kind(rows: pd.DataFrame) -> np.ndarray:
    """Rising within the kinds, and falling within the plain one."""
    return np.where(rows["kind"] == "plain", -1, 1) * rising(rows)


def by_width(rows: pd.DataFrame) -> np.ndarray:
    """Rising with the width, and within one in an order of its own."""
    return 100.0 * rows["width"].to_numpy() + np.tile([1.0, 3.0, 0.0, 2.0], len(rows))[: len(rows)]


def against_width(rows: pd.DataFrame) -> np.ndarray:
    return -by_width(rows)


BOTH = (rising, falling)
ALL = [trained(), *(read(reading, rising) for reading in claim.READINGS)]
LATER = [read("attenuation", rising), read("gradient_ratio", rising), read("chi", rising)]
CRITICAL = {activation: mean_field.critical_weight_var(activation, 0.0) for activation in ("tanh", "relu", "sigmoid")}
SAMPLE = {"kind": "plain", "sample": 1}

# criterion, what is changed in the measured rows, verdict
CASES = [
    *((f"{reading}_predicts", [trained(), read(reading, rising)], "holds") for reading in claim.READINGS),
    *((f"{reading}_predicts", [trained(falling), read(reading, rising)], "refuted") for reading in claim.READINGS),
    ("rank_predicts", [trained(), put("rank", 10.0)], "refuted"),
    *((f"{reading}_predicts_nothing", [trained(), put(claim.READINGS[reading][0], 1.0)], "holds") for reading in claim.STATED),
    *((f"{reading}_predicts_nothing", [trained(order), read(reading, rising)], "refuted") for reading in claim.STATED for order in BOTH),
    ("width_predicts", [put("accuracy", lambda rows: rows["width"] + rising(rows) / 100, of="batch")], "holds"),
    ("width_predicts", [put("accuracy", lambda rows: -rows["width"] + rising(rows) / 100, of="batch")], "refuted"),
    *((f"{reading}_given_width", [trained(), read(reading, rising)], "holds") for reading in claim.GIVEN_WIDTH),
    *((f"{reading}_given_width", [trained(falling), read(reading, rising)], "refuted") for reading in claim.GIVEN_WIDTH),
    # a reading that is the width in disguise says nothing beyond it
    ("rank_given_width", [trained(by_width), put("rank", lambda rows: rows["width"])], "refuted"),
    ("rank_predicts", [trained(by_width), put("rank", lambda rows: rows["width"])], "holds"),
    ("better_than_width", [trained(by_width), *(read(entry, falling) for entry in claim.ENTRIES)], "refuted"),
    ("better_than_width", [trained(against_width), *(read(entry, against_width) for entry in claim.ENTRIES)], "holds"),
    ("combination_given_width", ALL, "holds"),
    ("combination_given_width", [*ALL, trained(by_kind)], "refuted"),
    ("better_than_depth", [*ALL, read("path_depth", falling)], "holds"),
    ("better_than_depth", [*ALL, read("skip_depth", falling)], "refuted"),
    ("gradient_better", [trained(), *LATER[1:], read("attenuation", falling)], "holds"),
    ("gradient_better", [*ALL, read("chi", falling)], "refuted"),
    ("combination", ALL, "holds"),
    ("combination", [*ALL, trained(by_kind)], "refuted"),
    ("wider_combination", ALL, "holds"),
    ("wider_combination", [*ALL, trained(by_kind)], "refuted"),
    ("gradient_product", [put("slack_as_stated", 0.0)], "holds"),
    ("gradient_product", [put("slack_as_stated", 1.0), put("slack_as_stated", -0.1, **SAMPLE)], "refuted"),
    ("product_bound", [], "holds"),
    ("product_bound", [put("slack", -0.1, **SAMPLE)], "refuted"),
    ("enclosures", [], "holds"),
    ("enclosures", [put("enclosure_error", 1.5, kind="plain")], "refuted"),
]


@pytest.fixture(scope="module")
def lab() -> Context:
    return context(NAME, *SMALL)


def network(lab: Context, **changes: object) -> torch.nn.Sequential:
    model = replace(lab.config.model, **{"width": 12, "depth": 4, "activation": "tanh", **changes})
    return lab.network(model, 0).double()


@pytest.mark.parametrize(("scale", "size"), [("smoke", 3 * 20), ("quick", 3 * 48), ("paper", 4 * 100)])
def test_the_zoo_is_drawn_from_all_combinations_and_varies_every_axis_in_every_family(scale: str, size: int) -> None:
    asked = config(NAME, f"scale={scale}")
    models, grid = claim.zoo(asked), asked.grid
    assert len(models) == len(set(models)) == size
    assert models == claim.zoo(config(NAME, f"scale={scale}", "seed=1"))
    kinds = Counter(map(claim.kind, models))
    assert kinds == dict.fromkeys([*claim.KINDS.values(), *[claim.CONVOLUTIONAL] * bool(grid.conv_widths)], grid.seeds)
    drawn = {}
    for kind in claim.KINDS.values():
        of_kind = [model for model in models if claim.kind(model) == kind]
        axes = {"depth": grid.depths, "width": grid.widths, "activation": grid.activations, "norm": ("none", "batch", "layer")}
        assert all({getattr(model, axis) for model in of_kind} == set(values) for axis, values in axes.items())
        assert {round(model.weight_var / CRITICAL[model.activation], 6) for model in of_kind} == set(grid.gains)
        drawn[kind] = [(m.depth, m.width, m.activation, m.norm, m.weight_var) for m in of_kind]
    # each family has draws of its own
    assert len(set(map(tuple, drawn.values()))) == 3


def test_a_gain_and_a_normalisation_are_drawn_independently() -> None:
    """Within a random zoo no axis stands for another: the rank correlations of depth, width and gain are small."""
    models = claim.zoo(config(NAME, "scale=paper", "grid.conv_widths=[]"))
    norms = pd.get_dummies([model.norm for model in models], dtype=float)
    axes = norms.assign(depth=[m.depth for m in models], gain=[m.weight_var / CRITICAL[m.activation] for m in models])
    correlations = axes[["depth", "gain"]].apply(lambda axis: [association(axis, axes[norm]).value for norm in norms], result_type="expand")
    assert correlations.abs().max(axis=None) < 0.15
    assert abs(association(axes["depth"], axes["gain"]).value) < 0.15


def test_every_network_has_draws_of_its_own_and_the_same_budget(lab: Context) -> None:
    assert pick(small_rows(NAME), "accuracy")["net_seed"].tolist() == list(range(24))
    works = claim.plan(lab)
    assert {(work.networks, work.steps) for work in works} == {(1, 2)}


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "linear"])
def test_gain_one_is_critical(activation: str) -> None:
    chosen = (f"grid.activations=[{activation}]", "grid.gains=[0.5,1.0,2.0]", "model.bias_var=0.05")
    models = claim.zoo(config(NAME, *chosen, "grid.seeds=20"))
    variances = sorted({model.weight_var for model in models})
    below, at, above = (mean_field.chi(activation, variance, 0.05) for variance in variances)
    assert below < 0.99
    assert at == pytest.approx(1, abs=1e-6)
    assert above > 1.01


def naive_entries(net: torch.nn.Sequential, x: torch.Tensor) -> tuple[float, int, float]:
    """Σ ln ‖J‖, min rank and max cond of one sample, a Jacobian entry at a time by NumPy."""
    log, ranks, conds = 0.0, [], []
    for stage in net:
        J = torch.autograd.functional.jacobian(stage, x).reshape(stage(x).numel(), x.numel()).numpy()
        log += math.log(np.linalg.norm(J, 2))
        ranks.append(np.linalg.matrix_rank(J))
        conds.append(np.linalg.cond(J) if ranks[-1] == min(J.shape) else math.inf)
        x = stage(x).detach()
    return log, min(ranks), max(conds)


@pytest.mark.parametrize("changes", [{}, {"activation": "relu"}, {"width": 4}, {"family": "residual_mlp", "skip": "preactivation"}])
def test_every_entry_is_the_naive_one_inside_its_enclosure(lab: Context, changes: dict) -> None:
    net = network(lab, **changes)
    inputs, targets = lab.samples(lab.data.test, 3)
    found = claim.entries(certify(net, inputs, targets))
    assert ((found["lo"] <= found["value"]) & (found["value"] <= found["hi"])).all()
    for sample in range(3):
        entry = found[found["sample"] == sample].set_index("quantity")
        naive = naive_entries(net.eval(), inputs[sample : sample + 1].double())
        assert tuple(entry.loc[["log_attenuation", "rank", "conditioning"], "value"]) == pytest.approx(naive, rel=1e-9)
        width = entry["hi"] - entry["lo"]
        assert 0 < width["log_attenuation"] < 1e-11
    if changes.get("activation") == "relu":
        assert (found[found["quantity"] == "conditioning"][["value", "hi"]] == math.inf).all(axis=None)


def test_an_orthogonal_linear_net_has_closed_forms(lab: Context) -> None:
    """Every singular value is a: Σ ln ‖J‖ = L ln a, and both ‖g_1‖/‖g_L‖ and χ make (L−1) ln a; cond is 1, rank the readout's."""
    net = network(lab, activation="linear", init="orthogonal", weight_var=0.25, depth=6)
    certificate = certify(net, *lab.samples(lab.data.test, 12))
    batch, entry = claim.rivals(certificate), claim.entries(certificate).groupby("quantity")["value"].median()
    assert entry.to_dict() == pytest.approx({"log_attenuation": 6 * math.log(0.5), "rank": 10, "conditioning": 1}, rel=1e-5)
    assert (batch["gradient_ratio"], batch["chi"]) == pytest.approx((5 * math.log(0.5), 5 * math.log(0.5)), rel=1e-5)
    assert (certificate.skip_depth, certificate.depth) == (5, 5)
    assert batch["severity"] == pytest.approx(1, abs=1e-12)  # rank ≤ classes − 1 behind every layer of a linear net
    assert batch["severity_nonzero"] < 0.9999


def test_the_gradient_ratio_is_that_of_the_error_signals(lab: Context) -> None:
    net = network(lab)
    signals = lab.error_signals(net)
    inputs, targets = lab.samples(lab.data.test, lab.config.grid.samples)
    measured = claim.rivals(certify(net, inputs, targets))
    assert measured["gradient_ratio"] == pytest.approx(signals[1] - signals[4], rel=1e-12)


def test_min_rank_never_exceeds_the_classes_and_severity_is_one_at_the_logits(lab: Context) -> None:
    assert pick(small_rows(NAME), "rank")["value"].max() <= lab.data.classes
    certificate = certify(network(lab, width=20), *lab.samples(lab.data.test, 12))
    assert certificate.severity["lambda"].iloc[-1] == pytest.approx(1, abs=1e-12)


def test_refined_singular_values_are_nearer_than_float64() -> None:
    """J = [[3, 0], [4, 5]] has σ² = 45 and 5."""
    refined = claim.refined_singular_values(np.array([[3.0, 0.0], [4.0, 5.0]]))
    exact = np.sqrt(np.array([45, 5], dtype=np.longdouble))
    np.testing.assert_allclose(refined, exact, rtol=4 * float(np.finfo(np.longdouble).eps))


def test_an_enclosure_that_is_too_narrow_is_found_out(lab: Context) -> None:
    net = network(lab)
    inputs, targets = lab.samples(lab.data.test, 2)
    certificate = certify(net, inputs, targets)
    assert 0 < claim.enclosure_error(net, inputs, certificate) < 1
    wrong = tuple(values * (1 + 1e-11) for values in certificate.singular_values)
    assert claim.enclosure_error(net, inputs, replace(certificate, singular_values=wrong)) > 1


def test_the_batch_has_the_median_and_the_extremes_of_its_samples() -> None:
    rows = pick(small_rows(NAME), "log_attenuation", net_seed=3)
    samples = pick(rows, "log_attenuation", of="sample").pivot(index="sample", columns="end", values="value")
    assert samples.shape == (4, 3)
    assert ((samples["lo"] <= samples["value"]) & (samples["value"] <= samples["hi"])).all()
    for of in ("median", "min", "max"):
        batch = rows[rows["of"] == of].set_index("end")["value"]
        assert batch.to_dict() == samples.agg(of).to_dict()


def test_a_training_that_diverges_counts_as_chance() -> None:
    lost = context(NAME, *SMALL, "grid.activations=[relu]", "grid.widths=[12]", "training.lr=1e30")
    rows = claim.measure(lost)
    diverged = pick(rows, "diverged")["value"].to_numpy() == 1
    assert diverged.any()
    assert (pick(rows, "accuracy")["value"].to_numpy()[diverged] == 1 / lost.data.classes).all()


def test_convolutional_nets_join_the_zoo() -> None:
    """The path of scale=paper: four convolutional shapes, certified and trained like the others."""
    sizes = ("grid.activations=[relu]", "grid.widths=[8]", "grid.conv_widths=[1]", "grid.samples=2", "training.batch_size=16")
    lab = context(NAME, *SMALL, *sizes)
    rows = claim.measure(lab)
    nets = claim.networks(rows)
    assert nets.groupby("kind").size().to_dict() == {**dict.fromkeys(claim.KINDS.values(), 3), claim.CONVOLUTIONAL: 8}
    assert verdicts(NAME, rows)["combination"].evidence.count("4 cells") == 1


def test_a_reading_that_is_the_same_for_all_predicts_nothing() -> None:
    nets = claim.networks(put("skip_depth", 1.0)(small_rows(NAME)))
    assert association(nets["skip_depth"], nets["accuracy"]).value == 0
    found = association(nets["gradient_ratio"], nets["accuracy"])
    assert found == association(-pick_batch("gradient_ratio").abs(), pick_batch("accuracy"))


def test_what_an_interval_says() -> None:
    intervals = ((0.3, 0.9), (-0.1, 0.3), (-0.9, -0.3), (0.0, 0.0), (0.01, 0.2), (0.01, 0.4), (-0.4, 0.1), (-0.9, 0.9))
    said = [claim.told(Estimate(0.1, lo, hi, 9, ""), 0.3) for lo, hi in intervals]
    assert said == ["predicts", "predicts nothing", "predicts the reverse", *["predicts nothing"] * 2, *["undecided"] * 3]
    criteria = config(NAME).criteria.items()
    assert {form.at_least for name, form in criteria if name.endswith(("_predicts", "_given_width"))} == {0.3}
    assert {(form.at_least, form.at_most) for name, form in criteria if name.endswith("nothing")} == {(-0.3, 0.3)}
    evidence = verdicts(NAME, after(small_rows(NAME), [trained(), put("rank", 10.0)]))["rank_predicts"].evidence
    assert "told=predicts nothing" in evidence


def test_every_reading_says_how_it_is_known() -> None:
    known = small_rows(NAME).groupby("quantity")["known"].unique()
    words = {reading: list(known[quantity]) for reading, (quantity, _) in claim.READINGS.items()}
    assert all(words[name] == ["enclosed"] for name in ("attenuation", "rank", "conditioning"))
    assert words["skip_depth"] == words["path_depth"] == ["exact"]
    assert all(words[name] == ["estimated"] for name in ("severity", "chi", "lock_condition"))


def pick_batch(quantity: str) -> pd.Series:
    """A quantity of every network, in the order of the table."""
    return pick(small_rows(NAME), quantity, of="batch").sort_values(claim.NETWORK)["value"].reset_index(drop=True)


@pytest.mark.parametrize(
    ("grid", "rule"),
    [
        ("grid.depths=[4,5]", "grid.depths: 2n[+]2"),
        ("grid.gains=[0.0,1.0]", "grid.gains: above 0"),
        ("grid.widths=[1,8]", "grid.widths: at least 2"),
        ("grid.samples=101", "grid.samples: 2 to 100"),
        ("grid.calibration=500", "grid.calibration: 2 to 128"),
    ],
)
def test_grids_that_cannot_be_measured_are_refused(grid: str, rule: str) -> None:
    lab = small_context(NAME, grid)
    with pytest.raises(UserError, match=rule):
        claim.check(lab.config, lab.data)


@pytest.mark.parametrize("method", ["factorised", "matrix_free"])
def test_large_stages_that_are_not_decomposed_count_by_what_is_known_of_them(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without all singular values Σσ² of a layer that is matrix-free isn't known, and χ with it; a factorised one tells it."""
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(2))
    net, inputs, targets = nn.Sequential(first, second, nn.Linear(24, 10)), torch.randn(4, 24), torch.arange(4)
    known = claim.rivals(certify(net, inputs, targets))
    monkeypatch.setattr(cost, "FACTORISED", 1e4)
    if method == "matrix_free":
        monkeypatch.setattr(cost, "BUDGET", 4.5e5)
    certificate = certify(net, inputs, targets)
    assert [*certificate.layers["method"][:3]] == [method, method, "exact"]
    assert claim.enclosure_error(net, inputs, certificate) < 1
    found = claim.rivals(certificate)
    assert found["relative_rank"] == known["relative_rank"] == 10 / 10
    assert found["chi"] == pytest.approx(known["chi"] if method == "factorised" else math.nan, rel=1e-9, nan_ok=True)
