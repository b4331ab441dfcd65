"""Residual blocks of two weight layers: original (He et al. 2016, CVPR), pre-activation (He et al. 2016, ECCV) and plain.

The three have equally many parameters: each weight layer but the readout goes with one normalisation, after it in the original
and plain forms, and before the next weight layer in the pre-activation form.
"""

from torch import Tensor, nn
from torch.fx import Proxy

from src.models.layers import Layers, stage

Value = Tensor | Proxy  # torch.fx traces `forward` with proxies


class Residual(nn.Module):
    """One residual block, after(shortcut(x) + branch(x)).

    Args:
        branch: what is learnt.
        shortcut: the identity, or a map to the branch's shape.
        after: the activation after the addition (original), or the identity (pre-activation).
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.after = after

    def forward(self, x: Value) -> Value:
        """Add the branch to the shortcut."""
        return self.after(self.shortcut(x) + self.branch(x))


def subsample_and_pad(extra: int) -> nn.Module:
    """Make the shortcut without parameters: every second pixel, `extra` channels of zeros (He et al. 2016, CVPR, option A).

    Returns: a module from [n, c, h, w] to [n, c + extra, ⌈h/2⌉, ⌈w/2⌉].
    """
    return stage(subsample=nn.AvgPool2d(1, stride=2), pad=nn.ConstantPad3d((0, 0, 0, 0, 0, extra), 0.0))


def entry(layers: Layers, width: int, **modules: nn.Module) -> nn.Module:
    """Make the stage before the blocks: W, then norm and φ unless the blocks begin with them."""
    if layers.config.skip == "preactivation":
        return stage(**modules)
    return stage(**modules, norm=layers.norm(width), activation=layers.activation())


def block(layers: Layers, first: nn.Linear | nn.Conv2d, second: nn.Linear | nn.Conv2d, shortcut: nn.Module) -> nn.Module:
    """Make a block of two weight layers, x ↦ φ(x + F(x)), x + F(x) or φ(F(x)) as the configuration says.

    Args:
        layers: makes norms and activations, and knows the kind of skip.
        first: W₁ of the branch F, which is norm–φ–W₁–norm–φ–W₂ (pre-activation) or W₁–norm–φ–W₂–norm.
        second: W₂.
        shortcut: maps x to the shape of F(x).
    """
    outputs, inputs = first.weight.shape[:2]
    norm, activation = layers.norm, layers.activation
    if layers.config.skip == "preactivation":
        before_first = {"norm1": norm(inputs), "activation1": activation(), "weight1": first}
        before_second = {"norm2": norm(outputs), "activation2": activation(), "weight2": second}
        return Residual(stage(**before_first, **before_second), shortcut, nn.Identity())
    branch = stage(weight1=first, norm1=norm(outputs), activation=activation(), weight2=second, norm2=norm(outputs))
    if layers.config.skip == "none":
        return stage(branch=branch, after=activation())
    return Residual(branch, shortcut, activation())


def ending(layers: Layers, width: int, **modules: nn.Module) -> nn.Module:
    """Make the stage after the blocks: the readout, preceded by the norm and φ that pre-activation blocks leave to it."""
    if layers.config.skip == "preactivation":
        return stage(norm=layers.norm(width), activation=layers.activation(), **modules)
    return stage(**modules)
