"""Figure and table of deep_supervision: the direct part of ∇θ_1, its angle with the rest, accuracy against α, k and the exit."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.deep_supervision import CHAIN, SETTING, Supervision, best_adam, describe, gradients_of, shares
from paper_figures.style import DASHES, MARKERS, PREDICTION, SEEDS, over_seeds, panels, title
from src.rows import pick
from src.statistics import paired_difference

NOTE = f"{SEEDS}, cut where the quantity ends: in c at ±1, in d to f at 0 and 1"
TIMES = {"initial": 0, "early": 1, "trained": 2}


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: size and survival of the direct part, its angle along training; accuracy against α, against k, of every exit."""
    with panels(rows, count=6, columns=3, height=2.5, note=NOTE) as (
        figure,
        axes,
    ):
        _share(axes[0], rows)
        _kept(axes[1], rows)
        _angle(axes[2], rows)
        _weights(axes[3], rows)
        _spacings(axes[4], rows)
        _exits(axes[5], rows)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of the chain in every setting, mean over seeds, and its gain over plain training, paired by seed."""
    lines = []
    for (heads, weight_var, depth), nets in pick(rows, "test_accuracy", part="training").groupby(["heads", *CHAIN]):
        accuracy = nets.pivot(index="net_seed", columns=SETTING, values="value")
        for setting in accuracy:
            gain = paired_difference(accuracy[setting], accuracy[0.0, 0, "none", 1.0, 0.0])
            of_setting = rows[(rows[["heads", *CHAIN, *SETTING]] == [heads, weight_var, depth, *setting]).all(axis=1)]
            lines.append(
                {
                    "heads": heads,
                    "σw²": weight_var,
                    "depth": int(depth),
                    "auxiliary losses": describe(Supervision(*setting)),
                    "early accuracy": pick(of_setting, "early_accuracy")["value"].mean(),
                    "test accuracy": accuracy[setting].mean(),
                    "gain": gain.value,
                    "± gain": gain.hi - gain.value,
                    "first exit": pick(of_setting, "exit_accuracy", layer=1)["value"].mean(),
                    "diverged": int(pick(of_setting, "diverged")["value"].sum()),
                    "seeds": gain.n,
                }
            )
    return pd.DataFrame(lines)


def _chain(weight_var: float, depth: float) -> str:
    return f"{weight_var:g}, {depth:g}"


def _share(axis: Axes, rows: pd.DataFrame) -> None:
    for k, (weight_var, nets) in enumerate(shares(rows).groupby("weight_var")):
        over_seeds(axis, nets, "depth", k, f"{weight_var:g}", linestyle="none")
        depths = np.array([2, nets["depth"].max()])
        axis.plot(depths, (depths - 2) * nets["loss"].iloc[0] / 2, **PREDICTION)
    axis.set(xlabel="depth L (weight layers)", ylabel="ln ‖∇θ_1 ℒ_1‖ / ‖∇θ_1 ℒ_L‖ (nats)")
    title(axis, "initial; black: −(L−2)/2 · ln χ")
    axis.legend(title="σw²", loc="upper left")


def _kept(axis: Axes, rows: pd.DataFrame) -> None:
    nets = gradients_of(rows)
    kept = np.exp(nets["total"] - nets["direct"])
    for k, when in enumerate(TIMES):
        chosen = (nets["heads"] == "random") & (nets["when"] == when)
        look: dict[str, Any] = {"marker": MARKERS[k], "color": f"C{k}", "markerfacecolor": "none" if when == "initial" else f"C{k}"}
        axis.plot(nets["cosine"][chosen], kept[chosen], **look, linestyle="none", alpha=0.5, markersize=3, markeredgewidth=0.5, label=when)
    opposed = nets["heads"] == "opposed"
    axis.plot(nets["cosine"][opposed], kept[opposed], linestyle="none", marker="X", color="C3", markersize=7, label="opposite heads")
    cosines = np.linspace(-1, 1, 201)
    axis.plot(cosines, np.where(cosines < 0, np.sqrt(1 - cosines**2), 1), label="least possible", **PREDICTION)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="cosine of direct part and rest", ylabel="‖∇θ_1 ℒ‖ / α‖∇θ_1 ℒ_l‖", ylim=(-0.1, None))
    title(axis, "what is left of the direct part")
    axis.legend(loc="lower right", handlelength=1, labelspacing=0.1)


def _angle(axis: Axes, rows: pd.DataFrame) -> None:
    nets = gradients_of(rows).query("part == 'training' and heads == 'random' and every == 1 and alpha == alpha.max()")
    for k, (chain, of_chain) in _by_chain(rows, nets):
        places = of_chain["when"].map(TIMES) + 0.03 * k
        over_seeds(axis, of_chain.assign(at=places, value=of_chain["cosine"]), "at", k, _chain(*chain), (-1, 1), linestyle=DASHES[k])
    axis.axhline(0, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_xticks(list(TIMES.values()), ["0", "¼", "1"])
    axis.set(xlabel="share of the training done", ylabel="cosine of direct part and rest", ylim=(-1, 1))
    title(axis, f"α = {nets['alpha'].max():g}, an exit a stage")
    axis.legend(title="σw², L (panels c to f)", loc="lower right", ncols=2)


def _weights(axis: Axes, rows: pd.DataFrame) -> None:
    swept = "schedule == 'none' and boost == 1 and adam == 0 or schedule == 'constant' and every == 1"
    nets, early = _trained(rows).query(swept), _trained(rows, "early_accuracy").query(swept)
    for k, (chain, of_chain) in _by_chain(rows, nets):
        over_seeds(axis, of_chain, "alpha", k, _chain(*chain), (0, 1))
        mean = early.groupby([*CHAIN, "alpha"])["value"].mean()[chain]
        axis.plot(mean.index, mean, marker=MARKERS[k], markerfacecolor="none", color=f"C{k}", linewidth=0.5, markersize=3)
    axis.set_xscale("symlog", linthresh=nets.loc[nets["alpha"] > 0, "alpha"].min())
    weights = sorted(nets["alpha"].unique())
    axis.set_xticks(weights, [f"{weight:g}" for weight in weights])
    axis.minorticks_off()
    axis.set(xlabel="α of every exit (0: none)", ylabel="test accuracy of the chain", ylim=(0, 1))
    title(axis, "constant α, k = 1; open: at ¼")


def _spacings(axis: Axes, rows: pd.DataFrame) -> None:
    nets = _trained(rows)
    supervised = nets.query("schedule == 'constant' and alpha == alpha.max()")
    faded = nets.query("schedule == 'fading'")
    plain = nets.query("schedule == 'none' and boost == 1 and adam == 0").groupby(CHAIN)["value"].mean()
    by_adam = nets.merge(best_adam(_trained(rows, "train_accuracy")), on=[*CHAIN, "adam"]).groupby(CHAIN)["value"].mean()
    for k, (chain, of_chain) in _by_chain(rows, supervised):
        over_seeds(axis, of_chain, "every", k, _chain(*chain), (0, 1))
        end = faded.groupby([*CHAIN, "every"])["value"].mean()[chain]
        axis.plot(end.index * 0.85, end, linestyle="none", marker=MARKERS[k], markerfacecolor="none", color=f"C{k}")
        axis.axhline(plain[chain], color=f"C{k}", linewidth=0.8, linestyle=":")
        if chain in by_adam:
            axis.axhline(by_adam[chain], color=f"C{k}", linewidth=0.8, linestyle=(0, (6, 4)))
    axis.set_xscale("log", base=2)
    spacings = sorted(supervised["every"].unique())
    axis.set_xticks(spacings, [f"{spacing:g}" for spacing in spacings])
    axis.minorticks_off()
    axis.set(xlabel=f"an exit at every k-th stage (α = {supervised['alpha'].max():g})", ylabel="test accuracy of the chain", ylim=(0, 1))
    title(axis, "··· no exit; – – Adam; open: fading")


def _exits(axis: Axes, rows: pd.DataFrame) -> None:
    for k, (chain, of_chain) in _by_chain(rows, pick(rows, "exit_accuracy")):
        over_seeds(axis, of_chain, "layer", k, _chain(*chain), (0, 1))
    layers = 2 ** np.arange(np.log2(rows["layer"].max()) + 1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(layers, [f"{layer:g}" for layer in layers])
    axis.set(xlabel="layer l of the exit (L: the chain)", ylabel="test accuracy of the exit")
    title(axis, "every exit, trained together")


def _trained(rows: pd.DataFrame, quantity: str = "test_accuracy") -> pd.DataFrame:
    return pick(rows, quantity, part="training", heads="random")


def _by_chain(rows: pd.DataFrame, nets: pd.DataFrame) -> Iterator[tuple[int, tuple[Any, pd.DataFrame]]]:
    """The nets of each chain, with its place among all that are trained."""
    chains = list(_trained(rows).groupby(CHAIN).groups)
    return ((chains.index(chain), (chain, of_chain)) for chain, of_chain in nets.groupby(CHAIN))
