"""Why a stage is locked, with the number that shows it, and what would help: remedies tried on a copy of the net."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from src.certificate import Certificate
from src.chain import Value
from src.errors import UserError
from src.seeds import generator

# ‖g_l‖ a decade below ‖g_L‖: a step that suits the last layer is ten times too small there
LOCKED_DECADES = 1.0
# so many units pass less than a tenth of the slope that they could; half of them are what a ReLU layer has anyway
SATURATED_UNITS = 0.75
# a quarter of the units pass nothing for any sample, or derivatives hang on the choice at the kink for a quarter of them
DEAD_UNITS, AT_KINK = 0.25, 0.25
# relative error of the backpropagated Jacobian: the root of single precision's ε
BACKPROP_ERROR = 3.5e-4
CAUSES = ["stage", "index", "cause", "at", "quantity", "value", "limit"]


@dataclass(frozen=True)
class Diagnosis:
    """What locks a net and what helps.

    Attributes:
        causes: a row a (locked stage, cause): stage, index, cause; at, the stage that shows it; quantity, value, limit.
        what_ifs: a row a remedy, the best first: remedy; locked, the number of stages that are; decades, log₁₀ ‖g_1‖/‖g_L‖ (median over the
            samples); severity, λ of the first stage; gained, decades more than as it is; note. The first row is the net as it is.
    """

    causes: pd.DataFrame
    what_ifs: pd.DataFrame

    def __str__(self) -> str:
        """Both as tables."""
        out = StringIO()
        for title, frame in (("Why stages are locked", self.causes), ("What would help", self.what_ifs)):
            table = Table(*frame.columns, title=title)
            for row in frame.itertuples(index=False):
                table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
            Console(file=out, width=140).print(table)
        return out.getvalue()


def diagnose(certificate: Certificate) -> Diagnosis:
    """Name the causes of every locked stage and try the remedies of the specification."""
    return Diagnosis(causes(certificate), what_ifs(certificate))


def attenuation(certificate: Certificate) -> Float[np.ndarray, " stages"]:
    """log₁₀ ‖g_l‖/‖g_L‖ of every stage l, the median over the samples."""
    log_norm = certificate.layers.pivot(index="sample", columns="index", values="log_error_norm")
    with np.errstate(invalid="ignore"):
        return np.asarray(log_norm.sub(log_norm.iloc[:, -1], axis=0).median() / math.log(10))


def locked(certificate: Certificate) -> list[bool]:
    """Whether a stage fails the lock condition, or ‖g_l‖ is a decade below ‖g_L‖."""
    below = ~(attenuation(certificate) > -LOCKED_DECADES)
    return (below | certificate.severity["locked"].to_numpy(dtype=bool)).tolist()


def causes(certificate: Certificate) -> pd.DataFrame:
    """The causes of every locked stage, each from a number of this stage or of one behind it, those furthest beyond their limit first."""
    medians = certificate.layers.groupby("index").median(numeric_only=True)
    stages = certificate.severity.set_index("index")
    names, decades = stages["stage"], attenuation(certificate)
    smallest_normal = math.log10(torch.finfo(torch.float32).tiny)
    rows = []
    for index, is_locked in zip(stages.index, locked(certificate), strict=True):
        if not is_locked:
            continue
        here, behind = medians.loc[index:], stages.loc[index:]
        deficient = here.loc[(here["cond"] == math.inf) & (here.index > index)]
        signals = float(behind["rank"].max())
        tight = here.loc[(here.index > index) & (here.index < stages.index[-1]) & (here["rank_structural"] < signals)]
        lost = here["rank"] - here["rank_backprop"]
        error_norm = float(medians.loc[index, "log_error_norm"]) / math.log(10)
        shown = [
            ("vanishing product", index, "log₁₀ ‖g_l‖/‖g_L‖", decades[index - 1], -LOCKED_DECADES, decades[index - 1] <= -LOCKED_DECADES),
            *_least("rank deficiency", deficient["rank"], "rank J, which is not full", math.nan),
            *_least("information bottleneck", tight["rank_structural"], "directions that pass, of those that the loss sends", signals),
            *_most("saturation", here["saturation"], "share of units with φ' < max/10", SATURATED_UNITS),
            *_most("dead units", behind["dead"], "share of units with φ' = 0 for all", DEAD_UNITS),
            *_most("kink", behind["kink"], "share of z = 0", AT_KINK),
            *_most("floating point", here["backprop_error"], "‖J' − J‖/‖J‖ in training's dtype", BACKPROP_ERROR),
            *_most("floating point", lost, "ranks lost in training's dtype", 0.5),
            ("floating point", index, "log₁₀ ‖g_l‖", error_norm, smallest_normal, error_norm < smallest_normal),
        ]
        rows += [(names[index], index, cause, names[at], *numbers) for cause, at, *numbers, holds in shown if holds]
    return pd.DataFrame(rows, columns=CAUSES)


def _most(cause: str, values: pd.Series, quantity: str, limit: float) -> list[tuple[str, int, str, float, float, bool]]:
    """The largest of a number of the stages, where it is known, and whether it exceeds its limit."""
    known = values.dropna()
    return [(cause, int(known.idxmax()), quantity, float(known.max()), limit, bool(known.max() > limit))] if len(known) else []


def _least(cause: str, values: pd.Series, quantity: str, limit: float) -> list[tuple[str, int, str, float, float, bool]]:
    """The smallest of a number of those stages that have too little of it."""
    return [(cause, int(values.idxmin()), quantity, float(values.min()), limit, True)] if len(values) else []


def what_ifs(certificate: Certificate) -> pd.DataFrame:
    """The net as it is, and with every remedy: certified again in the same way, ranked by how many stages stay locked, then by ‖g_1‖."""
    before = _measured("as it is", certificate)
    rows: list[dict[str, object]] = []
    for remedy, change in REMEDIES.items():
        try:
            changed = change(certificate)
        except (UserError, RuntimeError) as error:  # RuntimeError: of the model's own code, which the remedy does not suit
            rows.append({"remedy": remedy, "note": f"not tried: {(str(error).splitlines() or ['it fails'])[0]}"})
            continue
        rows.append(_measured(remedy, changed))
    frame = pd.DataFrame(rows, columns=[*before]).sort_values(["locked", "decades"], ascending=[True, False])
    frame = pd.concat([pd.DataFrame([before]), frame], ignore_index=True)
    return frame.assign(gained=frame["decades"] - before["decades"])[["remedy", "locked", "decades", "gained", "severity", "note"]]


def _measured(remedy: str, certificate: Certificate) -> dict[str, object]:
    first = certificate.severity.iloc[0]
    return {
        "remedy": remedy,
        "locked": sum(locked(certificate)),
        "decades": float(attenuation(certificate)[0]),
        "severity": float(first["lambda_nonzero"]),
        "note": "",
    }


def _stages(certificate: Certificate) -> list[nn.Module]:
    """The stages of a copy of the model."""
    chain = certificate.recut()
    if chain.on_batch:
        raise UserError("under batch_norm='train' the batch is one sample")
    return list(chain.stages)


def _states(certificate: Certificate, stages: Sequence[nn.Module]) -> list[Tensor]:
    """H_0 … H_L."""
    states = [certificate.again.keywords["inputs"]]
    with torch.no_grad():
        for stage in stages:
            states.append(stage(states[-1]))
    return states


class _Skip(nn.Module):
    """X + f(x) where the shapes agree, else f(x)."""

    def __init__(self, stage: nn.Module, agrees: bool):
        super().__init__()
        self.stage, self.agrees = stage, agrees

    def forward(self, x: Value) -> Value:
        outputs = self.stage(x)
        return x + outputs if self.agrees else outputs


class _Normalised(nn.Module):
    """f(LN(x)): layer normalisation without gains over all that a sample has."""

    def __init__(self, stage: nn.Module, shape: torch.Size):
        super().__init__()
        self.stage, self.normalise = stage, nn.LayerNorm(shape, elementwise_affine=False)

    def forward(self, x: Value) -> Value:
        return self.stage(self.normalise(x))


def _with_skips(certificate: Certificate) -> Certificate:
    """An identity around every stage whose input and output are of one shape."""
    stages = _stages(certificate)
    agree = [before.shape == behind.shape for before, behind in pairwise(_states(certificate, stages))]
    if not any(agree):
        raise UserError("no stage keeps the shape of its input")
    return certificate.again(nn.Sequential(*(_Skip(stage, agrees) for stage, agrees in zip(stages, agree, strict=True))))


def _with_norms(certificate: Certificate) -> Certificate:
    """Layer normalisation before every stage but the first."""
    first, *others = stages = _stages(certificate)
    if not others:
        raise UserError("there is one stage alone")
    shapes = [state.shape[1:] for state in _states(certificate, stages)[1:-1]]
    return certificate.again(nn.Sequential(first, *(_Normalised(stage, shape) for stage, shape in zip(others, shapes, strict=True))))


def _widened(certificate: Certificate) -> Certificate:
    """Hidden layers of twice the width, drawn anew with the mean squared weight kept a unit: Σw² of a row stays."""
    stages, draws = _stages(certificate), generator(0, "what if")
    layers = [module for stage in stages for module in stage.modules() if isinstance(module, nn.Linear)]
    weights = sum(parameter.ndim > 1 for stage in stages for parameter in stage.parameters())
    others = {id(p) for stage in stages for p in stage.parameters()} - {id(p) for layer in layers for p in layer.parameters()}
    if others or weights > len(layers) or len(layers) < 2:
        raise UserError("width is doubled in chains of dense layers only")
    for place, linear in enumerate(layers):
        rows, columns = linear.out_features * (1 + (place < len(layers) - 1)), linear.in_features * (1 + (place > 0))
        scale = float(linear.weight.square().mean().sqrt()) * math.sqrt(linear.in_features / columns)
        weight = scale * torch.randn(rows, columns, generator=draws, dtype=torch.float64).to(linear.weight)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.repeat(rows // linear.out_features), requires_grad=False)
        linear.weight, linear.out_features, linear.in_features = nn.Parameter(weight, requires_grad=False), rows, columns
    return certificate.again(nn.Sequential(*stages))


def _with_head(certificate: Certificate) -> Certificate:
    """The first half of the net under a linear head of its own: what an auxiliary loss sends to the early layers."""
    stages = _stages(certificate)
    if len(stages) < 3:
        raise UserError("there is no stage between the first and the last")
    middle, states = (len(stages) + 1) // 2, _states(certificate, stages)
    hidden, outputs = states[middle], states[-1]
    head = nn.Linear(hidden[0].numel(), outputs[0].numel(), dtype=torch.float64, device=hidden.device)
    draws = generator(0, "auxiliary head")
    weight = torch.randn(head.weight.shape, generator=draws, dtype=torch.float64).to(hidden.device) / math.sqrt(head.in_features)
    head.weight, head.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(torch.zeros_like(head.bias), requires_grad=False)
    return certificate.again(nn.Sequential(*stages[:middle], nn.Sequential(nn.Flatten(), head)))


REMEDIES: dict[str, Callable[[Certificate], Certificate]] = {
    "skip connections": _with_skips,
    "layer normalisation": _with_norms,
    "twice the width": _widened,
    "auxiliary head at half depth": _with_head,
}
