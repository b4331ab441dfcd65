"""The top hidden layer through long trainings: what is watched, how, and what is read off its course."""

import pandas as pd
import pytest
import torch

from experiments import sigmoid_top_layer as top_layer
from src.trainings import Trainee, train_all
from tests.experiments.measured import small_context

NAME = "sigmoid_saturation"


@pytest.fixture(scope="module")
def watched() -> pd.DataFrame:
    return pd.DataFrame(top_layer.watch(small_context(NAME)))


def test_it_is_watched_from_before_the_first_step_to_after_the_last(watched: pd.DataFrame) -> None:
    means = watched[watched["quantity"] == "activation_mean"]
    assert (means["step"].min(), means["step"].max()) == (0, 12)
    assert set(means.loc[means["depth"] == 6, "layer"]) == {1, 2, 3, 4, 5}
    assert set(watched["net_seed"]) == {0}
    between = watched.pivot_table(index=["depth", "layer", "step"], columns="quantity", values="value")
    assert (between["activation_p2"] < between["activation_mean"]).all()
    assert (between["activation_mean"] < between["activation_p98"]).all()


def test_watching_leaves_the_training_as_it_is(watched: pd.DataFrame) -> None:
    lab = small_context(NAME)
    model = top_layer.long_nets(lab.config)[0]
    network = lab.network(model, 0)
    top_layer.standard_start(network, lab.generator("uniform", 0))
    train_all(lab, [Trainee(network, "alone", 0, config=top_layer.recipe_of(lab))])
    with torch.no_grad():
        mean = float(network[:-1](lab.samples(lab.data.test, top_layer.WATCHED_IMAGES)[0]).double().mean())
    top = watched.query("quantity == 'activation_mean' and depth == 5 and layer == 4 and step == 12")
    assert list(top["value"]) == [pytest.approx(mean, rel=1e-12)]


def test_the_recipe_is_the_papers() -> None:
    recipe = top_layer.recipe_of(small_context(NAME))
    assert (recipe.optimizer, recipe.momentum, recipe.batch_size, recipe.schedule) == ("sgd", 0.0, 10, "constant")
    assert (recipe.lr, recipe.max_steps, recipe.epochs) == (1.0, 12, 1)


def test_the_course_of_the_top_layer_alone() -> None:
    at = {"part": "long", "quantity": "activation_p98", "depth": 5, "net_seed": 3}
    top = [{**at, "layer": 4, "step": 10.0 * k, "value": value} for k, value in enumerate([0.5, 0.2, 0.3, 0.1, 0.4])]
    below = [{**at, "layer": 3, "step": 10.0 * k, "value": 0.01} for k in range(5)]
    of_mean = [{**at, "layer": 4, "step": 0.0, "value": 0.0, "quantity": "activation_mean"}]
    found = top_layer.courses(pd.DataFrame(top + below + of_mean))
    expected = {"hidden_layers": 4, "net_seed": 3, "steps": 40, "lowest_early": 0.2, "lowest": 0.1, "rise": 0.4 - 0.1}
    assert found.to_dict("records") == [expected]
