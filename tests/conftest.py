"""Fixtures for all tests; src is imported in them only, since its annotations are checked from the moment pytest is configured."""

import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import pytest
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from tests.tiny import Tiny

ROOT = Path(__file__).resolve().parent.parent
# in the environment of all processes of the tests: a folder for what they measure once
SHARED = "MEASURED_BY_TESTS"


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[SHARED] = mkdtemp()


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ.pop(SHARED))


@dataclass(frozen=True)
class Outcome:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that the user is told; nothing else may be on standard error."""
        assert self.err.startswith("error: "), self.err
        assert self.err.endswith("\n"), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip()


CommandLine = Callable[..., Outcome]


@pytest.fixture(scope="session")
def data_root() -> Path | None:
    """The folder with the image sets, from DATA_ROOT or data/; None where there is none: use the digits then."""
    root = Path(os.environ.get("DATA_ROOT", ROOT / "data")).resolve()
    return root if root.is_dir() else None


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> CommandLine:
    """`python -m src.run` in this process, in an empty folder. What is logged goes to caplog, not to standard error."""
    from src import run

    monkeypatch.chdir(tmp_path)
    for variable in ("HYDRA_FULL_ERROR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    caplog.set_level(logging.INFO)

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["src.run", *arguments])
        capsys.readouterr()
        try:
            code = run.main()
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    """The tiny experiment's config as composed."""
    from hydra import compose, initialize_config_dir

    from src.config import register_resolvers
    from tests.tiny import install

    register_resolvers()
    with pytest.MonkeyPatch.context() as patch:
        conf = install(tmp_path_factory.mktemp("tiny"), patch).conf
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", ["experiment=tiny"])


@pytest.fixture
def start(cli: CommandLine, tiny: "Tiny", tiny_config: DictConfig, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """`python -m src.run experiment=tiny KEY=VALUE …` in this process, without Hydra's half second: no options, no groups."""
    from src import run

    def call(*arguments: str) -> Outcome:
        config = OmegaConf.merge(tiny_config, OmegaConf.from_dotlist(list(arguments)))
        capsys.readouterr()
        code = run.run(config)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Tiny":
    """The tiny experiment, beside the real ones."""
    from tests.tiny import install

    return install(tmp_path, monkeypatch)
