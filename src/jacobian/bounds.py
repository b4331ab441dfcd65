"""Rigorous bounds on ‖J‖ and rank J of a stage at a point, read off its graph: no iteration, no randomness.

Every node carries a bound on ‖∂node/∂x‖ and on its rank: layers multiply by their own norms, sums add, concatenations add squares. The
norm of a convolution is bounded by that of the circular one on a larger grid, of which it is a compression (Sedghi, Gupta & Long 2019,
"The singular values of convolutional layers", theorem 6).
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, Tracer
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm

from src.jacobian.materialised import transpose
from src.paths import keeps_its_forward


@dataclass(frozen=True)
class Bounds:
    """‖J‖ ≤ norm and rank J ≤ rank, of every sample; the norm is inf where an operation is unknown."""

    norm: Float[Tensor, " n"]
    rank: Int[Tensor, " n"]

    def __mul__(self, factor: float | Float[Tensor, " n"]) -> "Bounds":
        """Behind a map of the given norm."""
        return Bounds(self.norm * factor, self.rank)

    def __add__(self, other: "Bounds") -> "Bounds":
        """Of a sum."""
        return Bounds(self.norm + other.norm, self.rank + other.rank)

    def beside(self, other: "Bounds") -> "Bounds":
        """Of a concatenation."""
        return Bounds((self.norm**2 + other.norm**2).sqrt(), self.rank + other.rank)

    def at_most(self, rank: int | Int[Tensor, " n"]) -> "Bounds":
        """Where the rank can't exceed another number either."""
        return Bounds(self.norm, self.rank.clamp(max=rank) if isinstance(rank, int) else torch.minimum(self.rank, rank))


GRAMS = 6
DECOMPOSED = 5e9  # m·d·min(m, d) of a matrix that is decomposed for its norm
SINGLE = 1e-4  # above the rounding of these sums in single precision, relative
POINTWISE = {"relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "gelu", "silu", "elu", "leaky_relu", "hardtanh", "hardswish",
             "hardsigmoid", "softplus", "relu6", "sin", "cos", "exp"}  # fmt: skip
ADDING = {"add", "add_", "iadd", "sub", "sub_", "isub"}
REARRANGING = {"flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "clone"}
ACTIVATIONS = (
    nn.Tanh, nn.Sigmoid, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Hardtanh, nn.ReLU6, nn.Hardswish,
    nn.Hardsigmoid,
)  # fmt: skip
KEEPING = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad2d,
)  # fmt: skip


def bounds(stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> Bounds:
    """Bound ‖J‖ and rank J of a stage at every input.

    Args:
        stage: f, traceable, in eval mode, acting on each sample alone.
        inputs: N inputs.

    Returns: the bounds; rank at most that of the support of φ', and of the narrowest tensor that every path passes.
    """
    root = nn.Sequential(stage)  # so that a leaf stays one node
    graph = Tracer().trace(root)
    walk = _Bounding(GraphModule(root, graph), inputs)
    try:
        with torch.no_grad():
            walk.run(inputs)
    except Exception:  # running the stage's own graph: anything may be raised
        return Bounds(torch.full_like(walk.start.norm, torch.inf), walk.start.rank)
    output = next(node for node in graph.nodes if node.op == "output")
    return walk.of[output.name]


class _Bounding(Interpreter):
    """Runs a graph and keeps the bounds of every node that depends on the input."""

    def __init__(self, graph: GraphModule, inputs: Tensor):
        super().__init__(graph)
        self.count = len(inputs)
        size = torch.full((len(inputs),), inputs[0].numel(), device=inputs.device)
        self.start = Bounds(inputs.new_ones(len(inputs)), size)
        self.of: dict[str, Bounds] = {}  # by the node's name: the graph is copied

    def run_node(self, n: Node) -> Any:
        read: list[Node] = []
        map_arg((n.args, n.kwargs), read.append)  # what stands twice is read twice
        sources = [source for source in read if source.name in self.of]
        # taken before it runs, for it may write over what it reads
        states = [self.env[source].clone() for source in sources]
        result = super().run_node(n)
        if n.op == "placeholder":
            self.of[n.name] = self.start
        elif n.op == "output":
            self.of[n.name] = self.of[sources[0].name]
        elif sources and isinstance(result, Tensor) and result.is_floating_point():
            known = self._rule(n, [self.of[source.name] for source in sources], states, result)
            self.of[n.name] = known.at_most(result.numel() // self.count)  # the samples need not come first
        return result

    def _rule(self, n: Node, known: list[Bounds], states: list[Tensor], result: Tensor) -> Bounds:
        """The bounds of a node from those of what it reads."""
        if n.op == "call_module":
            module = self.submodules[str(n.target)]
            if isinstance(module, ACTIVATIONS) and keeps_its_forward(module):
                return self._pointwise(module.forward, known[0], states[0])
            return _behind(module, known[0], states[0])
        name = str(n.target) if n.op == "call_method" else getattr(n.target, "__name__", "")
        if name in ADDING and not n.kwargs:  # alpha would scale a term
            return reduce(operator.add, known)
        if name == "cat":
            return reduce(Bounds.beside, known)
        if len(known) > 1:
            return known[0] * math.inf
        if name in POINTWISE:
            return self._pointwise(lambda z: self._at(n, z), known[0], states[0])
        if name in REARRANGING or (name == "getitem" and _picks_once(n.args[1])):
            return known[0]
        if name == "mean":
            return known[0] * math.sqrt(result[0].numel() / states[0][0].numel())
        return known[0] * math.inf

    def _pointwise(self, phi: Callable[[Tensor], Any], known: Bounds, z: Tensor) -> Bounds:
        """Behind φ: the largest |φ'(z)|, and no more rank than units with φ'(z) ≠ 0."""
        _, pull_back = transpose(lambda z: phi(z.clone()), z)  # φ may write over what it reads
        slopes = pull_back(torch.ones_like(z)).abs().reshape(self.count, -1)
        return (known * slopes.amax(1)).at_most((slopes > 0).sum(1))

    def _at(self, n: Node, z: Tensor) -> Any:
        """The function of a node at another value of what it reads."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        call = self.call_method if n.op == "call_method" else self.call_function
        return call(n.target, (z, *args[1:]), kwargs)


def _picks_once(index: Any) -> bool:
    """Whether an index takes no entry twice, as a list of indices may."""
    return all(isinstance(part, slice | int | None) or part is ... for part in (index if isinstance(index, tuple) else (index,)))


def _behind(module: nn.Module, known: Bounds, state: Float[Tensor, "n ..."]) -> Bounds:
    """The bounds behind a layer."""
    if not keeps_its_forward(module):
        return known * math.inf
    if isinstance(module, KEEPING):
        return known
    if isinstance(module, nn.Linear):
        return known * matrix_norm(module.weight)
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
        return known * circular_norm(module, state.shape[-2:])
    if isinstance(module, _BatchNorm) and module.running_var is not None:
        gain = 1.0 if module.weight is None else module.weight.abs()
        return known * float((gain / (module.running_var + module.eps).sqrt()).max())
    if isinstance(module, nn.MaxPool2d):
        return known * math.sqrt(_overlap(module))
    if isinstance(module, nn.AvgPool2d) and module.count_include_pad and not module.ceil_mode and module.divisor_override is None:
        return known * math.sqrt(_overlap(module) / math.prod(_pair(module.kernel_size)))
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return known * (1 / math.sqrt(state[0, 0].numel()))
    return known * math.inf


def matrix_norm(W: Float[Tensor, "m d"]) -> float:
    """‖W‖ where its decomposition takes seconds, else the smaller of ‖W‖_F and √(‖W‖₁‖W‖_∞), which bound it."""
    if W.numel() * min(W.shape) <= DECOMPOSED:
        return float(torch.linalg.matrix_norm(W, 2))
    size = W.abs()
    return float(torch.minimum(torch.linalg.matrix_norm(W), (size.sum(0).max() * size.sum(1).max()).sqrt()))


def circular_norm(conv: nn.Conv2d, size: Sequence[int]) -> float:
    """The norm of a convolution with circular padding on a grid that holds the zero-padded image: above that of the convolution itself.

    σ₁ = max over frequencies of ‖Ŵ(ω)‖, Ŵ the discrete Fourier transform of the kernel. A stride only drops rows.

    Args:
        conv: any groups, dilation and stride.
        size: height and width of its input.
    """
    reach = [d * (k - 1) for d, k in zip(_pair(conv.dilation), conv.kernel_size, strict=True)]
    padding = reach if conv.padding == "same" else [0, 0] if conv.padding == "valid" else [2 * p for p in _pair(conv.padding)]
    grid = [s + p + r for s, p, r in zip(size, padding, reach, strict=True)]
    kernel = torch.zeros(*conv.weight.shape[:2], *grid, device=conv.weight.device)
    kernel[..., : reach[0] + 1 : _pair(conv.dilation)[0], : reach[1] + 1 : _pair(conv.dilation)[1]] = conv.weight
    spectrum = torch.fft.rfft2(kernel).permute(2, 3, 0, 1).unflatten(2, (conv.groups, -1))
    return float(norm_by_grams(spectrum).max()) * (1 + SINGLE)


def norm_by_grams(matrices: Float[Tensor, "*batch m d"] | Complex[Tensor, "*batch m d"]) -> Float[Tensor, "*batch"]:
    """‖W‖ from above, by matrix products alone: ‖W‖ ≤ ‖(W*W)^(2^(t−1))‖_F^(1/2^t), at most a factor d^(1/2^(t+1)) too large, t = 6.

    Gram iteration (Delattre et al. 2023, "Efficient bound of Lipschitz constant for convolutional layers by Gram iteration", algorithm 1).
    """
    log_norm = torch.zeros(matrices.shape[:-2], dtype=matrices.real.dtype, device=matrices.device)
    for doubling in range(GRAMS + 1):
        size = torch.linalg.matrix_norm(matrices)
        matrices = matrices / torch.where(size > 0, size, 1)[..., None, None]
        log_norm = log_norm + size.log() / 2**doubling
        if doubling < GRAMS:
            matrices = matrices.mH @ matrices if matrices.shape[-1] <= matrices.shape[-2] else matrices @ matrices.mH
    return log_norm.exp()


def _overlap(pool: nn.MaxPool2d | nn.AvgPool2d) -> int:
    """How many windows a pixel lies in at most: one a place in the window, and without gaps in it only those a stride apart."""
    kernel, stride, dilation = (_pair(size) for size in (pool.kernel_size, pool.stride, getattr(pool, "dilation", 1)))
    return math.prod(k if d > 1 else math.ceil(k / s) for k, s, d in zip(kernel, stride, dilation, strict=True))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
