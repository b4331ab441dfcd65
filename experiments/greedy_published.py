"""Long trainings of greedy_layerwise beside the test errors that were published for them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import pandas as pd

from experiments.greedy_rules import RULE, Loss, Rule, applied, train_by, turn_count
from src.config import Config, ModelConfig, TrainingConfig
from src.experiment import Context, network_columns
from src.plan import Work
from src.rows import Row, measured, pick
from src.statistics import t_interval
from src.trainings import Trainee
from src.verdict import cells_by

# Published test errors in percent. Nøkland & Eidnes 2019: an MLP with three hidden layers, of 1024 units on MNIST and of 3000 on CIFAR-10
# (2.9 and 27.3 million parameters); Belilovsky et al. 2019: a CNN with k = 1, 2, 3, accuracies 88.3/90.4/91.7%.
NOKLAND: dict[str, dict[Loss, float]] = {
    "mnist": {"backprop": 0.75, "pred": 0.68, "sim": 0.80, "predsim": 0.62},
    "cifar10": {"backprop": 33.56, "pred": 32.33, "sim": 33.48, "predsim": 30.93},
}
BELILOVSKY = {"cifar10": {1: 11.7, 2: 9.6, 3: 8.3}}


@dataclass(frozen=True)
class Published:
    """A training whose test error was published, in percent."""

    model: ModelConfig
    rule: Rule
    error: float

    def training(self, config: Config) -> TrainingConfig:
        """Adam from 5e-4 (Nøkland & Eidnes 2019), though with a cosine; one block after the other, half the epochs each (Belilovsky)."""
        epochs = config.grid.published_epochs
        each = epochs if self.rule.schedule == "simultaneous" else -(-epochs // 2)
        return replace(config.training, optimizer="adam", lr=5e-4, epochs=each, max_steps=None)


def published(context: Context) -> list[Published]:
    """The trainings whose error was published for this data set: 3 dense hidden layers, and a VGG-like net of 8 weight layers."""
    data, widths = context.data.name, context.config.grid.published_widths
    if not widths or data not in NOKLAND:
        return []
    *dense_widths, channels = widths
    base = replace(context.config.model, activation="relu", weight_var=2.0, bias_var=0.0, norm="batch")
    dense = replace(base, depth=4, width=dict(zip(NOKLAND, dense_widths, strict=True))[data])
    conv = replace(base, family="vgg", depth=8, width=channels)
    return [
        *(Published(dense, Rule(loss, 4 if loss == "backprop" else 1), error) for loss, error in NOKLAND[data].items()),
        *(Published(conv, Rule("pred", 1, k - 1, "sequential"), error) for k, error in BELILOVSKY.get(data, {}).items()),
    ]


def works(context: Context) -> list[Work]:
    """What is trained."""
    config = context.config
    return [
        Work(run.model, config.grid.train_seeds, turn_count(run.rule, run.model.depth) * context.steps(run.training(config)))
        for run in published(context)
    ]


def trainings(context: Context) -> Iterator[Row]:
    """How each came out; none unless `grid.published_widths` asks for them."""
    config = context.config
    for run in context.progress(published(context), "published trainings"):
        trainees = []
        for seed in range(config.grid.train_seeds):
            blocks = applied(context, run.rule, context.network(run.model, seed), run.model, seed)
            trainees.append(Trainee(blocks, f"published, {run.model.family}", seed, config=run.training(config)))
        for seed, trained in enumerate(train_by(context, run.rule, trainees)):
            where = {"part": "published", "published": run.error, **network_columns(run.model, seed), **asdict(run.rule)}
            yield from measured(where, **trained.metrics)


def cells(rows: pd.DataFrame, family: str) -> pd.DataFrame:
    """Test error over the published one, over seeds; beside it both, in percent."""
    nets = pick(rows, "test_accuracy", part="published", family=family)
    if nets.empty:
        return nets
    errors = nets.assign(error=100 * (1 - nets["value"]))
    errors["measured"] = errors.groupby(RULE)["error"].transform("mean")
    return cells_by(errors.assign(value=errors["error"] / errors["published"]), [*RULE, "published", "measured"], t_interval)
