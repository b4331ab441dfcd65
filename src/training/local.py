"""Local losses: a chain cut into blocks, each trained by a loss of its own, without any gradient between them.

Nøkland & Eidnes 2019, "Training neural networks with local error signals" (the losses);
Belilovsky et al. 2019, "Greedy layerwise learning can scale to ImageNet" (auxiliary heads with hidden layers, one block after another).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize, one_hot
from torch.nn.utils import parameters_to_vector

from src.models.convolutional import GlobalMean
from src.models.layers import Layers, stage

LocalLoss = Literal["pred", "sim", "predsim"]
BETA = 0.99  # the share of the similarity in predsim (Nøkland & Eidnes 2019)


def similarity(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """S(X), the adjusted cosine similarity: the cosines between rows from each of which its own mean is taken (Nøkland & Eidnes 2019)."""
    centred = normalize(rows - rows.mean(1, keepdim=True), dim=1)
    return centred @ centred.T


class Prediction(nn.Module):
    """pred: the mean cross-entropy of a classifier on the features, in nats."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, features: Float[Tensor, "n ..."], labels: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
        """The loss of a batch."""
        return cross_entropy(self.classifier(features), labels)


class Similarity(nn.Module):
    """sim: ‖S(A H) − S(Y)‖_F²/n² with a learnt matrix A and the one-hot labels Y of a batch of n."""

    def __init__(self, projection: nn.Linear, classes: int) -> None:
        super().__init__()
        self.projection = projection
        self.classes = classes

    def forward(self, features: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
        """The loss of a batch."""
        projected = self.projection(features)
        return mse_loss(similarity(projected), similarity(one_hot(labels, self.classes).to(projected)))


class PredSim(nn.Module):
    """predsim: (1 − β)·pred + β·sim, β = .99."""

    def __init__(self, prediction: Prediction, similarity: Similarity) -> None:
        super().__init__()
        self.prediction = prediction
        self.similarity = similarity

    def forward(self, features: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
        """The loss of a batch."""
        loss: Tensor = (1 - BETA) * self.prediction(features, labels) + BETA * self.similarity(features, labels)
        return loss


class Blockwise(nn.Module):
    """Blocks of stages in a row, each with a head: the loss of what the block makes of its input, whose past is cut off.

    Args:
        blocks: the stages of each; a block of all stages is plain backpropagation.
        heads: one a block, from features and labels to a loss.
    """

    def __init__(self, blocks: Sequence[nn.Sequential], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(heads)

    @property
    def stages(self) -> list[nn.Module]:
        """f_1 … f_L."""
        return [stage for block in self.blocks for stage in block.children()]

    @property
    def borders(self) -> list[int]:
        """How many stages stand before each border between two blocks."""
        return list(accumulate(len(list(block.children())) for block in self.blocks))[:-1]

    def forward(self, images: Float[Tensor, "n ..."]) -> Float[Tensor, "n k"]:
        """The logits of the chain; no head has a part in them."""
        state = images
        for block in self.blocks:
            state = block(state)
        return state

    def losses(self, images: Float[Tensor, "n ..."], labels: Int64[Tensor, " n"]) -> list[Float[Tensor, ""]]:
        """The loss of every block."""
        losses, state = [], images
        for block, head in zip(self.blocks, self.heads, strict=True):
            state = block(state.detach())
            losses.append(head(state, labels))
        return losses


def end_to_end_block(chain: nn.Sequential) -> Blockwise:
    """Plain backpropagation: all stages are one block, whose loss is the cross-entropy of the logits."""
    return Blockwise([chain], [Prediction(nn.Identity())])


def blockwise(chain: nn.Sequential, size: int, loss: LocalLoss, layers: Layers, classes: int, hidden: int = 0) -> Blockwise:
    """Cut a chain into blocks of `size` stages, the last of them perhaps smaller, and the readout as a block of its own.

    The readout learns from the cross-entropy on features that are cut off, whatever the blocks' loss (as `layer_out` in the code of Nøkland
    & Eidnes 2019, though that starts from zero).

    Args:
        chain: f_1 … f_L, as built, the last stage the readout; the blocks share its parameters.
        size: stages from one border to the next.
        loss: of every block but the readout's, which is the cross-entropy. sim and predsim take dense stages.
        layers: draws the heads' weights, block by block, from a generator of their own.
        classes: number of logits.
        hidden: weight layers of a pred head before its linear classifier, each with φ. What Belilovsky et al. (2019) call a k-hidden-layer
            auxiliary problem is size = 1 and hidden = k − 1.
    """
    *_, readout = chain
    blocks = [chain[first : min(first + size, len(chain) - 1)] for first in range(0, len(chain) - 1, size)]
    heads = [_head(block, loss, layers, classes, hidden) for block in blocks]
    whole = Blockwise([*blocks, nn.Sequential(readout)], [*heads, Prediction(nn.Identity())])
    return whole.to(next(chain.parameters()))


def _head(block: nn.Sequential, loss: LocalLoss, layers: Layers, classes: int, hidden: int) -> nn.Module:
    *_, last = (parameter for parameter in block.parameters() if parameter.ndim > 1)
    width, is_convolutional = len(last), last.ndim > 2

    def classifier() -> nn.Module:
        weigh = layers.conv if is_convolutional else layers.linear
        auxiliary = {f"hidden{index}": stage(weight=weigh(width, width), activation=layers.activation()) for index in range(1, hidden + 1)}
        return stage(**auxiliary, pool=GlobalMean() if is_convolutional else None, linear=layers.linear(width, classes))

    if loss == "pred":
        return Prediction(classifier())
    projection = layers.linear(width, width)
    projection.register_parameter("bias", None)
    matching = Similarity(projection, classes)
    return matching if loss == "sim" else PredSim(Prediction(classifier()), matching)


def all_blocks(model: Blockwise, images: Float[Tensor, "n ..."], labels: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
    """The objective of simultaneous training: the sum of all blocks' losses."""
    return torch.stack(model.losses(images, labels)).sum()


@dataclass(frozen=True)
class OneBlock:
    """The objective of one turn of sequential training: the loss of one block. Those before it are frozen, their statistics too.

    Args:
        index: of the block, 0 the first.
    """

    index: int

    def __call__(self, model: Blockwise, images: Float[Tensor, "n ..."], labels: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
        """The block's loss."""
        state = images
        with torch.no_grad():
            for block in model.blocks[: self.index]:
                state = block.eval()(state)
        loss: Tensor = model.heads[self.index](model.blocks[self.index](state), labels)
        return loss


def gradients(model: Blockwise, images: Float[Tensor, "n ..."], labels: Int64[Tensor, " n"]) -> list[Float[Tensor, " _"]]:
    """∇θ_l of the sum of all blocks' losses, a vector a stage."""
    stages = [list(stage.parameters()) for stage in model.stages]
    found = iter(torch.autograd.grad(all_blocks(model, images, labels), [parameter for stage in stages for parameter in stage]))
    return [parameters_to_vector([next(found) for _ in stage]) for stage in stages]


def later_influence(model: Blockwise, other: Blockwise, border: int, images: Float[Tensor, "n ..."], labels: Int64[Tensor, " n"]) -> float:
    """The largest ‖∇θ_l − ∇θ_l'‖/‖∇θ_l‖, l ≤ border, when all stages after it, and the heads of blocks after it, are another model's.

    Args:
        model: left as it is.
        other: cut alike.
        border: stages before those that are replaced, 1 … L − 1.
        images: standardised.
        labels: theirs.
    """
    redrawn = copy.deepcopy(model)
    for later, drawn in zip(redrawn.stages[border:], other.stages[border:], strict=True):
        later.load_state_dict(drawn.state_dict())
    for first, head, drawn in zip([0, *redrawn.borders], redrawn.heads, other.heads, strict=True):
        if first >= border:
            head.load_state_dict(drawn.state_dict())
    before, after = (gradients(net, images, labels)[:border] for net in (model, redrawn))
    return max(float((a - b).norm() / a.norm()) for a, b in zip(before, after, strict=True))
