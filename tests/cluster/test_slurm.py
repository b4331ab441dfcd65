"""Sweeps on a real SLURM of three nodes, and what may befall them there.

Needs root, apt, and in BACKLOCK_SLURM a folder whose up.sh and down.sh start and stop such a cluster; .ci/run gives it where it can.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.tree import User, expected, measured, plant

SMALL = {"BACKLOCK_GPUS": "0", "BACKLOCK_CPUS": "1", "BACKLOCK_MEM_GB": "1", "BACKLOCK_MINUTES": "20"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """A cluster and a disk of 4 MiB that its nodes see; the environment of those who use them."""
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
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True, check=False)
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


def test_a_sweep_on_which_everything_falls(user: User) -> None:
    """Every run's rows are there once, and equal those of a sweep that nothing befell; the table names each mishap."""
    user.order("raise", 1)
    user.order("kill", 2)
    user.order("hold", 3, 4, 5, 6)
    launcher = user.start("src.run", "-m", "experiment=tiny", "seed=range(8)", "cluster=slurm")
    user.until(lambda: all(user.began(seed) for seed in range(8)), "all runs begin")

    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    slurm_says(user, "scancel", job(user, 3))
    slurm_says(user, "scancel", "--signal=USR2", job(user, 4))
    crashed = node(user, 5)
    subprocess.run([Path(user.environment["SLURM_TEST_DIR"]) / "node", "kill", crashed], check=True)
    user.until(lambda: user.attempts(4)[0].outcome == "stopped", "the job at its time limit is stopped")
    watching = user.start("src.sweep", "resume", user.sweep().name)
    see(user, crashed, "down")
    subprocess.run([Path(user.environment["SLURM_TEST_DIR"]) / "node", "start", crashed], check=True)
    user.until(lambda: user.began(5) > 1, "another node takes the run of the one that crashed")
    user.order("go on", 3, 4, 5, 6)
    code, out = user.ended(watching)

    assert code == 1, out
    assert f"this finishes the rest: python -m src.sweep resume {user.sweep().name}" in out
    assert "ZeroDivisionError: by order" in out
    assert "killed by SIGKILL" in out
    assert "CANCELLED" in out
    assert "its job reached the time limit or was preempted" in out
    assert "NODE_FAIL" in out
    assert {attempt.told()["host"] for seed in range(8) for attempt in user.attempts(seed)} == {"node1", "node2", "node3"}

    user.order("go on", 1, 2)
    code, out = user.call("src.sweep", "resume", user.sweep().name)
    assert code == 0, out
    assert measured(user.tree / "results") == {seed: expected(seed) for seed in range(8)}
    code, out = user.call("src.run", "-m", "experiment=tiny", "seed=range(8)", "cluster=slurm")
    assert (code, "submitted" in out) == (0, False)
    assert slurm_says(user, "squeue", "-h") == ""


def test_nodes_out_of_sight_preemption_and_a_full_disk(user: User) -> None:
    disk = Path(user.environment["DISK"])
    (user.tree / "results").symlink_to(disk)
    user.order("hold", 0, 1, 2)
    launcher = user.start("src.run", "-m", "experiment=tiny", "seed=range(3)", "cluster=slurm")
    user.until(lambda: all(user.began(seed) for seed in range(3)), "all runs begin")

    # SLURM takes the node for dead and starts a copy of the job elsewhere, while the first works on
    unseen = node(user, 0)
    controller = (Path(user.environment["SLURM_TEST_DIR"]) / f"run/node{unseen}.pid").read_text().strip()
    slurmd = int(subprocess.run(["pgrep", "-P", controller], capture_output=True, text=True, check=True).stdout)
    os.kill(slurmd, signal.SIGSTOP)
    user.until(lambda: len(user.attempts(0)) == 2, "a copy is started")
    user.order("go on", 0)
    user.until(lambda: 0 in measured(user.tree / "results"), "the first ends its run")
    user.until(lambda: user.attempts(0)[1].outcome == "done", "the copy finds it finished")
    assert user.began(0) == 1
    os.kill(slurmd, signal.SIGCONT)
    see(user, unseen, "idle")

    slurm_says(user, "sbatch", "-p", "urgent", "-c", "2", "-w", f"node{node(user, 1)}", "-o", "/dev/null", "--wrap", "true")
    user.until(lambda: user.began(1) == 2, "the preempted run begins again")

    with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    user.order("go on", 1, 2)
    code, out = user.ended(launcher)
    assert code == 1, out
    assert "no space left on the disk" in out
    assert "its job reached the time limit or was preempted" in out
    assert measured(user.tree / "results") == {0: expected(0)}

    (disk / "filler").unlink()
    code, out = user.call("src.sweep", "resume", user.sweep().name)
    assert code == 0, out
    assert measured(user.tree / "results") == {seed: expected(seed) for seed in range(3)}
