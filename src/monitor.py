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
