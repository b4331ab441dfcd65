"""The top hidden layer of logistic nets through long trainings: it saturates, and escapes or not.

After Glorot & Bengio 2010 (Understanding the difficulty of training deep feedforward neural networks), sections 2.3 and 3.1, Figure 2.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from src.config import Config, ModelConfig, TrainingConfig
from src.experiment import Context, network_columns
from src.models.start import standard_start
from src.rows import Row, measured, pick
from src.saturation import activity
from src.training.loop import lasting
from src.trainings import Trainee, train_all

# plain SGD on batches of ten; activations on 300 test images
RECIPE: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "batch_size": 10, "schedule": "constant"}
WATCHED_IMAGES, WATCHED_TIMES, PERCENTILES = 300, 40, (2.0, 50.0, 98.0)


def long_nets(config: Config) -> list[ModelConfig]:
    """The standard start of equation 1: U[−1/√n, 1/√n] has the variance 1/(3n)."""
    start: dict[str, Any] = {"activation": "sigmoid", "weight_var": 1 / 3, "bias_var": 0.0, "width": config.grid.long_width}
    return [replace(config.model, **start, depth=depth) for depth in config.grid.long_depths]


def recipe_of(context: Context) -> TrainingConfig:
    """The paper's training, `grid.long_steps` long."""
    grid = context.config.grid
    return lasting(replace(context.config.training, **RECIPE, lr=grid.long_lr), grid.long_steps, len(context.data.train))


def watch(context: Context) -> Iterator[Row]:
    """The activations of every hidden layer through each long training, and its test accuracies."""
    grid = context.config.grid
    images, _ = context.samples(context.data.test, WATCHED_IMAGES)
    times = set(np.geomspace(1, grid.long_steps, WATCHED_TIMES).astype(int).tolist())
    recipe = recipe_of(context)

    def layers(network: nn.Sequential) -> list[dict[str, float]]:
        return activity(network[:-1], images, PERCENTILES)

    def look(network: nn.Sequential, step: int) -> list[dict[str, float]] | None:
        return layers(network) if step in times else None

    for model in context.progress(long_nets(context.config), "long trainings"):
        seeds = range(grid.long_seeds)
        networks = [context.network(model, seed) for seed in seeds]
        for seed, network in zip(seeds, networks, strict=True):
            standard_start(network, context.generator("uniform", seed))
        before = [layers(network) for network in networks]
        trainees = [
            Trainee(network, f"{model.depth - 1} hidden layers, seed {seed}", seed, on_step=partial(look, network), config=recipe)
            for seed, network in zip(seeds, networks, strict=True)
        ]
        for seed, initial, outcome in zip(seeds, before, train_all(context, trainees), strict=True):
            where = {"part": "long", **network_columns(model, seed)}
            for step, found in {0: initial, **outcome.seen}.items():
                for layer, of_layer in enumerate(found, start=1):
                    named = {f"activation_{name}": value for name, value in of_layer.items()}
                    yield from measured({"step": step, "layer": layer, **where}, **named)
            for point in outcome.history.itertuples():
                yield from measured({"step": point.step, **where}, test_accuracy=point.test_accuracy)


def courses(rows: pd.DataFrame) -> pd.DataFrame:
    """The top hidden layer's 98th percentile in each long training: lowest in the first half, lowest, and the rise from there.

    Args:
        rows: as `watch` has them.

    Returns: a row a training; columns hidden_layers, net_seed, steps, lowest_early, lowest, rise.
    """
    layers = pick(rows, "activation_p98", part="long")
    return courses_of(layers[layers["layer"] == layers["depth"] - 1])


def courses_of(percentiles: pd.DataFrame) -> pd.DataFrame:
    """The same of the percentiles alone, a row a training and step."""
    found = []
    for (depth, seed), top in percentiles.groupby(["depth", "net_seed"]):
        course = top.sort_values("step").set_index("step")["value"]
        early, late = course[: course.index.max() / 2], course[course.idxmin() :]
        where = {"hidden_layers": int(depth) - 1, "net_seed": seed, "steps": int(course.index.max())}
        found.append({**where, "lowest_early": early.min(), "lowest": course.min(), "rise": late.max() - course.min()})
    return pd.DataFrame(found, columns=["hidden_layers", "net_seed", "steps", "lowest_early", "lowest", "rise"])
