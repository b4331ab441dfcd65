"""A probe batch watched while a model trains: which stages the gradient still reaches, every k steps, at a few percent of a step."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, normalize

from src.chain import split
from src.errors import UserError
from src.jacobian import matrix_free, structured
from src.jacobian.golub_kahan import Product, largest
from src.locking import ErrorSignal, Loss, loss_signal, severities, walk_back
from src.seeds import generator
from src.selftest import check_stage
from src.tracking import ActiveRun
from src.twin import bare, require_only_watching, twin
from src.units import ACTIVATIONS, SATURATED, largest_slope

Log = Callable[[dict[str, float], int], object]

# relative residual at which σ₁ has converged: the error of a value is of the order of its square
TOLERANCE = 1e-2
# Golub–Kahan–Lanczos steps at most: of the first measurement, of those that start where the last ended, and of these where states have
# fewer entries than SMALL: there the calls take the time, in a step of the training too, and few are paid by 5% of it. Along trainings
# on MNIST at k = 100 the medians were about 1% below σ₁, and 4% at worst, early
COLD, WARM, WARM_SMALL = 300, 12, 4
SMALL = 2**11
# of a random direction in a warm start: neither zero nor a singular vector that another has overtaken is kept for ever
FRESH = 0.1


class LockMonitor:
    """Watches every stage of a model on a probe batch while the model trains, in float32; the training stays the same bit for bit.

    A copy of the model is cut into a chain once. On entry and after every k-th step it is given the model's weights, and of every stage

    - log_error_norm = ½ ln mean_n ‖g_l‖², nats,
    - saturation: the share of activation units whose slope is below a tenth of the largest; NaN without activation modules,
    - lambda = 1 − σ_min(G)/σ_max(G), G with rows g_lᵀJ_l; lambda_nonzero over the nonzero singular values; rank and stable_rank of G,
    - norm: the median σ₁(J_l) of the samples (of two the lower), from below, by a few Golub–Kahan–Lanczos steps from where the last ended,

    go to `history` and to the log. What has diverged is inf or NaN. As in `certify`, dropout is off and BatchNorm has its running
    statistics. The model's own hooks see one pass, on entry, which asks whether they change what it computes, and nothing else.

        with LockMonitor(model, inputs, targets) as monitor:
            for images, labels in loader:
                ...
                optimizer.step()
                monitor.step()

    Args:
        model: what `certify` takes.
        inputs: the probe, N inputs; the cost grows with N, and 16 are enough.
        targets: N targets.
        every: k, in steps.
        log: called with {"backlock/<stage>/<quantity>": value} and the step; None: Weights & Biases, where a run is active.
        loss: ℓ(H_L, y); it is applied to one sample at a time.

    Raises: UserError on entry, when the model can't be cut, a hook changes what it computes, a stage fails the test of `certify`, or a
        value is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Float[Tensor, "n ..."],
        targets: Tensor,
        every: int = 100,
        log: Log | None = None,
        loss: Loss = cross_entropy,
    ):
        if every < 1:
            raise UserError(f"monitor: every={every}; give a number of steps, at least 1")
        self.model, self.inputs, self.targets, self.loss = bare(model), inputs, targets, loss
        self.every, self.log = every, log or ActiveRun()
        self.steps = 0
        self._probe: _Probe | None = None
        self._rows: list[dict[str, Any]] = []

    @property
    def history(self) -> pd.DataFrame:
        """A row per (measurement, stage): step, stage, index (1 … L), and the quantities."""
        return pd.DataFrame(self._rows)

    def __enter__(self) -> "LockMonitor":
        self._measure()
        return self

    def __exit__(self, *_: object) -> None:
        self._probe = None

    def step(self) -> None:
        """Count a step of the training, and measure if it is the k-th.

        Raises: UserError outside of the `with` block.
        """
        if self._probe is None:
            raise UserError("monitor: a step outside of `with LockMonitor(…) as monitor:`; put the training inside")
        self.steps += 1
        if self.steps % self.every == 0:
            self._measure()

    def _measure(self) -> None:
        device = next((tensor.device for tensor in _tensors(self.model)), self.inputs.device)
        with _apart(device):
            if self._probe is None or self._probe.inputs.device != device:  # Lightning moves a model when the training starts
                self._probe = _Probe(self.model, self.inputs, self.targets, self.loss, device)
            stages = self._probe.measure(self.model)
        for index, (name, found) in enumerate(stages.items(), start=1):
            self._rows.append({"step": self.steps, "stage": name, "index": index, **found})
        self.log({f"backlock/{name}/{quantity}": value for name, found in stages.items() for quantity, value in found.items()}, self.steps)


@dataclass(frozen=True)
class _Stage:
    """A stage at the present weights: H_{l−1}, a leaf; H_l, with the graph from it; W and s where J = diag(s) W."""

    x: Float[Tensor, "n ..."]
    y: Float[Tensor, "n ..."]
    dense: tuple[Float[Tensor, "m d"], Float[Tensor, "n m"]] | None

    def pull_back(self, signal: ErrorSignal) -> ErrorSignal:
        """g_{l−1} = J_lᵀg_l."""
        if self.dense:
            weight, slopes = self.dense
            pulled = ((slopes * signal.direction) @ weight).reshape(self.x.shape)
        else:
            (pulled,) = grad(self.y, self.x, signal.direction, retain_graph=True)
        return ErrorSignal.of(pulled, signal.log_norm)


class _Probe:
    """A chain cut once from a copy of a model, at a probe batch.

    Of small stages the calls take the time, not the arithmetic: whatever does not depend on another stage is done for all at once, and
    J = diag(s) W is multiplied as it stands. `src.locking` stage by stage, and autograd's products, take twice the 5% on a small MLP.
    """

    def __init__(self, model: nn.Module, inputs: Float[Tensor, "n ..."], targets: Tensor, loss: Loss, device: torch.device):
        require_only_watching(model, inputs.detach().to(device, next((weight.dtype for weight in model.parameters()), inputs.dtype)))
        self.twin = twin(model)
        self.inputs, self.targets, self.loss = inputs.detach().to(device, torch.float32), targets.to(device), loss
        self.chain = split(self.twin, None, torch.float32, "eval", self.inputs)
        self.weights = _tensors(self.twin)
        self.draws = generator(0, "lock monitor")
        self.random: dict[tuple[int, ...], Tensor] = {}
        self.warm: dict[tuple[int, ...], Tensor] = {}
        self.linears: dict[int, nn.Linear] = {}  # of the stages with J = diag(s) W
        for link in walk_back(self.chain, self.inputs, self.targets, loss):
            check_stage(link, self._draw(link.signal.direction.shape), self._draw(link.inputs.shape))
            if structured.dense(link.stage, link.inputs):
                self.linears[link.index - 1] = next(module for module in link.stage.modules() if isinstance(module, nn.Linear))
        # what the hooks keep while a stage runs: z, φ(z) and the slope below which a unit is saturated; Wh + b
        self.at = 0
        self.activated: list[tuple[int, Tensor, Tensor, float]] = []
        self.preactivated: dict[int, Tensor] = {}
        for module in self.twin.modules():
            if isinstance(module, ACTIVATIONS):
                module.register_forward_hook(self._activated(SATURATED * float(largest_slope(module.forward, self.inputs))))
            elif module in self.linears.values():
                module.register_forward_hook(self._preactivated)

    def _draw(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.draws).to(self.inputs.device)

    def _activated(self, least: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(activation: nn.Module, arguments: tuple[Tensor, ...], _: Tensor) -> None:
            z = arguments[0].detach().clone().requires_grad_()
            self.activated.append((self.at, z, activation.forward(z), least))  # not a call, which this hook would see

        return keep

    def _preactivated(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.at in self.linears:  # another stage may share the layer
            self.preactivated[self.at] = output
        return output.clone()  # which may be written over

    def measure(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """The quantities of every stage, by its name, at the model's present weights."""
        with torch.no_grad():
            for mine, trained in zip(self.weights, _tensors(model), strict=True):
                mine.copy_(trained)
        stages = self._run()
        signals = [loss_signal(self.loss, stages[-1].y.detach(), self.targets)]
        for stage in stages[::-1]:
            signals.append(stage.pull_back(signals[-1]))
        log_norms = torch.stack([signal.log_norm for signal in signals[-2::-1]])
        columns = {
            "log_error_norm": (((2 * log_norms).logsumexp(1) - math.log(len(self.inputs))) / 2).tolist(),
            "saturation": self._saturations(),
            **severities(signals[:0:-1]),
            "norm": self._norms(stages),
        }
        self.activated, self.preactivated = [], {}  # and their memory
        return {name: {column: values[at] for column, values in columns.items()} for at, name in enumerate(self.chain.names)}

    def _run(self) -> list[_Stage]:
        """The stages, first to last."""
        self.activated, self.preactivated = [], {}
        states, outputs, h = [], [], self.inputs
        for at, stage in enumerate(self.chain.stages):
            self.at = at
            states.append(h.detach().requires_grad_())
            h = stage(states[-1])
            outputs.append(h)
        slopes = _slopes([(z, outputs[at]) for at, z in self.preactivated.items()])
        dense = {at: (self.linears[at].weight, s) for at, s in zip(self.preactivated, slopes, strict=True)}
        return [_Stage(x, y, dense.get(at)) for at, (x, y) in enumerate(zip(states, outputs, strict=True))]

    def _saturations(self) -> list[float]:
        """The share of units that are saturated, of every stage's activations; NaN of none."""
        flat: list[list[Tensor]] = [[] for _ in self.chain.stages]
        slopes = _slopes([(z, value) for _, z, value, _ in self.activated])
        for (at, z, _, least), slope in zip(self.activated, slopes, strict=True):
            # 0·z makes NaN of what has diverged
            flat[at].append(((slope.abs() < least) + 0 * z.detach()).flatten())
        return [float(torch.cat(units).mean()) if units else torch.nan for units in flat]

    def _norms(self, stages: Sequence[_Stage]) -> list[float]:
        """The median over the samples of σ₁(J_l), of all stages of a kind at once."""
        norms: dict[int, float] = {}
        kinds = [(stage.x[0].numel(),) if stage.dense else (stage.x[0].numel(), stage.y[0].numel()) for stage in stages]
        for kind in dict.fromkeys(kinds):
            where = [at for at, other in enumerate(kinds) if other == kind]
            push, pull = _products([stages[at] for at in where])
            if kind in self.warm:
                start, most = self.warm[kind].nan_to_num(0) + FRESH * self.random[kind], WARM_SMALL if max(kind) < SMALL else WARM
            else:
                start, most = normalize(self._draw((len(where) * len(self.inputs), kind[0]))), COLD
                self.random[kind] = start
            found = largest(push, pull, start, TOLERANCE, most=most)
            self.warm[kind] = found.vector
            norms |= zip(where, found.value.unflatten(0, (len(where), -1)).median(1).values.tolist(), strict=True)
        return [norms[at] for at in range(len(stages))]


def _products(stages: Sequence[_Stage]) -> tuple[Product, Product]:
    """Jv and Jᵀu of stages of a kind."""
    dense = [stage.dense for stage in stages if stage.dense]
    if dense:
        return structured.stacked_products([weight for weight, _ in dense], [slopes for _, slopes in dense])
    return matrix_free.stacked_products([stage.x for stage in stages], [stage.y for stage in stages])


def _slopes(pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """φ'(z) of every pair of z and φ(z), φ a function of each entry alone."""
    points, values = [z for z, _ in pairs], [value for _, value in pairs]
    return grad(values, points, [torch.ones_like(value) for value in values], retain_graph=True) if pairs else ()


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Apart from the training: its random numbers, modes and precision neither decide nor notice what happens here."""
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),  # with gradients, under no_grad too
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),  # the backward passes of the others can't be differentiated
    ):
        yield


def _tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, in an order that a copy shares."""
    return [*module.parameters(), *module.buffers()]
