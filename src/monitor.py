"""A probe batch watched while a model trains: which stages the gradient still reaches, every k steps, at a few percent of a step."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from src.chain import cut
from src.errors import UserError
from src.jacobian.golub_kahan import largest
from src.locking import ACTIVATIONS, SATURATED, ErrorSignal, Loss, loss_signal
from src.seeds import generator
from src.spectrum import Spectrum

Log = Callable[[dict[str, float], int], object]

# relative residual at which σ₁ has converged: the error of the value is of the order of its square
TOLERANCE = 1e-2
# steps of one measurement: what has not converged goes on from there at the next
STEPS = 8
# of a random direction in the start, so that neither a zero vector nor a singular vector overtaken by another is kept for ever
FRESH = 0.1
# a product of this length is not squared in float32
OVERFLOW = 1e18


class LockMonitor:
    """Watches the stages of a model while it trains, on a probe batch, in float32; the training stays the same bit for bit.

    On entry a copy of the model is cut into a chain, once; at entry and after every k-th step the model's weights are copied into it and

    - log_error_norm = ½ ln mean_n ‖g_l‖², nats,
    - saturation, the share of units whose slope is below a tenth of the largest (NaN without activation modules),
    - lambda = 1 − σ_min(G)/σ_max(G) of the matrix G with rows g_lᵀJ_l, lambda_nonzero over its nonzero singular values, its rank and
      its stable_rank,
    - norm, the median over the samples of σ₁(J_l), from below, by a few Golub–Kahan–Lanczos steps that start where the last ended,

    of every stage go to `history` and to the log. What has diverged is inf or NaN. The chain is that of `certify`: dropout off,
    BatchNorm with its running statistics; of the model's hooks it keeps only torch's own (pruning, weight norm).

        with LockMonitor(model, inputs, targets) as monitor:
            for images, labels in loader:
                ...
                optimizer.step()
                monitor.step()

    Args:
        model: what `certify` takes.
        inputs: the probe, N inputs; 32 are enough, and cost a few steps' time.
        targets: N targets.
        every: steps between two measurements.
        log: called with {"backlock/<stage>/<quantity>": value} and the step; None: Weights & Biases, where a run is active.
        loss: ℓ(H_L, y); it is applied to one sample at a time.

    Raises: UserError on entry, when the model can't be cut, or inputs and targets differ in number.
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
        if len(inputs) == 0 or len(inputs) != len(targets):
            raise UserError(f"monitor: {len(inputs)} inputs and {len(targets)} targets; give as many of each, at least one")
        if every < 1:
            raise UserError(f"monitor: every={every}; give a number of steps, at least 1")
        self.model, self.inputs, self.targets = model, inputs.detach(), targets
        self.every, self.log, self.loss = every, log or to_wandb, loss
        self.steps = 0
        self._probe: _Probe | None = None
        self._rows: list[dict[str, Any]] = []

    @property
    def history(self) -> pd.DataFrame:
        """A row per (measurement, stage): step, stage, index, and the quantities."""
        return pd.DataFrame(self._rows)

    def __enter__(self) -> Self:
        with _apart(self.inputs.device):
            self._probe = _Probe(self.model, self.inputs, self.targets, self.loss)
        self._measure()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._probe = None

    def step(self) -> None:
        """Count a step of the training, and measure if it is the k-th."""
        self.steps += 1
        if self.steps % self.every == 0:
            self._measure()

    def _measure(self) -> None:
        if self._probe is None:
            raise UserError("monitor: not entered; write `with LockMonitor(…) as monitor:` around the training")
        with _apart(self._probe.inputs.device):
            measured = self._probe.measure(self.model)
        self._rows += [{"step": self.steps, **stage} for stage in measured]
        flat = {
            f"backlock/{stage['stage']}/{quantity}": value
            for stage in measured
            for quantity, value in stage.items()
            if quantity not in ("stage", "index")
        }
        self.log(flat, self.steps)

    def callback(self) -> Any:
        """A callback for Lightning's Trainer that enters when the training starts, and steps after every batch.

        Returns: of the Callback class of the Lightning that has been imported; of none where there is none.
        """
        monitor = self

        class Steps(_lightning_callback()):  # type: ignore[misc]
            def on_train_start(self, trainer: Any, module: Any) -> None:
                monitor.__enter__()

            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                monitor.step()

            def on_train_end(self, trainer: Any, module: Any) -> None:
                monitor.__exit__(None, None, None)

        return Steps()


class _Probe:
    """A chain cut once from a copy of a model, at a probe batch."""

    def __init__(self, model: nn.Module, inputs: Float[Tensor, "n ..."], targets: Tensor, loss: Loss):
        self.twin = copy.deepcopy(model)
        for module in self.twin.modules():
            _drop_hooks(module)
        # cut works on a copy of what it is given; this one is its own, so that the chain's weights are the twin's
        vars(self.twin)["__deepcopy__"] = lambda memo: self.twin
        self.chain = cut(self.twin, None, torch.float32, "eval")
        device = next(iter(_tensors(self.twin)), inputs).device
        self.inputs, self.targets, self.loss = inputs.to(device, torch.float32), targets.to(device), loss
        self.steepest: dict[nn.Module, Tensor] = {}
        self.calls: list[tuple[nn.Module, Tensor]] = []
        for stage in self.chain.stages:
            for module in stage.modules():
                if isinstance(module, ACTIVATIONS) and module not in self.steepest:
                    (slopes,) = _slopes([(module, torch.linspace(-8, 8, 1601, device=device))])
                    self.steepest[module] = slopes.max()
                    module.register_forward_hook(lambda module, arguments, _: self.calls.append((module, arguments[0].detach().clone())))
        self.random: dict[tuple[int, ...], Tensor] = {}
        self.warm: dict[tuple[int, ...], Tensor] = {}

    def measure(self, model: nn.Module) -> list[dict[str, Any]]:
        """The quantities of every stage at the model's present weights."""
        with torch.no_grad():
            for mine, trained in zip(_tensors(self.twin), _tensors(model), strict=True):
                mine.copy_(trained)
        states, outputs, saturations = self._forward()
        signals = [loss_signal(self.loss, outputs[-1].detach(), self.targets)]
        for x, y in zip(states[::-1], outputs[::-1], strict=True):
            (pulled,) = torch.autograd.grad(y, x, signals[-1].direction.reshape(y.shape), retain_graph=True)
            signals.append(ErrorSignal.of(pulled, signals[-1].log_norm))
        *before, behind = signals[::-1][:-1], signals[::-1][1:]
        norms = self._norms(states, outputs)
        return [
            {"stage": name, "index": index, "log_error_norm": signal.log_rms(), "saturation": saturation, **severity, "norm": norm}
            for index, (name, signal, saturation, severity, norm) in enumerate(
                zip(self.chain.names, behind, saturations, _severities(before[0]), norms, strict=True), start=1
            )
        ]

    def _forward(self) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Inputs and outputs of every stage, each with a graph of its own, and the saturation."""
        states, outputs, saturations = [], [], []
        h = self.inputs
        for stage in self.chain.stages:
            states.append(h.detach().requires_grad_())
            self.calls.clear()
            h = stage(states[-1])
            outputs.append(h)
            saturations.append(self._saturation())
        return states, outputs, saturations

    def _saturation(self) -> float:
        """The share of units whose slope is below a tenth of the largest, of the activations called last."""
        if not self.calls:
            return torch.nan
        saturated = [
            # 0·z, so that what has diverged is not counted as one or the other
            ((slopes < SATURATED * self.steepest[activation]) + 0 * z).flatten()
            for (activation, z), slopes in zip(self.calls, _slopes(self.calls), strict=True)
        ]
        return float(torch.cat(saturated).mean())

    def _norms(self, states: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[float]:
        """The median over the samples of σ₁(J_l), stages of one size at once."""
        covectors = [torch.zeros_like(y).requires_grad_() for y in outputs]
        # J is the transpose of the linear map u ↦ uᵀJ
        pulled = torch.autograd.grad(outputs, states, covectors, create_graph=True)
        norms = torch.empty(len(states))
        sizes = [(y[0].numel(), x[0].numel()) for x, y in zip(states, outputs, strict=True)]
        for size in dict.fromkeys(sizes):
            group = [index for index, other in enumerate(sizes) if other == size]
            x, y, u, g = ([several[index] for index in group] for several in (states, outputs, covectors, pulled))
            values = self._largest(size, lambda v: _product(g, u, v), lambda v: _product(y, x, v), len(group) * len(x[0]))
            norms[group] = values.cpu().reshape(len(group), -1).median(1).values
        return norms.tolist()

    def _largest(self, size, push, pull, count):
        if size not in self.random:
            start = torch.randn(count, size[1], generator=generator(0, "lock monitor", *size)).to(self.inputs.device)
            self.random[size] = start / start.norm(dim=1, keepdim=True)
        start = self.random[size]
        if size in self.warm:
            start = self.warm[size] + FRESH * start
        diverged = torch.zeros(count, dtype=torch.bool, device=start.device)

        def bounded(product):
            def call(v):
                w = product(v)
                bad = ~(w.norm(dim=1) < OVERFLOW)
                diverged.logical_or_(bad)
                return w.masked_fill(bad[:, None], 0)
            return call

        found = largest(bounded(push), bounded(pull), start, TOLERANCE, most=STEPS)
        self.warm[size] = found.vector
        self.found = found
        return found.value.masked_fill(diverged, torch.nan)


def _product(outputs: Sequence[Tensor], inputs: Sequence[Tensor], covectors: Float[Tensor, "rows _"]) -> Float[Tensor, "rows _"]:
    """The rows of all stages, one after the other, times the transpose of the derivative of outputs by inputs."""
    parts = [part.reshape(y.shape) for part, y in zip(covectors.split(len(inputs[0])), outputs, strict=True)]
    return torch.cat([product.reshape(len(product), -1) for product in torch.autograd.grad(outputs, inputs, parts, retain_graph=True)])


def _severities(signals: Sequence[ErrorSignal]) -> list[dict[str, float]]:
    """As `src.locking.severity`, of all stages at once, by the Gram matrices of float32 signals in float64."""
    rows = [signal.relative() for signal in signals]
    grams = torch.stack([G.double() @ G.double().T for G in rows]).cpu()
    finite = grams.isfinite().all(2).all(1)
    values = torch.linalg.eigvalsh(grams.where(finite[:, None, None], 0)).flip(-1).clamp(min=0).sqrt()
    found = []
    for G, s, known in zip(rows, values, finite, strict=True):
        spectrum = Spectrum(s[: min(G.shape)], max(G.shape) * torch.finfo(G.dtype).eps * s[0])
        rank = int(spectrum.rank)
        numbers = {
            "lambda": float(1 - spectrum.smallest / spectrum.norm),
            "lambda_nonzero": float(1 - s[max(rank - 1, 0)] / spectrum.norm),
            "rank": float(rank),
            "stable_rank": float(spectrum.stable_rank),
        }
        found.append(numbers if known else dict.fromkeys(numbers, torch.nan))
    return found


def _slopes(calls: Sequence[tuple[nn.Module, Tensor]]) -> list[Tensor]:
    """|φ'(z)| of every call."""
    points = [z.detach().requires_grad_() for _, z in calls]
    # forward, not a call, so that no hook sees it
    values = [activation.forward(z) for (activation, _), z in zip(calls, points, strict=True)]
    return [slope.abs() for slope in torch.autograd.grad(values, points, [torch.ones_like(z) for z in points])]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, in an order that a copy shares."""
    for _, parameter in module.named_parameters(remove_duplicate=False):
        yield parameter
    for _, buffer in module.named_buffers(remove_duplicate=False):
        yield buffer


def _drop_hooks(module: nn.Module) -> None:
    """Take off what watches a module, leave on what is part of its function: torch's own."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
        for key, hook in list(hooks.items()):
            if not hook.__module__.startswith("torch.nn.utils"):
                del hooks[key]


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Apart from the training: its random state, its modes and its precision neither decide nor notice what happens here."""
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),  # the others' backward passes have no derivative
    ):
        yield


def to_wandb(scalars: dict[str, float], step: int) -> None:
    """Add the scalars to the row that the active run of Weights & Biases is at, if there is one."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.define_metric("backlock/*", step_metric="backlock/step")
        wandb.run.log({**scalars, "backlock/step": step}, commit=False)


def _lightning_callback() -> type:
    """The Callback class of the Lightning that has been imported."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if name in sys.modules:
            return sys.modules[name].Callback
    return object
