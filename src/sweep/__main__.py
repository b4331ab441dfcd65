"""Look after a sweep from any shell.

    python -m src.sweep status SWEEP     how its runs stand, and what befell them
    python -m src.sweep resume SWEEP     submit what is missing, and watch
    python -m src.sweep cancel SWEEP     end its jobs
    python -m src.sweep collect SWEEP    the rows of its finished runs in one table

SWEEP is its name, or its folder when it isn't under results/. Exit code 0: done; 1: runs failed or are lost; 2: the user can mend it.
"""

import argparse
import os
import sys
from collections.abc import Callable

from src.config import register_resolvers
from src.errors import UserError
from src.run import WRONG, complain, explain
from src.sweep import cluster
from src.sweep.folder import Sweep, find
from src.sweep.launch import launch, tell
from src.sweep.state import counted, look


def main(arguments: list[str] | None = None) -> int:
    """Answer the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m src.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("sweep", metavar="SWEEP")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for resume: detach=true, or what a job is given")
    options = parser.parse_args(arguments)
    try:
        if options.overrides and options.command != "resume":
            raise UserError(f"{options.command}: takes no {options.overrides[0]}")
        return COMMANDS[options.command](find(options.sweep), options.overrides)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        return complain(f"{error.filename or options.command}: {error.strerror}", 2)
    except WRONG as error:
        return complain(explain(error), 2)


def status(sweep: Sweep, _: list[str]) -> int:
    """Print how the runs stand; return 1 if one is failed, lost or missing."""
    done: set[str] = set()
    states = look(sweep, {}, done)
    if len(done) < len(states):  # of finished ones no cluster need tell
        states = look(sweep, cluster.alive(sweep), done)
    return tell(sweep, states)


def resume(sweep: Sweep, overrides: list[str]) -> int:
    """Submit what is missing with the code as it is now; return 0 when all is done.

    What the first shell said of the site and the data holds, unless this one says otherwise.

    Raises: UserError when the sweep's command line now stands for other runs.
    """
    os.chdir(sweep.cwd)
    for name, value in sweep.environment.items():
        os.environ.setdefault(name, value)
    kept = [override for override in sweep.arguments if not _replaced(override, {*map(_key, overrides), "detach"})]
    return launch([*kept, *overrides], expected=sweep)


def cancel(sweep: Sweep, _: list[str]) -> int:
    """End the sweep's jobs; return 1 if some may run on another machine, where that has to be done."""
    jobs = len(cluster.alive(sweep))
    cluster.cancel(sweep)
    print(f"sweep {sweep.name}: {counted(jobs, 'job')} cancelled")
    if all(map(sweep.done, sweep.runs)):
        return 0
    print(f"python -m src.sweep resume {sweep.called} goes on with it")
    if hosts := cluster.elsewhere(sweep):
        print(f"it has had jobs on {', '.join(hosts)}: if they go on, python -m src.sweep cancel {sweep.called} there")
    return int(bool(hosts))


def collect(sweep: Sweep, _: list[str]) -> int:
    """Write the rows of all finished runs into one file; return 1 if some are not finished, or their rows can't be read."""
    from src import collect as rows

    finished = [run for run in sweep.runs if sweep.done(run)]
    if not finished:
        raise UserError(f"sweep {sweep.name}: no run is finished; python -m src.sweep status {sweep.called}")
    file = sweep.path / "rows.parquet"
    unreadable = rows.collect([sweep.folder(run) for run in finished], file)
    print(f"{len(finished) - len(unreadable)} of {len(sweep.runs)} runs: {file}")
    for complaint in unreadable:
        print(f"left out: {complaint}")
    if unreadable:
        print(f"with these folders moved away, python -m src.sweep resume {sweep.called} makes them again")
    if len(made := rows.commits(file)) > 1:
        print(f"made by different code: {', '.join(made)}")
    return int(bool(unreadable) or len(finished) < len(sweep.runs))


def _key(override: str) -> str:
    """What an argument sets, with the sign of how."""
    return override.partition("=")[0]


def _replaced(override: str, keys: set[str]) -> bool:
    """Whether an earlier argument gives way to later ones of some keys: where they set the same, or what it sets is another cluster's."""
    key = _key(override)
    return key in keys or key.lstrip("+") == "detach" or ("cluster" in keys and key.lstrip("+~").startswith("hydra.launcher."))


COMMANDS: dict[str, Callable[[Sweep, list[str]], int]] = {"status": status, "resume": resume, "cancel": cancel, "collect": collect}

if __name__ == "__main__":
    register_resolvers()
    sys.exit(main())
