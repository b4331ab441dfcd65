"""Models that torch.fx cannot trace, and torch.export can."""

import copy

import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.certificate import certify
from src.chain import branch, cut
from src.errors import UserError
from src.jacobian.materialised import layer_jacobian
from src.models import Residual
from src.monitor import LockMonitor
from src.paths import path_lengths
from src.trace import exported, traced_stages
from tests.jacobian.networks import normal, seeded

LABELS = torch.tensor([0, 2, 1])


class Transformer(nn.Module):
    """The plain encoder, whose forward asks for the values of flags, with a linear head."""

    def __init__(self, layers=2, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.encoder(x).flatten(1))


class Choosing(nn.Module):
    """Loops over its input's shape, which torch.fx does not know, and calls a layer as often; writes in place, without using the result."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        for _ in range(min(x.shape[1], 2)):
            x = self.shared(x)
            x.tanh_()
        return self.head(x)


def jacobians(function, x):
    """By torch.func alone, one sample at a time."""
    return vmap(jacrev(lambda h: function(h.unsqueeze(0)).flatten()))(x).flatten(2)


@pytest.fixture(scope="module")
def transformer():
    return seeded(Transformer())


@pytest.fixture(scope="module")
def tokens():
    return normal(3, 2, 16)


@pytest.fixture(scope="module")
def certificate(transformer, tokens):
    return certify(transformer, tokens, LABELS)


def test_a_transformer_encoder_is_cut_into_its_blocks(certificate):
    names = ["encoder.layers.0.self_attn", "encoder.layers.0", "encoder.layers.1.self_attn", "encoder.layers.1", "head"]
    assert list(certificate.severity["stage"]) == names
    # stages 2 … 5: the skips carry all but the head; two products in an attention block, two in a feed-forward one
    assert (certificate.skip_depth, certificate.depth) == (1, 2 + 2 + 2 + 1)


class Attention(nn.Module):
    """Self-attention beside a skip."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


@sdpa_kernel(SDPBackend.MATH)
def test_attention_has_two_weight_layers_in_either_graph():
    module = seeded(Attention())
    assert path_lengths(module) == path_lengths(exported(module, normal(3, 2, 8))) == (0, 2)


@sdpa_kernel(SDPBackend.MATH)  # torch.func has no rules for the others
def test_its_jacobians_are_those_of_the_layers_as_written(transformer, tokens, certificate):
    twin = copy.deepcopy(transformer).double().eval()
    state, stages = tokens.double(), cut(transformer, None, torch.float64, "eval", inputs=tokens).stages
    whole = torch.eye(32, dtype=torch.float64)
    for layer, (attention, forward) in zip(twin.encoder.layers, [stages[:2], stages[2:4]], strict=True):
        middle = attention(state)
        by_stage = layer_jacobian(forward, middle) @ layer_jacobian(attention, state)
        torch.testing.assert_close(by_stage, jacobians(layer, state), rtol=1e-9, atol=1e-12)
        whole, state = by_stage @ whole, forward(middle)
    head = layer_jacobian(stages[4], state)
    torch.testing.assert_close(head @ whole, jacobians(twin, tokens.double()), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.linalg.svdvals(head)[:, 0], torch.tensor(certificate.layers.query("index == 5")["norm"].to_numpy()))


@sdpa_kernel(SDPBackend.MATH)
def test_the_branch_of_a_block_is_reported_beside_its_sum(transformer, tokens, certificate):
    attention = copy.deepcopy(transformer).double().eval().encoder.layers[0].self_attn
    expected = torch.linalg.svdvals(jacobians(lambda x: attention(x, x, x, need_weights=False)[0], tokens.double()))[:, 0]
    found = certificate.layers.pivot(index="sample", columns="index", values="branch_norm")
    torch.testing.assert_close(torch.tensor(found[1].to_numpy()), expected, rtol=1e-6, atol=0)
    assert found.notna().all().tolist() == [True, True, True, True, False]


@pytest.fixture(scope="module")
def single():
    return seeded(Transformer(layers=1))


def by_stage(certificate, column):
    return certificate.layers.pivot(index="sample", columns="index", values=column).to_numpy()


def test_an_exported_stage_may_be_measured_in_any_way(single, tokens):
    exact = certify(single, tokens, LABELS, method="exact")
    norms = by_stage(exact, "norm")
    free = certify(single, tokens, LABELS, method="matrix_free")
    assert by_stage(free, "norm") == pytest.approx(norms, rel=1e-6)
    assert (by_stage(free, "norm_hi") >= norms * (1 - 1e-9)).all()
    assert (by_stage(free, "rank_hi") >= by_stage(exact, "rank")).all()
    assert by_stage(certify(single, tokens[1:2], LABELS[1:2]), "norm") == pytest.approx(norms[1:2], rel=1e-9)
    # the batch as one operator is block diagonal
    together = certify(single, tokens, LABELS, batch_norm="train")
    assert by_stage(together, "norm") == pytest.approx(norms.max(0, keepdims=True), rel=1e-9)
    assert by_stage(together, "branch_norm")[:, :2] == pytest.approx(by_stage(exact, "branch_norm").max(0, keepdims=True)[:, :2], rel=1e-6)


def test_normalisation_may_come_first_and_the_encoder_stand_in_a_sequential(tokens):
    model = seeded(Transformer(layers=1, norm_first=True))
    stages = traced_stages(model.eval(), tokens)
    assert list(stages) == ["encoder.layers.0", "encoder.layers.0@2", "head"]
    sequential = nn.Sequential(nn.Linear(16, 16), model.encoder, nn.Flatten(), model.head)
    certificate = certify(sequential, tokens, LABELS)
    assert list(certificate.severity["stage"]) == ["0", "1", "2", "3"]
    assert (certificate.skip_depth, certificate.depth) == (1, 5)


def test_exported_stages_are_keyed_by_call_site_and_written_in_place_nowhere():
    model, x = seeded(Choosing()), normal(3, 4)
    certificate = certify(model, x, LABELS)
    assert list(certificate.severity["stage"]) == ["shared", "shared@2", "head"]
    by_hand = nn.Sequential(nn.Sequential(model.shared, nn.Tanh()), nn.Sequential(model.shared, nn.Tanh()), model.head)
    expected = certify(by_hand, x, LABELS)
    torch.testing.assert_close(certificate.log_attenuation, expected.log_attenuation)
    assert (certificate.skip_depth, certificate.depth) == (expected.skip_depth, expected.depth) == (2, 2)


class WritesInto(nn.Module):
    """Writes over a tensor that is read by its old name: no node of torch.fx's graph reads what was written."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(x)
        x[:, 1] = 2.0
        x.relu_()
        return self.last(x)


def test_a_tensor_written_over_in_place_counts_as_written():
    model, x = seeded(WritesInto()), normal(3, 4)
    torch.testing.assert_close(cut(model, None, torch.float32, "eval", inputs=x).states(x)[-1], model(x))
    assert (certify(model, x, LABELS).layers.query("index == 1")["rank"] < 4).all()


class Batched(nn.Module):
    """Reads the number of samples at the start, and uses it at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x):
        size = x.shape[0]
        return self.last(torch.relu(self.first(x)).view(size, -1))


def test_the_number_of_samples_jumps_over_no_stage():
    model, x = seeded(Batched()), normal(3, 2, 4)
    stages = traced_stages(model)
    assert list(stages) == ["first", "last"]
    torch.testing.assert_close(stages["last"](stages["first"](x)), model(x))


def test_branches_of_skips_by_identity_and_by_projection():
    inner, projection, other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    x = normal(3, 4)
    torch.testing.assert_close(branch(Residual(inner, nn.Identity(), nn.Tanh()))(x), inner(x))
    two = nn.Sequential(inner, nn.ReLU(), other)
    torch.testing.assert_close(branch(Residual(two, projection, nn.ReLU()))(x), two(x))
    assert branch(Residual(inner, projection, nn.Identity())) is None  # which of the two is the skip?
    assert branch(nn.Sequential(inner, nn.Tanh())) is None
    assert branch(nn.Sequential(Residual(inner, nn.Identity(), nn.Tanh()), other)) is None
    assert branch(nn.Tanh()) is None


def test_the_model_stays_as_it_was(single, tokens):
    model = copy.deepcopy(single).train()
    model.encoder.layers[0].eval()
    model.head.bias.requires_grad_(False)
    model(tokens).sum().backward()
    calls = []
    hook = model.head.register_forward_hook(lambda *_: calls.append(1))

    def everything():
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None), tokens]
        modes = [module.training for module in model.modules()]
        hooks = [[*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks] for module in model.modules()]
        flags = [parameter.requires_grad for parameter in model.parameters()]
        state = modes, hooks, flags, torch.backends.mha.get_fastpath_enabled(), [*vars(model.encoder)], torch.is_grad_enabled()
        return [tensor.clone() for tensor in [*tensors, torch.get_rng_state()]], state

    before, identities = everything(), [id(parameter) for parameter in model.parameters()]
    certify(model, tokens, LABELS)
    after = everything()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    assert identities == [id(parameter) for parameter in model.parameters()]
    assert hook.id in model.head._forward_hooks


def test_a_monitor_follows_the_weights_of_an_exported_model(single, tokens):
    model = copy.deepcopy(single)
    with LockMonitor(model, tokens, LABELS, every=1) as monitor:
        with torch.no_grad():
            model.head.weight.mul_(2)
        monitor.step()
    first, second = (monitor.history.query(f"step == {step} and stage == 'head'")["norm"].item() for step in (0, 1))
    assert second == pytest.approx(2 * first, rel=1e-2)


def test_what_neither_can_trace_is_told_with_both_reasons():
    class Deciding(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match=r"^Deciding: torch\.fx cannot trace it \(.*\), nor torch\.export \(.*\); wrap its stages"):
        certify(Deciding(), normal(3, 3), LABELS)
