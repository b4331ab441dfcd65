"""Figure and table of the whole story, a fact a panel: a locked chain, four sources, four solutions, and what the certificate tells.

Its rows are those of nine experiments; black lines are predictions, points single seeds, bars and bands 95% t-intervals over seeds.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.certificate import ENTRIES, networks
from experiments.information_bottleneck import PREDICTED
from experiments.sigmoid_saturation import jacobian_nets
from paper_figures.style import DASHES, PREDICTION, SMALL, criteria, over_seeds, panels, title
from src import mean_field
from src.jacobian.normalised import batch_norm_growth
from src.prediction import association
from src.rows import pick
from src.statistics import paired_difference, t_interval

Depths = TypeVar("Depths", float, np.ndarray)
SOLUTIONS = ("residual_unlock", "batchnorm_stabilization", "wide_layers", "deep_supervision")
EXPERIMENTS = (
    *("vanishing_products", "rank_bottleneck", "sigmoid_saturation", "information_bottleneck"),
    *SOLUTIONS,
    "certificate",
)
NOTE = "points: single seeds; bars: 95% t-intervals over seeds; black: predicted"
LOCKED = 1.3  # σw² of the locked tanh chains
LOGISTIC = 1.0  # σw² of the logistic ones, σb² = 0
REACH = 6  # a chain is locked where −L ln χ exceeds it (Schoenholz et al. 2017)
READINGS = {
    "attenuation": "∏‖J$_l$‖",
    "rank": "min rank J$_l$",
    "conditioning": "max cond J$_l$",
    "skip_depth": "skip depth",
    "gradient_ratio": "‖g$_1$‖/‖g$_L$‖",
    "width": "width",
}


def draw(rows: pd.DataFrame) -> Figure:
    """Ten panels: a locked, b–e its sources, f–i what is said to solve it, j how well the certificate foretells the accuracy."""
    parts = _by_experiment(rows)
    with panels(rows, count=10, columns=4, height=2.1, wide=(0, 9), note=NOTE) as (figure, axes):
        _locked(axes[0], parts["vanishing_products"])
        _products(axes[1], parts["vanishing_products"])
        _ranks(axes[2], parts["rank_bottleneck"])
        _saturation(axes[3], parts["sigmoid_saturation"])
        _code(axes[4], parts["information_bottleneck"])
        _skips(axes[5], parts["residual_unlock"])
        _normalisation(axes[6], parts["batchnorm_stabilization"])
        _width(axes[7], parts["wide_layers"])
        _exits(axes[8], parts["deep_supervision"])
        _certificate(axes[9], parts["certificate"])
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a panel: the number that shows its fact, with its interval over seeds, and what is predicted."""
    parts = _by_experiment(rows)
    chains, sigmoid, normalised, wide = (
        parts[name] for name in ("vanishing_products", "sigmoid_saturation", "batchnorm_stabilization", "wide_layers")
    )
    chi, logistic = mean_field.chi("tanh", LOCKED, _bias_var(chains)), mean_field.chi("sigmoid", LOGISTIC, 0.0)
    rate = pick(chains, "rate", part="rate", activation="tanh", weight_var=LOCKED)["value"]
    ranks = _lowest_ranks(parts["rank_bottleneck"])
    least = ranks[(ranks["rank"] == ranks["rank"].min()) & (ranks["activation"] == "relu")]
    energy = _relative_energy(parts["information_bottleneck"])
    narrow = energy[energy["code"] == energy["code"].min()]
    plain, skipped = (_flows(parts["residual_unlock"], skip) for skip in ("none", "preactivation"))
    deepest = plain["depth"].max()
    growth = pick(normalised, "rate", part="rate", norm="batch")
    largest = growth[growth["batch"] == growth["batch"].max()]
    linear = _gradient_ranks(wide).query("activation == 'linear' and width == width.max()")
    gains = _supervised(parts["deep_supervision"]).query("vanished == vanished.max()")
    zoo = networks(parts["certificate"])
    lines = {
        "a": ("locked: tanh, ln ‖g‖² a layer", t_interval(rate), np.log(chi)),
        "b": ("source, product: tanh, growth of ‖g‖² a layer", t_interval(np.exp(rate)), chi),
        "c": ("source, rank: ReLU, rank ∇W_1 below the narrowest layer", t_interval(least["value"]), least["rank"].iloc[0]),
        "d": ("source, saturation: logistic, growth of ‖g‖² a layer", t_interval(_logistic_growth(sigmoid)), logistic),
        "e": ("source, bottleneck: linear, energy before the narrowest code", t_interval(narrow["value"]), narrow["predicted"].iloc[0]),
        "f": ("locked: deepest plain chain, ln ‖g_1‖/‖g_{L−1}‖", t_interval(_at(plain, deepest)), _halved(deepest)),
        "f'": ("solution, skips: the same with skips", t_interval(_at(skipped, deepest)), np.nan),
        "g": (
            "solution, BatchNorm: growth of ‖g‖² a layer",
            t_interval(np.exp(largest["value"])),
            batch_norm_growth(largest["batch"].max()),
        ),
        "h": ("solution, width: widest linear nets, rank ∇W_l", t_interval(linear["value"]), int(wide["classes"].max()) - 1),
        "i": ("solution, auxiliary losses: accuracy gained, most locked", paired_difference(gains["exits"], gains["plain"]), np.nan),
        "j": ("certificate: ρ of Σ ln ‖J_l‖ and the accuracy", association(zoo["attenuation"], zoo["accuracy"]), np.nan),
    }
    return pd.DataFrame(
        [
            {"panel": panel, "what": what, "measured": found.value, "lo": found.lo, "hi": found.hi, "n": found.n, "predicted": predicted}
            for panel, (what, found, predicted) in lines.items()
        ]
    )


def _by_experiment(rows: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    return {name: rows[rows["experiment"] == name] for name in EXPERIMENTS}


def _bias_var(chains: pd.DataFrame) -> float:
    return float(pick(chains, "rate", part="rate")["bias_var"].iloc[0])


def _locked(axis: Axes, rows: pd.DataFrame) -> None:
    """Error signals of two tanh chains, layer by layer."""
    signals = pick(rows, "error_signal", part="rate", activation="tanh")
    bias_var = _bias_var(rows)
    critical = min(signals["weight_var"].unique(), key=lambda variance: abs(mean_field.chi("tanh", variance, bias_var) - 1))
    for k, weight_var in enumerate((LOCKED, critical)):
        profile = signals[signals["weight_var"] == weight_var].pivot(index="layer", columns="net_seed", values="value")
        top = profile.index.max() - 1
        relative = (profile - profile.loc[top]).loc[:top]
        axis.plot(relative.index, relative, color=f"C{k}", alpha=0.25, linewidth=0.6)
        axis.plot(relative.index, relative.mean(axis=1), DASHES[k], color=f"C{k}", label=f"tanh, σw² = {weight_var:g}")
        chi = mean_field.chi("tanh", weight_var, bias_var)
        label = "mean field: ½(L−1−l) ln χ" if k else None
        axis.plot(relative.index, (top - relative.index) * np.log(chi) / 2, label=label, **PREDICTION)
    axis.set(xlabel="layer l (the loss is on the right)", ylabel="ln ‖g$_l$‖/‖g$_{L-1}$‖ (nats)")
    axis.legend(loc="lower right")
    title(axis, "locked: the first layers hear least of the loss")


def _products(axis: Axes, rows: pd.DataFrame) -> None:
    growth = pick(rows, "rate", part="rate", activation="tanh").assign(value=lambda nets: np.exp(nets["value"]))
    _seeds(axis, growth, "weight_var", 0)
    grid = np.linspace(growth["weight_var"].min(), growth["weight_var"].max(), 40)
    axis.plot(grid, [mean_field.chi("tanh", w, _bias_var(rows)) for w in grid], label="χ", **PREDICTION)
    _unit(axis)
    _seeds(axis, pick(rows, "mean_norm", part="large"), "weight_var", 3, "mean ‖J$_l$‖")
    axis.set_ylim(top=3)
    axis.set(xlabel="σw² of tanh chains", ylabel="growth of ‖g‖²; ‖J$_l$‖")
    axis.legend(loc="upper left")
    title(axis, "source: product")


def _lowest_ranks(rows: pd.DataFrame) -> pd.DataFrame:
    """Rank ∇W_1 at initialisation below a narrow third layer, images, the largest batch."""
    ranks = pick(rows, "gradient_rank", part="ranks", source="images", layer=1, place=3, steps=0)
    return ranks[ranks["batch"] == ranks["batch"].max()]


def _ranks(axis: Axes, rows: pd.DataFrame) -> None:
    ranks = _lowest_ranks(rows)
    for k, activation in enumerate(("linear", "relu")):
        _seeds(axis, ranks[ranks["activation"] == activation], "rank", k, activation)
    bound = np.sort(ranks["rank"].unique())
    axis.plot(bound, bound, label="as stated: ≤ r", **PREDICTION)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="rank r of W$_3$", ylabel="rank ∇W$_1$")
    axis.set(ylim=(None, 2**11), yticks=bound)
    axis.legend(loc="upper left")
    title(axis, "source: rank")


def _logistic_growth(rows: pd.DataFrame) -> pd.Series:
    nets = jacobian_nets(rows).query("varied == 'weight_var'")
    return np.exp(nets.loc[np.isclose(nets["weight_var"], LOGISTIC), "rate"])


def _saturation(axis: Axes, rows: pd.DataFrame) -> None:
    nets = jacobian_nets(rows).query("varied == 'weight_var'")
    _seeds(axis, nets.assign(value=np.exp(nets["rate"])), "weight_var", 0)
    grid = np.geomspace(nets["weight_var"].min(), nets["weight_var"].max(), 40)
    axis.plot(grid, [mean_field.chi("sigmoid", w, 0.0) for w in grid], label="χ", **PREDICTION)
    _unit(axis)
    axis.set(xscale="log", yscale="log", xlabel="σw² of logistic chains", ylabel="growth of ‖g‖² a layer")
    axis.legend(loc="lower right", handlelength=1)
    title(axis, "source: saturation")


def _relative_energy(rows: pd.DataFrame) -> pd.DataFrame:
    """Energy that arrives before an untrained linear code with orthogonal weights, over that before one of full width."""
    kept = pick(rows, "energy_kept", activation="linear", init="orthogonal", when="untrained")
    wide = kept.loc[kept["code"] == kept["width"], "value"].mean()
    shares = kept["code"] / kept["width"]
    return kept.assign(value=kept["value"] / wide, predicted=[PREDICTED["orthogonal"](share) for share in shares])


def _code(axis: Axes, rows: pd.DataFrame) -> None:
    energy = _relative_energy(rows)
    _seeds(axis, energy, "code", 0)
    predicted = energy.groupby("code")["predicted"].first()
    axis.plot(predicted.index, predicted, label="r/d", **PREDICTION)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="code width r (d = 64)" if energy["width"].max() == 64 else "code width r", ylabel="energy before the code")
    axis.legend(loc="lower right", handlelength=1)
    title(axis, "source: bottleneck")


def _flows(rows: pd.DataFrame, skip: str) -> pd.DataFrame:
    return pick(rows, "flow", part="flow", norm="none", weight_var=1.0, skip=skip)


def _at(nets: pd.DataFrame, depth: float) -> pd.Series:
    return nets.loc[nets["depth"] == depth, "value"]


def _halved(depth: Depths) -> Depths:
    """The prediction of ln ‖g_1‖/‖g_{L−1}‖ in a plain ReLU chain with σw² = 1: χ = ½."""
    return -(depth - 2) * np.log(2) / 2


def _skips(axis: Axes, rows: pd.DataFrame) -> None:
    for k, (skip, name) in enumerate({"none": "plain", "preactivation": "with skips"}.items()):
        _seeds(axis, _flows(rows, skip), "depth", k, name)
    depths = np.array(sorted(_flows(rows, "none")["depth"].unique()))
    axis.plot(depths, _halved(depths), label="χ = ½", **PREDICTION)
    axis.axhline(0, color="0.3", linewidth=0.8, linestyle=":")
    axis.set(xlabel="depth L (weight layers)", ylabel="ln ‖g$_1$‖/‖g$_{L-1}$‖ (nats)")
    axis.legend(loc="lower left")
    title(axis, "solution: skips")


def _normalisation(axis: Axes, rows: pd.DataFrame) -> None:
    growth = pick(rows, "rate", part="rate").assign(value=lambda nets: np.exp(nets["value"]))
    for k, (norm, name) in enumerate({"batch": "BatchNorm", "layer": "LayerNorm"}.items()):
        _seeds(axis, growth[growth["norm"] == norm], "batch", k, name)
    sizes = np.geomspace(growth["batch"].min(), growth["batch"].max(), 40)
    axis.plot(sizes, [batch_norm_growth(size) for size in sizes], label="mean field", **PREDICTION)
    _unit(axis)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="batch N (ReLU chains)", ylabel="growth of ‖g‖² a layer")
    axis.legend(loc="center right", bbox_to_anchor=(1, 0.36))
    title(axis, "solution: norms")


def _gradient_ranks(rows: pd.DataFrame) -> pd.DataFrame:
    """Rank of ∇W_l at initialisation over the largest batch, mean over the hidden layers of a net."""
    ranks = pick(rows, "gradient_rank", part="rank", when="initial", batch_size=rows["batch_size"].max())
    return ranks[ranks["layer"] < ranks["depth"]].groupby(["activation", "width", "net_seed"], as_index=False)["value"].mean()


def _width(axis: Axes, rows: pd.DataFrame) -> None:
    ranks = _gradient_ranks(rows)
    for k, activation in enumerate(("linear", "relu")):
        _seeds(axis, ranks[ranks["activation"] == activation], "width", k, activation)
    axis.axhline(rows["classes"].max() - 1, label="softmax: C−1", **PREDICTION)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="width w (units)", ylabel="rank ∇W$_l$")
    axis.set(ylim=(None, 2**12), yticks=np.sort(ranks["width"].unique()))
    axis.legend(loc="upper left")
    title(axis, "solution: width")


def _supervised(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every chain and seed, plain and with an exit at every stage at the largest α, and how far its gradient vanishes."""
    nets = pick(rows, "test_accuracy", part="training", heads="random").query("boost == 1 and adam == 0")
    keys = ["weight_var", "depth", "bias_var", "net_seed"]
    plain = nets[nets["schedule"] == "none"].set_index(keys)["value"]
    exits = nets.query("schedule == 'constant' and every == 1 and alpha == alpha.max()").set_index(keys)["value"]
    pairs = pd.DataFrame({"plain": plain, "exits": exits}).reset_index()
    loss = {(w, b): -np.log(mean_field.chi("tanh", w, b)) for w, b in set(zip(pairs["weight_var"], pairs["bias_var"], strict=True))}
    return pairs.assign(
        vanished=[depth * loss[w, b] for depth, w, b in zip(pairs["depth"], pairs["weight_var"], pairs["bias_var"], strict=True)]
    )


def _exits(axis: Axes, rows: pd.DataFrame) -> None:
    pairs = _supervised(rows)
    for k, (column, name) in enumerate({"plain": "plain", "exits": "with exits"}.items()):
        _seeds(axis, pairs.assign(value=pairs[column]), "vanished", k, name)
    axis.axvline(REACH, ymax=1 / 1.6, label=f"locked beyond {REACH}", **PREDICTION)
    axis.set(xlabel="−L ln χ (nats)", ylabel="test accuracy", ylim=(0, 1.6), yticks=np.linspace(0, 1, 6))
    axis.legend(loc="upper left")
    title(axis, "solution: exits")


def _certificate(axis: Axes, rows: pd.DataFrame) -> None:
    """How each entry of K_back goes with the accuracy reached over the zoo, beside what the gradient itself and the width tell."""
    nets = networks(rows)
    for place, (reading, _) in enumerate(READINGS.items()):
        rho = association(nets[reading], nets["accuracy"])
        colour = "C0" if reading in ENTRIES else "C1"
        axis.plot([rho.lo, rho.hi], [place, place], color=colour)
        axis.plot(rho.value, place, "o" if reading in ENTRIES else "s", color=colour)
    level = float(criteria("certificate").rank_predicts.at_least)
    axis.axvline(level, linestyle="--", **PREDICTION)
    axis.annotate("foretells from here on", (level, len(READINGS)), xytext=(3, 1), textcoords="offset points", fontsize=SMALL)
    axis.axvline(0, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(READINGS)), list(READINGS.values()))
    axis.set(xlim=(-1, 1), ylim=(len(READINGS) + 0.3, -0.6), xlabel="Spearman ρ with the accuracy reached", ylabel="reading")
    title(axis, f"certificate: K$_{{back}}$ (circles), {len(nets)} nets")


def _seeds(axis: Axes, nets: pd.DataFrame, x: str, k: int, label: str = "measured") -> None:
    """Every seed as a point, and the means, unconnected, with their 95% t-intervals."""
    over_seeds(axis, nets, x, k, label, linestyle="none", markerfacecolor="w")


def _unit(axis: Axes) -> None:
    axis.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
