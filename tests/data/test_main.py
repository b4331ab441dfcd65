from pathlib import Path

import pytest

from src.data import __main__ as command
from src.data.catalogue import CATALOGUE, Source
from tests.data import tiny


@pytest.fixture
def conf(tmp_path: Path, server: tiny.Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that names the web server as MNIST's mirror, and a key that only a whole configuration resolves."""
    monkeypatch.setattr(command, "CONF", tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "default"))
    (tmp_path / "mnist.yaml").write_text(f"root: ${{oc.env:DATA_ROOT,data}}\nmirrors: ['{server.url}']\nfallback: ${{at_scale:{{a:b}}}}\n")
    return tmp_path


def test_fetches_to_the_configured_root(source: Source, conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["fetch", "mnist"]) == 0
    assert capsys.readouterr().out == f"mnist: complete in {conf / 'default'}\n"
    assert (conf / "default/MNIST/raw/train-images-idx3-ubyte").is_file()


def test_fetches_to_a_named_root(source: Source, conf: Path) -> None:
    assert command.main(["fetch", "mnist", "--root", str(conf / "other")]) == 0
    assert (conf / "other/MNIST/raw/train-images-idx3-ubyte").is_file()


@pytest.mark.usefixtures("refusals")
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    source: Source, conf: Path, archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (archives / "train-labels-idx1-ubyte.gz").unlink()
    assert command.main(["fetch", "mnist"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: mnist could not be fetched")
    assert captured.err.count("\n") == 1


def test_damage_is_found(source: Source, conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny.write_files(conf / "default") / "MNIST/raw/t10k-images-idx3-ubyte"
    file.write_bytes(b"")
    assert command.main(["fetch", "mnist"]) == 2
    assert str(file) in capsys.readouterr().err


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["fetch", "imagenet"])
    assert "invalid choice: 'imagenet'" in capsys.readouterr().err


def test_the_shipped_configuration_is_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["fetch", "digits", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "digits: bundled, nothing to fetch\n"
    assert {path.stem for path in command.CONF.glob("*.yaml")} == set(CATALOGUE)
