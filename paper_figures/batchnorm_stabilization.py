"""Figure and table of batchnorm_stabilization: ‖J_BN‖, scaled weights, growth of ‖g‖², gradients end to end and in training, accuracy."""

from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from paper_figures.style import DASHES, PREDICTION, SEEDS, over_seeds, panels, title
from src.jacobian.normalised import batch_norm_growth
from src.rows import pick
from src.statistics import t_interval

NAMES = {"batch": "BatchNorm", "layer": "LayerNorm"}
NOTE = f"{SEEDS}, in b cut at 0 and in f at 0 and 1"
CHAINS = {("batch", "none"): "BN", ("layer", "none"): "LN", ("batch", "preactivation"): "BN + skips"}


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: ‖J‖ against σw², BN∘sW, growth of ‖g‖² a layer, gradients end to end, along training, accuracy against depth."""
    with panels(rows, count=6, columns=3, height=2.4, note=NOTE) as (figure, axes):
        _norms(axes[0], rows)
        _gain(axes[1], rows)
        _growth(axes[2], rows)
        _flow(axes[3], rows)
        _training(axes[4], rows)
        _accuracy(axes[5], rows)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Growth of ‖g‖² a layer at initialisation, measured and predicted, at every batch size."""
    lines = []
    for (norm, batch), nets in pick(rows, "rate", part="rate").groupby(["norm", "batch"]):
        growth = t_interval(np.exp(nets["value"]))
        lines.append(
            {
                "normalisation": NAMES[str(norm)],
                "batch N": int(batch),
                "growth of ‖g‖² a layer": growth.value,
                "±": growth.hi - growth.value,
                "mean field": batch_norm_growth(batch) if norm == "batch" else 1.0,
                "nets": growth.n,
            }
        )
    return pd.DataFrame(lines)


def _norms(axis: Axes, rows: pd.DataFrame) -> None:
    measured = pick(rows, "mean_norm", part="norm")
    for k, (norm, name) in enumerate(NAMES.items()):
        nets = measured[measured["norm"] == norm]
        over_seeds(axis, nets, "weight_var", k, name, linestyle="none")
        variances = np.geomspace(nets["weight_var"].min(), nets["weight_var"].max(), 20)
        level = (nets["value"] * np.sqrt(nets["weight_var"])).mean()
        axis.plot(variances, level / np.sqrt(variances), **PREDICTION)
    axis.axhspan(0.5, 2, color="0.9", zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="weight variance σw²", ylabel="‖J‖ of the normalisation")
    for minor in (axis.xaxis, axis.yaxis):
        minor.set_minor_formatter(NullFormatter())
    title(axis, "black: 1/σw; band: ½ to 2")
    axis.legend(loc="upper right")


def _gain(axis: Axes, rows: pd.DataFrame) -> None:
    """The larger of the changes of output and gradient, and the change of ε's share that would make them."""
    gains = rows[(rows["part"] == "gain") & (rows["gain"] != 1)]
    for k, (eps, draws) in enumerate(gains.groupby("eps")):
        changes = draws[draws["quantity"].isin(["output_change", "gradient_change"])]
        larger = changes.groupby(["gain", "net_seed"], as_index=False)["value"].max()
        over_seeds(axis, larger, "gain", k, f"ε = {eps:.0e}", (0, np.inf), markersize=3)
    shares = pick(rows, "eps_share", part="gain", eps=gains["eps"].max()).groupby("gain")["value"].mean()
    change = (shares - shares[1.0]).abs().drop(1.0) / 2
    axis.plot(change.index, change, label="½ change of ε's share", **PREDICTION)
    axis.axhline(0.01, color="0.3", linewidth=0.8, linestyle=":", label="1%")
    axis.set(xscale="log", yscale="log", xlabel="scale s of W", ylabel="relative change")
    title(axis, "BN(sWx) against BN(Wx)")
    axis.legend(loc="center right", bbox_to_anchor=(1.0, 0.42))


def _growth(axis: Axes, rows: pd.DataFrame) -> None:
    growth = pick(rows, "rate", part="rate").assign(value=lambda nets: np.exp(nets["value"]))
    sizes = np.geomspace(growth["batch"].min(), growth["batch"].max(), 60)
    predicted = {"batch": np.array([batch_norm_growth(size) for size in sizes]), "layer": np.ones_like(sizes)}
    for k, (norm, name) in enumerate(NAMES.items()):
        nets = growth[growth["norm"] == norm]
        over_seeds(axis, nets, "batch", k, name, linestyle="none")
        axis.plot(sizes, predicted[str(norm)], **PREDICTION)
    axis.axhline(np.pi / (np.pi - 1), color="0.3", linewidth=0.8, linestyle=":", label="π/(π−1)")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="batch N", ylabel="growth of ‖g‖² a layer")
    title(axis, "initial; black: mean field")
    axis.legend(loc="center right", bbox_to_anchor=(0.94, 0.34))


def _flow(axis: Axes, rows: pd.DataFrame) -> None:
    flows, trained = pick(rows, "flow", part="flow"), pick(rows, "flow", part="along", norm="batch")
    trained = trained[trained["step"] == trained["step"].max()]
    depths = np.array(sorted(flows["depth"].unique()))
    for k, (norm, name) in enumerate(NAMES.items()):
        nets = flows[flows["norm"] == norm]
        over_seeds(axis, nets, "depth", k, name, linestyle="none")
    label = f"BatchNorm, {trained['step'].max():.0f} steps later"
    over_seeds(axis, trained, "depth", len(NAMES), label, linestyle="none")
    for rate in (np.log(batch_norm_growth(np.inf)), 0.0):
        axis.plot(depths, (depths - 2) * rate / 2, **PREDICTION)
    axis.axhline(np.log(10), color="0.3", linewidth=0.8, linestyle=":", label="ln 10")
    axis.set(xlabel="depth L (weight layers)", ylabel="ln ‖g$_1$‖ / ‖g$_{L-1}$‖ (nats)")
    axis.set_ylim(top=2 * axis.get_ylim()[1])
    title(axis, "black: mean field at start")
    axis.legend(loc="upper left")


def _training(axis: Axes, rows: pd.DataFrame) -> None:
    growth = pick(rows, "rate", part="along").assign(value=lambda nets: np.exp(nets["value"]))
    depths = sorted(growth["depth"].unique())
    for (norm, depth), nets in growth.groupby(["norm", "depth"]):
        deeper = depths.index(depth)
        look: dict[str, Any] = {"linestyle": DASHES[deeper], "markerfacecolor": "w" if deeper else None}
        over_seeds(axis, nets, "step", list(NAMES).index(str(norm)), f"{NAMES[str(norm)][0]}N, L = {depth:.0f}", **look)
    axis.axhline(np.pi / (np.pi - 1), color="0.3", linewidth=0.8, linestyle=":")
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(-0.2, 1.4 * growth["step"].max())
    axis.set(xlabel="training steps", ylabel="growth of ‖g‖² a layer")
    low, high = axis.get_ylim()
    axis.set_ylim(top=high + 0.45 * (high - low))
    title(axis, "along training; ··· π/(π−1)")
    axis.legend(loc="upper right", ncols=2, columnspacing=0.6, handlelength=1.8)


def _accuracy(axis: Axes, rows: pd.DataFrame) -> None:
    accuracy = pick(rows, "train_accuracy", part="depth")
    for k, ((norm, skip), name) in enumerate(CHAINS.items()):
        trained = accuracy[(accuracy["norm"] == norm) & (accuracy["skip"] == skip)]
        for j, (_, nets) in enumerate(trained.groupby("batch")):
            over_seeds(axis, nets, "depth", k, name if j == 0 else None, (0, 1), linestyle=DASHES[j])
    axis.axvline(50, ymax=2 / 3, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    depths = sorted(accuracy["depth"].unique())
    ticks = depths[:: -(-len(depths) // 5)]
    axis.set_xticks(ticks, [f"{depth:.0f}" for depth in ticks])
    axis.set(xlabel="depth L (weight layers)", ylabel="train accuracy", ylim=(0, 1.5), yticks=np.linspace(0, 1, 6))
    title(axis, f"{accuracy['steps'].max():.0f} steps; dotted: L = 50")
    batches = enumerate(sorted(accuracy["batch"].unique()))
    sizes = [Line2D([0], [0], color="k", linestyle=cast(Any, DASHES[j]), label=f"N = {n:.0f}") for j, n in batches]
    chains, _ = axis.get_legend_handles_labels()
    axis.legend(handles=[*chains, *sizes], loc="upper right", ncols=2, columnspacing=0.8, handlelength=1.8)
