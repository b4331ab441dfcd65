"""Bottlenecks in a chain: a dense layer of low rank, a code narrower than its neighbours, and a filter on the gradient alone."""

import math
from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from src.models.layers import Layers, stage


def dense_layer(part: nn.Module) -> nn.Linear:
    """The only dense layer of a stage.

    Raises: ValueError when there is none, or more than one.
    """
    (linear,) = [module for module in part.modules() if isinstance(module, nn.Linear)]
    return linear


def replace_dense(chain: nn.Sequential, name: str, module: nn.Module) -> None:
    """Put a module in the place of the only dense layer of the named stage."""
    part = chain.get_submodule(name)
    path = next(path for path, found in part.named_modules() if found is dense_layer(part))
    chain.set_submodule(f"{name}.{path}" if path else name, module)


@torch.no_grad()
def factorised(linear: nn.Linear, rank: int) -> nn.Sequential:
    """Two dense layers with `rank` units between that are the best approximation of one, W ≈ (U√Σ)(√ΣVᵀ) (Eckart & Young 1936).

    Args:
        linear: W h + b; it stays untouched.
        rank: r ≤ min(m, d); at min(m, d) the layer is approximated exactly.

    Returns: `encoder` (√ΣVᵀ, r×d, no bias) and `decoder` (U√Σ, m×r, b), in the layer's dtype and on its device.
    """
    U, S, Vh = torch.linalg.svd(linear.weight, full_matrices=False)
    root = S[:rank].sqrt()
    encoder = nn.Linear(linear.in_features, rank, bias=False, dtype=linear.weight.dtype, device=linear.weight.device)
    decoder = skip_init(nn.Linear, rank, linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
    encoder.weight.copy_(root.unsqueeze(1) * Vh[:rank])
    decoder.weight.copy_(U[:, :rank] * root)
    decoder.bias.copy_(linear.bias)
    return nn.Sequential(OrderedDict(encoder=encoder, decoder=decoder))


@torch.no_grad()
def reduce_rank(linear: nn.Linear, rank: int) -> None:
    """Replace W by its best approximation of the given rank, in place; in float64 its numerical rank is that one, in float32 it is not."""
    encoder, decoder = (factor.get_parameter("weight") for factor in factorised(linear, rank))
    linear.weight.copy_(decoder @ encoder)


def with_code(chain: nn.Sequential, name: str, width: int, layers: Layers) -> nn.Sequential:
    """Put a code c = φ(V h + b) of `width` units, a stage of its own, before the named stage, whose dense layer then reads the code.

    Args:
        chain: f_1 … f_L; its stages are used, and the named one is changed.
        name: of a stage with one dense layer, on a vector a sample.
        width: r.
        layers: draws V, b and the weights that read the code, from a generator of their own.

    Returns: a chain of L + 1 stages, the new one named `code`.
    """
    old = dense_layer(chain.get_submodule(name))
    code = stage(linear=layers.linear(old.in_features, width), norm=layers.norm(width), activation=layers.activation())
    replace_dense(chain, name, layers.linear(width, old.out_features))
    return before(chain, name, "code", code).to(old.weight)


def before(chain: nn.Sequential, name: str, added: str, part: nn.Module) -> nn.Sequential:
    """The chain with one more stage, before the named one."""
    stages = OrderedDict[str, nn.Module]()
    for other, old in chain.named_children():
        if other == name:
            stages[added] = part
        stages[other] = old
    return nn.Sequential(stages)


class GradientFilter(nn.Module):
    """The identity forwards, g ↦ √(d/r) QQᵀg backwards, Q an orthonormal basis of `rank` random directions: E‖g‖² stays as it is.

    Args:
        width: d.
        rank: r, 0 to d; to no direction the gradient is 0.
        generator: draws the directions, on the CPU.
    """

    directions: Float[Tensor, "d r"]

    def __init__(self, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        Q, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))
        self.register_buffer("directions", Q.float())
        self.gain = math.sqrt(width / max(rank, 1))

    def forward(self, state: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The state, its gradient filtered."""
        passed = self.gain * (state @ self.directions @ self.directions.T)
        return state.detach() + (passed - passed.detach())
