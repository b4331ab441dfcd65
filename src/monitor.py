"""A probe batch watched while a model trains: which stages the gradient still reaches, every k steps, at a few percent of a step."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from src.jacobian.golub_kahan import Product, largest
from src.locking import ACTIVATIONS, SATURATED, ErrorSignal, Loss, largest_slope, loss_signal, severity, walk_back
from src.seeds import generator
from src.selftest import check_stage

Log = Callable[[dict[str, float], int], object]

# relative residual at which σ₁ has converged: the error of a value is of the order of its square
TOLERANCE = 1e-2
# Golub–Kahan–Lanczos steps that a warm start may take, converged or not
WARM = 6
# of a random direction in a warm start: neither zero nor a singular vector that another has overtaken is kept for ever
FRESH = 0.1


class LockMonitor:
    """Watches every stage of a model on a probe batch while the model trains, in float32; the training stays the same bit for bit.

    A copy of the model is cut into a chain once. On entry and after every k-th step it is given the model's weights, and of every stage

    - log_error_norm = ½ ln mean_n ‖g_l‖², nats,
    - saturation: the share of activation units whose slope is below a tenth of the largest; NaN without activation modules,
    - lambda = 1 − σ_min(G)/σ_max(G), G with rows g_lᵀJ_l; lambda_nonzero over the nonzero singular values; rank and stable_rank of G,
    - norm: the median over the samples of σ₁(J_l), from below, by a few Golub–Kahan–Lanczos steps from where the last ended,

    go to `history` and to the log. What has diverged is inf or NaN. As in `certify`, dropout is off and BatchNorm has its running
    statistics; the model's own hooks see nothing of it.

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

    Raises: UserError on entry, when the model can't be cut, a stage fails the test of `certify`, or a value is not finite.
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
        self.model, self.inputs, self.targets, self.loss = model, inputs, targets, loss
        self.every, self.log = every, log or ToWandb()
        self.steps = 0
        self._probe: _Probe | None = None
        self._rows: list[dict[str, Any]] = []

    @property
    def history(self) -> pd.DataFrame:
        """A row per (measurement, stage): step, stage, index (1 … L), and the quantities."""
        return pd.DataFrame(self._rows)

    def __enter__(self) -> "LockMonitor":
        with _apart(_device(self.model)):
            self._probe = _Probe(self.model, self.inputs, self.targets, self.loss)
        self._measure(self._probe)
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
            self._measure(self._probe)

    def _measure(self, probe: "_Probe") -> None:
        with _apart(_device(self.model)):
            stages = probe.measure(self.model)
        for index, (name, found) in enumerate(stages.items(), start=1):
            self._rows.append({"step": self.steps, "stage": name, "index": index, **found})
        self.log({f"backlock/{name}/{quantity}": value for name, found in stages.items() for quantity, value in found.items()}, self.steps)


class ToWandb:
    """Adds scalars, over backlock/step, to the row that the active run of Weights & Biases is at; without a run it does nothing."""

    def __init__(self) -> None:
        self.row: tuple[str, int] | None = None

    def __call__(self, scalars: dict[str, float], step: int) -> None:
        """Log scalars of a step."""
        wandb = sys.modules.get("wandb")  # not imported: it takes seconds, and may not be wanted
        run = wandb and wandb.run
        if not run:
            return
        if self.row == (run.id, run.step):  # nobody else logs: the row still holds the last measurement
            run.log({}, commit=True)
        run.define_metric("backlock/*", step_metric="backlock/step")
        run.log({**scalars, "backlock/step": step}, commit=False)
        self.row = run.id, run.step


class _Probe:
    """A chain cut once from a copy of a model, at a probe batch."""

    def __init__(self, model: nn.Module, inputs: Float[Tensor, "n ..."], targets: Tensor, loss: Loss):
        device = _device(model)
        self.twin = _twin(model)
        self.chain = split(self.twin, None, torch.float32, "eval")
        self.inputs, self.targets, self.loss = inputs.detach().to(device, torch.float32), targets.to(device), loss
        self.draws = generator(0, "lock monitor")
        self.vectors: dict[tuple[int, int], Tensor] = {}
        for link in walk_back(self.chain, self.inputs, self.targets, loss):
            check_stage(link, self._random(link.signal.direction.shape), self._random(link.inputs.shape))
        self.flat: list[Tensor] = []  # of the stage that runs, by activation
        for module in self.twin.modules():
            if isinstance(module, ACTIVATIONS):
                module.register_forward_hook(self._flatness(float(largest_slope(module, self.inputs))))

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.draws).to(self.inputs.device)

    def _flatness(self, steepest: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """A hook that keeps of every unit whether it is saturated; `src.locking.saturation` would run every stage once more."""

        def keep(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            (slope,) = grad(output.sum(), arguments[0], retain_graph=True)
            # 0·z makes NaN of what has diverged
            self.flat.append(((slope.abs() < SATURATED * steepest) + 0 * arguments[0].detach()).flatten())

        return keep

    def measure(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """The quantities of every stage, by its name, at the model's present weights."""
        with torch.no_grad():
            for mine, trained in zip(_tensors(self.twin), _tensors(model), strict=True):
                mine.copy_(trained)
        states, outputs, flat, h = [], [], [], self.inputs
        for stage in self.chain.stages:
            self.flat = [h.new_empty(0)]
            states.append(h.detach().requires_grad_())
            h = stage(states[-1])
            outputs.append(h)
            flat.append(torch.cat(self.flat).mean())  # NaN of none
        norms = self._norms(states, outputs)
        signal = loss_signal(self.loss, h.detach(), self.targets)
        found = {}
        for at in reversed(range(len(states))):
            (pulled,) = grad(outputs[at], states[at], signal.direction, retain_graph=True)
            before = ErrorSignal.of(pulled, signal.log_norm)
            found[self.chain.names[at]] = {
                "log_error_norm": signal.log_rms(),
                "saturation": float(flat[at]),
                **_severity(before),
                "norm": norms[at],
            }
            signal = before
        return {name: found[name] for name in self.chain.names}

    def _norms(self, states: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[int, float]:
        """The median over the samples of σ₁(J_l), by stage; of all stages of one size at once: of small ones the calls take the time."""
        norms: dict[int, float] = {}
        sizes = [(x[0].numel(), y[0].numel()) for x, y in zip(states, outputs, strict=True)]
        for size in dict.fromkeys(sizes):
            where = [at for at, other in enumerate(sizes) if other == size]
            push, pull = _products([states[at] for at in where], [outputs[at] for at in where])
            start, most = normalize(self._random((len(where) * len(self.inputs), size[0]))), 300
            if size in self.vectors:
                start, most = self.vectors[size].nan_to_num(0) + FRESH * start, WARM
            found = largest(push, pull, start, TOLERANCE, most=most)
            self.vectors[size] = found.vector
            norms |= zip(where, found.value.unflatten(0, (len(where), -1)).quantile(0.5, dim=1).tolist(), strict=True)
        return norms


def _products(states: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Product, Product]:
    """Jv and Jᵀu of stages of one size, the samples of one stage below those of another.

    Jᵀu is a backward pass, Jv the transpose of the linear map u ↦ Jᵀu: linearising as in `src.jacobian.matrix_free` traces every stage
    anew, which takes longer than the training's own steps.
    """
    covectors = [torch.zeros_like(y).requires_grad_() for y in outputs]
    pulled = grad(outputs, states, covectors, create_graph=True)
    return _transpose(pulled, covectors), _transpose(outputs, states)


def _transpose(values: Sequence[Tensor], points: Sequence[Tensor]) -> Product:
    """The product with the transposed derivative of values by points."""

    def product(rows: Tensor) -> Tensor:
        covectors = [part.reshape(value.shape) for part, value in zip(rows.split(len(values[0])), values, strict=True)]
        return torch.cat([x.flatten(1) for x in grad(values, points, covectors, retain_graph=True)])

    return product


def _severity(signal: ErrorSignal) -> dict[str, float]:
    """As `src.locking.severity`, NaN of a signal that is not finite."""
    if signal.direction.isfinite().all():
        return severity(signal)
    return dict.fromkeys(("lambda", "lambda_nonzero", "rank", "stable_rank"), torch.nan)


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Apart from the training: its random numbers, modes and precision neither decide nor notice what happens here."""
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),  # the backward passes of the others can't be differentiated
    ):
        yield


def _tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, in an order that a copy shares."""
    return [*module.parameters(), *module.buffers()]


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))


def _twin(model: nn.Module) -> nn.Module:
    """A copy without the hooks that watch the model, and with those that are part of it: torch's own (pruning, weight norm)."""
    # a weight that such a hook computes is no leaf of the graph, and torch copies leaves only
    computed = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor) and value.grad_fn]
    twin = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    for module in twin.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
            for key in [key for key, hook in hooks.items() if not hook.__module__.startswith("torch.nn.utils")]:
                del hooks[key]
    return twin
