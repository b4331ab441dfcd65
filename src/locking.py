"""Gradient profile, severity and lock condition of a stage."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from src.chain import BatchNormMode, Chain, cut, require_finite
from src.errors import UserError
from src.jacobian.materialised import parameter_gradients, transpose
from src.spectrum import spectrum
from src.statistics import slope

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ErrorSignal:
    """g_l of every sample as a direction of unit length and ln‖g_l‖: products over many layers leave the range of floats."""

    direction: Float[Tensor, "n ..."]
    log_norm: Float[Tensor, " n"]

    @classmethod
    def of(cls, covectors: Float[Tensor, "n ..."], log_scale: Float[Tensor, " n"]) -> "ErrorSignal":
        """Normalise covectors that stand for exp(log_scale)·covector."""
        norm = covectors.reshape(len(covectors), -1).norm(dim=1)
        safe = torch.where(norm > 0, norm, 1)
        return cls(covectors / safe.reshape(-1, *[1] * (covectors.ndim - 1)), norm.log() + log_scale)

    def pull_back(self, stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> "ErrorSignal":
        """g_{l−1} = J_lᵀ g_l."""
        _, pull_back = transpose(stage, inputs)
        return ErrorSignal.of(pull_back(self.direction), self.log_norm)

    def log_rms(self) -> float:
        """½ ln mean_n ‖g_n‖², nats."""
        return log_rms(self.log_norm)

    def relative(self) -> Float[Tensor, "n d"]:
        """The samples' signals as rows, all divided by the norm of the longest."""
        longest = self.log_norm.max()
        share = (self.log_norm - longest).exp() if longest > -torch.inf else torch.zeros_like(self.log_norm)
        return self.direction.reshape(len(share), -1) * share.unsqueeze(1)


def loss_signal(loss: Loss, outputs: Float[Tensor, "n ..."], targets: Tensor) -> ErrorSignal:
    """g_L = ∇_{H_L} ℓ of every sample's own loss, ℓ(H_L, y) of that sample alone.

    Raises: UserError where the loss does not take such outputs and targets.
    """

    def own(output: Tensor, target: Tensor) -> Tensor:
        return loss(output.unsqueeze(0), target.unsqueeze(0)).sum()

    try:
        gradients = vmap(grad(own))(outputs, targets)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the user's own code
        given = f"outputs {'×'.join(map(str, outputs.shape))} and targets {'×'.join(map(str, targets.shape))} of {targets.dtype}"
        raise UserError(
            f"certify: the loss fails on {given} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.150}); "
            "it is given a sample at a time by torch.func.vmap, and may not branch on values"
        ) from error
    return ErrorSignal.of(gradients, outputs.new_zeros(len(outputs)))


@dataclass(frozen=True)
class Link:
    """One stage on the way back: f_l at H_{l−1} = `inputs`, with g_l = `signal` behind it and g_{l−1} = `signal_before` before it."""

    index: int
    name: str
    stage: nn.Module
    inputs: Float[Tensor, "n ..."]
    signal: ErrorSignal
    signal_before: ErrorSignal


def walk_back(chain: Chain, inputs: Float[Tensor, "n ..."], targets: Tensor, loss: Loss) -> Iterator[Link]:
    """Go from the loss to the input, l = L…1, with g_{l−1} = J_lᵀg_l.

    Args:
        chain: f_1 … f_L.
        inputs: H_0.
        targets: one a sample.
        loss: ℓ(H_L, y).

    Yields: a link a stage, the last stage first.
    Raises: UserError naming stage and sample where a state or a signal is not finite, or when inputs and targets differ in number.
    """
    require_pairs(inputs, targets)
    if chain.on_batch:
        inputs, targets, loss = inputs.unsqueeze(0), targets.unsqueeze(0), _on_batch(loss)
    states = chain.states(inputs)
    signal = loss_signal(loss, states[-1], targets)
    require_finite(signal.direction, "the gradient of the loss")
    for index in range(len(chain.stages), 0, -1):
        name, stage, state = chain.names[index - 1], chain.stages[index - 1], states[index - 1]
        before = signal.pull_back(stage, state)
        require_finite(before.direction, f"the error signal before stage '{name}'")
        yield Link(index, name, stage, state, signal, before)
        signal = before


def require_pairs(inputs: Tensor, targets: Tensor) -> None:
    """Raise UserError unless there is a target for each input, and at least one."""
    if len(inputs) == 0 or len(inputs) != len(targets):
        raise UserError(f"certificate: {len(inputs)} inputs and {len(targets)} targets; give as many of each, at least one")


def error_signals(
    network: nn.Sequential, inputs: Float[Tensor, "n ..."], targets: Tensor, batch_norm: BatchNormMode = "eval"
) -> dict[int, float]:
    """½ ln mean_n ‖g_l‖² of every stage l under the cross-entropy, in float64; nats.

    Args:
        network: a chain.
        inputs: H_0.
        targets: classes, one a sample.
        batch_norm: "train": the batch is one sample, g_l = ∂ℒ/∂H_l of its mean loss.
    """
    links = walk_back(cut(network, None, torch.float64, batch_norm), inputs.double(), targets, cross_entropy)
    return {link.index: link.signal.log_rms() for link in links}


def gradient_profile(chain: Chain, inputs: Float[Tensor, "n ..."], targets: Tensor, loss: Loss) -> pd.DataFrame:
    """How the gradient goes back through a chain, without any singular value.

    Args:
        chain: f_1 … f_L.
        inputs: H_0.
        targets: one a sample.
        loss: ℓ(H_L, y).

    Returns: a row a stage, first to last: index, stage; log_error_norm = ½ ln mean_n ‖g_l‖² and
        log_weight_grad_norm = ½ ln mean_n ‖∇W_l‖², in nats.
    """
    rows = []
    for link in walk_back(chain, inputs, targets, loss):
        gradients = parameter_gradients(link.stage, link.inputs, link.signal.direction, weights_only=True)
        rows.append(
            {
                "index": link.index,
                "stage": link.name,
                "log_error_norm": link.signal.log_rms(),
                "log_weight_grad_norm": log_rms(gradients.norm(dim=1).log() + link.signal.log_norm),
            }
        )
    return pd.DataFrame(rows[::-1])


def log_rms(log_norms: Float[Tensor, " n"]) -> float:
    """½ ln mean exp(2 log_norm)."""
    return float((2 * log_norms).logsumexp(0) - math.log(len(log_norms))) / 2


def growth(signals: Mapping[int, float], last: int | None = None) -> float:
    """The growth of the gradient on its way back: the slope of ln mean_n ‖g_l‖² against the distance L − l, over the deeper half.

    Args:
        signals: ½ ln mean_n ‖g_l‖² by the stage, l = 1 … L, nats.
        last: the stage up to which the slope is taken, from L//2 on; None: L − 1, the last but the readout.

    Returns: nats a layer.
    """
    depth = len(signals)
    deep = range(depth // 2, last + 1 if last else depth)
    return slope([depth - layer for layer in deep], [2 * signals[layer] for layer in deep]).value


def _on_batch(loss: Loss) -> Loss:
    return lambda outputs, targets: loss(outputs.squeeze(0), targets.squeeze(0))


def severity(signal: ErrorSignal) -> dict[str, float | int]:
    """The locking severity of a stage from the N×d matrix G with rows g_lᵀJ_l.

    λ = 1 − σ_min(G)/σ_max(G) as stated (specification, part 2), and the same over the r nonzero singular values, r = rank G.

    Args:
        signal: g_{l−1} = J_lᵀg_l of every sample.

    Returns: lambda, lambda_nonzero, rank and stable_rank; λ is NaN where G = 0.
    """
    s = spectrum(signal.relative())
    rank = int(s.rank)
    least = s.values[max(rank - 1, 0)]
    return {
        "lambda": float(1 - s.smallest / s.norm),
        "lambda_nonzero": float(1 - least / s.norm),
        "rank": rank,
        "stable_rank": float(s.stable_rank),
    }


def severities(signals: Sequence[ErrorSignal]) -> dict[str, list[float]]:
    """The `severity` of several stages at once, from GGᵀ in float64: to √(Nε), which loses nothing that a G of float32 holds.

    Args:
        signals: g_{l−1} of every stage, of the same N samples.

    Returns: the columns of `severity`, a number a stage; NaN where G is not finite.
    """
    rows = [signal.relative() for signal in signals]
    grams = torch.stack([G.double() @ G.double().T for G in rows]).cpu()
    finite = grams.isfinite().all(2).all(1)[:, None]
    squares = torch.linalg.eigvalsh(grams.where(finite[:, None], 0)).flip(1).clamp(min=0).where(finite, torch.nan)
    shares = (squares / squares[:, :1]).sqrt()
    known = (grams.shape[-1] * torch.finfo(grams.dtype).eps) ** 0.5  # as in `src.spectrum.gram_spectrum`
    tolerance = shares.new_tensor([max(known, max(G.shape) * torch.finfo(G.dtype).eps) for G in rows])
    rank = (shares > tolerance[:, None]).sum(1)
    smallest = torch.tensor([min(G.shape) - 1 for G in rows])
    columns = {
        "lambda": 1 - shares.gather(1, smallest[:, None])[:, 0],
        "lambda_nonzero": 1 - shares.gather(1, (rank - 1).clamp(min=0)[:, None])[:, 0],
        "rank": rank + 0 * squares[:, 0],
        "stable_rank": shares.square().sum(1),
    }
    return {column: values.tolist() for column, values in columns.items()}


def lock_condition(gradients: Float[Tensor, "n p"], free: Float[Tensor, "n p"]) -> dict[str, int | bool]:
    """The lock condition over the batch: rank of the N×|θ| matrix of per-sample gradients against its free rank.

    rank(g_nᵀP_n)_n < rank(ξ_nᵀP_n)_n with independent Gaussian ξ_n in place of g_n (specification, part 1).

    Args:
        gradients: the rows g_nᵀP_n, each up to a factor that does not matter to the rank.
        free: the rows ξ_nᵀP_n.

    Returns: gradient_rank, free_rank, and locked.
    """
    gradient_rank, free_rank = (int(spectrum(matrix).rank) if matrix.shape[1] else 0 for matrix in (gradients, free))
    return {"gradient_rank": gradient_rank, "free_rank": free_rank, "locked": gradient_rank < free_rank}
