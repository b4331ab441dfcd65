"""A command line as runs."""

import os
from pathlib import Path

import pytest
from hydra.errors import HydraException

from src.errors import UserError
from src.results import run_hash
from src.sweep import plan as module
from src.sweep.folder import Sweep
from src.sweep.plan import plan
from tests.tiny import Tiny

pytestmark = pytest.mark.usefixtures("planned")


def test_every_combination_is_a_run_named_by_its_hash() -> None:
    made = plan(["experiment=tiny", "seed=range(3)", "training.lr=0.1,0.2", "cluster=slurm"])
    assert [(made.configs[run.config].training.lr, run.seed) for run in made.runs] == [(lr, seed) for seed in range(3) for lr in (0.1, 0.2)]
    sweep = Sweep.create(made)
    for run in made.runs:
        assert run.id == run_hash(sweep.config(run))
        assert sweep.config(run).seed == run.seed


def test_a_seed_that_is_not_given_is_the_default() -> None:
    assert [run.seed for run in plan(["experiment=tiny", "cluster=local"]).runs] == [0]


def test_the_same_runs_are_the_same_sweep_and_each_is_there_once() -> None:
    one = plan(["experiment=tiny", "seed=0,1,0", "cluster=slurm"])
    other = plan(["cluster=local", "seed=1,0", "experiment=tiny", "tracker=none", "device=cpu"])
    assert len(one.runs) == 2
    assert one.name == other.name
    assert one.name != plan(["experiment=tiny", "seed=2,1", "cluster=slurm"]).name


def test_experiments_are_found_by_a_pattern() -> None:
    made = plan(["experiment=glob(*)", "data=digits", "cluster=slurm", "scale=smoke"])
    assert len(made.runs) == len({config.claim.name for config in made.configs}) > 10


def test_configs_that_are_composed_together_are_those_composed_alone() -> None:
    """Though files are read once for all, and groups are chosen otherwise from one to the next."""
    axes = ["experiment=residual_unlock,greedy_layerwise,reproduction/he2016", "data=digits,mnist", "scale=paper,smoke"]
    together = plan([*axes, "training.lr=0.1,0.2", "cluster=slurm"]).configs
    assert len({run_hash(config) for config in together}) == 24
    for config in together[::5]:
        paper = config.grid.paper
        of = [f"experiment={config.claim.name}{f'/{paper}' if paper else ''}", f"data={config.data.name}", f"scale={config.scale.name}"]
        assert plan([*of, f"training.lr={config.training.lr}", "cluster=slurm"]).configs == [config]


def test_values_set_in_a_copy_are_those_that_hydra_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = ["experiment=vanishing_products", "data=digits", "scale=quick,smoke", "cluster=slurm"]
    values = ["training.lr=0.1,1e-3", "training.max_steps=7", "grid.depths=[2,3],[4]", "cluster.at_once=2"]
    arguments = [*groups, *values]
    quick = plan(arguments)
    assert len(quick.configs) == 8
    monkeypatch.setattr(module, "VALUE", module.re.compile("$^"))  # everything is composed by Hydra
    assert plan(arguments) == quick


@pytest.mark.parametrize("wrong", ["training.none=1", "training.lr.none=1", "training.lr=fast", "grid.none=1"])
def test_a_wrong_value_is_told_as_hydra_tells_it(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> str:
        with pytest.raises((HydraException, UserError)) as error:
            plan(["experiment=vanishing_products", "data=digits", wrong, "cluster=slurm"])
        return str(error.value)

    quick = told()
    monkeypatch.setattr(module, "VALUE", module.re.compile("$^"))
    assert told() == quick


def test_what_a_job_is_given_is_the_cluster_file_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKLOCK_PARTITION", "long")
    monkeypatch.setenv("BACKLOCK_GPUS", "2")
    launcher = plan(["experiment=tiny", "cluster=slurm", "hydra.launcher.timeout_min=7"]).launcher
    assert (launcher["partition"], launcher["gpus_per_node"], launcher["timeout_min"]) == ("long", 2, 7)
    asked = {"cpus_per_task", "mem_gb", "max_num_timeout", "signal_delay_s", "array_parallelism", "account", "qos"}
    assert asked <= launcher.keys()


@pytest.mark.parametrize(("at_once", "cpus", "memory"), [("1", 3, 16), ("4", 12, 64), ("null", 3, 16), ("4", None, 64)])
def test_runs_that_share_a_job_have_their_own_cpus_and_memory(
    at_once: str, cpus: int | None, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKLOCK_AT_ONCE", at_once)
    monkeypatch.setenv("BACKLOCK_CPUS", "3" if cpus else "null")
    launcher = plan(["experiment=tiny", "cluster=slurm"]).launcher
    assert (launcher["cpus_per_task"], launcher["mem_gb"]) == (cpus, memory)


def test_a_site_is_one_file_of_its_own(tiny: Tiny) -> None:
    text = (tiny.conf / "cluster/slurm.yaml").read_text()
    (tiny.conf / "cluster/mine.yaml").write_text(text.replace("timeout_min: ", "timeout_min: 33 # "))
    assert plan(["experiment=tiny", "cluster=mine"]).launcher["timeout_min"] == 33


def test_paths_hold_wherever_a_job_runs() -> None:
    (config,) = plan(["experiment=tiny", "cluster=slurm", "data.root=here"]).configs
    assert config.results_dir == str(Path.cwd() / "results")
    assert config.data.root == str(Path.cwd() / "here")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["experiment=tiny", "seed=0,-1"], "seed: Input should be greater than or equal to 0"),
        (["experiment=tiny", f"seed=0,{2**32}"], "seed: Input should be less than"),
        (["experiment=tiny", "training.lr=0.1,-1"], "training.lr"),
        (["experiment=glob(nothing*)"], "nothing to run"),
        (["experiment=tiny", "force=true"], "force=true doesn't go with cluster="),
        (["seed=1"], "no experiment given"),
        (["experiment=tiny", "results_dir=a,b"], "results_dir: the same for all runs"),
        (["experiment=tiny", "cluster.jobs=1,2"], "cluster: the same for all runs"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_submitted(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan(["cluster=slurm", *arguments])
    assert not os.listdir(".") or not Path("results").exists()


def test_a_group_that_does_not_exist_is_hydra_s_to_tell() -> None:
    with pytest.raises(HydraException, match="nosuch"):
        plan(["experiment=tiny", "cluster=nosuch"])


def test_data_that_are_not_there_are_told_with_the_command_that_fetches_them() -> None:
    with pytest.raises(UserError, match=r"mnist is not under none; run python -m src.data fetch mnist --root none"):
        plan(["experiment=tiny", "data=mnist", "data.root=none", "cluster=slurm"])
