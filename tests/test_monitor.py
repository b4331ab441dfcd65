"""The monitor against the certificate, the training with it against the training without, and what it refuses."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

from src import monitor as module
from src.certificate import certify
from src.errors import UserError
from src.monitor import LockMonitor
from src.tracking import ActiveRun
from tests.conftest import ROOT
from tests.jacobian.networks import SMALL, Counting, dense, diagonal, family, matrix_stage, normal, seeded, small

QUANTITIES = ["log_error_norm", "saturation", "lambda", "lambda_nonzero", "rank", "stable_rank", "norm"]
LABELS = torch.arange(6) % 3


def refusal(message):
    return pytest.raises(UserError, match=f"^{re.escape(message)}")


def expected(model, x, y, **options):
    """The quantities from the certificate, in float64."""
    cert = certify(model, x, y, method="exact", **options)
    by_stage = cert.layers.groupby("index")
    table = cert.severity[["lambda", "lambda_nonzero", "rank", "stable_rank"]].set_axis(by_stage.groups)
    table["log_error_norm"] = by_stage["error_norm"].agg(lambda norms: np.log((norms**2).mean()) / 2)
    table["saturation"] = by_stage["saturation"].mean()
    table["norm"] = by_stage["norm"].quantile(interpolation="lower")
    return table[QUANTITIES]


def assert_is_the_certificate(found, model, x, y, slack=0.001, **options):
    """λ and the rank to the rounding of float32; σ₁ within the slack, and not above."""
    wanted = expected(model, x, y, **options)
    found = found.set_index("index")[QUANTITIES]
    np.testing.assert_allclose(found[["log_error_norm", "stable_rank"]], wanted[["log_error_norm", "stable_rank"]], rtol=1e-4, atol=1e-4)
    # the certificate knows activation functions too
    modules = found["saturation"].notna() | wanted["saturation"].isna()
    assert modules.any()
    np.testing.assert_allclose(found["saturation"][modules], wanted["saturation"][modules], atol=1e-6)
    np.testing.assert_allclose(found["lambda"], wanted["lambda"], atol=1e-5)
    full = found["rank"] == wanted["rank"]
    np.testing.assert_allclose(found["lambda_nonzero"][full], wanted["lambda_nonzero"][full], atol=1e-5)
    assert (found["rank"] <= wanted["rank"]).all()
    assert (found["norm"] <= wanted["norm"] * (1 + 1e-5)).all()
    np.testing.assert_allclose(found["norm"], wanted["norm"], rtol=slack)


def train(model, monitor=None, steps=20, shape=(4,), seed=0):
    """A plain loop; what it leaves behind."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        x, y = torch.randn(8, *shape), torch.randint(3, (8,))
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if monitor:
            monitor.step()
    return {
        "state": model.state_dict(),
        "gradients": [parameter.grad for parameter in model.parameters()],
        "optimizer": optimizer.state_dict()["state"],
        "modes": [part.training for part in model.modules()],
        "inplace": [getattr(part, "inplace", None) for part in model.modules()],
        "needs a gradient": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()],
        "random state": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, list | tuple):
        for part, its_like in zip(one, other, strict=True):
            assert_same(part, its_like)
    else:
        assert one == other


def noisy():
    """A network in which a random number too many, or a pass too many in train mode, changes the training."""
    torch.manual_seed(1)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)]
    model = nn.Sequential(*layers)
    model[6].bias.requires_grad_(False)
    model[0].register_forward_hook(lambda part, arguments, output: None)
    return model


# --- what is measured


@pytest.mark.parametrize("name", SMALL)
def test_it_measures_what_the_certificate_says(name):
    model, x = small(name), normal(6, 1, 4, 4)
    with LockMonitor(model, x, LABELS) as monitor:
        pass
    assert_is_the_certificate(monitor.history, model, x, LABELS)
    with pytest.raises(AssertionError):
        assert_is_the_certificate(monitor.history, seeded(model, 1), x, LABELS)


@pytest.mark.parametrize("name", ["mlp", "cifar", "residual_mlp"])
def test_after_training_it_measures_the_trained_weights(name):
    model, x, y = family(name, norm="batch", skip="none"), normal(5, 1, 8, 8), torch.arange(5) % 4
    with LockMonitor(model, x, y, every=6) as monitor:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
        for _ in range(12):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step()
    history = monitor.history
    assert sorted(set(history["step"])) == [0, 6, 12]
    assert_is_the_certificate(history.query("step == 12"), model, x, y, slack=0.05)
    with pytest.raises(AssertionError):
        assert_is_the_certificate(history.query("step == 6"), model, x, y, slack=0.05)


def test_it_cuts_once(monkeypatch):
    cuts, split = [], module.split
    monkeypatch.setattr(module, "split", lambda *arguments: cuts.append(1) or split(*arguments))
    model = dense(4, 5, 3)
    with LockMonitor(model, normal(6, 4), LABELS, every=2) as monitor:
        train(model, monitor, steps=6)
    assert cuts == [1]
    assert monitor.history["step"].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]


def test_a_linear_chain_in_closed_form():
    """J_1 = diag(3, 1) and J_2 = diag(2, 1): with ℓ = ½‖H_2 − y‖² and y = H_2 − e_n the signals are g_2 = e_n, so that G_1 = J_2J_1."""
    x = normal(2, 2)
    model = nn.Sequential(diagonal(3.0, 1.0), diagonal(2.0, 1.0)).float()
    with LockMonitor(model, x, model(x).detach() - torch.eye(2), loss=lambda h, y: (h - y).square().sum() / 2) as monitor:
        pass
    first, last = monitor.history.to_dict("records")
    assert (first["norm"], last["norm"]) == pytest.approx((3, 2), rel=1e-5)
    assert last["log_error_norm"] == pytest.approx(0, abs=1e-6)
    assert first["log_error_norm"] == pytest.approx(math.log((4 + 1) / 2) / 2)
    assert (last["lambda"], first["lambda"]) == pytest.approx((1 - 1 / 2, 1 - 1 / 6))
    assert (last["stable_rank"], first["stable_rank"]) == pytest.approx((1 + 1 / 4, 1 + 1 / 36))
    assert first["rank"] == last["rank"] == 2
    assert math.isnan(first["saturation"])


def test_saturation_in_closed_form():
    """tanh' = 1 − tanh² is below a tenth where |z| > artanh √.9 = 1.818."""
    model = nn.Sequential(nn.Sequential(diagonal(1.0, 1.0), nn.Tanh()), diagonal(1.0, 1.0)).float()
    with LockMonitor(model, torch.tensor([[1.81, -1.83], [0.0, 5.0], [1.0, 1.0]]), torch.tensor([0, 1, 0])) as monitor:
        pass
    assert monitor.history["saturation"][0] == pytest.approx(2 / 6)


# --- warm starts


def drifting(fresh, monkeypatch, times=30):
    """The relative errors of σ₁ of a matrix with small gaps whose singular vectors turn."""
    monkeypatch.setattr(module, "FRESH", fresh)
    U, V = (torch.linalg.qr(normal(60, 60, seed=seed).double()).Q for seed in (1, 2))
    turn = torch.linalg.matrix_exp(0.003 * (U - U.T))
    model = nn.Sequential(matrix_stage(U @ torch.diag(torch.linspace(2, 1, 60).double()) @ V)).float()
    with LockMonitor(model, normal(3, 60), torch.tensor([0, 1, 2]), every=1) as monitor, torch.no_grad():
        for _ in range(times):
            model[0].weight.copy_(model[0].weight.double() @ turn)
            monitor.step()
    return 1 - monitor.history["norm"].to_numpy() / 2


def test_warm_starts_follow_a_weight_that_drifts(monkeypatch):
    warm = drifting(module.FRESH, monkeypatch)
    assert (warm > -1e-6).all()
    assert warm.max() < 0.01
    # what as many steps from a random start reach: the start of before has no part in it
    assert drifting(1e6, monkeypatch)[1:].min() > 0.02


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.read = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.mix(x).unsqueeze(1).chunk(3, dim=-1)
        return self.read((x.unsqueeze(1) + functional.scaled_dot_product_attention(q, k, v)).mean((1, 2)))


class Squared(nn.Module):
    def forward(self, x):
        return x * x


class WrittenOver(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(20, 4)

    def forward(self, x):
        return self.linear(x).sigmoid_()


def test_attention_and_custom_stages():
    x = normal(6, 5, 4)
    custom = nn.Sequential(nn.Flatten(), WrittenOver(), Squared(), nn.Linear(4, 3))
    for model in (seeded(Attention()), seeded(custom)):
        with LockMonitor(model, x, LABELS) as monitor:
            pass
        with sdpa_kernel(SDPBackend.MATH):
            assert_is_the_certificate(monitor.history, model, x, LABELS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_precision_is_measured_in_float32(dtype):
    model, x = small("batch norm").to(dtype), normal(6, 1, 4, 4).to(dtype)
    with LockMonitor(model, x, LABELS, every=1) as monitor:
        seeded(model, 1)
        for _ in range(5):
            monitor.step()
    assert model[0][0].weight.dtype == model[0][1].running_var.dtype == dtype
    assert_is_the_certificate(monitor.history.query("step == 5"), copy.deepcopy(model).double(), x.double(), LABELS)


def test_a_layer_that_two_stages_share():
    shared = nn.Linear(4, 4)
    stages = [shared, nn.Sequential(shared, nn.Tanh()), nn.Sequential(nn.Tanh(), shared), nn.Linear(4, 3)]
    model, x = seeded(nn.Sequential(*stages)), normal(6, 4)
    with LockMonitor(model, x, LABELS) as monitor:
        pass
    assert_is_the_certificate(monitor.history, model, x, LABELS)


def test_another_loss():
    model, x, y = dense(4, 5, 2), normal(6, 4), normal(6, 2, seed=1)
    with LockMonitor(model, x, y, loss=functional.mse_loss) as monitor:
        pass
    assert_is_the_certificate(monitor.history, model, x, y.double(), loss=functional.mse_loss)


def test_the_gradient_may_leave_the_range_of_floats():
    model = nn.Sequential(*(seeded(nn.Linear(4, 4)) for _ in range(60)), nn.Linear(4, 3))
    with torch.no_grad():
        for layer in model[:-1]:
            layer.weight.mul_(0.05)
    with LockMonitor(model, normal(6, 4), LABELS) as monitor:
        pass
    first = monitor.history["log_error_norm"][0]
    assert first < math.log(torch.finfo(torch.float32).tiny) - 20
    assert first == pytest.approx(expected(model, normal(6, 4), LABELS)["log_error_norm"].iloc[0], rel=1e-4)


def test_a_stage_that_was_dead_is_found_alive(monkeypatch):
    def norms(fresh):
        monkeypatch.setattr(module, "FRESH", fresh)
        model = nn.Sequential(seeded(nn.Linear(4, 4)), nn.Tanh(), seeded(nn.Linear(4, 3), 1))
        weight = model[2].weight.detach().clone()
        with LockMonitor(model, normal(6, 4), LABELS, every=1) as monitor, torch.no_grad():
            model[2].weight.zero_()
            monitor.step()
            model[2].weight.copy_(weight)
            monitor.step()
        return monitor.history.query("index == 3")["norm"].tolist()

    alive, dead, again = norms(fresh=module.FRESH)
    assert dead == 0
    assert again == pytest.approx(alive, rel=1e-3)
    assert norms(fresh=0.0)[2] == 0


# --- the training does not notice


@pytest.mark.parametrize("every", [1, 3])
def test_the_training_is_the_same_bit_for_bit(every):
    alone, watched = noisy(), noisy()
    before = train(alone)
    with LockMonitor(watched, normal(6, 4, seed=2), LABELS, every=every) as monitor:
        after = train(watched, monitor)
    assert len(set(monitor.history["step"])) == 1 + 20 // every
    assert_same(after, before)
    assert_same(train(watched, seed=1), train(alone, seed=1))


@pytest.mark.parametrize("name", ["mlp", "residual_mlp", "cifar"])
def test_the_training_of_our_models_is_the_same_bit_for_bit(name):
    def trained(watch):
        model = nn.Sequential(*family(name, norm="batch", skip="none" if name == "mlp" else "original"), nn.Dropout(0.3)).train()
        if not watch:
            return train(model, steps=4, shape=(1, 8, 8))
        with LockMonitor(model, normal(5, 1, 8, 8), torch.arange(5) % 4, every=2) as monitor:
            return train(model, monitor, steps=4, shape=(1, 8, 8))

    assert_same(trained(watch=True), trained(watch=False))


DISTURBANCES = {
    "a random number": lambda model: torch.rand(1),
    "a pass in train mode": lambda model: model(normal(6, 4)),
    "a mode": lambda model: model.eval(),
    "a gradient": lambda model: model[0].weight.grad.add_(1e-6),
    "a weight": lambda model: model[0].weight.data.add_(1e-6),
    "a hook": lambda model: model[0].register_forward_hook(lambda part, arguments, output: None),
    "in place": lambda model: setattr(model[2], "inplace", False),
    "a frozen weight": lambda model: model.requires_grad_(True),
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_a_disturbance_is_noticed(disturbance):
    class Disturbing:
        def __init__(self, model):
            self.model, self.steps = model, 0

        def step(self):
            self.steps += 1
            if self.steps == 20:
                DISTURBANCES[disturbance](self.model)

    alone, watched = noisy(), noisy()
    before = train(alone)
    with pytest.raises(AssertionError):
        assert_same(train(watched, Disturbing(watched)), before)


def test_entering_draws_no_random_number():
    model, state = noisy(), torch.get_rng_state()
    with LockMonitor(model, normal(6, 4), LABELS):
        assert torch.equal(torch.get_rng_state(), state)
    model(normal(6, 4))  # dropout does
    assert not torch.equal(torch.get_rng_state(), state)


class Drawing(nn.Module):
    def forward(self, x):
        torch.rand(1)
        return x


def test_a_model_that_draws_random_numbers_in_every_mode_draws_no_more_of_them():
    def trained(watch):
        model = nn.Sequential(dense(4, 5, 3), Drawing(), nn.Dropout())
        if not watch:
            return train(model)
        with LockMonitor(model, normal(6, 4), LABELS, every=3) as monitor:
            return train(model, monitor)

    assert_same(trained(watch=True), trained(watch=False))


def test_a_buffer_that_a_pass_writes_to_is_the_copys_own():
    model = nn.Sequential(seeded(nn.Linear(4, 4)), Counting(), seeded(nn.Linear(4, 3)))
    with LockMonitor(model, normal(6, 4), LABELS):
        pass
    assert model[1].calls == 0


def test_hooks_that_watch_see_one_pass_on_entry_and_torchs_own_count():
    model, seen = seeded(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))), []
    prune.l1_unstructured(model[0], "weight", amount=8)
    for part in model:
        part.register_forward_hook(lambda part, arguments, output: seen.append(part))
        part.register_forward_pre_hook(lambda part, arguments: seen.append(part))
    x = normal(6, 4)
    with LockMonitor(model, x, LABELS, every=1) as monitor:
        assert seen == [part for part in model for _ in range(2)]
        monitor.step()
    assert len(seen) == 6
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
        plain[0].bias.copy_(model[0].bias)
    plain[2].load_state_dict(model[2].state_dict())
    assert_is_the_certificate(monitor.history.query("step == 0"), plain, x, LABELS)


def test_a_hook_that_changes_what_the_model_computes_is_refused():
    model = dense(4, 5, 3)
    model[0].register_forward_hook(lambda part, arguments, output: 2 * output)
    with pytest.raises(UserError, match="a hook changes what it computes"), LockMonitor(model, normal(6, 4), LABELS):
        pass


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_mode_it_is_called_in_does_not_matter(mode):
    model = dense(4, 5, 3)
    with LockMonitor(model, normal(6, 4), LABELS, every=1) as monitor:
        monitor.step()
        with mode():
            monitor.step()
    one, other = (monitor.history.query(f"step == {step}")[QUANTITIES[:-1]].to_numpy() for step in (1, 2))
    np.testing.assert_array_equal(one, other)


# --- what has diverged


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("name", ["dense", "conv", "residual", "batch norm"])
def test_what_diverges_is_told_and_does_not_end_the_training(name, value):
    model, x = small(name), normal(6, 1, 4, 4)
    weights = copy.deepcopy(model.state_dict())
    with LockMonitor(model, x, LABELS, every=1) as monitor:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        monitor.step()
        model.load_state_dict(weights)
        for _ in range(7):
            monitor.step()
    told = monitor.history.query("step == 1")
    assert not np.isfinite(told[["log_error_norm", "norm"]].to_numpy()).all()
    if not value < 1e31:
        assert not np.isfinite(told[["log_error_norm", "saturation", "lambda", "rank", "stable_rank"]].to_numpy()[1:]).any()
        weighted = [bool([*part.parameters()]) for part in model]
        assert not np.isfinite(told["norm"][weighted]).any()
    assert_is_the_certificate(monitor.history.query("step == 8"), model, x, LABELS)


def test_a_net_that_diverges_while_it_trains():
    model = dense(4, 5, 3, activation=nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e9)
    with LockMonitor(model, normal(6, 4), LABELS, every=1) as monitor:
        for _ in range(12):
            optimizer.zero_grad()
            functional.mse_loss(model(normal(8, 4)), normal(8, 3)).backward()
            optimizer.step()
            monitor.step()
    finite = np.isfinite(monitor.history.pivot(index="step", columns="index", values="norm"))
    assert finite.iloc[0].all()
    assert not finite.iloc[-1].any()


# --- who is told


def test_what_the_log_gets():
    told = []
    with LockMonitor(dense(4, 5, 3), normal(6, 4), LABELS, every=2, log=lambda scalars, step: told.append((step, scalars))) as monitor:
        for _ in range(5):
            monitor.step()
    assert [step for step, _ in told] == [0, 2, 4]
    assert list(told[0][1]) == [f"backlock/{stage}/{quantity}" for stage in "01" for quantity in QUANTITIES]
    assert {type(value) for value in told[0][1].values()} == {float}
    assert list(monitor.history) == ["step", "stage", "index", *QUANTITIES]
    assert told[2][1]["backlock/1/norm"] == monitor.history.query("step == 4 and stage == '1'")["norm"].item()


WANDB = """
import torch, wandb
from src.monitor import LockMonitor
quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False)
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
with LockMonitor(model, torch.randn(6, 4), torch.arange(6) % 3, every=2) as monitor:  # no run is active yet
    for logs in (False, True):
        with wandb.init(mode="offline", dir=str(logs), settings=quiet) as run:
            for step in range(1, 6):
                if logs:
                    run.log({"loss": step}, step=step)
                monitor.step()
                if logs:
                    run.log({"accuracy": step}, step=step)
"""


def test_weights_and_biases(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "false"}
    environment |= {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA")}
    for logs in ("True", "False"):
        (tmp_path / logs).mkdir()
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", WANDB], **run)
    assert done.returncode == 0, done.stderr
    for logs, steps, losses in (("False", [2, 4], []), ("True", [6, 8, 10], [1, 2, 3, 4, 5])):
        (folder,) = (tmp_path / logs).glob("wandb/offline-run-*")
        told = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)], **run, check=True).stdout
        records = [json.loads(line) for line in told.splitlines()]
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        ours = [row for row in rows if "backlock/step" in row]
        assert [int(row["backlock/step"]) for row in ours] == steps
        assert all({f"backlock/{stage}/{quantity}" for stage in "01" for quantity in QUANTITIES} <= row.keys() for row in ours)
        # nothing of the training is displaced or lost
        for own in ("loss", "accuracy"):
            assert [int(row[own]) for row in rows if own in row] == losses


@pytest.mark.parametrize("wandb", [None, SimpleNamespace(run=None)])
def test_without_a_run_nothing_is_logged(wandb, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    ActiveRun()({"backlock/x": 1.0}, 1)
    # an active run would be told
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=object()))
    with pytest.raises(AttributeError):
        ActiveRun()({"backlock/x": 1.0}, 1)


class Callback:
    """As much of Lightning's as a monitor needs."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass


class Trainer:
    def __init__(self, callbacks):
        self.callbacks = callbacks

    def fit(self, model):
        class Batches:
            def step(batches):  # noqa: N805
                for callback in self.callbacks:
                    callback.on_train_batch_end(self, model, None, None, 0)

        self.found = train(model, Batches())


def test_a_loop_of_lightnings_shape():
    class Watch(Callback):
        def on_train_batch_end(self, *_):
            monitor.step()

    alone, watched = noisy(), noisy()
    trainer = Trainer(callbacks=[Watch()])
    with LockMonitor(watched, normal(6, 4), LABELS, every=5) as monitor:
        trainer.fit(watched)
    assert_same(trainer.found, train(alone))
    assert sorted(set(monitor.history["step"])) == [0, 5, 10, 15, 20]
    with refusal("monitor: a step outside of"):
        trainer.fit(watched)


# --- refusals


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class AlwaysDropping(nn.Module):
    def forward(self, x):
        return functional.dropout(x, 0.5)


def test_what_is_refused():
    model, x = dense(4, 5, 3), normal(6, 4)
    with refusal("monitor: every=0; give a number of steps, at least 1"):
        LockMonitor(model, x, LABELS, every=0)
    with refusal("monitor: a step outside of `with LockMonitor(…) as monitor:`; put the training inside"):
        LockMonitor(model, x, LABELS).step()
    with refusal("certificate: 6 inputs and 2 targets"), LockMonitor(model, x, LABELS[:2]):
        pass
    with refusal("Branching: torch.fx cannot trace it"), LockMonitor(Branching(), x, LABELS):
        pass
    with refusal("certificate: stage '1' answers differently"), LockMonitor(nn.Sequential(model, AlwaysDropping()), x, LABELS):
        pass
    with refusal("1: BatchNorm without running statistics"):
        LockMonitor(nn.Sequential(model, nn.BatchNorm1d(3, track_running_stats=False)), x, LABELS).__enter__()
    x[1, 2] = math.nan
    with refusal("certificate: the input is not finite at sample 1"), LockMonitor(model, x, LABELS):
        pass
