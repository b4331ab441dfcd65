"""Sweeps on a real SLURM of three nodes, and what may befall them there.

Needs root, apt, and in BACKLOCK_SLURM a folder whose up.sh and down.sh start and stop such a cluster; .ci/run gives it where it can. With
BACKLOCK_SLURM_LONG=1 a time limit really passes, and takes its minutes.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.tree import LONG, User, expected, measured, plant

RUNS = 100  # in ten jobs, six of which run at a time
SMALL = {"BACKLOCK_GPUS": "0", "BACKLOCK_CPUS": "1", "BACKLOCK_MEM_GB": "1", "BACKLOCK_MINUTES": "20"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """A cluster and a disk of 16 MiB that its nodes see; the environment of those who use them."""
    scripts = os.environ.get("BACKLOCK_SLURM")
    if not scripts or os.getuid() != 0:
        pytest.skip("NOT TESTED: no SLURM; as root, set BACKLOCK_SLURM to a folder whose up.sh starts one")
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # munge wants its socket reachable for all
        place, disk = f"{folder}/slurm", f"{folder}/disk"
        environment = {**os.environ, **SMALL, "SLURM_TEST_DIR": place, "SLURM_CONF": f"{place}/slurm.conf", "DISK": disk}
        environment.pop("PYTHONPATH", None)
        # the nodes see only what is mounted when they start
        Path(disk).mkdir()
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, text=True, check=False)
        if mount.returncode:
            pytest.skip(f"NOT TESTED: no disk can be mounted here: {mount.stderr.strip()}")
        up = subprocess.run([f"{scripts}/up.sh"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if not up.returncode:
            yield environment
            subprocess.run([f"{scripts}/down.sh"], env=environment, check=True, capture_output=True)
        subprocess.run(["umount", disk], check=True)
        if up.returncode:
            pytest.skip(f"NOT TESTED: SLURM doesn't start here: {up.stdout.strip()[-300:]}")


@pytest.fixture
def user(slurm: dict[str, str], tmp_path: Path) -> Iterator[User]:
    """Somebody with an own copy of the code."""
    user = User(plant(tmp_path / "tree"), slurm)
    yield user
    user.order("go on", *range(10))
    user.leave()
    subprocess.run(["scancel", "--user=root"], env=slurm, check=True)


def slurm_says(user: User, *command: str) -> str:
    return subprocess.run(command, env=dict(user.environment), capture_output=True, text=True, check=True).stdout


def job(user: User, seed: int) -> str:
    return user.attempts(seed)[-1].job


def node(user: User, seed: int) -> str:
    """The number of the node that a run is on."""
    return user.attempts(seed)[-1].told()["host"].removeprefix("node")


def see(user: User, number: str, state: str) -> None:
    """Wait until SLURM sees a node so."""
    user.until(lambda: state in slurm_says(user, "sinfo", "-h", "-N", "-n", f"node{number}", "-o", "%T"), f"node{number} {state}")


def slurmd_of(user: User, number: str) -> int:
    """The process of a node's slurmd, the first in its namespace."""
    namespace = (Path(user.environment["SLURM_TEST_DIR"]) / f"run/node{number}.pid").read_text().strip()
    return int(subprocess.run(["pgrep", "-P", namespace], capture_output=True, text=True, check=True).stdout)


def in_hand(user: User, seed: int) -> bool:
    """Whether the job of a held run runs, in its latest start, and has come to where the run is held: no copy holds its lock."""
    *_, last = attempts = user.attempts(seed)
    told = slurm_says(user, "scontrol", "show", "job", last.job)
    latest = f"Restarts={last.restart} " in told and "JobState=RUNNING" in told
    return latest and user.began(seed, "reached") == len(attempts)


def begins_again(user: User, seed: int, *command: str) -> None:
    """Have a held run stopped by a command, and wait until it has begun again."""
    user.until(lambda: in_hand(user, seed), f"seed {seed} is in hand")
    before = len(user.attempts(seed))
    slurm_says(user, *command)
    user.until(lambda: len(user.attempts(seed)) > before and in_hand(user, seed), f"seed {seed} begins again")
    assert "stopped" in {attempt.outcome for attempt in user.attempts(seed)[before - 1 :]}


def fill(place: Path) -> None:
    with place.open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))


def test_a_sweep_that_everything_befalls(user: User) -> None:
    """Every run's rows are there once, and equal those of a sweep that nothing befell; the table names each mishap."""
    disk, control = Path(user.environment["DISK"]), Path(user.environment["SLURM_TEST_DIR"]) / "node"
    results = user.tree / "results"
    results.symlink_to(disk)
    user.order("raise", 1)
    user.order("kill", 2)
    user.order("hold", 0, 3, 4, 5)
    launcher = user.start("src.run", "-m", "experiment=tiny", f"seed=range({RUNS})", "cluster=slurm")
    user.until(lambda: all(user.began(seed, "reached") for seed in range(6)), "the runs begin that something befalls")
    assert {node(user, seed) for seed in range(6)} == {"1", "2", "3"}

    # the launcher is killed, and a job cancelled
    launcher.kill()
    crashing, cancelled, timed_out = sorted((3, 4, 5), key=lambda seed: node(user, seed) == node(user, 0))
    user.order("go on", cancelled)
    slurm_says(user, "scancel", job(user, cancelled))

    # a node crashes, and comes back when its run has been begun elsewhere
    crashed = node(user, crashing)
    subprocess.run([control, "kill", crashed], check=True)
    watching = user.start("src.sweep", "resume", user.sweep().name)
    user.until(lambda: user.began(crashing, "reached") == 2, "the run of the crashed node is begun elsewhere")
    assert len({attempt.told()["host"] for attempt in user.attempts(crashing)}) == 2
    subprocess.run([control, "start", crashed], check=True)

    # another is taken for dead while its run goes on
    unseen = node(user, 0)
    os.kill(slurmd := slurmd_of(user, unseen), signal.SIGSTOP)
    see(user, unseen, "down")
    user.until(lambda: len(user.attempts(0)) == 2, "its run has a copy elsewhere")
    user.order("go on", 0)
    user.until(lambda: user.attempts(0)[1].outcome == "done", "the copy finds the run finished by the first")
    assert user.began(0) == 1
    os.kill(slurmd, signal.SIGCONT)

    # a time limit is reached; then a job is preempted by a higher partition
    begins_again(user, timed_out, "scancel", "--signal=USR2", job(user, timed_out))
    user.until(lambda: in_hand(user, crashing), "the run of the node that crashed is in hand")
    urgent = ("sbatch", "-p", "urgent", "-c", "2", "-w", f"node{node(user, crashing)}", "-o", "/dev/null", "--wrap", "true")
    begins_again(user, crashing, *urgent)

    # the disk of the results is full
    user.until(lambda: user.attempts(cancelled)[-1].outcome == "done", "what was cancelled is done")
    fill(disk / "filler")
    user.order("go on", timed_out, crashing)
    code, out = user.ended(watching)
    assert code == 1, out
    assert f"this finishes the rest: python -m src.sweep resume {user.sweep().name}" in out
    for told in ("ZeroDivisionError: by order", "killed by SIGKILL", "CANCELLED", "NODE_FAIL", "reached the time limit or was preempted"):
        assert told in out
    assert "no space left on the disk" in out
    assert {0, cancelled} <= set(measured(results)) <= {0, cancelled, *range(6, RUNS)}

    (disk / "filler").unlink()
    user.order("go on", 1, 2)
    code, out = user.call("src.sweep", "resume", user.sweep().name)
    assert code == 0, out
    assert measured(results) == {seed: expected(seed) for seed in range(RUNS)}
    # whatever befell them, and on whatever node, they went on from their checkpoints
    assert [user.began(seed, "measured") for seed in range(6)] == [1] * 6
    code, out = user.call("src.run", "-m", "experiment=tiny", f"seed=range({RUNS})", "cluster=slurm")
    assert (code, "submitted" in out) == (0, False)
    assert slurm_says(user, "squeue", "-h") == ""


def test_an_interrupted_launcher_leaves_no_job(user: User) -> None:
    user.order("hold", 0)
    launcher = user.start("src.run", "-m", "experiment=tiny", "cluster=slurm")
    user.until(lambda: user.began(0), "the run begins")
    launcher.terminate()  # heard as Ctrl-C is, to which a shell's background processes are deaf
    code, _ = user.ended(launcher)
    user.until(lambda: slurm_says(user, "squeue", "-h") == "", "the job is gone")
    assert code == 130
    assert measured(user.tree / "results") == {}


def test_runs_of_a_job_share_its_gpus(slurm: dict[str, str], tmp_path: Path) -> None:
    """Four at once on two: each sees one, and each of them is seen by two. The cluster counts them; they are none."""
    runs = range(4)
    user = User(plant(tmp_path / "tree"), {**slurm, "BACKLOCK_GPUS": "2", "BACKLOCK_AT_ONCE": str(len(runs))})
    user.order("hold", *runs)
    small = ("hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1")  # the nodes have no room for what four runs are given
    launcher = user.start("src.run", "-m", "experiment=tiny", f"seed=range({len(runs)})", "cluster=slurm", *small)
    user.until(lambda: all(user.began(seed, "reached") for seed in runs), "all runs are at work")
    assert len({job(user, seed) for seed in runs}) == 1
    assert sorted(map(user.gpus, runs)) == ["0", "0", "1", "1"]
    user.order("go on", *runs)
    assert user.ended(launcher)[0] == 0
    assert measured(user.tree / "results") == {seed: expected(seed) for seed in runs}


@pytest.mark.skipif(not LONG, reason="NOT TESTED: a time limit takes minutes; set BACKLOCK_SLURM_LONG=1")
def test_a_time_limit_that_passes(user: User) -> None:
    user.order("hold", 0)
    launcher = user.start(
        "src.run", "-m", "experiment=tiny", "cluster=slurm", "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=60"
    )
    user.until(lambda: user.began(0, "reached") == 2, "the run goes on after its time")
    user.order("go on", 0)
    code, out = user.ended(launcher)
    assert (code, "reached the time limit or was preempted" in out) == (0, True)
    assert measured(user.tree / "results") == {0: expected(0)}
