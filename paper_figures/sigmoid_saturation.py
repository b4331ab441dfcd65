"""Figure and table of sigmoid_saturation: ‖J‖, E[φ'²], growth of the gradient, learning, mapped nets, the top layer's course."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.sigmoid_saturation import BOUNDED, SETTING, falls, jacobian_nets, learning_nets
from paper_figures.style import ACTIVATIONS, DASHES, PREDICTION, SEEDS, over_seeds, panels, title
from src import mean_field
from src.rows import pick
from src.statistics import t_interval

VARIED = {"weight_var": "by σw²", "bias_var": "by σb², σw² = 1"}
NOTE = f"{SEEDS}, of a setting each in a and d, in d cut at 0 and 1; by σb²: at σw² = 1"
STARTS = {"tanh": "tanh, σw² = 1.761", "mapped": "logistic, mapped from it", "usual": "logistic, σw² = 1"}


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: ‖J‖ and accuracy against saturation, E[φ'²], growth of ‖g‖², mapped nets, activations through a long training."""
    with panels(
        rows, count=6, columns=3, height=2.5, note=f"{SEEDS}, of a setting each in a and d, in d cut at 0 and 1; by σb²: at σw² = 1"
    ) as (figure, axes):
        _norms(axes[0], rows)
        _slopes(axes[1], rows)
        _growth(axes[2], rows)
        _learning(axes[3], rows)
        _mapped(axes[4], rows)
        _course(axes[5], rows)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Saturation, ‖J‖, χ and the gradient's growth of every setting with intervals, and the accuracy of its short training."""
    nets = jacobian_nets(rows)
    learning = learning_nets(rows)
    accuracy = learning.groupby([*SETTING, "depth"])["test_accuracy"].mean()
    lines = []
    for (varied, weight_var, bias_var), own in nets.groupby(SETTING, sort=False):
        rate = t_interval(np.exp(own["rate"]))
        lines.append(
            {
                "saturated by": VARIED[varied][3:6].rstrip(","),
                "σw²": weight_var,
                "σb²": bias_var,
                "saturated": own["saturated"].mean(),
                "mean ‖J‖": own["norm"].mean(),
                "χ predicted": own["prediction"].iloc[0],
                "χ measured": own["chi"].mean(),
                "growth of ‖g‖² a layer": rate.value,
                "± growth": rate.hi - rate.value,
                **{f"accuracy, L = {int(depth)}": value for depth, value in accuracy[varied, weight_var, bias_var].items()},
                "nets": rate.n,
            }
        )
    return pd.DataFrame(lines)


def _norms(axis: Axes, rows: pd.DataFrame) -> None:
    nets = jacobian_nets(rows)
    regressions = falls(nets, ["varied"], "log_norm").set_index("varied")
    for k, (varied, label) in enumerate(VARIED.items()):
        own, b = nets[nets["varied"] == varied], regressions.loc[varied]
        slope = f"{b['estimate']:+.2f}, R² {b['r_squared']:.2f}".replace("-", "−")
        seeds, settings = (b[hi] - b["estimate"] for hi in ("hi", "settings_hi"))
        errors = f"± {seeds:.2f} seeds, ± {settings:.2f} settings"
        _against_saturation(axis, own, "norm", k, DASHES[k], f"{label[:6]}: {slope}\n{errors}")
        shares = np.array([0, own["saturated"].max()])
        line = own["log_norm"].mean() + b["estimate"] * (shares - own["saturated"].mean())
        axis.plot(shares, np.exp(line), **PREDICTION)
    axis.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    axis.set(xlabel="share of saturated units, mean", ylabel="mean ‖J$_l$‖")
    axis.set_ylim(top=25 * axis.get_ylim()[1])
    title(axis, "black: slopes of ln ‖J‖")
    axis.legend(loc="upper left", handlelength=1, handletextpad=0.4)


def _learning(axis: Axes, rows: pd.DataFrame) -> None:
    for (depth, varied), nets in learning_nets(rows).groupby(["depth", "varied"]):
        k, deeper = list(VARIED).index(varied), depth > rows.loc[rows["part"] == "learning", "depth"].min()
        _against_saturation(axis, nets, "test_accuracy", k, ":" if deeper else "-", f"{VARIED[varied][3:6]}, L = {int(depth)}")
    axis.set(xlabel="share saturated at the start, mean", ylabel="test accuracy", ylim=(0, 1.25), yticks=np.linspace(0, 1, 6))
    title(axis, "short training, L weight layers")
    axis.legend(loc="upper right", ncols=2, columnspacing=0.6, handlelength=1, handletextpad=0.4)


def _against_saturation(axis: Axes, nets: pd.DataFrame, quantity: str, k: int, style: Any, label: str) -> None:
    """The nets of each setting, at its mean saturation."""
    at = nets.groupby(["weight_var", "bias_var"])["saturated"].transform("mean")
    bounds = (0, 1) if quantity == "test_accuracy" else (0, np.inf)
    over_seeds(axis, nets.assign(at=at, value=nets[quantity]), "at", k, label, bounds, linestyle=style, markersize=2.5)


def _slopes(axis: Axes, rows: pd.DataFrame) -> None:
    measured = pick(rows, "square_slope")
    grid = np.linspace(0, measured["weight_var"].max(), 60)
    for activation in BOUNDED:
        own = measured[measured["activation"] == activation]
        axis.plot(grid, [mean_field.mean_square_derivative(activation, q) for q in grid], **PREDICTION)
        over_seeds(axis, own, "weight_var", ACTIVATIONS.index(activation), activation, (0, np.inf), linestyle="none")
    axis.set_yscale("log")
    axis.set(xlabel="variance q of z", ylabel="E[φ'(z)²]")
    title(axis, "slopes; black: mean field")
    axis.legend(loc="center", bbox_to_anchor=(0.5, 0.42))


def _growth(axis: Axes, rows: pd.DataFrame) -> None:
    nets = jacobian_nets(rows).query("varied == 'weight_var'")
    grid = np.geomspace(nets["weight_var"].min(), nets["weight_var"].max(), 40)
    axis.plot(grid, [mean_field.chi("sigmoid", w, 0.0) for w in grid], **PREDICTION)
    quantities = ((nets["chi"], "mean σ² of J", "C0"), (np.exp(nets["rate"]), "growth of ‖g‖²", "none"), (nets["norm"], "mean ‖J‖", "C2"))
    for k, (values, label, face) in enumerate(quantities):
        size = 6 if face == "none" else 3.5  # open around what coincides with it
        look: dict[str, Any] = {"linestyle": "none", "markerfacecolor": face, "markersize": size}
        over_seeds(axis, nets.assign(value=values), "weight_var", k, label, (0, np.inf), **look)
    axis.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
    axis.axvline(mean_field.critical_weight_var("sigmoid", 0.0), color="0.3", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set(xlabel="weight variance σw² (σb² = 0)", ylabel="mean σ², growth, ‖J‖")
    title(axis, "black: χ; dotted: χ = 1")
    axis.legend(loc="upper left")


def _mapped(axis: Axes, rows: pd.DataFrame) -> None:
    signals = pick(rows, "error_signal", part="mapped")
    for k, (start, label) in enumerate(STARTS.items()):
        profile = signals[signals["start"] == start].pivot(index="layer", columns="net_seed", values="value")
        relative = (profile - profile.iloc[-1]).iloc[:-1]
        axis.plot(relative.index, relative, color=f"C{k}", alpha=0.25, linewidth=0.6)
        axis.plot(relative.index, relative.mean(axis=1), DASHES[k], color=f"C{k}", label=label)
    layers = relative.index.to_numpy()
    for chi in (1.0, mean_field.chi("sigmoid", 1.0, 0.0)):
        axis.plot(layers, (layers[-1] - layers) * np.log(chi) / 2, **PREDICTION | {"linestyle": (0, (1, 3)), "linewidth": 1})
    axis.set(xlabel="layer l", ylabel="ln ‖g$_l$‖ / ‖g$_L$‖ (nats)")
    title(axis, "one function twice; black: χ")
    axis.legend(loc="lower right", handlelength=1)


def _course(axis: Axes, rows: pd.DataFrame) -> None:
    long = rows[rows["part"] == "long"]
    shallow, *deeper = sorted(long["depth"].unique())

    def course(quantity: str, depth: float, layer: float) -> pd.DataFrame:
        own = pick(long, quantity, depth=depth, layer=layer)
        return own.pivot(index="step", columns="net_seed", values="value")

    for k in range(int(shallow) - 1):
        means = course("activation_mean", shallow, k + 1)
        axis.plot(means.index, means, color=f"C{k}", alpha=0.3, linewidth=0.6)
        axis.plot(means.index, means.mean(axis=1), DASHES[k], color=f"C{k}", label=f"layer {k + 1}")
    low, middle, high = (course(f"activation_p{percentile}", shallow, shallow - 1).mean(axis=1) for percentile in (2, 50, 98))
    top = f"C{int(shallow) - 2}"
    axis.fill_between(low.index, low, high, color=top, alpha=0.12, linewidth=0, label="its 2nd–98th pct.")
    axis.plot(middle.index, middle, ".", color=top, markersize=2.5, label="its median")
    for depth in deeper:
        tops = course("activation_p98", depth, depth - 1)
        axis.plot(tops.index, tops.mean(axis=1), color="k", linewidth=0.9, label=f"98th pct., top of {int(depth) - 1}")
    axis.set_xscale("symlog", linthresh=10)
    axis.set(xlabel="training step (batches of 10)", ylabel="activation", ylim=(0, 1.5), yticks=np.linspace(0, 1, 6))
    title(axis, f"{int(shallow) - 1} hidden layers, means")
    axis.legend(loc="upper left", ncols=2, columnspacing=0.5, handlelength=1, handletextpad=0.4)
