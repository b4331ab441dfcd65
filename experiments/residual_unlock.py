"""Step 5, skip connections: what the identity path guarantees, and what residual chains gain over plain ones of equal size.

Plain, original and pre-activation residual MLPs (He et al. 2016, CVPR and ECCV) of equal depth and parameters: the residual gradient
equation, σ_min(I+J) against 1−‖J‖, gradients end to end, the growth of Var(x_l) with and without normalisation (De & Smith 2020),
and the accuracy gap against depth, at initialisation and after training. Published errors are held to by experiment=reproduction/he2016.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from src.chain import cut
from src.config import Config, Criterion, ModelConfig, Norm, Skip, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.jacobian.materialised import layer_jacobian
from src.locking import walk_back
from src.models import Residual, calibrate
from src.plan import Work
from src.rows import Row, measured, pick
from src.spectrum import spectrum
from src.statistics import Estimate, greatest, least, paired_difference, slope, t_interval
from src.trainings import Trainee, train_all
from src.verdict import Verdict, cell, cells_by, judge_forms

QUANTITIES = {
    "skip_depth": "the fewest weight layers between the loss and the first stage",
    "log_attenuation": "Σ_l ln ‖J_l‖ over all stages, mean over samples, nats",
    "least_rank": "the least rank J_l of any stage and sample",
    "equation_error": "‖g_{l−1} − (I+J)ᵀg_l‖ / ‖g_l‖ with J of the branch, the worst sample of a block",
    "branch_norm": "‖J‖ of the branch, the largest of a block's samples",
    "sigma_min": "σ_min of the block's own Jacobian, the smallest of its samples",
    "weyl_slack": "σ_min(I+J) − (1−‖J‖) of a pre-activation block, the smallest of its samples",
    "gradient_kept": "‖g_{l−1}‖/‖g_l‖ over a block, the smallest of its samples",
    "flow": "½ ln mean ‖g‖² behind the first stage minus before the last, nats: 0 where the gradient passes unchanged",
    "second_moment": "mean x_l² over images and units behind block l, in units of its value before the first block",
    "added_variance": "mean x_l² behind block l minus its value before the first block",
    "train_accuracy": "share of training images told right",
    "test_accuracy": "share of test images told right",
    "diverged": "1 where the training diverged, else 0",
}
SKIPS: tuple[Skip, ...] = ("none", "original", "preactivation")
NORMS: tuple[Norm, ...] = ("none", "batch")


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    for axis, depths in (("depths", grid.depths), ("train_depths", grid.train_depths), ("block_depth", [grid.block_depth])):
        require(all(depth >= 4 and depth % 2 == 0 for depth in depths), f"grid.{axis}: 2n+2 weight layers, n ≥ 1 (4, 6, 8, …)")
    require(max(grid.depths) >= 8, "grid.depths: one of at least 8 weight layers, for a slope over blocks")
    require(min(grid.weight_vars) > 0, "grid.weight_vars: σw² above 0")
    require(config.model.width >= 8, "model.width: at least 8 units: narrower chains die")
    require(grid.samples <= len(data.test), f"grid.samples: at most {len(data.test)}, the test images")
    require(2 <= grid.calibration <= len(data.train), f"grid.calibration: 2 to {len(data.train)}, the training images")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid
    certified = [_dense(config, skip=skip, depth=grid.block_depth) for skip in SKIPS]
    blocks, passed, squares = (partial(measuring, context) for measuring in (_block_measures, _calibrated_flow, _mean_squares))
    return [
        *(Work(model, 1, measuring=context.certify) for model in certified),
        *(Work(model, grid.certified_seeds, measuring=blocks) for model in _blocked(config)),
        Work(_dense(config, depth=4), 1, measuring=blocks),
        *(Work(model, grid.seeds, measuring=passed) for model in _flowing(config)),
        *(Work(model, grid.seeds, measuring=squares) for model in _growing(config)),
        *(Work(model, grid.train_seeds, context.steps(), passed) for model in _trained(config)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return context.rows(_certificates, _blocks, _cancelled_identity, _flows, _moments, _trainings)


def _dense(config: Config, **changes: Any) -> ModelConfig:
    """A residual MLP of the configured width: what small exact Jacobians are measured on, whatever is trained."""
    return replace(config.model, family="residual_mlp", **changes)


def _blocked(config: Config) -> list[ModelConfig]:
    settings = [(skip, scale) for skip in ("original", "preactivation") for scale in config.grid.branch_scales]
    return [_dense(config, skip=skip, branch_scale=scale, depth=config.grid.block_depth) for skip, scale in settings]


def _certificates(context: Context) -> Iterator[Row]:
    """K_back of the three chains at equal depth and parameters."""
    for skip in context.progress(SKIPS, "certificates"):
        model = _dense(context.config, skip=skip, depth=context.config.grid.block_depth)
        certificate = context.certify(context.calibrated(model, 0))
        context.show(f"{skip}, depth {model.depth}", certificate)
        yield from measured(
            {"part": "certificate", **network_columns(model, 0)},
            skip_depth=float(certificate.skip_depth),
            log_attenuation=float(certificate.log_attenuation.mean()),
            least_rank=float(certificate.rank.min()),
        )


def _blocks(context: Context) -> Iterator[Row]:
    """Block by block at initialisation: the residual gradient equation, σ_min(I+J), ‖J‖, and the gradient that is kept."""
    for model in context.progress(_blocked(context.config), "blocks"):
        for seed in range(context.config.grid.certified_seeds):
            where = {"part": "block", **network_columns(model, seed)}
            yield from _block_rows(context, context.calibrated(model, seed), where)


def _block_rows(context: Context, network: nn.Sequential, where: Row) -> Iterator[Row]:
    for layer, values in _block_measures(context, network).items():
        yield from measured({**where, "layer": layer}, **values)


def _block_measures(context: Context, network: nn.Sequential) -> dict[int, dict[str, float]]:
    """What each residual block does to the gradient, by its layer; σ_min(I+J) where the block is I + branch."""
    inputs, targets = context.samples(context.data.test, context.config.grid.samples)
    found = {}
    for link in walk_back(cut(network, None, torch.float64, "eval"), inputs.double(), targets, cross_entropy):
        if not isinstance(link.stage, Residual):
            continue
        branch, block = layer_jacobian(link.stage.branch, link.inputs), layer_jacobian(link.stage, link.inputs)
        norm, sigma_min = spectrum(branch).norm, spectrum(block).smallest
        stated = link.signal.direction + (link.signal.direction.unsqueeze(1) @ branch).squeeze(1)
        kept = (link.signal_before.log_norm - link.signal.log_norm).exp()
        error = (stated - link.signal_before.direction * kept.unsqueeze(1)).norm(dim=1)
        found[link.index] = {
            "equation_error": float(error.max()),
            "branch_norm": float(norm.max()),
            "sigma_min": float(sigma_min.min()),
            "gradient_kept": float(kept.min()),
        }
        if isinstance(link.stage.after, nn.Identity):
            found[link.index]["weyl_slack"] = float((sigma_min - (1 - norm)).min())
    return found


def _cancelled_identity(context: Context) -> Iterator[Row]:
    """The counterexample: one block whose branch has J = −I."""
    model = _dense(context.config, skip="preactivation", norm="none", depth=4)
    network = context.network(model, 0)
    network.block1 = cancelled_block(model.width).to(context.device)
    yield from _block_rows(context, network, {"part": "cancelled", **network_columns(model, 0)})


def cancelled_block(width: int) -> Residual:
    """X + (1 − x): a residual block with J = −I, constant in x."""
    branch = nn.Linear(width, width)
    with torch.no_grad():
        branch.weight.copy_(-torch.eye(width))
        branch.bias.fill_(1.0)
    return Residual(branch, nn.Identity(), nn.Identity())


def _flowing(config: Config) -> list[ModelConfig]:
    # under batch normalisation the scale of the weights does not matter
    gains = [("none", weight_var) for weight_var in config.grid.weight_vars] + [("batch", 2.0)]
    return [
        _dense(config, skip=skip, norm=norm, weight_var=weight_var, depth=depth)
        for norm, weight_var in gains
        for depth in config.grid.depths
        for skip in SKIPS
    ]


def _flows(context: Context) -> Iterator[Row]:
    """How much of the gradient reaches the first stage, for the three chains at equal depth and parameters."""
    for model in context.progress(_flowing(context.config), "gradients end to end"):
        for seed in range(context.config.grid.seeds):
            where = {"part": "flow", "when": "initial", **network_columns(model, seed)}
            yield from measured(where, flow=flow(context, context.calibrated(model, seed)))


def flow(context: Context, network: nn.Sequential) -> float:
    """½ ln mean_n ‖g_1‖² − ½ ln mean_n ‖g_{L−1}‖², between the first stage and the readout."""
    signals = context.error_signals(network)
    return signals[1] - signals[len(signals) - 1]


def _calibrated_flow(context: Context, network: nn.Sequential) -> float:
    calibrate(network, context.samples(context.data.train, context.config.grid.calibration)[0])
    return flow(context, network)


def _growing(config: Config) -> list[ModelConfig]:
    depth, width = max(config.grid.depths), config.grid.product_width
    return [_dense(config, skip="preactivation", norm=norm, weight_var=2.0, depth=depth, width=width) for norm in NORMS]


def _moments(context: Context) -> Iterator[Row]:
    """How x_l² grows along pre-activation chains with σw² = 2, with and without normalisation."""
    for model in context.progress(_growing(context.config), "growth"):
        for seed in range(context.config.grid.seeds):
            before, *squares = _mean_squares(context, context.network(model, seed))
            for block, square in enumerate(squares, start=1):
                where = {"part": "moment", "layer": block, **network_columns(model, seed)}
                yield from measured(where, second_moment=square / before, added_variance=square - before)


def _mean_squares(context: Context, network: nn.Sequential) -> list[float]:
    """Mean x_l² over units and the images that normalisation is calibrated on, before the first block and behind every block."""
    images, _ = context.samples(context.data.train, context.config.grid.calibration)
    calibrate(network, images)
    chain = cut(network, None, torch.float64, "eval")
    return [float(state.square().mean()) for state in chain.states(images.double())[1:-1]]


def _trained(config: Config) -> list[ModelConfig]:
    return [replace(config.model, skip=skip, depth=depth) for depth in config.grid.train_depths for skip in SKIPS]


def _trainings(context: Context) -> Iterator[Row]:
    """The three chains trained alike, with their gradients before and after."""
    grid = context.config.grid
    for model in context.progress(_trained(context.config), "trainings"):
        seeds = range(grid.train_seeds)
        networks = [context.calibrated(model, seed) for seed in seeds]
        before = [flow(context, network) for network in networks]
        names = [f"{model.skip}, depth {model.depth}, seed {seed}" for seed in seeds]
        outcomes = train_all(context, [*map(Trainee, networks, names, seeds)])
        for seed, network, initial, outcome in zip(seeds, networks, before, outcomes, strict=True):
            where = {"part": "training", **network_columns(model, seed)}
            yield from measured({**where, "when": "initial"}, flow=initial)
            yield from measured(where, **outcome.metrics())
            if outcome.status == "finished":
                yield from measured({**where, "when": "trained"}, flow=flow(context, network))
                if model.depth == min(grid.train_depths):
                    yield from _block_rows(context, network, {**where, "part": "trained block"})


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    cells = {
        "bypass": cells_by(pick(rows, "skip_depth", part="certificate"), ["skip", "depth"], greatest),
        "gradient_equation": _by_branch(rows, "equation_error", greatest),
        "identity_ensures_flow": _by_branch(rows, "gradient_kept", least),
        "weyl_bound": _by_branch(rows, "weyl_slack", least),
        "guaranteed_flow": _by_branch(rows, "sigma_min", least).query("skip == 'preactivation'"),
        "maintains_flow": _sizes(pick(rows, "flow", part="flow").query("skip != 'none'"), ["skip", "norm", "weight_var", "depth"]),
        "flow_against_plain": _flow_gap(rows),
        "added_variance": _added_variance(rows),
        "doubling": _doubling(rows),
        "preactivation_gap": _accuracy_gap(rows, "preactivation"),
        "original_gap": _accuracy_gap(rows, "original"),
        "flow_after_training": _sizes(pick(rows, "flow", part="training", when="trained", skip="preactivation"), ["depth"]),
    }
    return judge_forms("residual_unlock", criteria, cells)


def _by_branch(rows: pd.DataFrame, quantity: str, bound: Callable[[pd.Series], Estimate]) -> pd.DataFrame:
    """The extreme of a quantity over all blocks, samples and seeds of a kind of block, beside the largest ‖J‖ among them."""
    keys = ["part", "skip", "branch_scale"]
    norms = pick(rows, "branch_norm").groupby(keys)["value"].max()
    return cells_by(pick(rows, quantity), keys, bound).join(norms.rename("branch_norm"), on=keys)


def _sizes(flows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """|flow| over seeds."""
    return cells_by(flows.assign(value=flows["value"].abs()), keys, t_interval)


def _flow_gap(rows: pd.DataFrame) -> pd.DataFrame:
    """|flow| of the plain chain minus that of the pre-activation chain, paired by seed."""
    keys = ["norm", "weight_var", "depth"]
    cells = []
    for at, values in pick(rows, "flow", part="flow").groupby(keys):
        flows = values.pivot(index="net_seed", columns="skip", values="value").abs()
        cells.append(cell(paired_difference(flows["none"], flows["preactivation"]), **dict(zip(keys, at, strict=True))))
    return pd.DataFrame(cells)


def _added_variance(rows: pd.DataFrame) -> pd.DataFrame:
    """(mean x_l² − mean x_0²)/l of normalised chains, over seeds, at every doubling of l."""
    growth = pick(rows, "added_variance", norm="batch")
    doublings = growth[np.log2(growth["layer"]) % 1 == 0]
    return cells_by(doublings.assign(block=doublings["layer"], value=doublings["value"] / doublings["layer"]), ["block"], t_interval)


def _doubling(rows: pd.DataFrame) -> pd.DataFrame:
    """The slope of log₂ mean x_l² a block of chains without normalisation, over seeds."""
    growth = pick(rows, "second_moment", norm="none").groupby("net_seed")[["layer", "value"]]
    slopes = growth.apply(lambda net: slope(net["layer"], np.log2(net["value"])).value)
    return pd.DataFrame([cell(t_interval(slopes), norm="none", weight_var=2.0)])


def _accuracy_gap(rows: pd.DataFrame, skip: Skip) -> pd.DataFrame:
    """Test accuracy with the skips minus without, paired by seed."""
    cells = []
    for depth, values in pick(rows, "test_accuracy", part="training").groupby("depth"):
        accuracy = values.pivot(index="net_seed", columns="skip", values="value")
        cells.append(cell(paired_difference(accuracy[skip], accuracy["none"]), depth=int(depth)))
    return pd.DataFrame(cells)
