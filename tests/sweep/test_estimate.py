"""What a sweep is said to take."""

import json

import pytest

from src.sweep import estimate as module
from src.sweep.estimate import estimate
from src.sweep.folder import Sweep
from src.sweep.plan import plan


def timed(sweep: Sweep, seed: int, seconds: float, device: str, resumed: bool = False) -> None:
    folder = sweep.folder(sweep.runs[0]).with_name(f"seed{seed}-other")
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(json.dumps({"wall_time_s": seconds, "device": device, "resumed": resumed}))


def test_nothing_is_guessed(sweep: Sweep) -> None:
    assert estimate(sweep, sweep.runs, 1.0) == "3 to do, 3 of them of a kind of which none is finished to go by"
    assert estimate(sweep, [], 1.0) == "0 to do"


def test_finished_runs_of_a_kind_tell_how_long_others_take(sweep: Sweep) -> None:
    for seed, seconds in enumerate((3600.0, 7200.0)):
        timed(sweep, seed, seconds, "a CPU")
    timed(sweep, 2, 1.0, "a CPU", resumed=True)
    assert estimate(sweep, sweep.runs, 0.0) == "3 to do, about 4.5 hours of work, as timed on a CPU"
    timed(sweep, 3, 5400.0, "a GPU")
    assert estimate(sweep, sweep.runs[:2], 0.25) == "2 to do, about 3 hours of work and 0.75 GPU-hours, as timed on a CPU, a GPU"


@pytest.mark.parametrize("damaged", ["[]", "{", '{"wall_time_s": null}', '{"wall_time_s": "NaN", "device": "x"}'])
def test_a_damaged_provenance_does_not_stop_a_sweep(sweep: Sweep, damaged: str) -> None:
    timed(sweep, 0, 3600.0, "a CPU")
    timed(sweep, 1, 3600.0, "a CPU")
    (sweep.folder(sweep.runs[0]).with_name("seed0-other") / "provenance.json").write_text(damaged)
    assert estimate(sweep, sweep.runs, 0.0) == "3 to do, about 3 hours of work, as timed on a CPU"


def test_papers_are_told_apart(planned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.sweep.plan.present", lambda _: True)
    experiments = "experiment=reproduction/he2016,reproduction/lee2015"
    sweep = Sweep.create(plan([experiments, "data=cifar10", "scale=quick", "cluster=slurm"]))
    timed(sweep, 9, 36000.0, "a CPU")
    kept = [module.COMMITTED / f"reproduction/{paper}-cifar10.provenance.json" for paper in ("he2016", "lee2015")]
    hours = sum(json.loads(file.read_bytes())["wall_time_s"] for file in kept) / 3600
    assert estimate(sweep, sweep.runs, 0.0).startswith(f"2 to do, about {hours:.2g} hours of work, as timed on")


def test_of_what_was_never_run_here_the_committed_rows_tell(planned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.sweep.plan.present", lambda _: True)

    def told(data: str, scale: str) -> str:
        sweep = Sweep.create(plan(["experiment=wide_layers", f"data={data}", f"scale={scale}", "cluster=slurm"]))
        return estimate(sweep, sweep.runs, 1.0)

    seconds = json.loads((module.COMMITTED / "wide_layers.provenance.json").read_bytes())["wall_time_s"]
    assert told("mnist", "quick").startswith(f"1 to do, about {seconds / 3600:.2g} hours of work")
    assert "as timed on x86_64 CPU" in told("cifar10", "quick")
    assert "none is finished to go by" in told("mnist", "smoke")
    assert "none is finished to go by" in told("digits", "quick")
