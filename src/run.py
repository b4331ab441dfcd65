"""Compose a config, run one experiment, leave one run folder.

    python -m src.run                                   lists the experiments
    python -m src.run experiment=residual_unlock        runs one
    python -m src.run -m experiment=a,b 'seed=range(3)' runs a sweep, here and one after the other
    python -m src.run -m … cluster=slurm                the same as jobs, and only what is missing (src/sweep)

Exit code 0: done; 1: a run failed; 2: the user can mend it; 130: interrupted.
"""

import difflib
import logging
import os
import re
import sys
import traceback
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import NoReturn, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config import Config, known_keys, register_resolvers, require, to_config, unknown_key
from src.data.catalogue import CATALOGUE
from src.errors import UserError
from src.results import RunError

# what is raised where a command line is wrong, or a place can't be written
WRONG = (UserError, HydraException, OmegaConfBaseException, OSError, ValueError)
CONF = Path(__file__).resolve().parent.parent / "conf"


def main() -> int:
    """Answer the command line; return the exit code."""
    if len(sys.argv) == 1:
        print(_listing())
        return 0
    # most products here are too small to share: two threads take three times as long as one
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Hydra then raises its errors instead of printing them over several lines
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_resolvers()
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def task(composed: DictConfig) -> None:
        codes.append(run(composed))

    try:
        asked = _options()
        if _on_a_cluster(asked):
            from src.sweep.launch import launch

            if asked.config_dir or asked.config_path or asked.config_name:
                raise UserError("cluster=: goes with conf/ alone, not with --config-dir, --config-path or --config-name")
            return launch(asked.overrides)
        task()
        if not codes and not (asked.cfg or asked.info):
            raise UserError(f"nothing to run: no experiment matches; there are {', '.join(_experiments())}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except WRONG as error:
        return complain(explain(error), 2)
    return max(codes, default=0)


def run(composed: DictConfig) -> int:
    """Run one composed config; what goes wrong is told and turned into the exit code that is returned, so that a sweep goes on."""
    try:
        config = check(composed)
    except UserError as error:
        return complain(str(error), 2)
    return carry_out(config)


def carry_out(config: Config) -> int:
    """Run one checked config; return the exit code."""
    try:
        # heavy imports only now that the config is known to be good
        from src.report import run_and_report

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        run_and_report(config)
        return 0
    except UserError as error:
        return complain(str(error), 2)
    except RunError as error:
        return complain(str(error), 1)
    except Exception:
        # no run folder holds it yet
        traceback.print_exc()
        return 1


def check(composed: DictConfig) -> Config:
    """A composed config, checked against the schema, the experiment's own axes and the data set's size.

    Raises: UserError for whatever is wrong with it.
    """
    if composed.get("experiment"):
        raise UserError("the experiment's file sets nothing: its first line must be '# @package _global_'")
    if "claim" not in composed:
        raise UserError(f"no experiment given; add experiment=NAME, one of {', '.join(_experiments())}")
    config = to_config(composed)
    for key in ("detach", "snapshot"):
        require(config.cluster is not None or not composed[key], f"{key}=true speaks of jobs; add cluster=local or cluster=slurm")
    name, paper = config.claim.name, config.grid.paper
    file = own_file(name, paper)
    own = _read(file, file.stat().st_mtime_ns) if file.is_file() else None
    if own is None or composed.claim != own.claim:
        raise UserError("claim: stands in the experiment's own file and is not for the command line; choose with experiment=NAME")
    for part in ("grid", "criteria"):
        for key in sorted(set(composed[part]) ^ set(own[part])):
            fault = "is missing" if key in own[part] else "is unknown"
            raise UserError(f"{part}.{key}: {fault}; {name} has {', '.join(sorted(own[part]))}")
    if composed.criteria != own.criteria:
        where = file.relative_to(CONF.parent)
        raise UserError(f"criteria: stand in {where} before anything is run and are not for the command line")
    _refuse_other_models(composed, own)
    size = min(CATALOGUE[config.data.name].train_size, config.data.train_size or sys.maxsize)
    if config.training.batch_size > size:
        raise UserError(f"training.batch_size: {config.training.batch_size} exceeds the {size} training images of {config.data.name}")
    return config


def own_file(name: str, paper: str | None = None) -> Path:
    """The file of an experiment, or of the paper that it reproduces."""
    return CONF / "experiment" / (f"{name}/{paper}.yaml" if paper else f"{name}.yaml")


@cache
def _read(file: Path, changed: int) -> DictConfig:
    """A file of conf/, read anew when it has changed; not to be written to."""
    return cast(DictConfig, OmegaConf.load(file))


def _refuse_other_models(composed: DictConfig, own: DictConfig) -> None:
    """Refuse a model that differs, in more than the keys it leaves open, from the one that the experiment names, if it names one."""
    groups = [entry["override /model"] for entry in own.get("defaults", []) if "override /model" in entry]
    if not groups:
        return
    file = CONF / "model" / f"{groups[0]}.yaml"
    model = OmegaConf.merge(_read(file, file.stat().st_mtime_ns), own.get("model", {}))
    expected = OmegaConf.create({"scale": composed.scale, "model": model}).model
    for key in composed.model:
        if key not in own.model_keys and composed.model[key] != expected.get(key):
            raise UserError(
                f"model.{key}: {composed.model[key]}, but {composed.claim.name} is made for {expected.get(key)}; "
                f"it leaves open model.{', model.'.join(own.model_keys)}"
            )


def _experiments() -> dict[str, str]:
    """Every experiment's name and title, those of the twelve claims first."""
    folder = CONF / "experiment"
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]
    return {file.relative_to(folder).with_suffix("").as_posix(): str(OmegaConf.load(file).claim.title) for file in files}


def _listing() -> str:
    experiments = _experiments()
    width = max(map(len, experiments))
    lines = [f"  {name:<{width}}  {title}" for name, title in experiments.items()]
    return "\n".join(["python -m src.run experiment=NAME, one of", *lines, "python -m src.run --help lists groups and keys"])


def _options() -> Namespace:
    """The options on the command line.

    Raises: UserError, where Hydra would print its usage over several lines.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; options (-m, --help, --cfg job) come first, then KEY=VALUE")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args()


def _on_a_cluster(asked: Namespace) -> bool:
    """Whether a command line runs something, and says on which cluster."""
    shows = asked.cfg or asked.info or asked.help or asked.hydra_help
    return not shows and any(override.startswith("cluster=") for override in asked.overrides)


def complain(message: str, code: int) -> int:
    """Tell what went wrong in one line; return the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def explain(error: Exception) -> str:
    """What went wrong before a run began, with the near match where there is one."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        near = difflib.get_close_matches(option, error.options, n=1, cutoff=0.4)
        hint = f"did you mean {group}={near[0]}? " if near else ""
        return f"unknown {group} '{option}'; {hint}there are {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"can't read the argument {error.override!r}; write KEY=VALUE"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: can't be written ({error.strerror}); choose another results_dir"
    if key := re.match(r"Could not (?:override|append to config|delete from config)[^']*'?([\w./@]+)'?", str(error)):
        name = key[1].rstrip(".")
        if name in known_keys():
            # a sweep over experiments is composed before any of them is chosen
            return f"unknown key '{name}' in this experiment; in a sweep over several write ++{name}=…"
        return unknown_key(name)
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
