"""Local losses against NumPy written by hand, and the proof that no gradient crosses a block border."""

import contextlib
import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from src.config import ModelConfig
from src.models import build
from src.models.layers import Layers
from src.training.local import (
    BETA,
    Blockwise,
    OneBlock,
    Prediction,
    PredSim,
    Similarity,
    all_blocks,
    blockwise,
    end_to_end_block,
    similarity,
)
from src.training.loop import train
from tests.training.sets import small_set
from tests.training.test_loop import config, network

LOSSES = ("pred", "sim", "predsim")
DEPTH = 7
SHAPE, CLASSES = (2, 3, 3), 3


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_config(**changes) -> ModelConfig:
    plain = {"init": "gaussian", "bias_var": 0.0, "norm": "none", "skip": "none", "branch_scale": 1.0}
    return ModelConfig(**{"family": "mlp", "depth": DEPTH, "width": 8, "activation": "tanh", "weight_var": 1.0, **plain, **changes})


def cut(size: int, loss: str, seed: int = 0, hidden: int = 0, shape: tuple[int, int, int] = SHAPE, **changes) -> Blockwise:
    model = model_config(**changes)
    chain = build(model, shape, CLASSES, rng(seed)).double()
    return blockwise(chain, size, loss, Layers(model, rng(seed + 100)), CLASSES, hidden)


def batch(n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, *SHAPE, generator=rng(1), dtype=torch.float64), torch.arange(n) % CLASSES


def cosine_matrix(X: np.ndarray) -> np.ndarray:
    """S(X) entry by entry."""
    S = np.empty((len(X), len(X)))
    for i, j in itertools.product(range(len(X)), repeat=2):
        a, b = X[i] - X[i].mean(), X[j] - X[j].mean()
        S[i, j] = a @ b / math.sqrt((a @ a) * (b @ b))
    return S


def test_similarity_is_the_adjusted_cosine() -> None:
    X = torch.randn(5, 4, generator=rng(0), dtype=torch.float64)
    np.testing.assert_allclose(similarity(X), cosine_matrix(X.numpy()), atol=1e-12)
    np.testing.assert_allclose(similarity(3 * X + 7), similarity(X), atol=1e-12)
    assert np.abs(cosine_matrix(X.numpy()) - (X @ X.T).numpy()).max() > 0.1


def test_one_hot_labels_are_alike_or_minus_one_over_the_other_classes() -> None:
    S = similarity(torch.eye(10, dtype=torch.float64)[[0, 0, 3]])
    np.testing.assert_allclose(S, [[1, 1, -1 / 9], [1, 1, -1 / 9], [-1 / 9, -1 / 9, 1]], atol=1e-12)


def test_features_that_are_all_alike_have_a_finite_loss_and_gradient() -> None:
    X = torch.ones(3, 4, requires_grad=True)
    similarity(X).sum().backward()
    assert (similarity(X) == 0).all()
    assert X.grad.isfinite().all()


def test_the_losses_are_those_written_by_hand() -> None:
    H, y = torch.randn(6, 4, generator=rng(0), dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 1])
    A, W = nn.Linear(4, 4).double(), nn.Linear(4, CLASSES).double()
    logits, projected, labels = W(H).detach().numpy(), A(H).detach().numpy(), np.eye(CLASSES)[y]
    pred = float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(6), y]))
    sim = float(((cosine_matrix(projected) - cosine_matrix(labels)) ** 2).mean())
    prediction, matching = Prediction(W), Similarity(A, CLASSES)
    assert prediction(H, y).item() == pytest.approx(pred, rel=1e-12)
    assert matching(H, y).item() == pytest.approx(sim, rel=1e-12)
    assert PredSim(prediction, matching)(H, y).item() == pytest.approx(0.01 * pred + 0.99 * sim, rel=1e-12)
    assert BETA == 0.99


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (4, [4, 2, 1]), (6, [6, 1])])
def test_blocks_of_k_stages_and_the_readout_alone(size: int, lengths: list[int]) -> None:
    model = cut(size, "pred")
    assert [len(block) for block in model.blocks] == lengths
    assert model.borders == list(itertools.accumulate(lengths))[:-1]
    assert len(model.stages) == DEPTH
    assert len(model.heads) == len(lengths)


def test_a_chain_cut_into_blocks_is_the_same_function_of_the_same_parameters() -> None:
    chain, (images, labels) = build(model_config(), SHAPE, CLASSES, rng(0)).double(), batch()
    model = blockwise(chain, 2, "pred", Layers(model_config(), rng(1)), CLASSES)
    assert torch.equal(model(images), chain(images))
    assert [id(p) for p in model.blocks.parameters()] == [id(p) for p in chain.parameters()]
    whole = end_to_end_block(chain)
    assert all_blocks(whole, images, labels).item() == cross_entropy(chain(images), labels).item()
    assert sum(p.numel() for p in whole.heads.parameters()) == 0


@pytest.mark.parametrize("hidden", [0, 2])
def test_heads_have_as_many_hidden_layers_as_asked_for(hidden: int) -> None:
    """A linear classifier of 8·3 weights and 3 biases; each hidden layer before it has 8·8 and 8."""
    sizes = [sum(p.numel() for p in head.parameters()) for head in cut(1, "pred", hidden=hidden).heads]
    assert sizes == [27 + hidden * 72] * (DEPTH - 1) + [0]


def test_pred_heads_read_the_pixel_means_of_convolutional_stages() -> None:
    model = cut(1, "pred", hidden=1, family="vgg", depth=8, shape=(1, 8, 8), norm="batch")
    losses = model.losses(torch.randn(4, 1, 8, 8, generator=rng(0), dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    assert len(losses) == 8
    assert torch.stack(losses).isfinite().all()


# No gradient crosses a border.


def gradients(model: Blockwise) -> list[torch.Tensor]:
    """∇θ_l of the sum of all losses, by stage."""
    model.zero_grad()
    all_blocks(model, *batch()).backward()
    return [torch.cat([p.grad.flatten() for p in stage.parameters()]) for stage in model.stages]


def is_used_elsewhere(model: Blockwise) -> bool:
    """Whether the loss of any block has a gradient for a parameter of another one."""
    for index, loss in enumerate(model.losses(*batch())):
        blocks = [(block, head) for other, (block, head) in enumerate(zip(model.blocks, model.heads, strict=True)) if other != index]
        strangers = [p for module in itertools.chain(*blocks) for p in module.parameters()]
        if any(g is not None for g in torch.autograd.grad(loss, strangers, allow_unused=True, retain_graph=True)):
            return True
    return False


def stages_that_feel_what_comes_after(model: Blockwise, another: Blockwise) -> set[int]:
    """The stages l whose gradient moves by one bit or more when all parameters after its block are replaced."""
    before, felt = gradients(model), set()
    for first, border in itertools.pairwise([0, *model.borders, len(model.stages)]):
        changed = copy.deepcopy(model)
        index = [0, *model.borders].index(first)
        for mine, other in ((changed.blocks, another.blocks), (changed.heads, another.heads)):
            for k in range(index + 1, len(mine)):
                mine[k].load_state_dict(other[k].state_dict())
        after = gradients(changed)
        felt |= {stage + 1 for stage in range(border) if not torch.equal(before[stage], after[stage])}
    return felt


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_gradient_crosses_a_border(loss: str, size: int, norm: str) -> None:
    model, another = cut(size, loss, norm=norm), cut(size, loss, seed=7, norm=norm)
    assert not is_used_elsewhere(model)
    assert stages_that_feel_what_comes_after(model, another) == set()
    assert all((gradient != 0).any() for gradient in gradients(model))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_proof_fails_where_the_features_are_not_cut_off(loss: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, another = cut(size, loss), cut(size, loss, seed=7)
    monkeypatch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
    assert is_used_elsewhere(model)
    assert stages_that_feel_what_comes_after(model, another) == set(range(1, model.borders[-1] + 1))


@pytest.mark.parametrize("loss", LOSSES)
def test_within_a_block_the_gradient_does_depend_on_later_stages(loss: str) -> None:
    model = cut(3, loss)
    before = gradients(model)
    with torch.no_grad():
        next(model.stages[1].parameters()).mul_(1.5)
    after = gradients(model)
    assert not torch.equal(before[0], after[0])


def test_backpropagation_feels_every_later_stage() -> None:
    models = [end_to_end_block(build(model_config(), SHAPE, CLASSES, rng(seed)).double()) for seed in (0, 7)]
    before = gradients(models[0])
    models[0].stages[-1].load_state_dict(models[1].stages[-1].state_dict())
    assert not any(torch.equal(a, b) for a, b in zip(before, gradients(models[0]), strict=True))


def first_blocks_trained_beneath(loss: str, size: int, kept: int) -> list[list[torch.Tensor]]:
    """Two chains that share their first `kept` blocks and no others are trained alike: what becomes of the blocks shared."""
    models = [cut(size, loss), cut(size, loss, seed=7)]
    for mine, other in ((models[1].blocks, models[0].blocks), (models[1].heads, models[0].heads)):
        for k in range(kept):
            mine[k].load_state_dict(other[k].state_dict())
    for model in models:
        train(model.float(), small_set(), config(), rng(0), objective=all_blocks)
    return [list(model.blocks[:kept].parameters()) for model in models]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_whole_training_never_learns_what_comes_after_its_block(loss: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; and where the features are not cut off it does learn it."""
    one, other = first_blocks_trained_beneath(loss, size, kept=1)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with monkeypatch.context() as patch:
        # what is evaluated or checked detaches too: only the blocks' inputs are left uncut
        detach = torch.Tensor.detach
        patch.setattr(torch.Tensor, "detach", lambda tensor: tensor if tensor.requires_grad and not tensor.is_leaf else detach(tensor))
        one, other = first_blocks_trained_beneath(loss, size, kept=1)
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Training, block by block.


@pytest.mark.parametrize("index", range(4))
def test_a_turn_trains_one_block_on_its_own_loss(index: int) -> None:
    model, (images, labels) = cut(2, "predsim"), batch()
    assert OneBlock(index)(model, images, labels).item() == model.losses(images, labels)[index].item()
    before = copy.deepcopy(model.state_dict())
    train(model.float(), small_set(), config(weight_decay=0.1), rng(0), objective=OneBlock(index))
    changed = {name.split(".")[1] for name, value in model.state_dict().items() if not torch.equal(value, before[name].float())}
    assert changed == {str(index)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_turn_has_a_gradient_for_its_own_block_and_head_alone(loss: str, size: int) -> None:
    model, another, (images, labels) = cut(size, loss), cut(size, loss, seed=7), batch()
    for index in range(len(model.blocks)):
        model.zero_grad(set_to_none=True)
        OneBlock(index)(model, images, labels).backward()
        reached = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
        assert reached == {str(index)}
        own = [p.grad.clone() for p in model.blocks[index].parameters()]
        changed = copy.deepcopy(model)
        for k in range(index + 1, len(model.blocks)):
            changed.blocks[k].load_state_dict(another.blocks[k].state_dict())
        changed.zero_grad(set_to_none=True)
        OneBlock(index)(changed, images, labels).backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(own, changed.blocks[index].parameters(), strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_readout_learns_from_the_cross_entropy_on_the_last_features_whatever_the_loss(loss: str) -> None:
    """As in the code of Nøkland & Eidnes (2019): a block of its own, with no head, on features that are cut off."""
    model, (images, labels) = cut(1, loss), batch()
    *_, readout = model.stages
    assert model.losses(images, labels)[-1].item() == cross_entropy(model(images), labels).item()
    found = torch.autograd.grad(model.losses(images, labels)[-1], list(model.parameters()), allow_unused=True)
    reached = {id(p) for p, gradient in zip(model.parameters(), found, strict=True) if gradient is not None}
    assert reached == {id(p) for p in readout.parameters()}


def test_a_turn_reaches_all_blocks_before_it_where_they_are_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = cut(2, "pred"), batch()
    monkeypatch.setattr(torch, "no_grad", contextlib.nullcontext)
    OneBlock(2)(model, images, labels).backward()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and "blocks" in name} == {"0", "1", "2"}


def test_similarity_has_a_matrix_and_no_bias() -> None:
    """Nøkland & Eidnes's linear layer: S(A H)."""
    *heads, _ = cut(1, "predsim").heads
    assert all([name for name, _ in head.similarity.named_parameters()] == ["projection.weight"] for head in heads)


def test_frozen_blocks_keep_their_statistics() -> None:
    model, (images, labels) = cut(2, "pred", norm="batch"), batch()
    before = copy.deepcopy(model.blocks.state_dict())
    model.train()
    OneBlock(1)(model, images, labels)
    moved = {name.split(".")[0] for name, value in model.blocks.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"1"}


def test_one_block_of_all_stages_trains_like_plain_backpropagation() -> None:
    plain, whole = network(18, 16, 3), network(18, 16, 3)
    train(plain, small_set(), config(), rng(0))
    train(end_to_end_block(whole), small_set(), config(), rng(0), objective=all_blocks)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), whole.parameters(), strict=True))
