"""What a certificate is made of: every stage measured, from the loss to the input."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from src.chain import BatchNormMode, Chain, branch, cut
from src.cost import Method, Planned, plan
from src.errors import UserError
from src.jacobian import matrix_free
from src.jacobian.backpropagated import Backpropagated, Call
from src.jacobian.materialised import parameter_gradients, pull_back_all
from src.jacobian.product import Product
from src.jacobian.structured import Dense
from src.locking import Link, Loss, lock_condition, severity, walk_back
from src.seeds import generator
from src.selftest import check_stage, check_state, state_of
from src.spectra import Spectra
from src.spectrum import Extremes, Known
from src.units import Units

# outputs; beyond them the product of all Jacobians is not followed
END_TO_END = 128
Watch = Callable[[list[Planned], int], object]


@dataclass(frozen=True)
class Measured:
    """All stages of a chain, measured.

    Attributes:
        layers: a row a (sample, stage), as the certificate has it.
        severity: a row a stage, likewise.
        extremes: of every J_l's spectrum, in the order of the stages.
        first: the first stage with its inputs.
        product: J_L ⋯ J_1 in factors; None where there are more than 128 outputs.
    """

    layers: pd.DataFrame
    severity: pd.DataFrame
    extremes: list[Extremes]
    first: Call
    product: Product | None


def measure(
    chain: Chain,
    inputs: Float[Tensor, "n ..."],
    targets: Tensor,
    loss: Loss,
    method: Method,
    trained: Sequence[Call],
    watch: Watch,
) -> Measured:
    """Walk from the loss to the input; at stage l hold J_l of all samples, its singular values, g_l and g_lᵀP_l.

    Of the other stages only their inputs are held. Every stage is first asked whether it is a function, of each sample alone, and rightly
    differentiated.

    Args:
        chain: the stages, in the dtype of the measurement.
        inputs: N inputs H_0, in that dtype.
        targets: N targets.
        loss: ℓ(H_L, y).
        method: how Jacobians are taken.
        trained: the stages as training differentiates them, each with its inputs.
        watch: called with the plan and how many stages are done: before the first and after each.

    Raises: UserError when a stage fails its test, a value is not finite (naming stage and sample), or a J_l is too large to write out.
    """
    layers, severities, known = [], [], []
    probe_generator, start_generator = generator(0, "lock condition"), generator(0, "matrix free")
    product: Product | None = None
    buffers = state_of(chain)
    states = chain.states(inputs.unsqueeze(0) if chain.on_batch else inputs)
    planned = plan(chain, states, method)
    spectra = Spectra(chain, states, planned)
    watch(planned, 0)
    for link in walk_back(chain, inputs, targets, loss):
        with _naming(link.name):
            probe = torch.randn(link.signal.direction.shape, generator=probe_generator, dtype=inputs.dtype).to(inputs.device)
            start = torch.randn(link.inputs.shape, generator=start_generator, dtype=inputs.dtype).to(inputs.device)
            check_stage(link, probe, start)
            measured = spectra.of(link, start.flatten(1), trained[link.index - 1])
            found, structure = measured.extremes, measured.structure
            backpropagated = Backpropagated.of(found, measured.jacobians, trained[link.index - 1], structure)
            if link.index == len(chain.stages) and probe[0].numel() <= END_TO_END:
                product = Product.behind(probe)
            if product is not None:
                pull = structure.pull if structure is not None else partial(pull_back_all, link.stage, link.inputs)
                product = product.before(pull, torch.minimum(found.structural, found.rank.hi))
            norms, gradients, free = _gradients(link, structure, probe)
            units = Units.of(link.stage, link.inputs)
            columns = _layer_columns(link, found, backpropagated, norms, units)
            layers.append(columns | {"branch_norm": _branch_norm(link, start.flatten(1))})
            severities.append({"stage": link.name, "index": link.index, **severity(link.signal_before), **lock_condition(gradients, free)})
            severities[-1] |= {"dead": units.dead, "kink": units.kink}
            known.append(found)
        watch(planned, len(known))
    check_state(chain, buffers)
    return Measured(_table(layers[::-1]), pd.DataFrame(severities[::-1]), known[::-1], (link.stage, link.inputs), product)


@contextmanager
def _naming(stage: str) -> Iterator[None]:
    """Say of which stage it is that something can't be measured."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"certificate: stage '{stage}' can't be measured ({type(error).__name__}: {first})") from error


def own_dtype(model: nn.Module, inputs: Tensor) -> torch.dtype:
    """The precision that a model is trained in."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), inputs.dtype)


def as_trained(model: nn.Module, inputs: Float[Tensor, "n ..."], stages: Sequence[str] | None, batch_norm: BatchNormMode) -> list[Call]:
    """The stages as training differentiates them, in the model's own dtype, each with its inputs."""
    own = own_dtype(model, inputs)
    chain = cut(model, stages, own, batch_norm, backpropagated=True, inputs=inputs)
    own_inputs = inputs.detach().to(own).contiguous()
    return [*zip(chain.stages, chain.states(own_inputs.unsqueeze(0) if chain.on_batch else own_inputs), strict=False)]


def _gradients(
    link: Link, structure: Dense | None, probe: Float[Tensor, "n ..."]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n p"], Float[Tensor, "n p"]]:
    """‖gᵀP‖ of every sample for the unit signal g, and matrices with the singular values of the N×|θ| ones, of g and of the probe."""
    signal = link.signal.direction
    if structure is not None:
        return structure.gradient_norm(signal), structure.gradient_matrix(signal), structure.gradient_matrix(probe)
    gradients = parameter_gradients(link.stage, link.inputs, signal)
    return gradients.norm(dim=1), gradients, parameter_gradients(link.stage, link.inputs, probe)


def _branch_norm(link: Link, start: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """σ₁ of the Jacobian of what the stage adds to its skip, a sample; NaN where it has none."""
    block = branch(link.stage)
    return torch.full_like(start[:, 0], torch.nan) if block is None else matrix_free.norm(block, link.inputs, start)


def _layer_columns(
    link: Link, found: Extremes, backpropagated: Backpropagated, gradient_norms: Float[Tensor, " n"], units: Units
) -> dict[str, Tensor | str | int]:
    """What the table says of one stage: a number a sample, or what holds for all."""
    log_grad_norm = gradient_norms.log() + link.signal.log_norm
    return {
        "stage": link.name,
        "index": link.index,
        **_sides("norm", found.norm),
        **_sides("sigma_min", found.smallest),
        **_sides("rank", found.rank),
        **_sides("cond", found.condition),
        "cond_active": found.active_condition.value,
        "tau": found.tolerance,
        "stable_rank": found.stable_rank,
        "rank_structural": found.structural,
        "rank_full": found.full,
        "rank_backprop": backpropagated.rank,
        "backprop_error": backpropagated.error,
        "method": found.method,
        "error_norm": link.signal.log_norm.exp(),
        "grad_norm": log_grad_norm.exp(),
        "saturation": units.saturation,
        "mean_square": found.mean_square,
        "log_error_norm": link.signal.log_norm,
        "log_grad_norm": log_grad_norm,
    }


def _table(stages: Sequence[Mapping[str, Tensor | str | int]]) -> pd.DataFrame:
    """A row a (sample, stage)."""
    samples = next(len(value) for value in stages[0].values() if isinstance(value, Tensor))
    frame = pd.DataFrame({"sample": np.repeat(range(samples), len(stages))})
    for column in stages[0]:
        values = [value.cpu().numpy() if isinstance(value := stage[column], Tensor) else np.repeat(value, samples) for stage in stages]
        frame[column] = np.stack(values, 1).ravel()
    return frame


def _sides(name: str, known: Known) -> dict[str, Tensor | str]:
    return {name: known.value, f"{name}_lo": known.lo, f"{name}_hi": known.hi, f"{name}_known": known.how}
