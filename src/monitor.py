"""A probe batch watched while a model trains: which stages the gradient still reaches, every k steps, at a few percent of a step."""

import copy
import sys
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
from torch.nn.utils.rnn import pad_sequence

from src.chain import split
from src.errors import UserError
from src.jacobian.golub_kahan import Product, largest
from src.jacobian.structured import dense
from src.locking import ACTIVATIONS, SATURATED, ErrorSignal, Loss, largest_slope, loss_signal, walk_back
from src.seeds import generator
from src.selftest import check_stage

Log = Callable[[dict[str, float], int], object]

# relative residual at which σ₁ has converged: the error of a value is of the order of its square
TOLERANCE = 1e-2
# Golub–Kahan–Lanczos steps at most, of the first measurement and of those that start where the last ended
COLD, WARM = 300, 4
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
    statistics. The model's own hooks see nothing of it.

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
        with _apart(probe.inputs.device):
            stages = probe.measure(self.model)
        for index, (name, found) in enumerate(stages.items(), start=1):
            self._rows.append({"step": self.steps, "stage": name, "index": index, **found})
        self.log({f"backlock/{name}/{quantity}": value for name, found in stages.items() for quantity, value in found.items()}, self.steps)


class ToWandb:
    """Adds scalars, over backlock/step, to the row that the active run of Weights & Biases is at; without a run it does nothing."""

    def __init__(self) -> None:
        self.row: tuple[str, int] | None = None

    def __call__(self, scalars: dict[str, float], step: int) -> None:
        """Log the scalars of a step."""
        wandb = sys.modules.get("wandb")  # who has a run has imported it
        if wandb is None or wandb.run is None:
            return
        run = wandb.run
        if self.row == (run.id, run.step):  # nobody else has logged since: the row still holds the last measurement
            run.log({}, commit=True)
        run.define_metric("backlock/*", step_metric="backlock/step")
        run.log({**scalars, "backlock/step": step}, commit=False)
        self.row = run.id, run.step


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
    J = diag(s) W is multiplied as it stands. `src.locking` and `src.jacobian.structured`, stage by stage, take twice the budget.
    """

    def __init__(self, model: nn.Module, inputs: Float[Tensor, "n ..."], targets: Tensor, loss: Loss):
        device = _device(model)
        self.twin = _twin(model)
        self.weights = _tensors(self.twin)
        self.chain = split(self.twin, None, torch.float32, "eval")
        self.inputs, self.targets, self.loss = inputs.detach().to(device, torch.float32), targets.to(device), loss
        self.draws = generator(0, "lock monitor")
        self.linears: dict[int, nn.Linear] = {}
        for link in walk_back(self.chain, self.inputs, targets, loss):
            check_stage(link, self._random(link.signal.direction.shape), self._random(link.inputs.shape))
            if dense(link.stage, link.inputs):
                self.linears[link.index - 1] = next(module for module in link.stage.modules() if isinstance(module, nn.Linear))
        self.vectors: dict[tuple[int, ...], Tensor] = {}
        # of the stage that runs: φ(z) and z of its activations, and Wh + b
        self.activated: list[tuple[Tensor, Tensor, float]] = []
        self.preactivation = self.inputs
        for module in self.twin.modules():
            if isinstance(module, ACTIVATIONS):
                module.register_forward_hook(self._activated(float(largest_slope(module, self.inputs))))
            elif module in self.linears.values():
                module.register_forward_hook(self._preactivated)

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.draws).to(self.inputs.device)

    def _activated(self, steepest: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(activation: nn.Module, arguments: tuple[Tensor, ...], _: Tensor) -> None:
            z = arguments[0].detach().clone().requires_grad_()
            self.activated.append((activation.forward(z), z, SATURATED * steepest))

        return keep

    def _preactivated(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.preactivation = output
        return output.clone()  # which may be written over

    def measure(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """The quantities of every stage, by its name, at the model's present weights."""
        with torch.no_grad():
            for mine, trained in zip(self.weights, _tensors(model), strict=True):
                mine.copy_(trained)
        stages, activated = self._run()
        signals = [loss_signal(self.loss, stages[-1].y.detach(), self.targets)]
        for stage in stages[::-1]:
            signals.append(stage.pull_back(signals[-1]))
        columns = {
            "log_error_norm": [signal.log_rms() for signal in signals[-2::-1]],
            "saturation": _saturations(activated),
            **_severities(signals[:0:-1]),
            "norm": self._norms(stages),
        }
        return {name: {column: values[at] for column, values in columns.items()} for at, name in enumerate(self.chain.names)}

    def _run(self) -> tuple[list[_Stage], list[list[tuple[Tensor, Tensor, float]]]]:
        """The stages, first to last, and their activations."""
        ran, activated, behind, h = [], [], {}, self.inputs
        for at, stage in enumerate(self.chain.stages):
            self.activated = []
            x = h.detach().requires_grad_()
            h = stage(x)
            ran.append((x, h))
            activated.append(self.activated)
            if at in self.linears:
                behind[at] = h, self.preactivation
        slopes = dict(zip(behind, _slopes([*behind.values()]), strict=True))
        structures = [(self.linears[at].weight, slopes[at]) if at in slopes else None for at in range(len(ran))]
        return [_Stage(x, y, structure) for (x, y), structure in zip(ran, structures, strict=True)], activated

    def _norms(self, stages: Sequence[_Stage]) -> list[float]:
        """The median over the samples of σ₁(J_l)."""
        norms: dict[int, float] = {}
        kinds = [(stage.x[0].numel(),) if stage.dense else (stage.x[0].numel(), stage.y[0].numel()) for stage in stages]
        for kind in dict.fromkeys(kinds):
            where = [at for at, other in enumerate(kinds) if other == kind]
            group = [stages[at] for at in where]
            push, pull = (_dense_products if group[0].dense else _products)(group)
            start, most = normalize(self._random((len(group) * len(self.inputs), kind[0]))), COLD
            if kind in self.vectors:
                start, most = self.vectors[kind].nan_to_num(0) + FRESH * start, WARM
            found = largest(push, pull, start, TOLERANCE, most=most)
            self.vectors[kind] = found.vector
            norms |= zip(where, found.value.unflatten(0, (len(group), -1)).quantile(0.5, dim=1).tolist(), strict=True)
        return [norms[at] for at in range(len(stages))]


def _dense_products(stages: Sequence[_Stage]) -> tuple[Product, Product]:
    """Jv and Jᵀu of stages with J = diag(s) W, the samples of one stage below those of another; missing outputs are zero."""
    W = pad_sequence([stage.dense[0] for stage in stages if stage.dense], batch_first=True)
    s = pad_sequence([stage.dense[1].T for stage in stages if stage.dense], batch_first=True).mT
    samples = s.shape[:2]
    return (
        lambda v: (s * (v.unflatten(0, samples) @ W.mT)).flatten(0, 1),
        lambda u: ((s * u.unflatten(0, samples)) @ W).flatten(0, 1),
    )


def _products(stages: Sequence[_Stage]) -> tuple[Product, Product]:
    """Jv and Jᵀu of stages of one size; Jv as the transpose of the linear map u ↦ Jᵀu, for linearising traces every stage anew."""
    states, outputs = [stage.x for stage in stages], [stage.y for stage in stages]
    covectors = [torch.zeros_like(y).requires_grad_() for y in outputs]
    return _transpose(grad(outputs, states, covectors, create_graph=True), covectors), _transpose(outputs, states)


def _transpose(values: Sequence[Tensor], points: Sequence[Tensor]) -> Product:
    """The product with the transposed derivative of values by points."""

    def product(rows: Tensor) -> Tensor:
        covectors = [part.reshape(value.shape) for part, value in zip(rows.split(len(values[0])), values, strict=True)]
        return torch.cat([x.flatten(1) for x in grad(values, points, covectors, retain_graph=True)])

    return product


def _slopes(pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """φ'(z) of every pair of φ(z) and z, φ a function of each entry alone."""
    values, points = [value for value, _ in pairs], [point for _, point in pairs]
    return grad(values, points, [torch.ones_like(value) for value in values], retain_graph=True) if values else ()


def _saturations(activated: Sequence[Sequence[tuple[Tensor, Tensor, float]]]) -> list[float]:
    """The share of units that are saturated, of every stage's activations; NaN of none."""
    slopes = iter(_slopes([(value, z) for stage in activated for value, z, _ in stage]))
    # 0·z makes NaN of what has diverged
    flat = [[((next(slopes).abs() < least) + 0 * z.detach()).flatten() for _, z, least in stage] for stage in activated]
    return [float(torch.cat(stage).mean()) if stage else torch.nan for stage in flat]


def _severities(signals: Sequence[ErrorSignal]) -> dict[str, list[float]]:
    """As `src.locking.severity`, from GGᵀ in float64, which loses nothing that float32 holds; NaN where G is not finite."""
    rows = [signal.relative() for signal in signals]
    grams = torch.stack([G.double() @ G.double().T for G in rows]).cpu()
    finite = grams.isfinite().all(2).all(1)[:, None]
    squares = torch.linalg.eigvalsh(grams.where(finite[:, None], 0)).flip(1).clamp(min=0).where(finite, torch.nan)
    shares = (squares / squares[:, :1]).sqrt()
    tolerance = shares.new_tensor([max(G.shape) * torch.finfo(G.dtype).eps for G in rows])
    rank = (shares > tolerance[:, None]).sum(1)
    last = torch.tensor([min(G.shape) for G in rows]) - 1
    columns = {
        "lambda": 1 - shares.gather(1, last[:, None])[:, 0],
        "lambda_nonzero": 1 - shares.gather(1, (rank - 1).clamp(min=0)[:, None])[:, 0],
        "rank": rank + 0 * squares[:, 0],
        "stable_rank": shares.square().sum(1),
    }
    return {column: values.tolist() for column, values in columns.items()}


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
