"""What is wrong outside the config: devices, data, folders. One line, exit code 2, nothing half-written."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from src import rows as row_table
from src.certificate import certify
from src.data.catalogue import CATALOGUE
from src.experiment import Context
from tests.conftest import CommandLine, Outcome
from tests.tiny import Tiny

MNIST = ("data.name=mnist", "data.fallback=none", "data.mirrors=[]")


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2
    for word in words:
        assert word in outcome.error
    assert not list(Path().rglob("seed*"))


def test_cuda_where_there_is_none(start: CommandLine, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(start("device=cuda"), "device=cuda: torch sees no CUDA device here; use device=auto or device=cpu")
    assert start("device=auto").code == 0


def test_data_root_that_cannot_be_written(start: CommandLine, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(start(*MNIST, f"data.root={tmp_path}/file/data"), f"{tmp_path}/file/data: cannot be written", "set DATA_ROOT to")


def test_data_that_is_nowhere(start: CommandLine, tiny: Tiny, tmp_path: Path) -> None:
    refused(start(*MNIST, f"data.root={tmp_path}/data"), f"mnist could not be fetched into {tmp_path}/data", "data.mirrors is empty")


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_no_network(start: CommandLine, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    answer = start(*MNIST[:2], "data.mirrors=['http://127.0.0.1:9/']", f"data.root={tmp_path}/data")
    refused(answer, "mnist could not be fetched", "http://127.0.0.1:9/", "Connection refused", "check the network or data.mirrors")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.suffix != ".lock"]


def with_files(root: Path, real: Path | None) -> Path:
    """A data root with MNIST's files: the real ones, or of the right names."""
    for name in CATALOGUE["mnist"].files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if real is not None and (real / name).is_file():
            shutil.copy(real / name, root / name)
        else:
            (root / name).write_bytes(b"not MNIST")
    return root


@pytest.mark.parametrize("fault", ["truncated", "flipped", "empty"])
def test_a_damaged_data_file_is_named_and_nothing_stands_in_for_it(
    start: CommandLine, tiny: Tiny, tmp_path: Path, data_root: Path | None, fault: str
) -> None:
    root = with_files(tmp_path / "data", data_root)
    damaged = root / next(iter(CATALOGUE["mnist"].files))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes({"truncated": content[:-1], "flipped": content, "empty": b""}[fault])
    answer = start("data.name=mnist", "data.fallback=digits", "data.mirrors=[]", f"data.root={root}")
    refused(answer, f"{damaged}: corrupted or truncated", "delete it and it is fetched again")


def test_more_samples_than_the_set_has(start: CommandLine, tiny: Tiny) -> None:
    tiny.measures(lambda context: pd.DataFrame(context.samples(context.data.test, 361)))
    answer = start()
    assert (answer.code, answer.error) == (2, "grid.samples: 361 asked for, the set has 360")


def test_a_fallback_smaller_than_the_batch(start: CommandLine, tiny: Tiny, tmp_path: Path) -> None:
    answer = start("data.name=mnist", "data.fallback=digits", "data.mirrors=[]", f"data.root={tmp_path}/data", "training.batch_size=2000")
    refused(answer, "training.batch_size: 2000 exceeds the 1437 training images of digits")


def test_a_fallback_is_loud(start: CommandLine, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the log, in the run folder's name, in every row; the figures' own tests look at the figures."""
    arguments = ("data.name=mnist", "data.fallback=digits", "data.mirrors=[]", f"data.root={tmp_path}/data")
    assert start(*arguments).code == 0
    assert "FALLBACK: digits stands in for mnist" in caplog.text
    (folder,) = Path("results/tiny/mnist/smoke").glob("seed*")
    assert folder.name.endswith("-fallback-digits")
    log = (folder / "log.txt").read_text()
    assert "WARNING src.experiment: FALLBACK: mnist could not be had, everything below is measured on digits" in log
    rows = row_table.read(folder / "rows.parquet")
    assert rows["fallback"].all()
    assert (rows["data"] == "digits").all()
    assert (rows["data_requested"] == "mnist").all()
    assert rows["run"].str.endswith("-fallback-digits").all()

    again = start(*arguments)
    assert "already finished" in again.out
    assert tiny.calls == [0]


def test_a_run_folder_of_another_config(start: CommandLine, tiny: Tiny) -> None:
    start()
    (folder,) = Path("results/tiny/digits/smoke").glob("seed*")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.01", "lr: 0.02"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for force in ("false", "true"):
        answer = start(f"force={force}")
        assert answer.code == 2
        assert f"{folder}: holds a run of another config" in answer.error
        assert "move it away or choose another results_dir" in answer.error
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert tiny.calls == [0]


@pytest.mark.parametrize("flag", [[], ["-m"]])
def test_results_that_cannot_be_written(cli: CommandLine, tiny: Tiny, tmp_path: Path, flag: list[str]) -> None:
    (tmp_path / "file").touch()
    answer = cli(*flag, "experiment=tiny", f"results_dir={tmp_path}/file/results")
    refused(answer, f"{tmp_path}/file/results", "can't be written (Not a directory); choose another results_dir")
    assert tiny.calls == []


@pytest.mark.parametrize("layer", [1, 3])
def test_a_nan_in_the_certificate_is_named_with_stage_and_sample(start: CommandLine, tiny: Tiny, layer: int) -> None:
    stages = []

    def measure(context: Context) -> pd.DataFrame:
        network = context.network(context.config.model, 0)
        stages.extend(name for name, _ in network.named_children())
        linears = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
        with torch.no_grad():
            linears[layer].weight[0, 0] = float("nan")
        certify(network, *context.samples(context.data.test, 3))
        raise AssertionError

    tiny.measures(measure)
    answer = start("model.depth=5", "model.width=6")
    assert answer.code == 2
    assert f"stage '{stages[layer]}'" in answer.error
    assert "sample 0" in answer.error
    (folder,) = Path("results/tiny/digits/smoke").glob("seed*")
    assert '"failed"' in (folder / "status.json").read_text()
