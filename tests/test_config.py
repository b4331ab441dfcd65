from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from src.config import Config, known_keys, register_resolvers, to_config, unknown_key
from src.errors import UserError
from src.results import to_plain
from src.run import CONF, check
from tests.conftest import CommandLine, Outcome
from tests.tiny import YAML, Tiny

ROOT = CONF.parent
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
SCALES = ("smoke", "quick", "paper")


def composed(*overrides: str, conf: Path = CONF) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", list(overrides))


def keys(plain: object, prefix: str = "") -> set[str]:
    """Every dotted key of nested mappings; a list counts as one value."""
    if not isinstance(plain, Mapping):
        return {prefix}
    return {key for name, value in plain.items() for key in keys(value, f"{prefix}.{name}")}


def parts_missing(root: Path) -> list[str]:
    """Whatever an experiment of conf/experiment lacks: its module, its figure, its test."""
    names = sorted(file.stem for file in (root / "conf/experiment").glob("*.yaml"))
    parts = [part for name in names for part in (f"experiments/{name}.py", f"paper_figures/{name}.py", f"tests/experiments/test_{name}.py")]
    return [part for part in parts if not (root / part).is_file()]


def test_groups_and_their_defaults(cli: CommandLine) -> None:
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    assert groups == {"experiment", "data", "model", "training", "scale", "tracker", "cluster"}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        choices = compose("config", return_hydra_config=True).hydra.runtime.choices
    assert choices.cluster is None
    assert choices["hydra/launcher"] == "basic"
    assert choices.tracker == "offline"
    assert choices.scale == "quick"
    assert choices.experiment is None


@pytest.mark.parametrize("group", ["data", "model", "training", "tracker"])
def test_every_option_of_a_group_is_valid(group: str) -> None:
    for option in sorted((CONF / group).glob("*.yaml")):
        assert to_config(composed("experiment=vanishing_products", f"{group}={option.stem}"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_the_same_keys_at_every_scale_and_the_name_of_its_file(name: str) -> None:
    configs = {scale: to_config(composed(f"experiment={name}", f"scale={scale}")) for scale in SCALES}
    assert {config.claim.name for config in configs.values()} == {name}
    assert {config.scale.name for config in configs.values()} == set(SCALES)
    first, *others = (keys(to_plain(config)) for config in configs.values())
    assert all(other == first for other in others)


def test_keys_that_differ_between_scales_are_found() -> None:
    assert keys({"grid": {"seeds": 1, "depths": [2]}}) == {".grid.seeds", ".grid.depths"}
    assert keys({"grid": {"seeds": 1}}) != keys({"grid": {"seeds": 1, "depths": [2]}})


def test_every_experiment_has_a_module_a_figure_and_a_test_of_its_own() -> None:
    assert EXPERIMENTS
    assert parts_missing(ROOT) == []


def test_missing_parts_are_found(tmp_path: Path) -> None:
    for folder in ("conf/experiment", "experiments", "paper_figures", "tests/experiments"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "conf/experiment/new.yaml").touch()
    assert parts_missing(tmp_path) == ["experiments/new.py", "paper_figures/new.py", "tests/experiments/test_new.py"]
    (tmp_path / "experiments/new.py").touch()
    assert parts_missing(tmp_path) == ["paper_figures/new.py", "tests/experiments/test_new.py"]


def test_a_claim_under_another_name_than_its_file_is_refused(cli: CommandLine, tiny: Tiny) -> None:
    tiny.yaml.write_text(tiny.yaml.read_text().replace("name: tiny", "name: teeny"))
    refused(cli("experiment=tiny"), "claim")


@pytest.mark.parametrize("by_scale", ["{smoke:1,quick:2}", "{smoke:1,quick:2,paper:3,huge:4}", "{smoke:1,quik:2,paper:3}"])
def test_scales_are_exactly_three(cli: CommandLine, tiny: Tiny, by_scale: str) -> None:
    tiny.yaml.write_text(tiny.yaml.read_text().replace("{smoke:8, quick:16, paper:32}", by_scale))
    refused(cli("experiment=tiny"), "needs exactly the scales smoke, quick, paper; got")


def refused(outcome: Outcome, *words: str) -> None:
    """One line that says all of `words`, exit code 2, and nothing on disk."""
    assert outcome.code == 2
    for word in words:
        assert word in outcome.error
    assert not list(Path().rglob("seed*"))
    assert not list(Path().rglob("*.tmp*"))


UNKNOWN_KEYS = {
    "trainning.lr=1": ["unknown key 'trainning.lr'", "'training.lr'"],
    "training.lrr=1": ["unknown key 'training.lrr'", "'training.lr'"],
    "modl=vgg": ["unknown key 'modl'", "'model'"],
    "sed=1": ["unknown key 'sed'", "'seed'"],
    "clustr=local": ["unknown key 'clustr'", "'cluster'"],
    "+optim.lrr=3": ["unknown key 'optim'"],
    "++training.lrr=1": ["unknown key 'training.lrr'", "'training.lr'"],
    "+grid.dephts=[1]": ["unknown key 'grid.dephts'", "'grid.depths'"],
    "+grid.depths=[1]": ["grid.depths", "tiny has samples"],  # another experiment's axis
    "grid.depths=[1]": ["unknown key 'grid.depths'"],
    "+data.fallbak=none": ["unknown key 'data.fallbak'", "'data.fallback'"],
    "+scale.nme=smoke": ["unknown key 'scale.nme'", "'scale.name'"],
    "+tracker.api_key=x": ["unknown key 'tracker.api_key'"],
    "+model.depht=3": ["unknown key 'model.depht'", "'model.depth'"],
    "+criteria.positive.at_lest=1": ["unknown key 'criteria.positive.at_lest'"],
    "+criteria.positiv={form: precise, statement: s, criterion: c, at_least: 0.0}": ["criteria.positiv", "tiny has positive"],
    "hydra.swep.dir=x": ["unknown key 'hydra.swep"],
}


@pytest.mark.parametrize("override", UNKNOWN_KEYS)
def test_unknown_keys_are_refused_on_the_command_line(cli: CommandLine, tiny: Tiny, override: str) -> None:
    refused(cli("experiment=tiny", override), *UNKNOWN_KEYS[override])


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("training:", "trainning:", "unknown key 'trainning'; did you mean 'training'?"),
        ("max_steps:", "max_step:", "unknown key 'training.max_step'; did you mean 'training.max_steps'?"),
        ("samples:", "sampels:", "unknown key 'grid.sampels'; did you mean 'grid.samples'?"),
        ("at_least:", "at_lest:", "unknown key 'criteria.positive.at_lest'"),
        ("title:", "titel:", "unknown key 'claim.titel'; did you mean 'claim.title'?"),
        ("criteria:", "criterions:", "unknown key 'criterions'; did you mean 'criteria'?"),
        ("override /data", "override /dta", "Could not override 'dta'"),
        ("# @package _global_\n", "", "'data@experiment.data'"),
        (YAML.partition("claim:")[0], "", "its first line must be '# @package _global_'"),
    ],
)
def test_misspelt_keys_are_refused_inside_experiment_files(cli: CommandLine, tiny: Tiny, right: str, wrong: str, named: str) -> None:
    text = tiny.yaml.read_text()
    assert right in text
    tiny.yaml.write_text(text.replace(right, wrong))
    refused(cli("experiment=tiny"), named)


def checked(base: DictConfig, changes: Mapping[str, object]) -> Config:
    """A composed config with values changed as the command line changes them, checked."""
    changed = OmegaConf.create(OmegaConf.to_container(base))
    for key, value in changes.items():
        OmegaConf.update(changed, key, value, force_add=True)
    return check(changed)


@pytest.fixture(scope="module")
def base() -> DictConfig:
    return composed("experiment=vanishing_products", "data=digits")


NAN, INF = float("nan"), float("inf")
WRONG = {
    "seed": [-1, 1.5, 2**32, True, "one", None],
    "device": ["tpu"],
    "results_dir": ["", None],
    "force": [1, "yes"],
    "model.family": ["transformer"],
    "model.depth": [0, 1001, 2.5, "deep"],
    "model.width": [-3, 0, "wide"],
    "model.activation": ["gelu"],
    "model.weight_var": [-0.1, NAN, INF],
    "model.bias_var": [-0.1],
    "model.branch_scale": [-1],
    "training.lr": [0, -1, NAN, INF, "fast", [0.1], True],
    "training.batch_size": [0, 1.5],
    "training.momentum": [1.0, -0.1],
    "training.epochs": [0],
    "training.max_steps": [0],
    "training.precision": ["float8"],
    "data.name": ["imagenet"],
    "data.root": ["", None],
    "data.mirrors": ["x"],
    "data.fallback": ["mnist"],
    "data.train_size": [0],
    "tracker.mode": ["maybe"],
    "grid.seeds": [0, None, [1]],
    "grid.depths": [[], 3, [0], [2, 1001]],
    "grid.weight_vars": [[1.0, -1.0], [NAN], 1.0],
    "criteria.bound.at_least": [NAN],
    "criteria.bound.form": ["loose"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_wrong_types_and_values_out_of_range_are_refused(base: DictConfig, key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^{key}[.:]"):
        checked(base, {key: value})


@pytest.mark.parametrize(
    "override", ["model.depth=0", "model.width=-3", "model.weight_var=-1", "training.lr=0", "training.lr=nan", "seed=-1", "seed=one"]
)
def test_what_is_refused_is_told_with_its_key_and_value(cli: CommandLine, tiny: Tiny, override: str) -> None:
    key, value = override.split("=")
    refused(cli("experiment=tiny", override), f"{key}: Input should be", f"(got {value if value != 'one' else repr(value)})")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.family": "residual_mlp", "model.depth": 5}, "2n\\+2"),
        ({"model.family": "cifar", "model.depth": 12}, "6n\\+2"),
        ({"model.family": "vgg", "model.depth": 9}, "8 weight layers"),
        ({"model.skip": "original"}, "no skip connections"),
        ({"model.family": "vgg", "model.depth": 8, "model.norm": "layer"}, "none or batch"),
        ({"criteria.bound.at_least": None}, "needs at_least, at_most or both"),
        ({"criteria.bound.at_most": -2}, "at_least -1e-09 exceeds at_most -2"),
        ({"training.batch_size": 1438, "data.train_size": None}, "training.batch_size: 1438 exceeds the 1437 training images of digits"),
        ({"training.batch_size": 65, "data.train_size": 64}, "exceeds the 64 training images"),
        ({"grid.block_depth": 4}, "grid.block_depth: is unknown; vanishing_products has certified_seeds, depths"),
        ({"criteria.new": {"form": "precise", "statement": "s", "criterion": "c", "at_least": 0}}, "criteria.new: is unknown"),
        ({"scale.name": "huge"}, "scale.name: 'huge' is none of smoke, quick, paper"),
        ({"seed": "???"}, "seed: Missing mandatory value"),
        ({"claim.statement": "anything"}, "claim: stands in the experiment's own file"),
        ({"claim.name": "residual_unlock"}, "claim: stands in the experiment's own file"),
        ({"claim.name": "nothing"}, "claim: stands in the experiment's own file"),
    ],
)
def test_values_that_do_not_go_together_are_refused(base: DictConfig, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        checked(base, changes)


@pytest.mark.parametrize(
    ("override", "said"),
    [("~grid.samples", "grid.samples: is missing"), ("~seed", "seed: missing"), ("~criteria.bound", "criteria.bound: is missing")],
)
def test_what_is_deleted_is_missed(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(composed("experiment=vanishing_products", override))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["experiment=vanishing_product"], "did you mean experiment=vanishing_products?"),
        (["experiment=zzzzzzzz"], "unknown experiment 'zzzzzzzz'; there are "),
        (["experimnt=vanishing_products"], "did you mean 'experiment'?"),
        (["experiment=tiny", "data=minst"], "did you mean data=mnist?"),
        (["experiment=tiny", "scale=huge"], "there are paper, quick, smoke"),
        (["experiment=tiny", "seed=[1"], "'seed=[1'"),
        (["experiment=tiny", "seed"], "'seed'"),
        (["experiment=tiny", "seed=range(2)"], "--multirun"),
        (["experiment=tiny", "seed=${nope}"], "nope"),
        (["experiment=tiny", "data=null"], "must be a string"),
        (["seed=1"], "no experiment given; add experiment=NAME"),
        (["--bogus", "experiment=tiny"], "--bogus"),
        (["experiment=tiny", "-m", "seed=1,2"], "options (-m, --help, --cfg job) come first"),
        (["-m", "experiment=glob(nothing*)"], "nothing to run: no experiment matches"),
        (["-m", "experiment=tiny,nope"], "unknown experiment 'nope'"),
    ],
)
def test_what_is_not_there_is_refused(cli: CommandLine, tiny: Tiny, arguments: list[str], said: str) -> None:
    refused(cli(*arguments), said)


def test_several_faults_stand_on_one_line(cli: CommandLine, tiny: Tiny) -> None:
    refused(cli("experiment=tiny", "seed=-1", "training.lr=0", "+optim.lrr=3"), "seed: ", "training.lr: ", "unknown key 'optim'")


def test_whole_numbers_are_accepted_where_real_ones_are_meant(tiny: Tiny) -> None:
    config = to_config(composed("experiment=tiny", "training.lr=1", "model.weight_var=2", conf=tiny.conf))
    assert (type(config.training.lr), type(config.model.weight_var)) == (float, float)


def test_known_keys_and_near_matches() -> None:
    known = set(known_keys())
    assert {"seed", "training.lr", "data.fallback", "grid.depths", "tracker.mode"} <= known
    assert unknown_key("zzzzzzzz") == "unknown key 'zzzzzzzz'"
    assert unknown_key("data.rot") == "unknown key 'data.rot'; did you mean 'data.root'?"


def test_configs_are_frozen() -> None:
    config: Any = to_config(composed("experiment=vanishing_products"))
    with pytest.raises(AttributeError):
        config.seed = 1
