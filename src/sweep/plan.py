"""What a sweep is: a command line, and the runs that it stands for, each once."""

import hashlib
import re
import shlex
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import run
from src.config import Config, require
from src.data.files import data_root, present
from src.errors import UserError
from src.results import decisive, hash_of

VALUE = re.compile(r"(?!hydra\.)\w+\.[\w.]+=")  # an argument that sets a key, and chooses no group


@dataclass(frozen=True)
class Run:
    """One run of a sweep: a config of the sweep's, with a seed."""

    id: str
    config: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep.

    Attributes:
        arguments: the command line that they come from.
        configs: those that differ in more than the seed.
        runs: each once, in the order of the command line.
        launcher: what hydra.launcher says of a job.
    """

    arguments: list[str]
    configs: list[Config]
    runs: list[Run]
    launcher: dict[str, Any]

    @property
    def name(self) -> str:
        """The sweep's id: the same runs are the same sweep."""
        return hashlib.sha256("\n".join(sorted(run.id for run in self.runs)).encode()).hexdigest()[:10]


def plan(arguments: Sequence[str]) -> Plan:
    """Compose and check every run of a command line; only the seed is not composed anew, for a config takes some hundredths of a second.

    Raises: UserError when a run's config is wrong, or its data are not on this machine.
    """
    with initialize_config_dir(str(run.CONF), version_base="1.3"):
        loader = _hydra().config_loader
        assert isinstance(loader, ConfigLoaderImpl)
        loader.repository = ReadOnce(loader.repository)  # type: ignore[assignment]
        asked = [_without_seed(overrides) for overrides in _combinations(arguments)]
        if not asked:
            raise UserError("nothing to run: no experiment matches")
        groups: dict[tuple[str, ...], DictConfig] = {}
        places = {others: place for place, others in enumerate(dict.fromkeys(others for others, _ in asked))}
        checked = [_checked(_composed(others, groups)) for others in places]
        launcher = _launcher(asked[-1][0])
    plain = [decisive(config) for config in checked]
    runs: dict[str, Run] = {}
    for others, seed in asked:
        place = places[others]
        if seed is None:
            seed = checked[place].seed
        made = Run(hash_of({**plain[place], "seed": seed}), place, seed)
        runs.setdefault(made.id, made)
    for key in ("results_dir", "cluster"):
        require(len({repr(getattr(config, key)) for config in checked}) == 1, f"{key}: the same for all runs of a sweep")
    return Plan(list(arguments), checked, list(runs.values()), launcher)


class ReadOnce(CachingConfigRepository):
    """The files of a configuration, each read once for all configs: reading is half of what a config takes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReadOnce":
        return self  # Hydra copies it for every config, and changes none of what it has read


def _hydra() -> Hydra:
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    return hydra


def _combinations(arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of every run, as Hydra's own sweeper multiplies them out."""
    return [run for batch in BasicSweeper.split_arguments(_parser().parse_overrides(list(arguments)), None) for run in batch]


def _parser() -> OverridesParser:
    return OverridesParser.create(config_loader=_hydra().config_loader)


def _without_seed(overrides: list[str]) -> tuple[tuple[str, ...], int | None]:
    """The overrides but that of the seed, where it is a number, and the seed."""
    last = next((override for override in reversed(overrides) if override.startswith("seed=")), "")
    seed = last.removeprefix("seed=")
    if not seed.isdecimal() or int(seed) >= 2**32:  # composed, and then told what is wrong
        return tuple(overrides), None
    return tuple(override for override in overrides if override != last), int(seed)


def _composed(overrides: Sequence[str], groups: dict[tuple[str, ...], DictConfig]) -> DictConfig:
    """The config of some overrides: of those that choose groups composed once and kept, the values of keys set in a copy.

    Args:
        overrides: of one run.
        groups: what was composed so far; more is added.
    """
    values = [override for override in overrides if VALUE.match(override)]
    chosen = tuple(override for override in overrides if override not in values)
    if chosen not in groups:
        groups[chosen] = compose("config", list(chosen))
    composed = deepcopy(groups[chosen])
    try:
        for value in _parser().parse_overrides(values):
            OmegaConf.update(composed, value.key_or_group, value.value(), merge=True)
    except OmegaConfBaseException:
        return compose("config", list(overrides))  # which tells what is wrong
    return composed


def _checked(composed: DictConfig) -> Config:
    """The checked config of a run, its paths absolute."""
    config = run.check(composed)
    require(config.cluster is not None, "cluster: its file must set cluster.jobs and cluster.at_once")
    require(not config.force, "force=true doesn't go with cluster=: only what is missing is run; move finished runs away")
    require(present(config.data), f"{config.data.name} is not under {data_root(config.data)}; run {fetch_command(config)}")
    data = replace(config.data, root=str(data_root(config.data).absolute()))
    return replace(config, data=data, results_dir=str(Path(config.results_dir).absolute()))


def _launcher(overrides: Sequence[str]) -> dict[str, Any]:
    """What hydra.launcher says of a job, but for what is for Hydra's own launcher."""
    launcher = compose("config", list(overrides), return_hydra_config=True).hydra.launcher
    told = cast(dict[str, Any], OmegaConf.to_container(launcher, resolve=True))
    return {key: value for key, value in told.items() if key not in ("submitit_folder", "name")}


def fetch_command(config: Config) -> str:
    """The command that fetches what a run reads: a job never does."""
    return f"python -m src.data fetch {config.data.name} --root {shlex.quote(str(data_root(config.data)))}"
