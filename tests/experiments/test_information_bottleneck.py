"""information_bottleneck: ranks and energies against naive gradients and closed forms, what a code and a filter let pass, its verdicts."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from experiments import information_bottleneck as claim
from src.errors import UserError
from src.experiment import Context
from src.models.bottleneck import dense_layer
from src.models.layers import Layers
from src.rows import pick
from src.trainings import Trainee, train_all
from tests.experiments.measured import after, config, context, digits, put, small_context, small_rows, verdicts
from tests.jacobian import naive

NAME = "information_bottleneck"
SMALL = (
    "model.width=16",
    "grid.seeds=2",
    "grid.train_seeds=2",
    "grid.samples=70",
    "grid.code_widths=[1,4,12,16]",
    "training.max_steps=2",
    "data.train_size=256",
    "data.test_size=100",
)

RELU, TANH = {"activation": "relu"}, {"activation": "tanh"}


def code_width(rows: pd.DataFrame) -> pd.Series:
    return rows["code"]


def share(rows: pd.DataFrame) -> pd.Series:
    return rows["code"] / rows["width"]


def accuracies(narrow: float, wide: float, **coordinates: object):
    """Test accuracies below C − 1 units or directions and from there on."""
    return put("test_accuracy", lambda rows: np.where(rows["code"] < rows["classes"] - 1, narrow, wide), **coordinates)


ALL_PASS = [put("test_accuracy", 0.9)]
ONE_BELOW = {"layer": 1, "code": 4, "net_seed": 1}

# criterion, what is changed in the measured rows, verdict
CASES = [
    ("filtered_rank", [put("signal_rank", code_width)], "holds"),
    ("filtered_rank", [], "refuted"),
    ("filtered_rank", [put("signal_rank", code_width), put("signal_rank", 5.0, when="trained", **TANH, **ONE_BELOW)], "refuted"),
    ("filtered_directions", [put("outside", 0.05)], "holds"),
    ("filtered_directions", [put("outside", 0.05), put("outside", 0.2, layer=1, code=4, when="trained", **RELU)], "refuted"),
    ("filtered_energy", [put("energy_kept", share)], "holds"),
    ("filtered_energy", [put("energy_kept", share), put("energy_kept", 0.0, code=1, when="trained", net_seed=0, **RELU)], "holds"),
    ("filtered_energy", [put("energy_kept", 0.3)], "refuted"),
    ("filtered_energy", [put("energy_kept", share), put("energy_kept", 1.0, when="trained", **TANH)], "refuted"),
    ("filter_explains", [*ALL_PASS, accuracies(0.5, 0.9, part="code"), accuracies(0.6, 0.9, part="filter")], "holds"),
    ("filter_explains", [*ALL_PASS, accuracies(0.5, 0.9, part="code"), accuracies(0.8, 0.9, part="filter")], "refuted"),
    ("filter_explains", [*ALL_PASS, accuracies(0.86, 0.9, part="code")], "inconclusive"),
    ("rank_before_code", [], "holds"),
    ("rank_before_code", [put("signal_rank", 5.0, layer=2, code=4, net_seed=1, when="trained", **TANH)], "refuted"),
    ("rank_below", [], "holds_if"),
    ("rank_below", [put("signal_rank", code_width)], "holds"),
    ("rank_below", [put("signal_rank", 5.0, activation="linear", when="trained", **ONE_BELOW)], "refuted"),
    ("rank_reached", [], "holds"),
    ("rank_reached", [put("signal_rank", 3.0, layer=2, code=4, net_seed=1, when="untrained", init="gaussian", **TANH)], "refuted"),
    ("rank_reached", [put("signal_rank", 10.0, layer=2, code=12, activation="linear", when="untrained")], "refuted"),
    ("energy_orthogonal", [put("energy_kept", share, init="orthogonal")], "holds"),
    ("energy_orthogonal", [put("energy_kept", share, init="orthogonal"), put("energy_kept", 1.0, init="orthogonal", **TANH)], "holds_if"),
    ("energy_orthogonal", [put("energy_kept", 1.0, init="orthogonal")], "refuted"),
    (
        "energy_orthogonal",
        [put("energy_kept", share, init="orthogonal"), put("energy_kept", 1.2 / 4, init="orthogonal", code=4)],
        "refuted",
    ),
    ("energy_gaussian", [put("energy_kept", 0.3, init="gaussian", when="untrained")], "holds"),
    ("energy_gaussian", [put("energy_kept", share, init="gaussian", when="untrained")], "refuted"),
    ("wide_code", [*ALL_PASS, accuracies(0.5, 0.9, part="code")], "holds_if"),
    ("wide_code", ALL_PASS, "holds"),
    ("wide_code", [*ALL_PASS, put("test_accuracy", 0.8, part="code", code=12, **TANH)], "refuted"),
    ("filter_alone", [*ALL_PASS, accuracies(0.5, 0.9, part="filter")], "refuted"),
    ("filter_alone", ALL_PASS, "holds"),
    ("filter_alone", [*ALL_PASS, put("test_accuracy", 0.1, part="filter", code=0)], "holds"),
    ("filter_of_the_cap", [*ALL_PASS, accuracies(0.5, 0.9, part="filter")], "holds_if"),
    ("filter_of_the_cap", [*ALL_PASS, put("test_accuracy", 0.1, part="filter", code=0)], "holds"),
    ("filter_of_the_cap", [*ALL_PASS, put("test_accuracy", 0.8, part="filter", code=12, **TANH)], "refuted"),
]


def test_exact_statements_come_out_on_real_rows() -> None:
    found = {name: verdict.verdict for name, verdict in verdicts(NAME, small_rows(NAME)).items()}
    expected = {"filtered_rank": "refuted", "rank_before_code": "holds", "rank_below": "holds_if", "rank_reached": "holds"}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    "override",
    [
        "grid.code_widths=[16]",
        "grid.code_widths=[16,4]",
        "grid.code_widths=[4,8]",
        "grid.samples=8",
        "grid.samples=101",
        "model.width=8",
        "grid.seeds=1",
    ],
)
def test_a_grid_that_cannot_be_measured_is_refused(override: str) -> None:
    codes = ("grid.code_widths=[4,8]",) if override.startswith("model") else ()
    with pytest.raises(UserError, match=override.partition("=")[0]):
        claim.check(config(NAME, *SMALL, *codes, override), digits(256, 100))


@pytest.fixture(scope="module")
def lab() -> Context:
    return small_context(NAME)


def net(lab: Context, activation: str, width: int, seed: int = 0, init: str = "gaussian") -> nn.Sequential:
    return claim.coded(lab, claim._model(lab.config, activation, init), width, seed)


def signals(lab: Context, network: nn.Sequential, width: int) -> pd.DataFrame:
    return pd.DataFrame(claim._signals(lab, network, width, {}))


def naive_signals(lab: Context, network: nn.Sequential) -> list[np.ndarray]:
    """The N×d matrices of g_0 … g_L, sample by sample."""
    inputs, targets = lab.samples(lab.data.test, lab.config.grid.samples)
    stages = list(naive.as_measured(network))
    each = [naive.gradients(stages, x, y, cross_entropy)[0] for x, y in zip(inputs.double(), targets, strict=True)]
    return [np.stack(signal) for signal in zip(*each, strict=True)]


@pytest.mark.parametrize("init", claim.PREDICTED)
@pytest.mark.parametrize("activation", claim.NETS)
@pytest.mark.parametrize("width", [1, 4, 12, 16])
def test_ranks_and_energies_are_those_of_naive_gradients(lab: Context, activation: str, init: str, width: int) -> None:
    network = net(lab, activation, width, init=init)
    found, g = signals(lab, network, width), naive_signals(lab, network)
    for layer in (1, 2):
        assert pick(found, "signal_rank", layer=layer)["value"].item() == naive.rank(g[layer])
        s = naive.singular_values(g[layer])
        outside = pick(found, "outside", layer=layer)["value"].item()
        assert outside == pytest.approx((s[width:] ** 2).sum() / (s**2).sum(), rel=1e-9, abs=1e-20)
        longest = np.linalg.norm(g[layer], axis=1).max()
        assert pick(found, "rank_tolerance", layer=layer)["value"].item() == pytest.approx(70 * 2.0**-52 * s[0] / longest)
    assert pick(found, "energy_kept")["value"].item() == pytest.approx((g[2] ** 2).sum() / (g[-1] ** 2).sum(), rel=1e-9)


def test_the_signals_of_a_linear_net_are_capped_by_code_and_softmax(lab: Context) -> None:
    """min(r, C−1) below the code; a loss whose gradients do not sum to zero has a rank more."""
    for width in (1, 4, 8, 9, 12, 16):
        found = pick(signals(lab, net(lab, "linear", width), width), "signal_rank")
        assert found["value"].tolist() == [min(width, 9)] * 2
    stages = list(naive.as_measured(net(lab, "linear", 16)))
    inputs, targets = lab.samples(lab.data.test, 70)

    def squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.square().sum(1) * (1 + targets)

    g_2 = np.stack([naive.gradients(stages, x, y, squares)[0][2] for x, y in zip(inputs.double(), targets, strict=True)])
    assert naive.rank(g_2) == 10


MODULES = [nn.Identity, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Hardtanh, nn.LeakyReLU]


@settings(deadline=None, max_examples=30)
@given(
    width=st.integers(1, 15),
    above=st.sampled_from(MODULES),
    below=st.sampled_from(MODULES),
    gain=st.floats(0.1, 10),
    seed=st.integers(0, 9),
)
def test_the_rank_just_before_a_code_is_at_most_r_whatever_the_activation(
    lab: Context, width: int, above: type[nn.Module], below: type[nn.Module], gain: float, seed: int
) -> None:
    network = net(lab, "linear", width, seed)
    for name, stage in network.named_children():
        if name != "readout":
            stage.activation = (below if name in ("layer1", "layer2") else above)()
            dense_layer(stage).weight.data.mul_(gain)
    ranks = pick(signals(lab, network, width), "signal_rank").set_index("layer")["value"]
    assert ranks[2] <= width
    if below is nn.Identity:
        assert ranks[1] <= width


def kept_of_all_directions(lab: Context, init: str, width: int, seeds: int) -> np.ndarray:
    """‖UV‖²_F/d, the mean of ‖VᵀUᵀg‖² over all g of unit length, of random V and U."""
    layers = Layers(claim._model(lab.config, "linear", init), torch.Generator().manual_seed(0))
    weights = [(layers.linear(width, 16).weight, layers.linear(16, width).weight) for _ in range(seeds)]
    return np.array([float((U @ V).detach().square().sum() / 16) for U, V in weights])


def test_an_orthogonal_code_keeps_the_share_r_over_d_exactly(lab: Context) -> None:
    for width in (1, 4, 12, 16):
        predicted = claim.PREDICTED["orthogonal"](width / 16)
        assert kept_of_all_directions(lab, "orthogonal", width, 3) == pytest.approx([predicted] * 3, rel=1e-5)


def test_a_gaussian_code_scaled_by_fan_in_keeps_all_in_the_mean(lab: Context) -> None:
    for width in (1, 4, 16):
        kept = kept_of_all_directions(lab, "gaussian", width, 400)
        error = kept.std() / 20
        assert abs(kept.mean() - claim.PREDICTED["gaussian"](width / 16)) < 4 * error < 0.2


def test_what_is_predicted_of_random_codes_is_found_in_linear_nets() -> None:
    """Mean energies of 30 nets, code against wide code, within three standard errors and a tenth for what the logits feel of the code."""
    lab = context(NAME, *SMALL, "grid.code_widths=[4,16]")
    rows = pd.DataFrame(
        row
        for init in claim.PREDICTED
        for width in (4, 16)
        for seed in range(30)
        for row in claim._signals(
            lab,
            net(lab, "linear", width, seed, init),
            width,
            {"when": "untrained", "init": init, "activation": "linear", "code": width, "net_seed": seed},
        )
    )
    for init in claim.PREDICTED:
        found = claim._against_prediction(rows, init).iloc[0]
        assert abs(np.log(found["estimate"])) < 0.1 + 3 / 2 * np.log(found["hi"] / found["estimate"]), init


def test_live_units_have_images_of_their_own(lab: Context) -> None:
    """A dead unit counts for nothing, and two that live on the same image alone count once."""
    inputs, _ = lab.samples(lab.data.test, 70)
    network = net(lab, "relu", 4)
    states = network[:2](inputs)
    code = dense_layer(network.code)
    with torch.no_grad():
        code.weight[1:] = states[0] / states[0].norm()
        cosines = states @ code.weight[1]
        code.bias[1] = -1e6
        second, first = cosines.sort().values[-2:]
        code.bias[2:] = -(first + second) / 2
    assert (network.code(states) != 0).sum(0).tolist()[1:] == [0, 1, 1]
    found = signals(lab, network, 4)
    assert pick(found, "live_units")["value"].item() == 2
    assert pick(found, "signal_rank", layer=2)["value"].item() == 2


def test_a_dead_code_lets_nothing_pass(lab: Context) -> None:
    network = net(lab, "relu", 4)
    with torch.no_grad():
        dense_layer(network.code).bias.fill_(-1e3)
    found = signals(lab, network, 4)
    assert (found["value"] == 0).all()


def test_a_filter_to_no_direction_leaves_the_layers_below_as_drawn(lab: Context) -> None:
    model = claim._model(lab.config, "tanh")
    for rank, still in ((0, True), (1, False)):
        network = claim.filtered(lab, model, rank, 0)
        drawn = copy.deepcopy(network)
        train_all(lab, [Trainee(network, "filtered", 0)])
        moved = {name: not torch.equal(p, drawn.get_parameter(name)) for name, p in network.named_parameters() if name.endswith("weight")}
        assert [moved[f"layer{layer}.linear.weight"] for layer in (1, 2)] == [not still] * 2
        assert all(moved[f"{name}.linear.weight"] for name in ("code", "layer3", "layer4"))


def test_a_filter_changes_the_gradient_of_the_layers_below_only(lab: Context) -> None:
    """The same net as with the wide code: the same outputs, the same gradients from the code on, √(16/4) QQᵀg_2 before it."""
    model = claim._model(lab.config, "relu")
    plain, narrowed = claim.coded(lab, model, 16, 0), claim.filtered(lab, model, 4, 0)
    inputs, targets = lab.samples(lab.data.test, 70)
    for network in (plain, narrowed):
        cross_entropy(network(inputs), targets).backward()
    assert torch.equal(plain(inputs), narrowed(inputs))
    for name, parameter in plain.named_parameters():
        same = torch.equal(parameter.grad, narrowed.get_parameter(name).grad)
        assert same == (not name.startswith(("layer1", "layer2"))), name
    g, filtered = naive_signals(lab, plain), naive_signals(lab, narrowed)
    Q = narrowed.filter.directions.double().numpy()
    np.testing.assert_allclose(filtered[2], 2 * g[2] @ Q @ Q.T, atol=1e-12)
    assert naive.rank(filtered[2]) == 4


def test_codes_that_are_all_wide_leave_nothing_to_explain_and_single_trainings_no_interval() -> None:
    rows = small_rows(NAME)
    found = verdicts(NAME, rows[(rows["code"] >= 12) & ~((rows["net_seed"] == 1) & (rows["when"] == "trained"))])
    assert found["filter_explains"].verdict == "inconclusive"
    assert found["wide_code"].verdict == "inconclusive"
    assert found["rank_before_code"].verdict == "holds"


def test_exponents_are_paired_by_seed_and_leave_out_codes_that_died() -> None:
    """(r/d)^0.7 times what is the seed's own: 0.7 with no interval to speak of."""
    rows = small_rows(NAME)
    rows = after(
        rows, [put("energy_kept", lambda kept: share(kept) ** 0.7 * 10.0 ** kept["net_seed"]), put("energy_kept", 0.0, code=1, **RELU)]
    )
    cells = claim._exponents(rows)
    np.testing.assert_allclose(cells[["estimate", "lo", "hi"]], 0.7)
    assert sorted(cells.loc[cells["activation"] == "relu", "code"].unique()) == [4, 12]
    assert sorted(cells.loc[cells["activation"] == "tanh", "code"].unique()) == [1, 4, 12]


def test_energies_are_ratios_of_means_over_seeds() -> None:
    """(1 + 5)/(2 + 2) over 4/16: 6, and without either seed 2 or 10, so that the standard error of the logarithm is ln(10/2)/2."""
    rows = after(
        small_rows(NAME),
        [put("energy_kept", 2.0, code=16), *(put("energy_kept", 1.0 + 4 * seed, code=4, net_seed=seed) for seed in (0, 1))],
    )
    found = claim._against_prediction(rows, "orthogonal").query("activation == 'tanh' and code == 4").iloc[0]
    assert found["estimate"] == pytest.approx(6)
    assert np.log(found["hi"] / 6) == pytest.approx(12.706 * np.log(5) / 2, rel=1e-4)


def test_accuracies_are_lost_against_the_wide_code_of_the_same_seed() -> None:
    rows = after(
        small_rows(NAME),
        [put("test_accuracy", lambda nets: 0.5 + 0.1 * nets["net_seed"] + 0.01 * nets["code"] - 0.2 * (nets["part"] == "filter"))],
    )
    lost = claim._lost(rows)
    np.testing.assert_allclose(lost["code"], np.tile([0.15, 0.12, 0.04], (6, 1)))
    np.testing.assert_allclose(lost["filter"], np.tile([0.36, 0.35, 0.32, 0.24], (6, 1)))
    explained = claim._explained(lost, 9, share=0.5, noticed=0.05)
    assert explained["code"].unique().tolist() == [1, 4]
    np.testing.assert_allclose(explained["estimate"], np.tile([0.35 - 0.075, 0.32 - 0.06], 3))


def test_a_code_that_costs_nothing_leaves_nothing_to_explain() -> None:
    rows = after(small_rows(NAME), [*ALL_PASS, put("test_accuracy", 0.5, part="code", code=1, **TANH)])
    cells = claim._explained(claim._lost(rows), 9, share=0.5, noticed=0.05)
    assert cells[["activation", "code"]].to_numpy().tolist() == [["tanh", 1]]
