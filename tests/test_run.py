import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from src.errors import UserError
from src.experiment import Context
from src.run import CONF, main
from src.trainings import Trainee, train_all
from tests import tiny as module
from tests.conftest import ROOT, CommandLine
from tests.tiny import Tiny, table

EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
PAPERS = sorted(f"reproduction/{file.stem}" for file in (CONF / "experiment/reproduction").glob("*.yaml"))
FILES = {"config.yaml", "rows.parquet", "verdicts.json", "provenance.json", "status.json", "figure.png", "log.txt"}


def folders() -> list[Path]:
    return sorted(Path("results/tiny/digits/smoke").glob("seed*"))


def status(folder: Path) -> dict[str, str]:
    return json.loads((folder / "status.json").read_text())


def crash(context: Context) -> pd.DataFrame:
    raise ZeroDivisionError("by design,\nover two lines")


def complain(context: Context) -> pd.DataFrame:
    raise UserError("grid.samples: ask for more")


def test_the_bare_command_lists_the_experiments_a_line_each(cli: CommandLine) -> None:
    answer = cli()
    assert (answer.code, answer.err) == (0, "")
    _, *lines, _ = answer.out.splitlines()
    assert [line.split()[0] for line in lines] == [*EXPERIMENTS, *PAPERS]
    assert all(len(line.split()) > 3 for line in lines)


def test_help_tells_groups_and_keys(cli: CommandLine) -> None:
    answer = cli("--help")
    assert (answer.code, answer.err) == (0, "")
    for word in ("experiment:", *EXPERIMENTS, "data:", "cifar10", "tracker:", "offline", "cluster:", "local", "seed: 0", "results_dir:"):
        assert word in answer.out


def test_showing_the_config_runs_nothing(cli: CommandLine, tiny: Tiny) -> None:
    answer = cli("--cfg", "job", "experiment=tiny")
    assert (answer.code, answer.err) == (0, "")
    assert "name: tiny" in answer.out
    assert tiny.calls == []


def test_a_run_leaves_its_folder_and_tells_its_verdicts(cli: CommandLine, tiny: Tiny) -> None:
    answer = cli("experiment=tiny", "seed=3")
    assert (answer.code, answer.err) == (0, "")
    (folder,) = folders()
    assert str(folder) in answer.out
    assert "max x > 0" in answer.out
    assert "holds" in answer.out
    assert {file.name for file in folder.iterdir()} == FILES
    assert status(folder) == {"status": "done"}
    assert folder.name.startswith("seed3-")
    log = (folder / "log.txt").read_text()
    assert "tiny on digits at scale=smoke, seed 3" in log
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["seed"] == 3
    assert {"torch", "numpy", "pandas"} <= set(provenance["versions"])
    assert provenance["data_sha256"].keys() == {"train", "test"}
    assert {"commit", "dirty", "device", "wall_time_s", "command"} <= provenance.keys()
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("rows.parquet", "verdicts.json")}
    assert provenance["sha256"] == digests
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_provenance_has_the_time_of_every_training(cli: CommandLine, tiny: Tiny) -> None:
    def train_two(context: Context) -> pd.DataFrame:
        train_all(context, [Trainee(context.network(context.config.model, seed), f"seed {seed}", seed) for seed in range(2)])
        return table([1.0])

    tiny.measures(train_two)
    assert cli("experiment=tiny", "data.train_size=128", "data.test_size=100").code == 0
    (folder,) = folders()
    seconds = json.loads((folder / "provenance.json").read_text())["training_seconds"]
    assert list(seconds) == ["seed 0", "seed 1"]
    assert all(value > 0 for value in seconds.values())


def test_a_finished_run_says_so_and_returns_its_verdicts(cli: CommandLine, tiny: Tiny) -> None:
    first = cli("experiment=tiny")
    again = cli("experiment=tiny", "device=cpu", "results_dir=./results")
    assert tiny.calls == [0]
    assert (again.code, again.err) == (0, "")
    assert "already finished, force=true runs it again" in again.out
    assert first.out.rpartition("run folder")[0] == again.out.rpartition("already finished")[0]


def test_force_runs_a_finished_run_again(start: CommandLine, tiny: Tiny) -> None:
    start()
    again = start("force=true")
    assert tiny.calls == [0, 0]
    assert "already finished" not in again.out
    assert len(folders()) == 1
    assert status(folders()[0]) == {"status": "done"}


def test_a_damaged_answer_is_one_line(start: CommandLine, tiny: Tiny) -> None:
    start()
    (folders()[0] / "verdicts.json").write_text("[{")
    answer = start()
    assert answer.code == 2
    assert "verdicts.json: missing or damaged; run the experiment again with force=true" in answer.error
    assert start("force=true").code == 0


def test_a_crash_is_one_line_exit_code_1_and_a_traceback_on_disk(start: CommandLine, tiny: Tiny) -> None:
    tiny.measures(crash)
    answer = start()
    assert answer.code == 1
    (folder,) = folders()
    assert answer.error == f"tiny crashed with ZeroDivisionError: by design, over two lines; the traceback is in {folder}/status.json"
    assert status(folder)["status"] == "failed"
    assert status(folder)["reason"] == "ZeroDivisionError: by design,\nover two lines"
    assert "in crash" in status(folder)["traceback"]
    assert {file.name for file in folder.iterdir()} == {"config.yaml", "status.json", "log.txt"}


def test_an_experiment_that_cannot_be_imported_is_a_crash(start: CommandLine, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "experiments.tiny")
    answer = start()
    assert answer.code == 1
    assert "ModuleNotFoundError" in answer.error
    assert folders() == []


def test_what_the_user_can_mend_in_mid_run_is_exit_code_2_and_the_reason_on_disk(start: CommandLine, tiny: Tiny) -> None:
    tiny.measures(complain)
    answer = start()
    assert (answer.code, answer.error) == (2, "grid.samples: ask for more")
    assert status(folders()[0])["status"] == "failed"
    assert status(folders()[0])["reason"] == "UserError: grid.samples: ask for more"


@pytest.mark.parametrize("fault", [crash, complain])
def test_a_failed_run_is_made_again(start: CommandLine, tiny: Tiny, fault: object) -> None:
    tiny.measures(fault)  # type: ignore[arg-type]
    start()
    tiny.measures(module.measure)
    assert start().code == 0
    assert len(tiny.calls) == 2
    assert {file.name for file in folders()[0].iterdir()} == FILES
    assert hidden() == [".lock"]


def hidden() -> list[str]:
    """What lies beside the run folder."""
    return sorted(path.suffix for path in Path("results/tiny/digits/smoke").glob(".*"))


def test_a_failed_redo_keeps_the_finished_run(start: CommandLine, tiny: Tiny) -> None:
    start()
    (folder,) = folders()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tiny.measures(crash)
    answer = start("force=true")
    assert answer.code == 1
    told = Path(answer.error.rpartition(" is in ")[2])
    assert "in crash" in status(told.parent)["traceback"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert "already finished" in start().out
    tiny.measures(module.measure)
    assert start("force=true").code == 0
    assert status(folder) == {"status": "done"}


def test_a_value_that_json_does_not_know_is_a_crash_not_a_file(start: CommandLine, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.verdict._finite", float)
    tiny.measures(lambda context: table([float("inf")]))
    answer = start()
    assert answer.code == 1
    assert "JSON" in answer.error
    assert not (folders()[0] / "verdicts.json").exists()


def test_verdicts_are_strict_json(start: CommandLine, tiny: Tiny) -> None:
    tiny.measures(lambda context: table([float("inf")]))
    assert start().code == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (verdict,) = json.loads((folders()[0] / "verdicts.json").read_text(), parse_constant=refuse)
    assert verdict["estimate"] is None
    told = ["claim", "form", "statement", "criterion", "verdict", "condition", "estimate", "interval", "n", "evidence", "amended"]
    assert list(verdict) == told


def test_a_sweep_runs_every_job(cli: CommandLine, tiny: Tiny) -> None:
    answer = cli("-m", "experiment=tiny", "seed=range(2)")
    assert (answer.code, answer.err) == (0, "")
    assert [folder.name.partition("-")[0] for folder in folders()] == ["seed0", "seed1"]
    for seed, folder in enumerate(folders()):
        assert f"seed {seed}" in (folder / "log.txt").read_text()
        assert f"seed {1 - seed}" not in (folder / "log.txt").read_text()


@pytest.mark.parametrize(("fault", "code"), [(crash, 1), (complain, 2)])
def test_one_failing_job_does_not_stop_the_next(cli: CommandLine, tiny: Tiny, fault: object, code: int) -> None:
    tiny.measures(lambda context: fault(context) if context.config.seed == 0 else module.measure(context))  # type: ignore[operator]
    answer = cli("-m", "experiment=tiny", "seed=range(2)")
    assert answer.code == code
    assert answer.error
    assert tiny.calls == [0, 1]
    assert [status(folder)["status"] for folder in folders()] == ["failed", "done"]


def test_a_bad_value_in_a_sweep_stops_only_its_job(cli: CommandLine, tiny: Tiny) -> None:
    answer = cli("-m", "experiment=tiny", "seed=-1,1")
    assert answer.code == 2
    assert answer.error.startswith("seed: ")
    assert tiny.calls == [1]


def test_the_scale_and_the_grid_reach_the_experiment(cli: CommandLine, tiny: Tiny) -> None:
    cli("-m", "experiment=tiny", "scale=smoke,quick")
    counts = {path.parts[3]: len(pd.read_parquet(path)) for path in Path("results").glob("tiny/*/*/*/rows.parquet")}
    assert counts == {"smoke": 8, "quick": 16}


SCRIPT = """
import sys
from pathlib import Path
import pytest
from src import run

def answer(*arguments):
    sys.argv = ["src.run", *arguments]
    try:
        code = run.main()
    except SystemExit as leave:
        code = leave.code
    print(f"{arguments} {code} heavy={sorted({'torch', 'wandb', 'torchvision'} & set(sys.modules))}", flush=True)

answer()
answer("--help")
answer("experiment=vanishing_products", "training.lrr=1")
answer("experiment=vanishing_products", "seed=-1")
run.CONF = Path("conf").resolve()
answer("experiment=tiny")
import tests.tiny
run.CONF = tests.tiny.ROOT / "conf"
tests.tiny.install(Path("other").resolve(), pytest.MonkeyPatch())
answer("experiment=tiny", "seed=1")
"""


def test_nothing_heavy_is_imported_before_the_config_is_known_to_be_good(start: CommandLine, tiny: Tiny) -> None:
    """Neither for help, nor for a config error, nor for a finished run; and wandb for no run with tracker=none."""
    start()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    reports = [line.rpartition(") ")[2] for line in done.stdout.splitlines() if "heavy=" in line]
    light = [f"{code} heavy=[]" for code in (0, 0, 2, 2, 0)]
    assert reports == [*light, "0 heavy=['torch', 'torchvision']"], done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [error.partition(";")[0] for error in errors] == [
        "error: unknown key 'training.lrr'",
        "error: seed: Input should be greater than or equal to 0 (got -1)",
    ]
    assert "Traceback" not in done.stderr
    assert "already finished" in done.stdout


@pytest.mark.parametrize("key", ["detach", "snapshot"])
def test_what_speaks_of_jobs_needs_a_cluster(start: CommandLine, tiny: Tiny, key: str) -> None:
    answer = start(f"{key}=true")
    assert (answer.code, answer.error) == (2, f"{key}=true speaks of jobs; add cluster=local or cluster=slurm")


def test_a_sweep_has_the_configuration_of_its_jobs_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "-m", "--config-dir=elsewhere", "experiment=chain_rule", "cluster=slurm"])
    assert main() == 2
    assert capsys.readouterr().err == "error: cluster=: goes with conf/ alone, not with --config-dir, --config-path or --config-name\n"
