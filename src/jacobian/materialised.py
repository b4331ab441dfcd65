"""Jacobians written out as matrices, one a sample.

A pass backwards with every unit covector at once: row i of J is eᵢᵀJ (Griewank & Walther 2008, section 3.2).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from src.jacobian.golub_kahan import largest
from src.paths import keeps_its_forward
from src.seeds import generator

# covectors pulled back at once are held to about this much memory
CHUNK_BYTES = 2**28
# rows beyond which PPᵀ is not written out
WRITTEN_OUT = 2_048


def transpose(function: Callable[[Any], Any], point: Any) -> tuple[Any, Callable[[Any], Any]]:
    """f(x), and the transpose of its derivative there: v ↦ vᵀ ∂f/∂x.

    Args:
        function: f; its values are tensors, or dictionaries of tensors.
        point: x, a tensor or a dictionary of tensors.
    """
    outputs, pull_back = cast(tuple[Any, Callable[[Any], tuple[Any]]], vjp(function, point))
    return outputs, lambda covector: pull_back(covector)[0]


def layer_jacobian(stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> Float[Tensor, "n m d"]:
    """The layer Jacobian J = ∂f(x)/∂x of every sample, states flattened.

    Args:
        stage: f, acting on each sample alone.
        inputs: N inputs of d entries.

    Returns: N matrices of m×d, in the inputs' dtype.
    """
    outputs, pull_back = transpose(stage, inputs)
    n, m = outputs.shape[0], outputs[0].numel()
    basis = torch.eye(m, dtype=outputs.dtype, device=outputs.device).unsqueeze(1).expand(m, n, m).reshape(m, *outputs.shape)
    rows = vmap(pull_back, chunk_size=_chunk(inputs.numel(), inputs.dtype))(basis)
    return rows.reshape(m, n, -1).transpose(0, 1)


def pull_back_all(stage: nn.Module, inputs: Float[Tensor, "n ..."], covectors: Float[Tensor, "n m k"]) -> Float[Tensor, "n d k"]:
    """JᵀQ of every sample, J = ∂f(x)/∂x.

    Args:
        stage: f, acting on each sample alone.
        inputs: N inputs of d entries.
        covectors: Q, k columns for each sample.
    """
    outputs, pull_back = transpose(stage, inputs)
    columns = covectors.permute(2, 0, 1).reshape(-1, *outputs.shape)
    pulled = vmap(pull_back, chunk_size=_chunk(inputs.numel(), inputs.dtype))(columns)
    return pulled.reshape(len(columns), len(inputs), -1).permute(1, 2, 0)


def parameter_jacobian_norm(stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """The norm of the parameter Jacobian P = ∂f(x; θ)/∂θ of every sample: ‖P‖ = √λ_max(PPᵀ).

    Where all parameters are those of one dense layer Wh + b, P has the blocks ∂f/∂b and ∂f/∂b ⊗ hᵀ, so that
    ‖P‖ = √(‖h‖²+1) ‖∂f/∂b‖. Elsewhere PPᵀ (m×m) is made column by column, PPᵀeᵢ, by a pass backwards and its transpose, or where
    it is large only multiplied by vectors; P (m×|θ|) is never formed.

    Args:
        stage: f, acting on each sample alone; without parameters the norm is 0.
        inputs: N inputs.

    Returns: N norms, in the inputs' dtype.
    """
    parameters: dict[str, Tensor] = dict(stage.named_parameters())
    if not parameters:
        return inputs.new_zeros(len(inputs))
    hidden = dense_input(stage, inputs) if len(parameters) == 2 else None
    if hidden is not None:
        bias = next(name for name in parameters if name.endswith("bias"))
        return hidden.square().sum(1).add(1).sqrt() * torch.linalg.svdvals(_jacobian_in(stage, bias, inputs))[:, 0]
    norm = _large_norm if stage(inputs[:1]).numel() > WRITTEN_OUT else _parameter_norm
    return torch.cat([norm(stage, parameters, sample) for sample in inputs.split(1)])


def dense_input(stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> Float[Tensor, "n d"] | None:
    """The inputs h of a stage's only dense layer with a bias; None unless there is one, called once, on a vector a sample."""
    calls: list[Tensor] = []
    # neither a subclass nor a reparametrised layer, whose output need not be Wh + b in its own parameters
    linears = [module for module in stage.modules() if type(module) is nn.Linear and module._parameters.keys() == {"weight", "bias"}]
    linears = [linear for linear in linears if linear.bias is not None and keeps_its_forward(linear)]
    hooks = [linear.register_forward_hook(lambda module, arguments, output: calls.append(arguments[0])) for linear in linears]
    stage(inputs)
    for hook in hooks:
        hook.remove()
    return calls[0] if len(calls) == 1 and calls[0].ndim == 2 and len(calls[0]) == len(inputs) else None


def _jacobian_in(stage: nn.Module, name: str, inputs: Float[Tensor, "n ..."]) -> Float[Tensor, "n m b"]:
    """∂f(x; θ)/∂b of every sample, b one of the parameters."""
    parameter = stage.get_parameter(name)

    def rows(sample: Tensor) -> Tensor:
        outputs, pull_back = transpose(lambda b: functional_call(stage, {name: b}, (sample.unsqueeze(0),)).flatten(), parameter)
        pulled: Tensor = vmap(pull_back)(torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device))
        return pulled

    return vmap(rows)(inputs)


def _parameter_norm(stage: nn.Module, parameters: dict[str, Tensor], sample: Float[Tensor, "1 ..."]) -> Float[Tensor, " 1"]:
    """‖P‖ of one sample, from PPᵀ."""
    outputs, pull_back, push_forward = _parameter_products(stage, parameters, sample)
    size = sum(parameter.numel() for parameter in parameters.values())
    basis = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
    gram = vmap(lambda covector: push_forward(pull_back(covector)), chunk_size=_chunk(size, sample.dtype))(basis)
    return torch.linalg.eigvalsh(gram)[-1:].clamp(min=0).sqrt()


def _large_norm(stage: nn.Module, parameters: dict[str, Tensor], sample: Float[Tensor, "1 ..."]) -> Float[Tensor, " 1"]:
    """‖P‖ of one sample by Golub–Kahan–Lanczos on Pᵀ."""
    outputs, pull_back, push_forward = _parameter_products(stage, parameters, sample)
    sizes = [parameter.numel() for parameter in parameters.values()]

    def push(u: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in pull_back(u[0]).values()]).unsqueeze(0)

    def pull(v: Tensor) -> Tensor:
        parts = zip(parameters.items(), v[0].split(sizes), strict=True)
        pulled: Tensor = push_forward({name: part.reshape(parameter.shape) for (name, parameter), part in parts})
        return pulled.unsqueeze(0)

    start = torch.randn(1, len(outputs), generator=generator(0, "parameter Jacobian"), dtype=outputs.dtype)
    return largest(push, pull, start.to(outputs.device)).value


def _parameter_products(
    stage: nn.Module, parameters: dict[str, Tensor], sample: Float[Tensor, "1 ..."]
) -> tuple[Float[Tensor, " m"], Callable[[Any], Any], Callable[[Any], Any]]:
    """f(x), u ↦ Pᵀu and v ↦ Pv of one sample, v by the names of the parameters."""
    outputs, pull_back = transpose(lambda parameters: functional_call(stage, parameters, (sample,)).flatten(), parameters)
    # P is the transpose of the linear map u ↦ uᵀP; forward mode would compile decompositions first
    _, push_forward = transpose(pull_back, torch.zeros_like(outputs))
    return outputs, pull_back, push_forward


def parameter_gradients(
    stage: nn.Module, inputs: Float[Tensor, "n ..."], covectors: Float[Tensor, "n ..."], weights_only: bool = False
) -> Float[Tensor, "n p"]:
    """The N×|θ| matrix of per-sample parameter gradients, rows g_nᵀP_n.

    Args:
        stage: f, acting on each sample alone.
        inputs: N inputs of the stage.
        covectors: g, one for each output of the stage.
        weights_only: leave out biases and the gains of normalisations: whatever is no matrix.

    Returns: a row a sample, parameters flattened in the order of `named_parameters`.
    """
    parameters = {name: parameter for name, parameter in stage.named_parameters() if parameter.ndim > 1 or not weights_only}
    if not parameters:
        return inputs.new_zeros(len(inputs), 0)

    def gradient(sample: Tensor, covector: Tensor) -> Tensor:
        _, pull_back = transpose(lambda parameters: functional_call(stage, parameters, (sample.unsqueeze(0),)), parameters)
        gradients = pull_back(covector.unsqueeze(0))
        parts = [gradients[name].flatten() for name in parameters]
        return torch.cat([torch.view_as_real(part).flatten() if part.is_complex() else part for part in parts])

    try:
        gradients: Tensor = vmap(gradient)(inputs, covectors)
    except RuntimeError:  # of an operation that vmap has no rule for, such as a recurrent layer
        gradients = torch.stack([gradient(sample, covector) for sample, covector in zip(inputs, covectors, strict=True)])
    return gradients


def _chunk(numel: int, dtype: torch.dtype) -> int:
    return max(1, CHUNK_BYTES // (numel * dtype.itemsize))
