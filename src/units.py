"""The activation units of a stage: which are saturated, which are dead, and which stand at a kink."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, Tracer

from src.jacobian.materialised import transpose
from src.paths import in_line, operation

ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Hardtanh, nn.ReLU6, nn.Hardswish)
KINKED = (nn.ReLU, nn.LeakyReLU, nn.ReLU6)
FUNCTIONS = {"tanh", "sigmoid", "relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "hardtanh", "relu6", "hardswish"}
KINKED_FUNCTIONS = {"relu", "leaky_relu", "relu6"}
# a unit is saturated where φ'(z) is below this share of its largest value: |tanh| > .949, σ(z) outside (.026, .974)
SATURATED = 0.1


@dataclass(frozen=True)
class Units:
    """The activation units of a stage, as it was called on N samples; NaN where it has none.

    Attributes:
        saturation: the share of units whose slope φ'(z) is below a tenth of the largest slope, a sample; for ReLU that of inactive units.
        dead: the share of units with φ'(z) = 0 at every sample.
        kink: the share of z = 0 at an activation that has its kink there.
    """

    saturation: Float[Tensor, " n"]
    dead: float
    kink: float

    @classmethod
    def of(cls, stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> "Units":
        """Run a stage and look at its units.

        Args:
            stage: f_l.
            inputs: H_{l−1}.
        """
        saturated, dead, kink = [], [], []
        for call in _activations(stage, inputs):
            slope = _slope(call.phi, call.z)
            saturated.append((slope < SATURATED * largest_slope(call.phi, call.z)).reshape(len(inputs), -1))
            dead.append((slope == 0).all(0).flatten())
            kink.append(((call.z == 0) & call.kinked).flatten())
        if not saturated:
            return cls(inputs.new_full((len(inputs),), torch.nan), math.nan, math.nan)
        return cls(torch.cat(saturated, 1).to(inputs.dtype).mean(1), *(float(torch.cat(part).double().mean()) for part in (dead, kink)))


@dataclass(frozen=True)
class _Call:
    """One call of an activation φ on pre-activations z."""

    phi: Callable[[Tensor], Tensor]
    z: Tensor = field(repr=False)
    kinked: bool


def _activations(stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> list[_Call]:
    """Every activation that a stage calls: modules, and functions where its graph can be had."""
    with torch.no_grad():
        if in_line(stage) is None:
            root = nn.Sequential(stage)  # so that a leaf stays one node
            try:
                recording = _Recording(GraphModule(root, Tracer().trace(root)))
                recording.run(inputs)
                return recording.calls
            except Exception:  # tracing runs the model's own code: anything may be raised
                pass
        return _hooked(stage, inputs)


class _Recording(Interpreter):
    """Runs a graph and takes down the activations in it."""

    def __init__(self, graph: GraphModule):
        super().__init__(graph)
        self.calls: list[_Call] = []

    def run_node(self, n: Node) -> Any:
        module = self.submodules[str(n.target)] if n.op == "call_module" else None
        name = operation(n).rstrip("_")
        if isinstance(module, ACTIVATIONS):
            self._record(n, module.forward, isinstance(module, KINKED))
        elif n.op in ("call_function", "call_method") and name in FUNCTIONS:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            call = self.call_method if n.op == "call_method" else self.call_function
            self._record(n, lambda z: call(n.target, (z.clone(), *args[1:]), kwargs), name in KINKED_FUNCTIONS)
        return super().run_node(n)

    def _record(self, n: Node, phi: Callable[[Tensor], Tensor], kinked: bool) -> None:
        self.calls.append(_Call(phi, self.env[n.all_input_nodes[0]].clone(), kinked))  # which may be written over


def _hooked(stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> list[_Call]:
    """The activation modules that a stage calls."""
    calls: list[_Call] = []

    def record(module: nn.Module, arguments: tuple[Tensor, ...], _: Tensor) -> None:
        # forward, not a call, so that no hook sees it
        calls.append(_Call(module.forward, arguments[0].clone(), isinstance(module, KINKED)))

    hooks = [module.register_forward_hook(record) for module in stage.modules() if isinstance(module, ACTIVATIONS)]
    try:
        stage(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _slope(phi: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """|φ'(z)|, unit by unit."""
    _, pull_back = transpose(phi, z)
    return pull_back(torch.ones_like(z)).abs()


def largest_slope(phi: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The largest |φ'(z)|, in the dtype and on the device of a z."""
    return _slope(phi, torch.linspace(-8, 8, 1601, dtype=z.dtype, device=z.device)).max()
