"""Step 10, the certificate: what K_back = (∏‖J_l‖, min rank J_l, max cond J_l, skip depth) says of how well a network will train.

A zoo of random networks, family × depth × gain × activation × normalisation × width: architectures drawn at random from all
combinations, so that they are independent draws. Each is certified at initialisation, sample by sample, every entry with its enclosure, and
then trained for one budget: the same steps, batches and learning rate. Spearman's ρ over the zoo between an entry and the accuracy reached
tells whether the entry predicts; beside K_back stand the gradient's own end-to-end ratio, χ, the severity and the lock condition. The
control is what is known without a certificate, depth and width: min rank J_l rises with the width, and so does the accuracy, so that each
entry is also held to its correlation among networks of one width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import nn

from src.certificate import Certificate
from src.chain import cut
from src.config import Config, Criterion, ModelConfig, Norm, Skip, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.jacobian.materialised import layer_jacobian
from src.locking import log_rms
from src.mean_field import critical_weight_var
from src.plan import Work
from src.prediction import association, association_gain, predict_left_out
from src.rows import Row, measured, pick
from src.seeds import generator
from src.statistics import Estimate, greatest, least
from src.trainings import Trainee, train_all
from src.verdict import Verdict, cell, cells_by, judge_forms

QUANTITIES = {
    "log_attenuation": "Σ_l ln ‖J_l‖, nats; enclosed by the backward error of each SVD",
    "rank": "min_l rank J_l; enclosed by counting σ above twice the tolerance and above 0",
    "conditioning": "max_l cond J_l, inf where a J_l is rank-deficient; enclosed by the backward error of each SVD",
    "skip_depth": "the fewest weight layers between the loss and the first stage; exact, from the graph",
    "path_depth": "the most weight layers between the loss and the first stage; exact, from the graph",
    "relative_rank": "min_l rank J_l / min(m, d) of J_l's m×d entries, median over samples",
    "gradient_ratio": "ln ‖g_1‖/‖g_L‖, each the root mean square over samples, nats",
    "chi": "½ Σ_{l≥2} ln of the mean squared singular value of J_l over samples, nats",
    "severity": "λ = 1 − σ_min/σ_max of the rows g_lᵀJ_l, mean over stages; estimated from the samples",
    "severity_nonzero": "the same over the nonzero singular values",
    "locked": "share of stages that meet the lock condition; estimated from the samples",
    "tolerance": "the largest τ = max(m, d)·ε·σ₁ used for a rank",
    "enclosure_error": "greatest difference of the certificate's σ from extended precision, over the error granted, stages of one sample",
    "slack_as_stated": "ln of ∏_l ‖J_l‖·‖g_L‖ minus ln ‖∇θ_1‖ of one sample, the product over all stages, nats",
    "slack": "ln of ‖P_1‖ ∏_{l≥2}‖J_l‖·‖g_L‖ minus ln ‖∇θ_1‖ of one sample, nats",
    "accuracy": "share of test images told right after the budget; 1/classes where the training diverged",
    "diverged": "1 where the training diverged, else 0",
}
KINDS: dict[Skip, str] = {"none": "plain", "original": "original residual", "preactivation": "pre-activation"}
CONVOLUTIONAL = "convolutional"
Shape = tuple[Literal["mlp", "residual_mlp", "vgg", "cifar"], Skip]
DENSE: tuple[Shape, ...] = (("mlp", "none"), ("residual_mlp", "original"), ("residual_mlp", "preactivation"))
CONVOLUTIONS: tuple[Shape, ...] = (("vgg", "none"), ("cifar", "none"), ("cifar", "original"), ("cifar", "preactivation"))
ENDS = ("value", "lo", "hi")  # an entry and the ends of its enclosure
NETWORK = ["kind", "family", "skip", "activation", "norm", "weight_var", "depth", "width", "net_seed"]


def _more(values: pd.Series) -> pd.Series:
    return values


def _less(values: pd.Series) -> pd.Series:
    return -values


def _nearer_zero(values: pd.Series) -> pd.Series:
    return -values.abs()


# each entry and rival, read so that more of it means less locked
READINGS: dict[str, tuple[str, Callable[[pd.Series], pd.Series]]] = {
    "attenuation": ("log_attenuation", _more),
    "rank": ("rank", _more),
    "conditioning": ("conditioning", _less),
    "skip_depth": ("skip_depth", _less),
    "attenuation_either_way": ("log_attenuation", _nearer_zero),
    "relative_rank": ("relative_rank", _more),
    "severity": ("severity", _less),
    "severity_nonzero": ("severity_nonzero", _less),
    "lock_condition": ("locked", _less),
    "gradient_ratio": ("gradient_ratio", _nearer_zero),
    "chi": ("chi", _nearer_zero),
    "path_depth": ("path_depth", _less),
}
CONTROLS = ("path_depth", "width")  # known without any certificate

ENTRIES = ("attenuation", "rank", "conditioning", "skip_depth")
# K_back's numbers alone: the product may be read either way
K_BACK = (*ENTRIES, "attenuation_either_way")
# those that are held to the control of the width
GIVEN_WIDTH = (*ENTRIES, "severity", "gradient_ratio", "chi")
# what the specification says to certify: each is also held to the statement that it predicts nothing
STATED = (*ENTRIES, "severity", "severity_nonzero", "lock_condition")
KEYS = ["kind", "norm", "activation"]


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    require(grid.seeds >= 2, "grid.seeds: at least 2 architectures of each kind")
    require(all(depth >= 4 and depth % 2 == 0 for depth in grid.depths), "grid.depths: 2n+2 weight layers, n ≥ 1 (4, 6, 8, …)")
    require(min(grid.gains) > 0, "grid.gains: above 0, in units of the critical σw²")
    require(min(grid.widths) >= 2, "grid.widths: at least 2 units: a single one has no order of singular values")
    require(2 <= grid.samples <= len(data.test), f"grid.samples: 2 to {len(data.test)}, the test images")
    require(2 <= grid.calibration <= len(data.train), f"grid.calibration: 2 to {len(data.train)}, the training images")


def plan(context: Context) -> list[Work]:
    """What is certified and trained."""
    return [Work(model, 1, context.steps(), measuring=context.certify) for model in zoo(context.config)]


def zoo(config: Config) -> list[ModelConfig]:
    """Of each kind `grid.seeds` architectures, drawn without replacement from all combinations of the axes: the same at every seed."""
    grid, draw = config.grid, generator(0, "zoo")
    critical = {activation: critical_weight_var(activation, config.model.bias_var) for activation in grid.activations}

    def combinations(shapes: Sequence[Shape], norms: Sequence[Norm], depths: Sequence[int], widths: Sequence[int]) -> list[ModelConfig]:
        axes = (shapes, norms, depths, widths, grid.activations, grid.gains)
        return [
            replace(
                config.model, family=family, skip=skip, norm=norm, depth=depth, width=width, activation=phi, weight_var=gain * critical[phi]
            )
            for (family, skip), norm, depth, width, phi, gain in product(*axes)
        ]

    dense = [combinations([shape], get_args(Norm), grid.depths, grid.widths) for shape in DENSE]
    convolutional = combinations(CONVOLUTIONS, ("none", "batch"), [8], grid.conv_widths)
    kinds = (*dense, convolutional)
    return [models[place] for models in kinds for place in torch.randperm(len(models), generator=draw)[: grid.seeds].tolist()]


def kind(model: ModelConfig) -> str:
    """The family that is left out as one."""
    return KINDS[model.skip] if model.family in ("mlp", "residual_mlp") else CONVOLUTIONAL


def measure(context: Context) -> pd.DataFrame:
    """Certify and train every network of the zoo; one row a measurement."""
    return context.rows(_networks)


def _networks(context: Context) -> Iterator[Row]:
    config, grid = context.config, context.config.grid
    inputs, _ = context.samples(context.data.test, grid.samples)
    models = zoo(config)
    shown = {kind(model): seed for seed, model in enumerate(models)}.values()
    # each architecture draws weights and an order of images of its own: the draws are independent
    nets = [(model, seed, context.calibrated(model, seed)) for seed, model in enumerate(models)]
    for model, seed, network in context.progress(nets, "zoo"):
        certificate = context.certify(network)
        where = {"kind": kind(model), **network_columns(model, seed)}
        if seed in shown:
            context.show(describe(model), certificate)
        yield from _k_back(certificate, where)
        yield from _bounds(certificate, where)
        batch = {"of": "batch", **where}
        yield from measured({"known": "estimated", **batch}, **rivals(certificate))
        yield from measured(batch, tolerance=certificate.tolerance)
        if model.depth == min(grid.depths) and kind(model) != CONVOLUTIONAL:
            yield from measured(batch, enclosure_error=enclosure_error(network, inputs, certificate))
    trainees = [Trainee(network, describe(model), seed) for model, seed, network in nets]
    for (model, seed, _), outcome in zip(nets, train_all(context, trainees), strict=True):
        found = outcome.metrics()
        reached = 1 / context.data.classes if found["diverged"] else found["test_accuracy"]
        where = {"of": "batch", "kind": kind(model), **network_columns(model, seed)}
        yield from measured(where, accuracy=reached, diverged=found["diverged"])


def describe(model: ModelConfig) -> str:
    """What tells a network of the zoo from the others, for its curves."""
    return f"{kind(model)} {model.family} {model.activation}, {model.norm}, {model.weight_var:.3g}, {model.depth}×{model.width}"


def entries(certificate: Certificate) -> pd.DataFrame:
    """The measured entries of K_back with the enclosure of each, from the enclosures of the stages.

    Returns: a row a sample and entry: quantity, sample, value, lo, hi.
    """
    layers = certificate.layers
    error = layers["norm_hi"] - layers["norm"]
    smallest = (layers["sigma_min"] - error).clip(lower=0)
    with np.errstate(divide="ignore"):
        stages = pd.DataFrame(
            {
                "sample": layers["sample"],
                "log_lo": np.log(layers["norm_lo"]),
                "log_hi": np.log(layers["norm_hi"]),
                "rank_lo": layers["rank_lo"],
                "rank_hi": layers["rank_hi"],
                "cond_lo": layers["norm_lo"] / (layers["sigma_min"] + error),
                "cond_hi": np.where(smallest > 0, layers["norm_hi"] / smallest, np.inf),
            }
        ).groupby("sample")
    values = {
        "log_attenuation": (certificate.log_attenuation, stages["log_lo"].sum(), stages["log_hi"].sum()),
        "rank": (certificate.rank, stages["rank_lo"].min(), stages["rank_hi"].min()),
        "conditioning": (certificate.conditioning, stages["cond_lo"].max(), stages["cond_hi"].max()),
    }
    tables = [
        pd.DataFrame({"quantity": name, "sample": range(len(value)), "value": value.numpy(), "lo": lo.to_numpy(), "hi": hi.to_numpy()})
        for name, (value, lo, hi) in values.items()
    ]
    return pd.concat(tables, ignore_index=True)


def _k_back(certificate: Certificate, where: Row) -> Iterator[Row]:
    """K_back of every sample with its enclosure and, for the batch, the median and the extremes over samples."""
    found = entries(certificate)
    for row in found.to_dict("records"):
        at = {"quantity": row["quantity"], "sample": row["sample"], "of": "sample", "known": "enclosed", **where}
        yield from ({**at, "end": end, "value": row[end]} for end in ENDS)
    for quantity, samples in found.groupby("quantity", sort=False):
        for of in ("median", "min", "max"):
            ends = getattr(np, of)(samples[[*ENDS]].to_numpy(dtype=float), axis=0)
            at = {"quantity": quantity, "of": of, "known": "enclosed", **where}
            yield from ({**at, "end": end, "value": value} for end, value in zip(ENDS, ends, strict=True))
    exact = {"of": "batch", "known": "exact", "end": "value", **where}
    yield from measured(exact, skip_depth=float(certificate.skip_depth), path_depth=float(certificate.depth))


def _bounds(certificate: Certificate, where: Row) -> Iterator[Row]:
    """Both forms of the product bound, a slack a sample."""
    bound = certificate.bound()
    stated = certificate.log_attenuation.numpy() + _layer(certificate, -1, "log_error_norm")
    # 0 ≤ 0 holds with no slack
    slack = np.where(stated == bound["lhs"], 0.0, stated - bound["lhs"])
    for sample, (as_stated, precise) in enumerate(zip(slack, bound["slack"], strict=True)):
        yield from measured({"sample": sample, "of": "sample", **where}, slack_as_stated=as_stated, slack=precise)


def rivals(certificate: Certificate) -> dict[str, float]:
    """What is measured of a batch beside K_back, estimated from its samples."""
    share = certificate.layers["rank"] / certificate.layers["rank_full"]
    first, last = (log_rms(torch.tensor(_layer(certificate, place, "log_error_norm"))) for place in (0, -1))
    mean_square = certificate.layers.groupby("index")["mean_square"].mean()
    with np.errstate(divide="ignore"):
        chi = float(np.log(mean_square.iloc[1:]).sum(skipna=False) / 2)
    of_stages = certificate.severity[["lambda", "lambda_nonzero", "locked"]].mean()
    return {
        "relative_rank": share.groupby(certificate.layers["sample"]).min().median(),
        "gradient_ratio": first - last,
        "chi": chi,
        "severity": of_stages["lambda"],
        "severity_nonzero": of_stages["lambda_nonzero"],
        "locked": of_stages["locked"],
    }


def _layer(certificate: Certificate, place: int, column: str) -> np.ndarray:
    """A column of the first (0) or last (−1) stage, a value a sample."""
    return certificate.layers.pivot(index="sample", columns="index", values=column).iloc[:, place].to_numpy()


def enclosure_error(network: nn.Sequential, inputs: torch.Tensor, certificate: Certificate) -> float:
    """How far the certificate's σ of the first sample are from those in extended precision, in units of the error that it grants them.

    Only stages that were decomposed grant all their singular values one.
    """
    chain = cut(network, None, torch.float64, "eval")
    states = chain.states(inputs.double())
    errors = []
    methods = certificate.layers.query("sample == 0").sort_values("index")["method"]
    for stage, state, values, method in zip(chain.stages, states[:-1], certificate.singular_values, methods, strict=True):
        if method != "exact":
            continue
        J = layer_jacobian(stage, state)[0].cpu().numpy()
        error = np.abs(values[0].cpu().numpy() - refined_singular_values(J)).max()
        granted = max(J.shape) * np.finfo(J.dtype).eps * float(values[0, 0])
        errors.append(float(error) / granted if error else 0.0)
    return max(errors)


def refined_singular_values(J: np.ndarray) -> np.ndarray:
    """σ_i = u_iᵀJv_i / (‖u_i‖‖v_i‖) in extended precision: the errors of the vectors enter squared (Ogita & Aishima 2020, section 2)."""
    U, _, Vt = (part.astype(np.longdouble) for part in np.linalg.svd(J, full_matrices=False))
    lengths = np.sqrt(np.square(U).sum(0) * np.square(Vt).sum(1))
    return (U * (J.astype(np.longdouble) @ Vt.T)).sum(0) / lengths


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    nets = networks(rows)
    medium = float(criteria["rank_predicts"].at_least or 0)
    rivalries = [(rival, entry) for rival in ("gradient_ratio", "chi") for entry in ("attenuation", "attenuation_either_way")]
    cells = {
        **{f"{name}_predicts": _predicts(nets, name, medium) for name in (*READINGS, "width")},
        **{f"{name}_predicts_nothing": _predicts(nets, name, medium) for name in STATED},
        **{f"{name}_given_width": _predicts(nets, name, medium, "width") for name in GIVEN_WIDTH},
        "better_than_depth": pd.DataFrame([cell(_gain(nets, entry, "path_depth"), entry=entry) for entry in ENTRIES]),
        "better_than_width": pd.DataFrame([cell(_gain(nets, entry, "width"), entry=entry) for entry in ENTRIES]),
        "gradient_better": pd.DataFrame([cell(_gain(nets, rival, entry), rival=rival, over=entry) for rival, entry in rivalries]),
        "combination": _left_out(nets, K_BACK),
        "combination_given_width": _left_out(nets, K_BACK, "width"),
        "wider_combination": _left_out(nets, tuple(READINGS)),
        "gradient_product": cells_by(pick(rows, "slack_as_stated"), KEYS, least),
        "product_bound": cells_by(pick(rows, "slack"), KEYS, least),
        "enclosures": cells_by(pick(rows, "enclosure_error"), KEYS, greatest),
    }
    return judge_forms("certificate", criteria, cells)


def networks(rows: pd.DataFrame) -> pd.DataFrame:
    """The zoo as a table, a row an architecture: every reading, the median over samples where it has one, and the accuracy reached."""
    batch = rows[rows["of"].isin(["batch", "median"]) & ~rows["end"].isin(["lo", "hi"])]
    values = batch.pivot(index=NETWORK, columns="quantity", values="value")
    readings = {name: read(values[quantity]) for name, (quantity, read) in READINGS.items()}
    return pd.DataFrame({**readings, "accuracy": values["accuracy"]}).reset_index()


def told(rho: Estimate, medium: float) -> str:
    """What a correlation's whole interval says of a reading: at least medium, less than medium either way, or neither of them."""
    if rho.lo >= medium or rho.hi <= -medium:
        return "predicts" if rho.lo > 0 else "predicts the reverse"
    return "predicts nothing" if -medium <= rho.lo and rho.hi <= medium else "undecided"


def _predicts(nets: pd.DataFrame, reading: str, medium: float, given: str | None = None) -> pd.DataFrame:
    rho = association(nets[reading], nets["accuracy"], None if given is None else nets[given])
    return pd.DataFrame([cell(rho, reading=reading, told=told(rho, medium))])


def _gain(nets: pd.DataFrame, better: str, worse: str) -> Estimate:
    return association_gain(nets[better], nets[worse], nets["accuracy"])


def _left_out(nets: pd.DataFrame, readings: Sequence[str], given: str | None = None) -> pd.DataFrame:
    """ρ of the accuracy foretold and reached within each kind that was left out, with the readings that foretold it."""
    foretold = predict_left_out(nets, readings, "accuracy", "kind").groupby("kind")
    return pd.DataFrame(
        [
            cell(association(n["predicted"], n["accuracy"], None if given is None else n[given]), left_out=kind, chosen=n["chosen"].iloc[0])
            for kind, n in foretold
        ]
    )
