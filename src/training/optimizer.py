"""The optimiser and the schedule of its learning rate, both PyTorch's."""

import math
from collections.abc import Callable, Mapping

from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """SGD with heavy-ball momentum, v ← μv + g, θ ← θ − lr·v, or Adam with β = (μ, 0.999); weight decay λ adds λθ to g."""
    if config.optimizer == "adam":
        return Adam(model.parameters(), config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay, fused=True)
    # a loop over the parameters takes more than twice as long, a quarter of a step of a deep narrow net
    return SGD(model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)


def build_schedule(optimizer: Optimizer, config: TrainingConfig, steps: int) -> LambdaLR:
    """The rate of step t = 0..T−1: lr throughout, or lr times FACTORS of `schedule`.

    Args:
        optimizer: whose rate is set.
        config: `schedule` is read.
        steps: T, the steps that will be done.
    """
    factor = FACTORS[config.schedule]
    return LambdaLR(optimizer, lambda t: factor(t, steps))


def _cosine(t: int, steps: int) -> float:
    """(1 + cos(πt/T))/2."""
    return (1 + math.cos(math.pi * t / steps)) / 2


def _steps(t: int, steps: int) -> float:
    """A tenth from T/2 on and a hundredth from 3T/4 on (He et al. 2016, CVPR, section 4.2: at 32,000 and 48,000 of 64,000)."""
    return float(0.1 ** ((2 * t >= steps) + (4 * t >= 3 * steps)))


def _warm_steps(t: int, steps: int) -> float:
    """The same with a tenth before T/160 too (ibid., depth 110: until the training error is below 80%, about 400 of 64,000)."""
    return 0.1 if 160 * t < steps else _steps(t, steps)


# of lr, by the schedule
FACTORS: Mapping[str, Callable[[int, int], float]] = {
    "constant": lambda t, steps: 1.0,
    "cosine": _cosine,
    "steps": _steps,
    "warm_steps": _warm_steps,
}
