"""A probe batch watched while a model trains: which stages the gradient still reaches, every k steps, at a few percent of a step."""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence

from src.chain import cut
from src.errors import UserError
from src.jacobian.golub_kahan import Product
from src.jacobian.structured import dense
from src.locking import ACTIVATIONS, SATURATED, ErrorSignal, Loss, loss_signal, walk_back
from src.seeds import generator
from src.selftest import check_stage

Log = Callable[[dict[str, float], int], object]
Call = tuple[nn.Module, Tensor]

# Golub–Kahan–Lanczos steps of a measurement; of a dense layer, whose singular values are fewer and further apart; how often the first
# measurement takes them before it counts
WARM, WARM_DENSE, COLD = 12, 5, 3
# of a random direction in a warm start, so that neither zero nor a singular vector that another has overtaken is kept for ever
FRESH = 0.1
# entries of a state beyond which its stage is measured alone, which takes less memory; of smaller ones the calls take the time
ALONE = 2**16
SMALLEST = torch.finfo(torch.float32).tiny


class LockMonitor:
    """Watches every stage of a model on a probe batch while the model trains, in float32; the training stays the same bit for bit.

    A copy of the model is cut into a chain once. On entry and after every k-th step it is given the model's weights, and of every stage

    - log_error_norm = ½ ln mean_n ‖g_l‖², nats,
    - saturation: the share of units whose slope is below a tenth of the largest; NaN without activation modules,
    - lambda = 1 − σ_min(G)/σ_max(G), G with rows g_lᵀJ_l; lambda_nonzero over the nonzero singular values; rank and stable_rank of G,
    - norm: the median over the samples of σ₁(J_l), from below, by a few Golub–Kahan–Lanczos steps from where the last ended,

    go to `history` and to the log. What has diverged is inf or NaN. As in `certify`, dropout is off and BatchNorm has its running
    statistics; of the model's hooks only torch's own count (pruning, weight norm).

        with LockMonitor(model, inputs, targets) as monitor:
            for images, labels in loader:
                ...
                optimizer.step()
                monitor.step()

    Args:
        model: what `certify` takes.
        inputs: the probe, N inputs. The cost grows with N; 32 are enough.
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
        scalars = {f"backlock/{name}/{quantity}": value for name, found in stages.items() for quantity, value in found.items()}
        self.log(scalars, self.steps)

    def callback(self) -> Any:
        """A callback for Lightning's Trainer that enters when the training starts, steps after every batch, and leaves at the end.

        Returns: of the Callback class of the Lightning that has been imported; where none has, of a class with its three methods.
        """
        monitor = self

        class Steps(_lightning_callback()):  # type: ignore[misc]
            def on_train_start(self, trainer: Any, module: Any) -> None:
                monitor.__enter__()

            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                monitor.step()

            def on_train_end(self, trainer: Any, module: Any) -> None:
                monitor.__exit__()

        return Steps()


def to_wandb(scalars: dict[str, float], step: int) -> None:
    """Add the scalars, over backlock/step, to the row that the active run of Weights & Biases is at; without a run do nothing."""
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
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [tensor for _, tensor in named]


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))


@dataclass(frozen=True)
class _Link:
    """A stage at the present weights.

    Attributes:
        x: H_{l−1}, a leaf.
        y: H_l, with the graph from x.
        calls: the activations it called, each with its input.
        dense: W and s where J = diag(s) W.
    """

    x: Float[Tensor, "n ..."]
    y: Float[Tensor, "n ..."]
    calls: list[Call]
    dense: tuple[Float[Tensor, "m d"], Float[Tensor, "n m"]] | None

    @property
    def kind(self) -> tuple[int, ...]:
        """What stages have in common that are multiplied at once: their sizes, or being dense in as many inputs."""
        return (self.x[0].numel(),) if self.dense else (self.x[0].numel(), self.y[0].numel())

    def pull_back(self, signal: ErrorSignal) -> ErrorSignal:
        """g_{l−1} = J_lᵀg_l."""
        if self.dense:
            weight, slopes = self.dense
            pulled = ((slopes * signal.direction) @ weight).reshape(self.x.shape)
        else:
            (pulled,) = torch.autograd.grad(self.y, self.x, signal.direction, retain_graph=True)
        return ErrorSignal.of(pulled, signal.log_norm)


class _Probe:
    """A chain cut once from a copy of a model, at a probe batch."""

    def __init__(self, model: nn.Module, inputs: Float[Tensor, "n ..."], targets: Tensor, loss: Loss):
        # a weight that is computed from others is left behind with its graph, which can't be copied
        left = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor) and value.grad_fn]
        self.twin = copy.deepcopy(model, {id(value): value.detach().clone() for value in left})
        for module in self.twin.modules():
            _drop_hooks(module)
        # cut copies what it is given; this is a copy already, and the chain is to share its weights
        vars(self.twin)["__deepcopy__"] = lambda memo: self.twin
        self.chain = cut(self.twin, None, torch.float32, "eval")
        device = _device(model)
        self.inputs, self.targets, self.loss = inputs.to(device, torch.float32), targets.to(device), loss
        self.draws = generator(0, "lock monitor")
        self.linears: list[nn.Linear | None] = [None] * len(self.chain.stages)
        for link in walk_back(self.chain, self.inputs, self.targets, loss):
            probe, direction = (torch.randn(like.shape, generator=self.draws).to(device) for like in (link.signal.direction, link.inputs))
            check_stage(link, probe, direction)
            if dense(link.stage, link.inputs) is not None:
                self.linears[link.index - 1] = next(module for module in link.stage.modules() if isinstance(module, nn.Linear))
        # of the stage that is running
        self.activated: list[Call] = []
        self.preactivated: list[Tensor] = []
        self.steepest: dict[nn.Module, Tensor] = {}
        for module in {module for stage in self.chain.stages for module in stage.modules()}:
            if isinstance(module, ACTIVATIONS):
                (slopes,) = _slopes([(module, torch.linspace(-8, 8, 1601, device=device))])
                self.steepest[module] = slopes.max()
                module.register_forward_hook(self._keep_input)
            elif module in self.linears:
                module.register_forward_hook(self._keep_output)
        self.random: dict[tuple[int, ...], Tensor] = {}
        self.vectors: dict[tuple[int, ...], Tensor] = {}

    def _keep_input(self, activation: nn.Module, arguments: tuple[Tensor, ...], _: Tensor) -> None:
        self.activated.append((activation, arguments[0].detach().clone()))

    def _keep_output(self, linear: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.preactivated.append(output)
        return output.clone()  # which may be written over

    def measure(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """The quantities of every stage, by its name, at the model's present weights."""
        with torch.no_grad():
            for mine, trained in zip(_tensors(self.twin), _tensors(model), strict=True):
                mine.copy_(trained)
        links = self._links()
        signals = [loss_signal(self.loss, links[-1].y.detach(), self.targets)]
        for link in links[::-1]:
            signals.append(link.pull_back(signals[-1]))
        before, behind = signals[:0:-1], signals[-2::-1]
        columns = {
            "log_error_norm": _log_rms(behind),
            "saturation": self._saturations(links),
            **_severities(before),
            "norm": self._norms(links),
        }
        return {name: {column: values[at] for column, values in columns.items()} for at, name in enumerate(self.chain.names)}

    def _links(self) -> list[_Link]:
        """The stages, first to last."""
        ran, kept = [], []
        h = self.inputs
        for stage in self.chain.stages:
            self.activated, self.preactivated = [], []
            x = h.detach().requires_grad_()
            h = stage(x)
            ran.append((x, h, self.activated))
            kept.append(self.preactivated)
        behind = {at: ran[at][1] for at, linear in enumerate(self.linears) if linear is not None}
        slopes = dict(zip(behind, _derivatives([*behind.values()], [kept[at][0] for at in behind]), strict=True))
        return [
            _Link(x, y, calls, None if linear is None else (linear.weight, slopes[at]))
            for at, ((x, y, calls), linear) in enumerate(zip(ran, self.linears, strict=True))
        ]

    def _saturations(self, links: Sequence[_Link]) -> list[float]:
        """The share of units whose slope is below a tenth of the largest, of every stage's activations."""
        slopes = iter(_slopes([call for link in links for call in link.calls]))
        shares = []
        for link in links:
            # 0·z makes NaN of what has diverged
            saturated = [((next(slopes) < SATURATED * self.steepest[activation]) + 0 * z).flatten() for activation, z in link.calls]
            shares.append(torch.cat([self.inputs.new_empty(0), *saturated]).mean())  # NaN of none
        return torch.stack(shares).tolist()

    def _norms(self, links: Sequence[_Link]) -> list[float]:
        """The median over the samples of σ₁(J_l), of all stages of a kind at once."""
        norms: dict[int, float] = {}
        kinds = [(*link.kind, at if link.x.numel() > ALONE else 0) for at, link in enumerate(links)]
        for kind in dict.fromkeys(kinds):
            where = [at for at, other in enumerate(kinds) if other == kind]
            group = [links[at] for at in where]
            push, pull = (_dense_products if group[0].dense else _products)(group)
            if kind not in self.vectors:
                rows = torch.randn(len(group) * len(self.inputs), kind[0], generator=self.draws).to(self.inputs.device)
                self.random[kind] = self.vectors[kind] = normalize(rows)
                for _ in range(COLD):
                    _, self.vectors[kind] = _largest(push, pull, self.vectors[kind], WARM)
            start = normalize(self.vectors[kind] + FRESH * self.random[kind])
            values, self.vectors[kind] = _largest(push, pull, start, WARM_DENSE if group[0].dense else WARM)
            norms |= zip(where, values.reshape(len(group), -1).median(1).values.tolist(), strict=True)
        return [norms[at] for at in range(len(links))]


def _dense_products(links: Sequence[_Link]) -> tuple[Product, Product]:
    """Jv and Jᵀu of stages with J = diag(s) W, the rows of one stage below those of another; missing outputs are zero."""
    pairs = [link.dense for link in links if link.dense]
    W = pad_sequence([weight for weight, _ in pairs], batch_first=True)
    s = pad_sequence([slopes.T for _, slopes in pairs], batch_first=True).mT
    shape = s.shape[:2]
    return (
        lambda v: (s * (v.unflatten(0, shape) @ W.mT)).flatten(0, 1),
        lambda u: ((s * u.unflatten(0, shape)) @ W).flatten(0, 1),
    )


def _products(links: Sequence[_Link]) -> tuple[Product, Product]:
    """Jv and Jᵀu of stages of one size, the rows of one stage below those of another."""
    states, outputs = [link.x for link in links], [link.y for link in links]
    covectors = [torch.zeros_like(y).requires_grad_() for y in outputs]
    # J is the transpose of the linear map u ↦ uᵀJ
    pulled = torch.autograd.grad(outputs, states, covectors, create_graph=True)
    return _transpose(pulled, covectors), _transpose(outputs, states)


def _transpose(values: Sequence[Tensor], points: Sequence[Tensor]) -> Product:
    """The product with the transposed derivative of values by points."""

    def product(rows: Tensor) -> Tensor:
        covectors = [part.reshape(value.shape) for part, value in zip(rows.split(len(values[0])), values, strict=True)]
        return torch.cat([x.reshape(len(x), -1) for x in torch.autograd.grad(values, points, covectors, retain_graph=True)])

    return product


def _largest(
    push: Product, pull: Product, v: Float[Tensor, "rows d"], steps: int
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows d"]]:
    """σ₁ of every row's matrix, from below, and the vector that reaches it, by a number of Golub–Kahan–Lanczos steps.

    `src.jacobian.golub_kahan.largest` without its looks at the residual, which cost more than these few steps.

    Args:
        push: u = Jv.
        pull: v = Jᵀu.
        v: where to start, of length 1.
        steps: products with J.

    Returns: values, NaN where a product is not finite, on the CPU; vectors of length 1, or 0 where there is none.
    """
    u, length = _unit(push(v))
    basis, alphas, betas = [v], [length], []
    for _ in range(steps - 1):
        v, length = _unit(torch.addcmul(pull(u), alphas[-1], v, value=-1))
        basis.append(v)
        betas.append(length)
        u, length = _unit(torch.addcmul(push(v), betas[-1], u, value=-1))
        alphas.append(length)
    B = (torch.diag_embed(torch.cat(alphas, 1)) + torch.diag_embed(torch.cat(betas, 1), 1)).double().cpu()
    finite = B.isfinite().all(2).all(1)
    B = B.where(finite[:, None, None], 0)
    squares, p = torch.linalg.eigh(B.mT @ B)
    vectors = torch.zeros_like(v)
    for weight, vector in zip(p[:, :, -1].to(v).split(1, dim=1), basis, strict=True):
        vectors.addcmul_(weight, vector)
    return squares[:, -1].clamp(min=0).sqrt().where(finite, math.nan), normalize(vectors.nan_to_num(0, 0, 0))


def _unit(vectors: Float[Tensor, "rows d"]) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "rows 1"]]:
    """Vectors of length 1, or 0, and their lengths."""
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / length.clamp(min=SMALLEST), length


def _log_rms(signals: Sequence[ErrorSignal]) -> list[float]:
    """½ ln mean_n ‖g_n‖² of every stage, nats."""
    log_norms = torch.stack([signal.log_norm for signal in signals])
    return ((2 * log_norms).logsumexp(1) - math.log(log_norms.shape[1])).div(2).tolist()


def _severities(signals: Sequence[ErrorSignal]) -> dict[str, list[float]]:
    """As `src.locking.severity`, of all stages at once: by the Gram matrices in float64 of signals whose τ is that of float32."""
    rows = [signal.relative() for signal in signals]
    grams = torch.stack([G.double() @ G.double().T for G in rows]).cpu()
    finite = grams.isfinite().all(2).all(1)
    squares = torch.linalg.eigvalsh(grams.where(finite[:, None, None], 0)).flip(1).clamp(min=0)
    columns: dict[str, list[float]] = {"lambda": [], "lambda_nonzero": [], "rank": [], "stable_rank": []}
    for G, (top, *rest) in zip(rows, squares.where(finite[:, None], math.nan).sqrt().tolist(), strict=True):
        shares = [value / top if top else math.nan for value in (top, *rest)][: min(G.shape)]
        rank = sum(share > max(G.shape) * torch.finfo(G.dtype).eps for share in shares)
        numbers = (1 - shares[-1], 1 - shares[max(rank - 1, 0)], rank + 0 * top, sum(share**2 for share in shares))
        for column, number in zip(columns.values(), numbers, strict=True):
            column.append(number)
    return columns


def _derivatives(values: Sequence[Tensor], points: Sequence[Tensor]) -> Sequence[Tensor]:
    """φ'(z), of values φ(z) that are functions of each entry alone."""
    return torch.autograd.grad(values, points, [torch.ones_like(value) for value in values], retain_graph=True) if values else ()


def _slopes(calls: Sequence[Call]) -> list[Tensor]:
    """|φ'(z)| of every call."""
    points = [z.detach().requires_grad_() for _, z in calls]
    # forward, not a call, so that no hook sees it
    values = [activation.forward(z) for (activation, _), z in zip(calls, points, strict=True)]
    return [slope.abs() for slope in _derivatives(values, points)]


def _drop_hooks(module: nn.Module) -> None:
    """Take off what watches a module, leave on what is part of it: torch's own."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
        for key, hook in list(hooks.items()):
            if not hook.__module__.startswith("torch.nn.utils"):
                del hooks[key]
