"""batchnorm_stabilization: verdicts follow the rows; growth, gain invariance and norms are measured against naive references."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments import batchnorm_stabilization as claim
from src.experiment import Context
from src.jacobian.normalised import batch_norm_growth, normalisation_jacobian
from src.locking import error_signals, growth
from src.models.start import neutral_readout
from src.training.objectives import ScaledSteps
from src.trainings import Trainee, train_all
from tests.experiments.measured import Change, context, put, small_context, small_rows, swap, verdicts

NAME = "batchnorm_stabilization"
SMALL = (
    "model.width=32",
    "grid.seeds=2",
    "grid.train_seeds=2",
    "grid.samples=4",
    "grid.batch_sizes=[8,256]",
    "grid.depths=[6,8]",
    "grid.rate_depth=8",
    "grid.train_depths=[4,6]",
    "grid.layer_norm_depths=[6]",
    "grid.depth_steps=2",
    "training.batch_size=32",
    "training.max_steps=2",
    "data.train_size=256",
    "data.test_size=100",
)
BATCH = {"norm": "batch"}


def depths(steps: int = 2000, **plain: float) -> pd.DataFrame:
    """Trainings at depths 8, 32 and 64 of a control at .9 and plain BN chains at the accuracy given, .9 unless given."""
    lines = []
    for depth, seed, (norm, skip) in product((8, 32, 64), range(3), (("batch", "none"), ("batch", "preactivation"), ("layer", "none"))):
        accuracy = plain.get(f"at{depth}", 0.9) if (norm, skip) == ("batch", "none") else 0.9
        at = {"norm": norm, "skip": skip, "depth": depth, "batch": 32.0, "steps": steps, "chance": 0.1, "net_seed": seed}
        lines.append({"quantity": "train_accuracy", "value": accuracy + 0.001 * seed, **at})
    return pd.DataFrame(lines)


def predicted(nets: pd.DataFrame) -> np.ndarray:
    return np.log([batch_norm_growth(batch) for batch in nets["batch"]])


def repair(batch: float = 0.8, none: float = 0.1, scaled_batch: float = 0.8, scaled_none: float = 0.1) -> Change:
    """Short trainings: .8 at σw² = 2; elsewhere as given, by norm and whether the learning rate goes with σw²."""
    away = {("batch", "equal"): batch, ("none", "equal"): none, ("batch", "scaled"): scaled_batch, ("none", "scaled"): scaled_none}
    lines = [
        {"quantity": "test_accuracy", "value": value + 0.001 * seed, "weight_var": var, "norm": norm, "hidden_lr": lr, "net_seed": seed}
        for (norm, lr), accuracy in away.items()
        for var, value in ((2.0, 0.8), (0.02, accuracy), (200.0, accuracy))
        for seed in range(3)
        if lr == "equal" or var != 2
    ]
    return swap("repair", pd.DataFrame(lines))


def ranges(shallow: float, deep: float) -> list[Change]:
    """Ranges of ln ‖g_l‖ along training, in units of the first, at depths 8 and 56."""

    def written(rows: pd.DataFrame) -> pd.DataFrame:
        depth = rows["depth"].where((rows["part"] != "along") | (rows["depth"] != 6), 56)
        return rows.assign(depth=depth)

    def after_a_step(factor: float):
        return lambda rows: 10 * np.where(rows["step"] > 0, factor + 0.001 * rows["net_seed"], 1)

    values = (put("range", after_a_step(factor), part="along", norm="batch", depth=depth) for depth, factor in ((8, shallow), (56, deep)))
    return [written, *values]


TWO, THREE = {**BATCH, "together": 2}, {**BATCH, "together": 3, "eps": 1e-5, "net_seed": 1}
LINEAR_IN_EPS = put("operator_norm", lambda rows: rows["eps"], **TWO)
UNSCALED = [put("step_factor", lambda rows: rows["gain"] ** -2.0)]

# criterion, what is changed in the measured rows, verdict
CASES = [
    ("norm_near_one", [put("mean_norm", 1.1)], "holds"),
    ("norm_near_one", [put("mean_norm", 1.1), put("mean_norm", 5.0, **BATCH, weight_var=0.2)], "refuted"),
    ("norm_near_one", [put("mean_norm", 1.1), put("mean_norm", 3.0, **BATCH, part="along", step=2)], "refuted"),
    ("norm_near_one", [put("mean_norm", 1.1), put("mean_norm", 3.0, norm="layer")], "holds"),
    ("stage_norm_near_one", [put("stage_norm", 1.1)], "holds"),
    ("stage_norm_near_one", [put("stage_norm", 1.1), put("stage_norm", 0.3, **BATCH, step=2)], "refuted"),
    ("consistent_flow", [put("flow", 0.5, part="flow")], "holds"),
    ("consistent_flow", [put("flow", 0.5, part="flow"), put("flow", -3.0, part="flow", depth=8)], "refuted"),
    ("flow_along_training", [put("flow", -1.0, part="along")], "holds"),
    ("flow_along_training", [put("flow", -1.0, part="along"), put("flow", 3.0, part="along", step=2)], "refuted"),
    ("norm_formula", [], "holds_if"),
    ("norm_formula", [put("norm_error", 1e-8, **THREE)], "refuted"),
    ("closed_form", [], "holds"),
    ("closed_form", [put("form_error", 1e-8, **THREE)], "refuted"),
    ("null_directions", [], "holds"),
    ("null_directions", [put("spectrum_error", 1e-8, **THREE)], "refuted"),
    ("null_directions", [put("direction_error", 1e-8, **THREE)], "refuted"),
    ("two_samples", [LINEAR_IN_EPS], "holds_if"),
    ("two_samples", [put("operator_norm", lambda rows: rows["eps"] ** 0.5, **TWO)], "refuted"),
    ("gain_invariance", [], "holds_if"),
    ("gain_invariance", [put("output_change", 0.0), put("gradient_change", 0.0)], "holds"),
    ("gain_invariance", [put("gradient_change", 0.02, net_seed=1, eps=1e-30, gain=float(claim.GAINS[0]))], "refuted"),
    ("relative_step", [], "holds_if"),
    ("relative_step", UNSCALED, "holds"),
    ("relative_step", [put("step_factor", 1.0)], "refuted"),
    ("gain_repaired", [repair()], "holds_if"),
    ("gain_repaired", [repair(none=0.8)], "holds"),
    ("gain_repaired", [repair(batch=0.3)], "refuted"),
    ("gain_repaired", [repair(batch=0.3, none=0.8)], "refuted"),
    ("gain_is_a_step_size", [repair(batch=0.3)], "holds_if"),
    ("gain_is_a_step_size", [repair(batch=0.3, scaled_batch=0.3)], "refuted"),
    ("gain_is_a_step_size", [repair(batch=0.3, scaled_batch=0.9)], "refuted"),
    ("gain_is_a_step_size", [repair(none=0.8, scaled_none=0.8)], "holds"),
    # as well without the step scaled, or without BN
    ("gain_is_a_step_size", [repair()], "inconclusive"),
    ("gain_is_a_step_size", [repair(batch=0.3, scaled_none=0.8)], "inconclusive"),
    ("large_batch_rate", [put("rate", math.log(1.467))], "holds"),
    ("large_batch_rate", [put("rate", predicted, **BATCH, part="rate")], "holds_if"),
    ("large_batch_rate", [put("rate", 0.0, **BATCH, part="rate")], "refuted"),
    ("finite_batch_rate", [put("rate", predicted, **BATCH, part="rate")], "holds"),
    ("finite_batch_rate", [put("rate", math.log(1.467), **BATCH, part="rate")], "refuted"),
    ("layer_norm_rate", [put("rate", predicted, **BATCH, part="rate"), put("rate", 0.0, norm="layer", part="rate")], "holds_if"),
    ("layer_norm_rate", [put("rate", 0.0, part="rate")], "holds"),
    ("layer_norm_rate", [put("rate", 0.2, norm="layer", part="rate")], "refuted"),
    ("untrainable_depth", [swap("depth", depths(at64=0.1))], "holds_if"),
    ("untrainable_depth", [swap("depth", depths(at8=0.1, at32=0.1, at64=0.1))], "holds"),
    ("untrainable_depth", [swap("depth", depths())], "refuted"),
    ("untrainable_depth", [swap("depth", depths(at64=0.1, steps=100))], "inconclusive"),
    ("trainable_up_to_there", [swap("depth", depths(at64=0.1))], "holds_if"),
    ("trainable_up_to_there", [swap("depth", depths())], "holds"),
    ("trainable_up_to_there", [swap("depth", depths(at32=0.1, at64=0.1))], "refuted"),
    ("trainable_up_to_there", [swap("depth", depths(at32=0.1, at64=0.1, steps=100))], "inconclusive"),
    ("settles_in_training", ranges(0.4, 0.4), "holds_if"),
    ("settles_in_training", ranges(0.4, 0.6), "refuted"),
    ("deep_settles_in_training", ranges(0.6, 0.4), "holds_if"),
    ("deep_settles_in_training", ranges(0.4, 0.6), "refuted"),
    # shallow nets settle too
    ("deep_settles_in_training", ranges(0.4, 0.4), "inconclusive"),
    ("rate_falls_in_training", [put("rate", lambda rows: -rows["step"], part="along")], "holds"),
    ("rate_falls_in_training", [put("rate", lambda rows: rows["step"], part="along")], "refuted"),
]


def test_exact_statements_come_out_on_real_rows() -> None:
    found = {name: verdict.verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items()}
    assert (found["norm_formula"], found["closed_form"], found["null_directions"]) == ("holds_if", "holds", "holds")
    assert (found["two_samples"], found["gain_invariance"], found["relative_step"]) == ("holds_if", "holds_if", "holds_if")


def test_accuracy_counts_only_where_the_control_trains() -> None:
    rows = depths(at64=0.1).assign(part="depth")
    failing = (rows["skip"] == "preactivation") & (rows["depth"] == 64)
    assert list(claim.trained_like_control(rows)["depth"]) == [8, 32, 64]
    assert list(claim.trained_like_control(rows.assign(value=rows["value"].mask(failing, 0.1)))["depth"]) == [8, 32]


@pytest.fixture(scope="module")
def lab() -> Context:
    return context(NAME, "model.width=256", "grid.rate_depth=14", "grid.seeds=5")


def growths(lab: Context, batch: int, **changes: object) -> list[float]:
    """Growth of ‖g‖² a layer in every net of a kind."""
    model = claim._net(lab.config, depth=lab.config.grid.rate_depth, width=lab.config.model.width, **changes)
    nets = (lab.network(model, seed) for seed in range(lab.config.grid.seeds))
    return [math.exp(claim.look(net, claim._batch(lab, batch))["rate"]) for net in nets]


def test_growth_at_large_batch_is_the_known_one(lab: Context) -> None:
    growth = np.mean(growths(lab, 256))
    assert growth == pytest.approx(math.pi / (math.pi - 1), rel=0.03)
    assert growth != pytest.approx(batch_norm_growth(16), rel=0.03)


def test_growth_at_a_small_batch_is_larger(lab: Context) -> None:
    growth = np.mean(growths(lab, 16))
    assert growth == pytest.approx(batch_norm_growth(16), rel=0.04)
    assert growth != pytest.approx(math.pi / (math.pi - 1), rel=0.04)


def test_layer_normalisation_has_no_growth(lab: Context) -> None:
    assert np.mean(growths(lab, 64, norm="layer")) == pytest.approx(1, rel=0.04)
    # it is the normalisation that keeps it so: without one σw² = 1 halves ‖g‖² a layer
    unnormalised = claim._net(lab.config, depth=14, width=256, norm="none", weight_var=1.0)
    signals = error_signals(lab.network(unnormalised, 0), *claim._batch(lab, 64))
    assert math.exp(growth(signals)) == pytest.approx(0.5, rel=0.1)


def trained(lab: Context, weight_var: float, factor: float) -> torch.Tensor:
    """The outputs of a BN chain after a few steps, those of its hidden weights `factor` times as large."""
    network = lab.network(claim._net(lab.config, depth=5, width=32, weight_var=weight_var), 0)
    neutral_readout(network, weight_var)
    train_all(lab, [Trainee(network, "trained", 0, ScaledSteps(factor), config=replace(lab.config.training, max_steps=8, batch_size=32))])
    with torch.no_grad():
        return network.train()(lab.samples(lab.data.test, 50)[0])


def test_with_its_step_scaled_a_net_of_any_gain_behind_batchnorm_trains_as_one(lab: Context) -> None:
    critical, scaled, unscaled = trained(lab, 2.0, 1.0), trained(lab, 200.0, 100.0), trained(lab, 200.0, 1.0)
    torch.testing.assert_close(scaled, critical, rtol=0, atol=0.01 * float(critical.abs().max()))
    assert float((unscaled - critical).norm() / critical.norm()) > 0.1


def test_two_samples_and_pytorchs_refusal_of_no_epsilon() -> None:
    gains, values = torch.ones(1, dtype=torch.float64), torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    for eps in (1e-2, 1e-6, 1e-10):
        J = normalisation_jacobian(nn.BatchNorm1d(1, eps, dtype=gains.dtype), values)[0, :, 0]
        # J = ε/σ³ (I − ½11ᵀ), σ² = 1 + ε
        assert float(torch.linalg.matrix_norm(J, 2)) == pytest.approx(eps / (1 + eps) ** 1.5, rel=1e-4)
    with pytest.raises((ValueError, RuntimeError), match="eps"):
        nn.BatchNorm1d(1, 0.0, dtype=gains.dtype)(values.T)


def test_the_control_has_as_many_parameters(lab: Context) -> None:
    counts: dict[int, set[int]] = {}
    for _, model in claim._deep(lab):
        network = lab.network(model, 0)
        counts.setdefault(model.depth, set()).add(sum(parameter.numel() for parameter in network.parameters()))
        assert any(isinstance(module, nn.BatchNorm1d | nn.LayerNorm) for module in network.modules())
    assert all(len(found) == 1 for found in counts.values())


def test_another_batch_size_leaves_the_other_rows_as_they_were() -> None:
    more = claim.measure(small_context(NAME, "grid.batch_sizes=[8,32,256]"))
    added = (more["part"] == "rate") & (more["batch"] == 32)
    assert added.any()
    pd.testing.assert_frame_equal(more[~added].reset_index(drop=True), small_rows(NAME), check_exact=True)
