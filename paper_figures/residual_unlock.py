"""Figure and table of residual_unlock: σ_min(I+J), gradients end to end, growth of x_l², accuracy against depth."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.style import PREDICTION, SEEDS, over_seeds, panels, title
from src.rows import pick

NAMES = {"none": "plain", "original": "original", "preactivation": "pre-activation"}


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: σ_min(I+J), gradients end to end without and with BN, growth of x_l², accuracy, gradients after training."""
    with panels(rows, count=6, columns=3, height=2.4, note=f"{SEEDS}; d: of logarithms; e: cut at 0 and 1") as (figure, axes):
        _sigma_min(axes[0], rows)
        # the mean field's growth of ‖g‖² a layer in plain chains: χ = ½, and π/(π−1) (Yang et al. 2019)
        _flow(axes[1], pick(rows, "flow", part="flow", norm="none", weight_var=1.0), "no norm, σw² = 1, initial", 0.5)
        _flow(axes[2], pick(rows, "flow", part="flow", norm="batch"), "BatchNorm, initial", np.pi / (np.pi - 1))
        _growth(axes[3], rows)
        _accuracy(axes[4], rows)
        _flow(axes[5], pick(rows, "flow", part="training", when="trained"), "BatchNorm, trained")
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and end-to-end gradient of the chains at every trained depth, mean over seeds."""
    lines = []
    for (depth, skip), nets in rows[rows["part"] == "training"].groupby(["depth", "skip"]):
        flows = pick(nets, "flow").groupby("when")["value"].mean()
        test = pick(nets, "test_accuracy")["value"]
        line = {
            "depth": int(depth),
            "chain": NAMES[str(skip)],
            "test accuracy": test.mean(),
            "least": test.min(),
            "greatest": test.max(),
            "train accuracy": pick(nets, "train_accuracy")["value"].mean(),
            "ln ‖g_1‖/‖g_{L−1}‖ initial": flows.get("initial", np.nan),
            "trained": flows.get("trained", np.nan),
            "diverged": int(pick(nets, "diverged")["value"].sum()),
            "seeds": len(test),
        }
        lines.append(line)
    return pd.DataFrame(lines)


def _sigma_min(axis: Axes, rows: pd.DataFrame) -> None:
    blocks = rows[rows["part"].isin(["block", "cancelled"]) & (rows["skip"] == "preactivation")]
    keys = ["part", "branch_scale", "net_seed", "layer"]
    wide = blocks.pivot(index=keys, columns="quantity", values="value").reset_index()
    random, cancelled = wide[wide["part"] == "block"], wide[wide["part"] == "cancelled"]
    axis.plot(random["branch_norm"], random["sigma_min"], linestyle="none", marker="o", alpha=0.5, label="random blocks")
    axis.plot(cancelled["branch_norm"], cancelled["sigma_min"], linestyle="none", marker="X", color="C3", markersize=7, label="J = −I")
    norms = np.geomspace(min(random["branch_norm"].min(), 0.1), 1, 50)
    axis.plot(norms, 1 - norms, label="1 − ‖J‖", **PREDICTION)
    axis.axvline(1, ymax=0.7, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set(xlabel="largest ‖J‖ of the branch", ylabel="least σ_min(I + J)")
    title(axis, "σ_min(I+J), a point a block")
    axis.legend(loc="upper right")


def _flow(axis: Axes, flows: pd.DataFrame, what: str, growth: float | None = None) -> None:
    _by_skip(axis, flows)
    if growth is not None:
        depths = np.sort(flows["depth"].unique())
        axis.plot(depths, (depths - 2) * np.log(growth) / 2, label="plain, mean field", **PREDICTION)
    axis.axhline(0, color="0.3", linewidth=0.8, linestyle=":")
    axis.set(xlabel="depth L (weight layers)", ylabel="ln ‖g_1‖ / ‖g_{L−1}‖ (nats)")
    title(axis, what)
    axis.legend()


def _growth(axis: Axes, rows: pd.DataFrame) -> None:
    plain = pick(rows, "second_moment", part="moment", norm="none")
    normalised = pick(rows, "added_variance", part="moment", norm="batch")
    blocks = np.arange(1, plain["layer"].max() + 1)
    curves = ((plain, 2.0**blocks, "no normalisation"), (normalised.assign(value=1 + normalised["value"]), 1 + blocks, "BN–ReLU–W"))
    for k, (growth, prediction, label) in enumerate(curves):
        over_seeds(axis, growth, "layer", k, label, geometric=True, markersize=2)
        axis.plot(blocks, prediction, **PREDICTION)
    axis.set_yscale("log")
    axis.set(xlabel="block l", ylabel="mean x_l² (BN: 1 + added)")
    title(axis, "growth; black: $2^l$ and 1+l")
    axis.legend(loc="upper left")


def _accuracy(axis: Axes, rows: pd.DataFrame) -> None:
    _by_skip(axis, pick(rows, "test_accuracy", part="training"), (0, 1))
    axis.set(xlabel="depth L (weight layers)", ylabel="test accuracy", ylim=(0, 1))
    title(axis, "short training, BatchNorm")
    axis.legend()


def _by_skip(axis: Axes, values: pd.DataFrame, bounds: tuple[float, float] = (-np.inf, np.inf)) -> None:
    for k, (skip, name) in enumerate(NAMES.items()):
        over_seeds(axis, values[values["skip"] == skip], "depth", k, name, bounds)
    axis.set_xscale("log", base=2)
