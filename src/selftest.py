"""What every certificate asks of each stage before it answers: is it a function, of each sample alone, and is its derivative one?"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from src.chain import Chain
from src.errors import UserError
from src.jacobian.materialised import transpose
from src.locking import Link

# ⟨Ju, v⟩ and ⟨u, Jᵀv⟩ are sums of as many products as J has rows or columns: rounding grows with their root
ROUNDING = 1e3


def check_stage(link: Link, probe: Tensor, direction: Tensor) -> None:
    """Ask a stage whether it repeats itself, keeps samples apart, and is differentiated rightly.

    Determinism: f(x) = f(x), bit for bit; to rounding where another kernel computes it because a derivative is taken. Leakage:
    ∂f(x_n)/∂x_m = 0 for m ≠ n, exactly. Adjoint: ⟨Ju, v⟩ = ⟨u, Jᵀv⟩, Ju by forward and Jᵀv by reverse differentiation, which share no
    formula; where there is no forward derivative, Ju by a difference, to ε^¼.

    Args:
        link: the stage with its inputs.
        probe: v, as large as the outputs.
        direction: u, as large as the inputs.

    Raises: UserError with the reason and the stage's name.
    """
    stage, x = link.stage, link.inputs
    outputs, pull_back = transpose(stage, x)
    if not _repeats(stage, x, outputs):
        raise UserError(
            f"certificate: stage '{link.name}' answers differently when it is asked twice: it draws random numbers or keeps a state; "
            "switch that off (functional dropout wants training=self.training)"
        )
    if len(x) > 1:
        leaked = max(_leaked(pull_back, probe, sample) for sample in (0, len(x) - 1))
        if leaked > 0:
            raise UserError(
                f"certificate: in stage '{link.name}' a sample's output depends on the other samples (by {leaked:.2g}); "
                "freeze its statistics, or certify with batch_norm='train', the batch as one"
            )
    tolerance = ROUNDING * torch.finfo(x.dtype).eps
    try:
        pushed = _push(stage, x, direction)
    except NotImplementedError:  # an operation without a forward derivative
        pushed, tolerance = _difference(stage, x, direction), torch.finfo(x.dtype).eps ** 0.25
    pushed, probe, direction, pulled = (part.reshape(len(x), -1) for part in (pushed, probe, direction, pull_back(probe)))
    size = pushed.norm(dim=1) * probe.norm(dim=1) + direction.norm(dim=1) * pulled.norm(dim=1)
    error = ((pushed * probe).sum(1) - (direction * pulled).sum(1)).abs() / torch.where(size > 0, size, 1)
    if error.max() > tolerance:
        raise UserError(
            f"certificate: the backward pass of stage '{link.name}' is not the transpose of its derivative "
            f"(⟨Ju,v⟩ and ⟨u,Jᵀv⟩ differ by {float(error.max()):.2g} of their size); look at its custom autograd functions, "
            "and at what it computes in another precision than dtype: with dtype=torch.float32 all is in single"
        )


@torch.no_grad()
def _repeats(stage: nn.Module, x: Tensor, outputs: Tensor) -> bool:
    """Whether the stage answers as it did when its derivative was taken."""
    again = stage(x)
    if torch.equal(again, outputs):
        return True
    rounding = ROUNDING * torch.finfo(x.dtype).eps * again.abs().max()
    return bool((again - outputs).abs().max() <= rounding) and torch.equal(again, stage(x))


def _leaked(pull_back: Callable[[Tensor], Tensor], probe: Tensor, sample: int) -> float:
    """The largest |∂f(x_n)/∂x_m|, m ≠ n, of one sample n, along the probe."""
    alone = torch.zeros_like(probe)
    alone[sample] = probe[sample]
    pulled = pull_back(alone)
    pulled[sample] = 0
    return float(pulled.abs().max())


def _push(stage: nn.Module, x: Tensor, direction: Tensor) -> Tensor:
    """J·u of every sample."""
    with warnings.catch_warnings(), dual_level():
        warnings.simplefilter("ignore")  # of torch's own compilation
        pushed = unpack_dual(stage(make_dual(x, direction))).tangent
    return torch.zeros_like(stage(x)) if pushed is None else pushed  # of a constant there is none


@torch.no_grad()
def _difference(stage: nn.Module, x: Tensor, direction: Tensor) -> Tensor:
    """J·u of every sample as (f(x + hu) − f(x − hu))/2h, h the ε^⅓ part of ‖x‖/‖u‖, right to its square away from kinks."""
    sizes = (part.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny) for part in (x, direction))
    h = torch.finfo(x.dtype).eps ** (1 / 3) * torch.div(*sizes)
    step = h.reshape(-1, *[1] * (x.ndim - 1)) * direction
    rise = stage(x + step) - stage(x - step)
    return rise / (2 * h).reshape(-1, *[1] * (rise.ndim - 1))


def state_of(chain: Chain) -> list[Tensor]:
    """A copy of all buffers, which no forward pass may change."""
    return [buffer.clone() for stage in chain.stages for buffer in _buffers(stage)]


def check_state(chain: Chain, before: list[Tensor]) -> None:
    """Compare the buffers with their copy.

    Raises: UserError naming the stage whose forward pass writes into its buffers.
    """
    copies = iter(before)
    for name, stage in zip(chain.names, chain.stages, strict=True):
        if any(not torch.equal(buffer, next(copies)) for buffer in list(_buffers(stage))):
            raise UserError(f"certificate: stage '{name}' writes into its buffers in eval mode; certify it with that switched off")


def _buffers(stage: nn.Module) -> list[Tensor]:
    return list(stage.buffers())
