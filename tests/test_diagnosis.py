"""Each cause on a net that has it and on one that has not, and remedies that help or do not."""

import math
from itertools import pairwise

import pandas as pd
import pytest
import torch
from torch import nn

from src import diagnosis
from src.certificate import certify
from src.diagnosis import attenuation, locked
from tests.jacobian import naive
from tests.jacobian.networks import normal, seeded

LABELS = torch.arange(6) % 4


def net(activation, weight_var, depth=10, width=24, outputs=4):
    """A dense chain with Gaussian weights of variance weight_var/width."""
    torch.manual_seed(0)
    widths = [16, *[width] * depth]
    hidden = [nn.Sequential(nn.Linear(d, m), activation()) for d, m in pairwise(widths)]
    model = nn.Sequential(*hidden, nn.Linear(width, outputs))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, math.sqrt(weight_var / module.in_features))
            nn.init.zeros_(module.bias)
    return model


def certified(model):
    return certify(model, normal(6, 16), LABELS)


def causes(model):
    return set(diagnosis.causes(certified(model))["cause"])


def test_attenuation_is_that_of_the_plain_gradients():
    model = net(nn.Tanh, 1.0, depth=3)
    cert, stages = certified(model), list(naive.as_measured(model))
    signals = [naive.gradients(stages, x, y, nn.functional.cross_entropy)[0] for x, y in zip(normal(6, 16).double(), LABELS, strict=True)]
    norms = pd.DataFrame([[(g**2).sum() ** 0.5 for g in of_sample[1:]] for of_sample in signals])
    expected = norms.div(norms.iloc[:, -1], axis=0).map(math.log10).median()
    assert attenuation(cert).tolist() == pytest.approx(expected.tolist())


def test_a_net_that_is_not_locked_has_no_causes():
    cert = certified(net(nn.Identity, 1.0, depth=2))
    assert not any(locked(cert))
    assert cert.diagnosis().causes.empty
    assert cert.diagnosis().what_ifs["remedy"][0] == "as it is"


def test_a_vanishing_product():
    found = diagnosis.causes(certified(net(nn.Sigmoid, 1.0)))
    first = found.query("index == 1 and cause == 'vanishing product'").iloc[0]
    assert first["value"] < first["limit"] == -1
    assert first["stage"] == first["at"] == "0"
    assert set(found["cause"]) == {"vanishing product"}


def test_saturation_and_dead_units_and_rank_deficiency():
    saturated = net(nn.Tanh, 1.0)
    with torch.no_grad():
        saturated[5][0].bias += 4.0
    assert "saturation" in causes(saturated)
    dead = net(nn.ReLU, 2.0)
    with torch.no_grad():
        dead[5][0].bias[:-2] = -100.0
    found = diagnosis.causes(certified(dead))
    assert {"dead units", "rank deficiency"} <= set(found["cause"])
    assert set(found.query("cause == 'dead units'")["at"]) == {"5"}
    assert set(found.query("cause == 'dead units' and index <= 6")["value"]) <= {22 / 24, 23 / 24}
    assert not {"saturation", "dead units"} & causes(net(nn.Tanh, 1.0))


def test_a_narrow_code():
    wide = net(nn.Tanh, 0.5)
    narrow = net(nn.Tanh, 0.5)
    narrow[5], narrow[6] = nn.Sequential(nn.Linear(24, 1), nn.Tanh()), nn.Sequential(nn.Linear(1, 24), nn.Tanh())
    found = diagnosis.causes(certified(narrow)).query("cause == 'information bottleneck'")
    assert set(found["value"]) == {1.0}
    assert set(found["at"]) == {"5", "6"}
    assert "information bottleneck" not in causes(wide)


def test_units_at_the_kink():
    model, x = net(nn.ReLU, 1.0), normal(6, 16)
    x[:, :] = 0  # without biases every pre-activation is exactly 0
    x[0] = normal(1, 16)
    assert "kink" in set(diagnosis.causes(certify(model, x, LABELS))["cause"])
    assert "kink" not in causes(model)


def test_floating_point():
    """Tanh at |z| > 9 passes nothing in single precision; a signal below 1e-38 is none."""
    stuck = net(nn.Tanh, 1.0)
    with torch.no_grad():
        stuck[5][0].bias += 12.0
    found = diagnosis.causes(certified(stuck)).query("cause == 'floating point'")
    assert "ranks lost in training's dtype" in set(found["quantity"])
    assert "floating point" not in causes(net(nn.Tanh, 0.5))
    faint = diagnosis.causes(certified(net(nn.Sigmoid, 0.05, depth=40)))
    assert "log₁₀ ‖g_l‖" in set(faint.query("cause == 'floating point'")["quantity"])


def test_a_skip_unlocks_a_vanishing_chain_and_width_does_not():
    what_ifs = certified(net(nn.ReLU, 1.0)).diagnosis().what_ifs.set_index("remedy")
    assert what_ifs.loc["skip connections", "locked"] < what_ifs.loc["as it is", "locked"]
    assert what_ifs.loc["skip connections", "gained"] > 1
    assert abs(what_ifs.loc["twice the width", "gained"]) < 1
    ranks = what_ifs["locked"].tolist()[1:]
    assert ranks == sorted(ranks)
    assert what_ifs.loc["as it is", "gained"] == 0


def test_the_skip_is_certified_as_if_written_by_hand():
    class Block(nn.Module):
        def __init__(self, stage):
            super().__init__()
            self.stage = stage

        def forward(self, x):
            return x + self.stage(x)

    model = net(nn.ReLU, 1.0)
    by_hand = nn.Sequential(model[0], *(Block(stage) for stage in model[1:-1]), model[-1])
    found = certified(model).diagnosis().what_ifs.set_index("remedy")
    assert found.loc["skip connections", "decades"] == pytest.approx(attenuation(certified(by_hand))[0])


def test_a_remedy_that_does_not_apply_says_why_and_the_model_stays():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = certify(model, normal(6, 1, 4, 4), LABELS).diagnosis()
    notes = found.what_ifs.set_index("remedy")["note"]
    assert notes["skip connections"] == "not tried: no stage keeps the shape of its input"
    assert notes["twice the width"] == "not tried: width is doubled in chains of dense layers only"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "not tried" in str(found)


def test_with_the_statistics_of_the_batch_no_remedy_is_tried():
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    what_ifs = certify(model, normal(6, 16), LABELS, batch_norm="train").diagnosis().what_ifs
    assert set(what_ifs["note"][1:]) == {"not tried: under batch_norm='train' the batch is one sample"}


@pytest.mark.parametrize(
    "between", [lambda: nn.LayerNorm(16), lambda: nn.PReLU(16), lambda: nn.BatchNorm1d(16), lambda: nn.Unflatten(1, (4, 4))]
)
def test_a_remedy_that_does_not_suit_the_model_is_told(between):
    """Whatever has the width written into it can't be widened."""
    shaped = between()
    back = [nn.Flatten()] if isinstance(shaped, nn.Unflatten) else []
    block = nn.Sequential(nn.Linear(16, 16), shaped, *back, nn.ReLU())
    model = seeded(nn.Sequential(nn.Linear(8, 16), block, nn.Linear(16, 3)))
    what_ifs = certify(model, normal(3, 8), torch.tensor([0, 1, 2])).diagnosis().what_ifs
    note = what_ifs.set_index("remedy")["note"]["twice the width"]
    assert note.startswith("not tried: ")
    assert what_ifs["locked"].notna().sum() >= 3
