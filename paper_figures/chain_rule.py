"""Figure and table of chain_rule: autograd against the product, coupled samples, the rank of long products, what the forms leave out."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.chain_rule import CONVOLUTIONAL, predicted_kept_rank
from paper_figures.style import ACTIVATIONS, DASHES, MARKERS, PREDICTION, over_seeds, panels, title
from src.rows import pick

NAMES = {
    ("mlp", "none"): "MLP",
    ("residual_mlp", "original"): "residual MLP, original",
    ("residual_mlp", "preactivation"): "residual MLP, pre-activation",
    ("cifar", "none"): "CIFAR net, plain",
    ("cifar", "original"): "CIFAR net, original",
    ("cifar", "preactivation"): "CIFAR net, pre-activation",
    ("vgg", "none"): "VGG-like",
}
INITS = ("gaussian", "orthogonal")
NONE = 1e-18  # what no error at all is drawn at
CRITERION = 1e-10
NOTE = "points: random chains, in c with the largest of them a line; no error at all stands at 10$^{-18}$; d: cut at 1"
NORMS = {"none": "no normalisation", "batch": "BatchNorm, eval", "layer": "LayerNorm"}
FORMS = {
    "error": ("the product", "eval"),
    "error_own": ("own J_k,\ntrain BN", "train"),
    "error_reversed": ("factors\nreversed", "eval"),
    "error_without_parameters": ("without\n∂H_l/∂θ_l", "eval"),
}


def draw(rows: pd.DataFrame) -> Figure:
    """Four panels: errors of every kind of chain, of every form, of coupled samples, and the rank of long products."""
    with panels(rows, count=4, columns=2, height=2.6, note=NOTE) as (figure, axes):
        _kinds(axes[0], rows)
        _forms(axes[1], rows)
        _coupling(axes[2], rows)
        _ranks(axes[3], rows)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest errors of every kind of chain, and how many random chains they are taken over."""
    keys = ["batch_norm", "family", "skip", "norm"]
    of_chains = rows[rows["quantity"].isin(FORMS)].groupby([*keys, "quantity"])["value"]
    worst, count = of_chains.max().unstack(), of_chains.size().unstack()["error"]
    lines = []
    for mode, family, skip, norm in worst.index:
        errors = worst.loc[(mode, family, skip, norm)]
        lines.append(
            {
                "chain": NAMES[(family, skip)],
                "norm": norm,
                "BatchNorm in": mode if norm == "batch" else "–",
                "random chains": int(count[(mode, family, skip, norm)]),
                "error of the product": errors["error"],
                "of the samples' own Jacobians": errors.get("error_own", np.nan),
                "without ∂H_l/∂θ_l": errors.get("error_without_parameters", np.nan),
                "factors reversed": errors.get("error_reversed", np.nan),
            }
        )
    return pd.DataFrame(lines)


def _shown(values: pd.Series) -> pd.Series:
    """Errors on a log axis."""
    return values.clip(lower=NONE)


def _kinds(axis: Axes, rows: pd.DataFrame) -> None:
    errors = pick(rows, "error", part="per sample")
    for k, (norm, name) in enumerate(NORMS.items()):
        chains = errors[errors["norm"] == norm]
        places = np.array([list(NAMES).index(kind) for kind in zip(chains["family"], chains["skip"], strict=True)])
        axis.plot(
            _shown(chains["value"]), places + 0.22 * (k - 1), linestyle="none", marker=MARKERS[k], color=f"C{k}", alpha=0.5, label=name
        )
    axis.axvline(CRITERION, **PREDICTION)
    axis.set_xscale("log")
    axis.set_yticks(range(len(NAMES)), list(NAMES.values()))
    axis.set_ylim(len(NAMES) - 0.5, -0.5)
    axis.set(xlabel="relative error of ∇θ_l (worst sample and stage)", ylabel="random chains, a point each")
    title(axis, "product against autograd; black: criterion")
    axis.legend(loc="center", bbox_to_anchor=(0.7, 0.5))


def _forms(axis: Axes, rows: pd.DataFrame) -> None:
    for k, quantity in enumerate(FORMS):
        errors = _shown(pick(rows, quantity, batch_norm=FORMS[quantity][1])["value"])
        jitter = np.linspace(-0.3, 0.3, len(errors))
        axis.plot(k + jitter, errors, linestyle="none", marker=MARKERS[k], color=f"C{k}", alpha=0.4)
    axis.axhline(CRITERION, **PREDICTION)
    axis.set_yscale("log")
    axis.set_xticks(range(len(FORMS)), [name for name, _ in FORMS.values()])
    axis.set(xlabel="form of the product", ylabel="relative error of ∇θ_l")
    title(axis, "errors by form; black: criterion")


def _coupling(axis: Axes, rows: pd.DataFrame) -> None:
    batch = rows[rows["part"] == "batch"].copy()
    kinds = [NAMES[kind] for kind in zip(batch["family"], batch["skip"], strict=True)]
    batch["kind"] = np.where(batch["family"].isin(CONVOLUTIONAL), "convolutional nets", kinds)
    for k, (quantity, name, height) in enumerate((("error_own", "samples' own J_k", 30), ("error", "one operator on the batch", 1e-13))):
        for j, kind in enumerate(("convolutional nets", *NAMES.values())):
            chains = pick(batch, quantity, kind=kind)
            if chains.empty:
                continue
            axis.plot(chains["batch_size"], _shown(chains["value"]), linestyle="none", marker=MARKERS[j], color=f"C{k}", alpha=0.4)
            worst = _shown(chains["value"]).groupby(chains["batch_size"]).max()
            axis.plot(worst.index, worst, color=f"C{k}", linestyle=DASHES[j], marker=MARKERS[j], label=kind if k == 0 else None)
        axis.text(batch["batch_size"].max(), height, name, color=f"C{k}", fontsize=7, ha="right")
    axis.axhline(CRITERION, **PREDICTION)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="batch size N", ylabel="relative error of ∇θ_l", ylim=(None, 1e3))
    title(axis, "train-mode BatchNorm; black: criterion")
    axis.legend(loc="center right", bbox_to_anchor=(1, 0.6))


def _ranks(axis: Axes, rows: pd.DataFrame) -> None:
    kept = pick(rows, "kept_rank")
    for j, init in enumerate(INITS):
        for k, activation in enumerate(ACTIVATIONS[:3]):
            chains = kept[(kept["init"] == init) & (kept["activation"] == activation)]
            # a ring around tanh, with which it coincides
            look: dict[str, Any] = {"markerfacecolor": "none", "markersize": 7} if activation == "linear" else {}
            over_seeds(axis, chains, "factors", k, f"{activation}, {init}", (0, 1), linestyle=DASHES[j], **look)
    factors = 2.0 ** np.linspace(0, np.log2(kept["factors"].max()), 60)
    width = int(kept["width"].iloc[0])
    axis.plot(factors, [predicted_kept_rank(width, m) for m in factors], label="linear Gaussian, theory", **PREDICTION)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="factors in the product", ylabel="rank ∏J over least rank J", ylim=(0, 1.05))
    title(axis, "rank in float64; means, 95% intervals")
    axis.legend(loc="lower left")
