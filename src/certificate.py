"""The backward locking certificate K_back = (∏‖J_l‖, min rank J_l, max cond J_l, skip depth)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import StringIO
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Num
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from src import paths
from src.chain import BatchNormMode, Chain, cut
from src.cost import Method
from src.errors import UserError
from src.jacobian.backpropagated import Call
from src.jacobian.materialised import parameter_jacobian_norm
from src.jacobian.product import Product
from src.jacobian.structured import dense
from src.locking import Loss, require_pairs
from src.measure import Watch, as_trained, measure, own_dtype
from src.spectrum import weakest
from src.twin import bare, require_only_watching

# the two sides of the bound are compared to this many nats: rounding, far below any slack worth a name
ROUNDING = 1e-9
if TYPE_CHECKING:
    import src.diagnosis


@dataclass(frozen=True)
class Certificate:
    """K_back of a chain on N samples, and what each stage contributes.

    Attributes:
        log_attenuation: Σ_l ln‖J_l‖ over all stages, a sample; nats.
        rank: min_l rank J_l, a sample; where a rank is enclosed, its upper side counts.
        conditioning: max_l cond J_l, a sample; inf where a J_l is rank-deficient, NaN where one is not known and none is deficient.
        skip_depth: the fewest weight layers between the loss and H_1.
        depth: the most.
        layers: a row per (sample, stage): sample, stage, index; norm (σ₁), sigma_min, rank and cond, each with _lo, _hi and _known: "exact"
            within the backward error, "enclosed" for certain, or "estimated" with probability 1 − 1e-6; cond_active, of the singular values
            above τ alone; tau; stable_rank; rank_structural, which no rank exceeds; rank_full, min(m, d); rank_backprop and backprop_error
            (‖J' − J‖_F/‖J‖_F), of the Jacobian J' that training's own backward pass takes in its dtype, NaN where J is not known; method
            ("exact", "factorised", "matrix_free"); error_norm (‖g_l‖), grad_norm (‖∇θ_l‖), saturation, mean_square (Σσ²/k),
            log_error_norm, log_grad_norm (nats);
            branch_norm, σ₁ from below of the branch of a residual block, whose sum has the norm; NaN where there is no skip.
        severity: a row per stage: stage, index, lambda, lambda_nonzero, rank, stable_rank, gradient_rank, free_rank, locked, dead, kink.
        singular_values: of every J_l in the order of the stages, a row a sample.
        tolerance: the largest τ = max(m, d)·ε·σ₁ used for a rank; NaN where every rank is enclosed.
        first: the first stage with its inputs.
        product: J_L ⋯ J_1 in factors; None where there are more than 128 outputs.
        again: certifies another model in the same way.
        recut: cuts a copy of the model into its stages again.
    """

    log_attenuation: Float[Tensor, " n"]
    rank: Int[Tensor, " n"]
    conditioning: Float[Tensor, " n"]
    skip_depth: int
    depth: int
    layers: pd.DataFrame
    severity: pd.DataFrame
    singular_values: tuple[Float[Tensor, "n _"], ...]
    tolerance: float
    first: Call
    product: Product | None
    again: "partial[Certificate]" = field(repr=False)
    recut: Callable[[], Chain] = field(repr=False)

    @cached_property
    @sdpa_kernel(SDPBackend.MATH)
    def first_parameter_norm(self) -> Float[Tensor, " n"]:
        """‖P_1‖ of every sample; taken when it is asked for first, by the bound."""
        stage, inputs = self.first
        structure = dense(stage, inputs)
        return structure.parameter_norm() if structure else parameter_jacobian_norm(stage, inputs)

    def end_to_end(self) -> pd.DataFrame:
        """The product of all J_l itself beside the product of their norms, in logs, a row a sample.

        Returns: sample, log_norm (ln ‖∏J_l‖), log_smallest (ln σ_min(∏J_l), of as many singular values as there are outputs), log_bound
            (Σ ln‖J_l‖), slack (the bound less the norm); nats. NaN where there are more than 128 outputs; log_smallest also where a
            factor is singular to rounding without a rank that says so.
        """
        bound = self.log_attenuation.numpy()
        unknown = np.full_like(bound, np.nan)
        norm, smallest = (unknown, unknown) if self.product is None else (self.product.log_norm, self.product.log_smallest)
        frame = pd.DataFrame({"log_norm": norm, "log_smallest": smallest, "log_bound": bound}, dtype=float)
        # nothing is bounded by nothing with no slack
        slack = (frame["log_bound"] - frame["log_norm"]).mask(frame["log_norm"] == frame["log_bound"], 0.0)
        return frame.assign(slack=slack).rename_axis("sample").reset_index()

    def diagnosis(self) -> "src.diagnosis.Diagnosis":
        """Why its locked stages are locked, and which remedy would unlock how many: see `src.diagnosis`."""
        return self._diagnosis

    @cached_property
    def _diagnosis(self) -> "src.diagnosis.Diagnosis":
        from src.diagnosis import diagnose

        return diagnose(self)

    def bound(self) -> pd.DataFrame:
        """The gradient product bound, as stated and precise, in logs, a row a sample.

        As stated: ‖∇θ_1‖ ≤ ∏_{l=1}^{L−1}‖J_l‖·‖g_L‖. Precise: ‖∇θ_1‖ ≤ ‖P_1‖ ∏_{l=2}^{L}‖J_l‖·‖g_L‖.

        Returns: sample, lhs, rhs_as_stated, rhs, slack_as_stated, slack (nats), holds_as_stated, holds.
        """
        log_norm = self.layers.pivot(index="sample", columns="index", values="norm").map(_log)
        last = log_norm.columns[-1]
        by_stage = self.layers.set_index(["index", "sample"])
        lhs, signal = by_stage.loc[1, "log_grad_norm"], by_stage.loc[last, "log_error_norm"]
        as_stated = log_norm.drop(columns=last).sum(axis=1) + signal
        precise = log_norm.drop(columns=1).sum(axis=1) + signal + [_log(norm) for norm in self.first_parameter_norm.tolist()]
        frame = pd.DataFrame({"lhs": lhs, "rhs_as_stated": as_stated, "rhs": precise})
        for form in ("_as_stated", ""):
            # 0 ≤ 0 holds with no slack, 0 ≤ positive with all of it
            slack = (frame["rhs" + form] - lhs).where(lhs > -math.inf, math.inf).mask(frame["rhs" + form] == lhs, 0.0)
            frame["slack" + form] = slack
            frame["holds" + form] = slack >= -ROUNDING
        return frame.rename_axis("sample").reset_index()

    def known(self) -> pd.DataFrame:
        """The measured entries of K_back, each with its interval and how it is known; from those of the stages.

        Returns: a row a (sample, entry): sample, entry ("log_attenuation", "rank", "conditioning"), value, lo, hi, known.
        """
        logs = {side: self.layers[f"norm{side}"].map(_log) for side in ("", "_lo", "_hi")}
        stages = self.layers.assign(**{f"log{side}": column for side, column in logs.items()}).groupby("sample")
        entries = {
            "log_attenuation": ("norm", stages["log_lo"].sum(), stages["log_hi"].sum(), self.log_attenuation),
            "rank": ("rank", stages["rank_lo"].min(), stages["rank_hi"].min(), self.rank),
            "conditioning": ("cond", stages["cond_lo"].max(), stages["cond_hi"].agg(_greatest), self.conditioning),
        }
        tables = [
            pd.DataFrame({"entry": entry, "value": value.numpy(), "lo": lo, "hi": hi, "known": stages[f"{column}_known"].agg(weakest)})
            for entry, (column, lo, hi, value) in entries.items()
        ]
        return pd.concat(tables).reset_index()

    def to_dict(self) -> dict[str, Any]:
        """K_back as plain numbers and lists."""
        return {
            "log_attenuation": self.log_attenuation.tolist(),
            "rank": self.rank.tolist(),
            "conditioning": self.conditioning.tolist(),
            "skip_depth": self.skip_depth,
            "depth": self.depth,
            "tolerance": self.tolerance,
        }

    def to_frame(self) -> pd.DataFrame:
        """K_back as a table, a row a sample."""
        return pd.DataFrame(self.to_dict()).rename_axis("sample").reset_index()

    def plot(self) -> Figure:
        """Norm, rank, condition number and ‖g_l‖ of every stage; a line a sample."""
        quantities = {"norm": "‖J_l‖", "rank": "rank J_l", "cond": "cond J_l", "error_norm": "‖g_l‖"}
        figure = Figure(figsize=(10, 2.6), layout="constrained")
        for axis, (column, label) in zip(figure.subplots(1, 4), quantities.items(), strict=True):
            for _, sample in self.layers.groupby("sample"):
                axis.plot(sample["index"], sample[column], color="C0", alpha=0.5, marker=".")
            axis.set(xlabel="stage l", title=label, yscale="linear" if column == "rank" else "log")
            axis.xaxis.get_major_locator().set_params(integer=True)
        return figure

    def __str__(self) -> str:
        """The certificate as a table: a row a stage, medians over samples; the rank as structural, numerical and backpropagated."""
        table = Table(
            title=f"K_back on {len(self.rank)} samples: ln ∏‖J‖ = {self.log_attenuation.median():.3g} (median), "
            f"min rank {self.rank.min()}, max cond {self.conditioning.max():.3g}, skip depth {self.skip_depth} of {self.depth}"
        )
        medians = self.layers.groupby("index").median(numeric_only=True)
        for column in (
            "stage",
            "‖J‖",
            "σ_min",
            "rank s/n/b",
            "cond",
            "active",
            "‖g‖",
            "‖∇θ‖",
            "saturated",
            "λ",
            "λ≠0",
            "rank ∇θ/free",
            "locked",
        ):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for stage in self.severity.itertuples():
            m = medians.loc[stage.index]
            ranks = "/".join(f"{m[column]:.0f}" for column in ("rank_structural", "rank", "rank_backprop"))
            numbers = [m["cond"], m["cond_active"], m["error_norm"], m["grad_norm"], m["saturation"]]
            table.add_row(
                stage.stage,
                f"{m['norm']:.3g}",
                f"{m['sigma_min']:.3g}",
                ranks,
                *(f"{number:.3g}" for number in [*numbers, stage[self.severity.columns.get_loc("lambda") + 1], stage.lambda_nonzero]),
                f"{stage.gradient_rank}/{stage.free_rank}",
                "yes" if stage.locked else "no",
            )
        out = StringIO()
        Console(file=out, width=140).print(table)
        return out.getvalue()


@torch.inference_mode(False)
@sdpa_kernel(SDPBackend.MATH)  # torch.func has no rules for the others
def certify(
    model: nn.Module,
    inputs: Num[Tensor, "n ..."],
    targets: Tensor,
    loss: Loss = torch.nn.functional.cross_entropy,
    stages: Sequence[str] | None = None,
    method: Method = "auto",
    dtype: torch.dtype = torch.float64,
    batch_norm: BatchNormMode = "eval",
    watch: Watch | None = None,
) -> Certificate:
    """Certify how a chain of stages passes its gradient backwards.

    Every stage is first asked whether it is a function, of each sample alone, and rightly differentiated. Walks from the loss to the
    input; at stage l it holds J_l of all samples, its singular values, g_l and g_lᵀP_l, and nothing
    of the other stages but their inputs.

    Args:
        model: an `nn.Sequential` whose children are the stages, or one that torch.fx or torch.export can trace; it stays untouched. What
            torch.compile or data parallelism wraps is certified itself.
        inputs: N inputs H_0, on the model's device.
        targets: N targets.
        loss: ℓ(H_L, y); it is applied to one sample at a time (to the whole batch under batch_norm="train").
        stages: names of the stages to cut after, None cuts after every one; of a model that cannot be traced, the submodules that are
            its stages, in order.
        method: "exact" writes each J_l out; "matrix_free" encloses σ₁ and the rank by products with vectors; "auto" takes for each stage
            "exact" while its Jacobians fit in 512 MiB and their decomposition is a matter of seconds, and for large dense layers one
            factorisation for all samples.
        dtype: the arithmetic of the measurement.
        batch_norm: "eval" with frozen statistics, per sample; "train" with the batch's own: one operator on the batch, N = 1.
        watch: called with the plan, a method and a cost a stage, and how many stages are done: before the first and after each.

    Returns: the certificate.
    Raises: UserError when the model is no chain, a stage fails its test, a value is not finite (naming stage and sample), or a J_l is too
        large to write out.
    """
    if batch_norm not in get_args(BatchNormMode):
        raise UserError(f"certify: batch_norm={batch_norm!r}; use 'eval' or 'train'")
    if method not in get_args(Method):
        raise UserError(f"certify: method={method!r}; use 'auto', 'exact' or 'matrix_free'")
    require_pairs(inputs, targets)
    if not inputs.is_floating_point():
        raise UserError(f"certify: inputs of {inputs.dtype} have no derivative; certify the model behind its embedding")
    inputs, model = inputs.clone(), bare(model)
    require_only_watching(model, inputs.detach().to(own_dtype(model, inputs)))
    chain = cut(model, stages, dtype, batch_norm, inputs=inputs)
    trained = as_trained(model, inputs, stages, batch_norm)
    inputs = inputs.detach().to(dtype).contiguous()
    found = measure(chain, inputs, targets, loss, method, trained, watch or (lambda planned, done: None))
    by_sample = found.layers.groupby("sample")
    return Certificate(
        log_attenuation=torch.tensor(found.layers["norm"].map(_log).groupby(found.layers["sample"]).sum().to_numpy()),
        rank=torch.tensor(by_sample["rank"].min().to_numpy()),
        conditioning=torch.tensor(by_sample["cond"].agg(_greatest).to_numpy()),
        skip_depth=paths.skip_depth(chain.stages),
        depth=paths.depth(chain.stages),
        layers=found.layers,
        severity=found.severity,
        singular_values=tuple(extremes.values for extremes in found.extremes),
        tolerance=max((float(extremes.tolerance.max()) for extremes in found.extremes if extremes.method == "exact"), default=math.nan),
        first=found.first,
        product=found.product,
        again=partial(certify, inputs=inputs, targets=targets, loss=loss, method=method, dtype=dtype, batch_norm=batch_norm),
        recut=partial(cut, model, stages, dtype, batch_norm, inputs=inputs),
    )


def _greatest(conditions: pd.Series) -> float:
    """The largest, inf if there is one, NaN if one is not known."""
    return math.inf if (conditions == math.inf).any() else float(conditions.max(skipna=False))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
