import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from src import results
from src.config import Config, register_resolvers, to_config
from src.errors import UserError
from src.results import RunError, RunFolder, read_status, run_hash, write_atomically
from src.run import CONF


def composed(*overrides: str) -> Config:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("config", ["experiment=vanishing_products", "scale=smoke", *overrides]))


@pytest.fixture(scope="module")
def plain() -> Config:
    return composed()


@pytest.fixture
def config(plain: Config, tmp_path: Path) -> Config:
    return replace(plain, results_dir=str(tmp_path / "results"))


def finish(config: Config, content: str = "[]") -> RunFolder:
    with RunFolder(config).running() as folder:
        folder.write("verdicts.json", content)
    return folder


def beside(folder: RunFolder) -> list[str]:
    """What lies beside the run folder, but for its lock."""
    return sorted(path.name for path in folder.path.parent.iterdir() if path != folder.path and path.suffix != ".lock")


def test_the_folder_is_named_by_experiment_data_scale_seed_and_hash(config: Config) -> None:
    folder = RunFolder(config)
    assert folder.path == Path(config.results_dir) / "vanishing_products/mnist/smoke" / f"seed0-{run_hash(config)}"
    assert RunFolder(config, "mnist").path == folder.path
    assert RunFolder(config, "digits").path.name == f"{folder.path.name}-fallback-digits"
    assert RunFolder(config, "digits").id != folder.id


def test_the_hash_ignores_launcher_tracker_paths_device(plain: Config) -> None:
    paths = ("results_dir=y", "data.root=z", "data.mirrors=[]")
    elsewhere = composed("cluster=local", "tracker=none", "tracker.project=x", *paths, "device=cpu", "force=true")
    assert run_hash(elsewhere) == run_hash(plain)


def variants(value: object) -> object:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value + 0.5
        case str():
            return value + "x"
        case None:
            return 7
        case []:
            return ["x"]
        case list():
            return [*value, value[-1]]
    raise TypeError(type(value))


def test_the_hash_depends_on_everything_else(plain: Config) -> None:
    decisive = results.decisive(plain)
    hashes = {run_hash(plain)}
    leaves = []

    def walk(node: dict[str, object], path: tuple[str, ...]) -> None:
        for key, value in node.items():
            walk(value, (*path, key)) if isinstance(value, dict) else leaves.append((*path, key))

    walk(decisive, ())
    names = {".".join(leaf) for leaf in leaves}
    assert {"seed", "experiment", "scale.name", "training.lr", "model.width", "data.train_size", "grid.depths"} <= names
    for leaf in leaves:
        changed = json.loads(json.dumps(decisive))
        node = changed
        for key in leaf[:-1]:
            node = node[key]
        node[leaf[-1]] = variants(node[leaf[-1]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(results, "decisive", lambda _, changed=changed: changed)
            hashes.add(run_hash(plain))
    assert len(hashes) == len(leaves) + 1


def test_every_key_decides_or_is_known_not_to(plain: Config) -> None:
    everything, decisive = results.to_plain(plain), results.decisive(plain)
    assert set(everything) - set(decisive) == {
        *("results_dir", "force", "device", "tracker", "claim", "model_keys", "cluster", "detach", "snapshot")
    }
    assert set(everything["data"]) - set(decisive["data"]) == {"root", "mirrors", "fallback"}
    for part in ("model", "training", "grid", "criteria", "scale"):
        assert decisive[part] == everything[part]


@pytest.mark.parametrize("experiment", sorted(file.stem for file in (CONF / "experiment").glob("*.yaml")))
def test_config_yaml_gives_the_config_back(experiment: str, tmp_path: Path) -> None:
    config = composed(f"experiment={experiment}", "scale=paper", f"results_dir={tmp_path}", "training.lr=1e-7", "seed=7")
    with RunFolder(config).running() as folder:
        written = OmegaConf.to_container(OmegaConf.load(folder.path / "config.yaml"))
    assert TypeAdapter(Config).validate_python(written) == config
    folder.refuse_another_config()


def test_a_run_is_running_then_done(config: Config) -> None:
    folder = RunFolder(config)
    assert folder.status is None
    with folder.running():
        assert json.loads((folder.path / "status.json").read_bytes()) == {
            "status": "running",
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        assert not folder.answers
        assert RunFolder(config).owned
    assert folder.status == "done"
    assert folder.answers
    assert not folder.owned
    assert not RunFolder(replace(config, force=True)).answers
    assert beside(folder) == []


@pytest.mark.parametrize(
    ("raised", "told", "status"),
    [
        (ZeroDivisionError("x"), RunError, "failed"),
        (UserError("x"), UserError, "failed"),
        (KeyboardInterrupt(), KeyboardInterrupt, "interrupted"),
        (SystemExit(3), RunError, "failed"),
    ],
)
def test_what_stops_a_run_is_its_status(config: Config, raised: BaseException, told: type[BaseException], status: str) -> None:
    folder = RunFolder(config)
    with pytest.raises(told), folder.running():
        raise raised
    assert folder.status == status
    with folder.running():
        pass
    assert folder.status == "done"
    assert beside(folder) == []


def test_a_finished_run_is_kept_until_another_is_finished(config: Config) -> None:
    folder = finish(config, '[{"run": "first"}]')
    with pytest.raises(KeyboardInterrupt), folder.running():
        raise KeyboardInterrupt
    assert (folder.status, folder.verdicts()) == ("done", [{"run": "first"}])
    with pytest.raises(RunError, match=r"\.failed/status\.json"), folder.running():
        raise ZeroDivisionError
    assert (folder.status, folder.verdicts()) == ("done", [{"run": "first"}])
    finish(config, '[{"run": "second"}]')
    assert folder.verdicts() == [{"run": "second"}]


def test_a_finished_run_survives_a_kill_during_its_redo(config: Config) -> None:
    folder = finish(config, '[{"run": "first"}]')
    with pytest.MonkeyPatch.context() as killed:
        killed.setattr(RunFolder, "_end", lambda *_, **__: folder.path / "status.json")
        with folder.running():
            folder.write("verdicts.json", '["half')
    assert folder.status == "running"
    with pytest.raises(RunError), folder.running():
        raise ZeroDivisionError
    assert (folder.status, folder.verdicts()) == ("done", [{"run": "first"}])


def test_a_folder_of_another_config_is_refused(config: Config) -> None:
    folder = finish(config)
    folder.refuse_another_config()
    text = (folder.path / "config.yaml").read_text()
    for content in (text.replace("seed: 0", "seed: 1"), "", "[1]", "a: [", text.replace("seed: 0", "sed: 0")):
        (folder.path / "config.yaml").write_text(content)
        with pytest.raises(UserError, match="holds a run of another config"):
            folder.refuse_another_config()
    (folder.path / "config.yaml").unlink()
    with pytest.raises(UserError, match="holds a run of another config"):
        folder.refuse_another_config()


def test_a_second_run_of_the_same_config_is_refused(config: Config) -> None:
    with RunFolder(config).running() as folder:
        with pytest.raises(UserError, match="another process is at this run"), RunFolder(config).running():
            pass
        assert folder.status == "running"
    assert folder.status == "done"


def test_places_that_cannot_be_written_are_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = RunFolder(replace(config, results_dir=str(tmp_path / "file/results")))
    assert folder.status is None
    folder.refuse_another_config()
    with pytest.raises(UserError, match=r"file/results.*can't be written \(Not a directory\)"), folder.running():
        pass


def test_a_damaged_status_is_none(config: Config) -> None:
    folder = finish(config)
    (folder.path / "status.json").write_text("{")
    assert read_status(folder.path) is None
    finish(config)
    assert folder.status == "done"


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_atomically(file, "σ")
    assert file.read_bytes() == "σ".encode()

    def torn(self: Path, content: bytes) -> None:
        with self.open("wb") as out:
            out.write(content[:3])
        raise OSError("torn")

    monkeypatch.setattr(Path, "write_bytes", torn)
    for path in (file, tmp_path / "new"):
        with pytest.raises(OSError, match="torn"):
            write_atomically(path, b"another content")
    assert file.read_bytes() == "σ".encode()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_is_strict(config: Config, number: float) -> None:
    with RunFolder(config).running() as folder:
        with pytest.raises(ValueError, match="JSON"):
            folder.write_json("verdicts.json", [{"estimate": number}])
        assert not (folder.path / "verdicts.json").exists()


@pytest.mark.parametrize("content", [None, b"", b"[{", b"\xff"])
def test_damaged_verdicts_are_named(config: Config, content: bytes | None) -> None:
    folder = finish(config)
    (folder.path / "verdicts.json").unlink()
    if content is not None:
        (folder.path / "verdicts.json").write_bytes(content)
    with pytest.raises(UserError, match=r"verdicts\.json: missing or damaged"):
        folder.verdicts()
