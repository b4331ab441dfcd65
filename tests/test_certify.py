"""The certificate from the command line: what it measures, what it writes, what it refuses."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from torch import nn

from src import certificate, certify, results
from src.chain import BatchNormMode
from src.config import DataConfig
from src.cost import Method
from src.data.load import Data, load
from src.seeds import generator
from tests.conftest import ROOT, Outcome

MINE = """
import torch
from torch import nn

def make(seed=0):
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh())
    return nn.Sequential(first, nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 10))

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(*make())

def dead():
    net = make()
    nn.init.zeros_(net[2].weight)
    return net

def vanishing():
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(6, 6), nn.Sigmoid()) for _ in range(4)]
    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), *hidden, nn.Linear(6, 10))

def normalised():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 10))

def colour(classes=10):
    return nn.Sequential(nn.Conv2d(3, 2, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes))

def several():
    net = make()
    net.forward = lambda x: (x, x)
    return net

def needs(width):
    return nn.Linear(width, width)

def fails():
    raise ValueError("no such\\nwidth")

model, number, few = make(), 3, colour(4)
"""

CommandLine = Callable[..., Outcome]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[CommandLine]:
    """`python -m src.certify` in this process, in a folder with the user's own module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import json, a_module_that_is_nowhere\n")
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    importlib.invalidate_caches()

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = certify.main(arguments)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield call
    for name in ("mine", "broken", "wrong"):
        sys.modules.pop(name, None)


@pytest.fixture
def answer(cli: CommandLine, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What is written as JSON for a model of the user's on three digits; it must be strict."""

    def call(model: str, *arguments: str) -> dict[str, Any]:
        outcome = cli(f"mine:{model}", "--data", "digits", "--samples", "3", "--json", "out.json", *arguments)
        assert (outcome.code, outcome.err) == (0, "")
        content: dict[str, Any] = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
        return content

    return call


@pytest.fixture(scope="module")
def digits() -> Data:
    config = DataConfig(name="digits", root="data", mirrors=[], fallback="none", train_size=None, test_size=None)
    return load(config, torch.device("cpu"))


def column(content: dict[str, Any], table: str, name: str) -> list[Any]:
    return [row[name] for row in content[table]]


# --- what is measured


def test_the_certificate_is_that_of_the_library(answer: Callable[..., dict[str, Any]], cli: CommandLine, digits: Data) -> None:
    content = answer("make")
    import mine

    chosen = torch.randperm(360, generator=generator(0, "samples"))[:3]
    images, labels = digits.standardise(digits.test.images[chosen]), digits.test.labels[chosen]
    expected = certificate.certify(mine.make(), images, labels)
    layers = pd.DataFrame(content["layers"]).astype(expected.layers.dtypes)  # no branch has a norm here, and null has no type
    pd.testing.assert_frame_equal(layers, expected.layers, check_exact=True)
    pd.testing.assert_frame_equal(pd.DataFrame(content["severity"]), expected.severity, check_exact=True)
    assert content["log_attenuation"] == expected.log_attenuation.tolist()
    assert content["provenance"]["test_images"] == chosen.tolist()
    printed = cli("mine:make", "--data", "digits", "--samples", "3").out
    first, plan, rest = printed.split("\n", 2)
    assert first == "mine:make, its own weights; 3 test images of digits"
    assert plan.startswith("plan: 3 stages (3 exact), ")
    assert rest == f"{expected}\n"


@pytest.mark.parametrize("model", ["model", "Net"])
def test_a_model_and_a_class_of_models_will_do(answer: Callable[..., dict[str, Any]], model: str) -> None:
    assert answer(model)["layers"] == answer("make")["layers"]


def test_the_options_reach_the_measurement(answer: Callable[..., dict[str, Any]]) -> None:
    plain = answer("make")
    assert column(plain, "severity", "stage") == ["0", "1", "2"]
    assert column(answer("make", "--stages", "1"), "severity", "stage") == ["1", "2"]
    assert set(column(plain, "layers", "method")) == {"exact"}
    assert set(column(answer("make", "--method", "matrix_free"), "layers", "method")) == {"matrix_free"}
    assert answer("make", "--dtype", "float32")["tolerance"] / plain["tolerance"] == pytest.approx(2**29, rel=1e-3)
    assert [len(answer("normalised", "--batch-norm", mode)["rank"]) for mode in ("eval", "train")] == [3, 1]
    assert answer("make", "--seed", "0")["layers"] == plain["layers"]
    other = answer("make", "--seed", "1")
    assert other["provenance"]["test_images"] != plain["provenance"]["test_images"]
    assert other["layers"] != plain["layers"]


def test_a_diagnosis_is_printed_and_written_where_it_is_asked_for(answer: Callable[..., dict[str, Any]], cli: CommandLine) -> None:
    assert "what_ifs" not in answer("make")
    found = answer("make", "--diagnose")
    assert found["what_ifs"][0]["remedy"] == "as it is"
    assert {"stage", "cause", "value", "limit"} <= set(found["causes"][0]) if found["causes"] else True
    assert "What would help" in cli("mine:make", "--data", "digits", "--samples", "3", "--diagnose").out


def test_the_seed_decides_random_weights(answer: Callable[..., dict[str, Any]]) -> None:
    answer("make")  # imports the module, which draws numbers too
    first, again, other = (answer("normalised", *seed) for seed in ((), ("--seed", "0"), ("--seed", "1")))
    assert first["layers"] == again["layers"] != other["layers"]


def test_the_choices_are_those_of_the_library() -> None:
    for method in get_args(Method):
        assert certify.parse(["a:b", "--data", "digits", "--method", method]).method == method
    for mode in get_args(BatchNormMode):
        assert certify.parse(["a:b", "--data", "digits", "--batch-norm", mode]).batch_norm == mode


def test_grey_images_become_what_the_first_convolution_takes(cli: CommandLine) -> None:
    outcome = cli("mine:colour", "--data", "digits", "--samples", "2", "--size", "6")
    assert outcome.code == 0
    said = "2 test images of digits, grey repeated on the 3 channels of the first convolution, resized from 8×8 to 6×6"
    assert outcome.out.splitlines()[0].endswith(said)


# --- weights


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 3, "state_dict": state}], ids=["state dict", "checkpoint"])
def test_weights_are_loaded(
    answer: Callable[..., dict[str, Any]], tmp_path: Path, wrap: Callable[[dict[str, torch.Tensor]], dict[str, Any]]
) -> None:
    plain = answer("make")
    import mine

    torch.save(wrap(mine.make(1).state_dict()), tmp_path / "one.pt")
    torch.save(wrap(mine.make(0).state_dict()), tmp_path / "zero.pt")
    assert answer("make", "--weights", "zero.pt")["layers"] == plain["layers"]
    content = answer("make", "--weights", "one.pt")
    assert content["layers"] != plain["layers"]
    assert len(content["provenance"]["weights_sha256"]) == 64


class Malicious:
    """What, unpickled, writes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("written",)


def test_weights_that_are_refused(cli: CommandLine, tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(64, 6)).state_dict()
    files: dict[str, Any] = {"code.pt": Malicious(), "model.pt": nn.Linear(2, 2), "other.pt": state, "tensor.pt": torch.ones(2)}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:300])
    refused = {
        "code.pt": "code.pt: holds posix.mkdir, which weights_only=True refuses; save model.state_dict() alone",
        "model.pt": "model.pt: holds torch.nn.modules.linear.Linear, which weights_only=True refuses",
        "other.pt": "other.pt: not the weights of this Sequential: Missing key(s) in state_dict: ",
        "tensor.pt": "tensor.pt: holds a Tensor, not a state dict; save model.state_dict()",
        "text.pt": "text.pt: damaged, or not saved by torch.save (",
        "empty.pt": "empty.pt: damaged, or not saved by torch.save (",
        "cut.pt": "cut.pt: damaged, or not saved by torch.save (",
        "nowhere.pt": "argument --weights: nowhere.pt: there is no such file",
    }
    for name, message in refused.items():
        outcome = cli("mine:make", "--data", "digits", "--weights", name)
        assert outcome.code == 2
        assert outcome.error.startswith(message)
        assert len(outcome.error) < 500
    assert not (tmp_path / "written").exists()


# --- what is written


def test_what_is_not_finite_is_strict_json(answer: Callable[..., dict[str, Any]]) -> None:
    content = answer("dead")
    assert "Infinity" in column(content, "layers", "cond")
    assert "-Infinity" in column(content, "layers", "log_error_norm")
    assert None in column(content, "severity", "lambda")
    assert all(isinstance(value, bool) for value in column(content, "severity", "locked"))
    free = answer("make", "--method", "matrix_free", "--dtype", "float32")
    assert free["conditioning"] == [None] * 3
    assert free["tolerance"] is None


def test_where_the_numbers_come_from(answer: Callable[..., dict[str, Any]], digits: Data) -> None:
    provenance = answer("make")["provenance"]
    assert provenance["command"] == "python -m src.certify mine:make --data digits --samples 3 --json out.json"
    assert provenance["options"]["method"] == "auto"
    assert provenance["options"]["json"] == "out.json"
    assert provenance["data_sha256"] == digits.sha256
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"commit", "dirty", "python", "device", "weights_sha256"} <= set(provenance)


@pytest.mark.parametrize(("name", "magic"), [("out.png", b"\x89PNG"), ("out.pdf", b"%PDF"), ("OUT.PNG", b"\x89PNG")])
def test_the_figure_is_what_its_ending_says(cli: CommandLine, tmp_path: Path, name: str, magic: bytes) -> None:
    assert cli("mine:make", "--data", "digits", "--samples", "2", "--figure", name).code == 0
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {"mine.py", "broken.py", "wrong.py", name}


def test_a_full_disk_is_told_in_a_line(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes | str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "write_atomically", full)
    outcome = cli("mine:make", "--data", "digits", "--samples", "2", "--json", "out.json")
    assert (outcome.code, outcome.error) == (2, "out.json: can't be written (No space left on device)")


# --- for use in CI


def test_locked_stages_fail_where_that_is_asked_for(cli: CommandLine) -> None:
    arguments = ("--data", "digits", "--samples", "2")
    outcome = cli("mine:dead", *arguments, "--fail-if", "locked")
    assert (outcome.code, outcome.err) == (1, "locked: 0, 1 (2 of 3 stages)\n")
    assert "K_back on 2 samples" in outcome.out
    assert cli("mine:dead", *arguments).code == 0
    outcome = cli("mine:make", *arguments, "--fail-if", "locked")
    assert (outcome.code, outcome.err) == (0, "")


def test_a_gradient_that_has_shrunk_by_a_decade_is_locked_too(cli: CommandLine) -> None:
    outcome = cli("mine:vanishing", "--data", "digits", "--samples", "2", "--fail-if", "locked")
    assert outcome.code == 1
    assert outcome.err.startswith("locked: 0, ")


def test_a_fault_of_ours_looks_like_no_locked_stage(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("src.certify.certify_as", fault)
    outcome = cli("mine:make", "--data", "digits", "--samples", "2", "--fail-if", "locked")
    assert outcome.code == 3
    assert "KeyError: 'ours'" in outcome.err


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: model, --data"),
        (("make", "--data", "digits"), "argument model: 'make' is neither torchvision:NAME nor package.module:callable"),
        (("mine:make",), "the following arguments are required: --data"),
        (("mine:make", "--data", "imagenet"), "argument --data: invalid choice: 'imagenet' (choose from "),
        (("mine:make", "--data", "digits", "--samples", "0"), "argument --samples: '0' is no whole number of at least 1"),
        (("mine:make", "--data", "digits", "--samples", "361"), "--samples: 361 asked for, digits has 360 test images"),
        (("mine:make", "--data", "digits", "--size", "-3"), "argument --size: '-3' is no whole number of at least 1"),
        (("mine:make", "--data", "digits", "--figure", "out.jpg"), "argument --figure: out.jpg: end it with .png or .pdf"),
        (
            ("mine:make", "--data", "digits", "--json", "no/out.json"),
            "argument --json: no/out.json: its folder does not exist; name a file",
        ),
        (("mine:make", "--data", "digits", "--json", "."), "argument --json: .: a folder; name a file"),
        (("mine:make", "--data", "digits", "--fail-if", "slow"), "argument --fail-if: invalid choice: 'slow' (choose from "),
        (("mine:make", "--data", "digits", "--sample", "3"), "unrecognized arguments: --sample 3"),
        (("torchvision:resnet81", "--data", "digits"), "torchvision has no classifier 'resnet81'; did you mean 'resnet18'?"),
        (("nowhere.net:make", "--data", "digits"), "no module 'nowhere' in the current directory or on PYTHONPATH"),
        (("broken:make", "--data", "digits"), "importing broken raised ModuleNotFoundError: No module named 'a_module_that_is_nowhere'"),
        (("wrong:make", "--data", "digits"), "importing wrong raised ZeroDivisionError: division by zero; python -c 'import wrong' shows"),
        (("mine:mak", "--data", "digits"), "module mine has no 'mak'; did you mean 'make'?"),
        (("mine:number", "--data", "digits"), "mine:number gives a int, not a torch.nn.Module"),
        (("mine:fails", "--data", "digits"), "mine:fails() raised ValueError: no such"),
        (("mine:needs", "--data", "digits"), "mine:needs() raised TypeError: needs() missing 1 required positional argument: 'width'"),
        (("mine:make", "--data", "digits", "--size", "5"), "mine:make can't take images of 1×5×5 (RuntimeError: mat1 and mat2 "),
        (("mine:several", "--data", "digits"), "mine:several gives a tuple for 8 images; a classifier gives 8×10, a score a class"),
        (("mine:few", "--data", "digits"), "mine:few gives 8×4 for 8 images; a classifier gives 8×10, a score a class"),
        (("mine:make", "--data", "digits", "--stages", "fc"), "no stage named 'fc'; there are 0, 1, 2"),
    ],
)
def test_the_users_mistakes_are_told_in_a_line(cli: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert outcome.error.startswith(message)


def test_cuda_where_there_is_none(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = cli("mine:make", "--data", "digits", "--device", "cuda")
    assert (outcome.code, outcome.error) == (2, "device=cuda: torch sees no CUDA device here; use device=auto or device=cpu")
    assert cli("mine:make", "--data", "digits", "--samples", "1", "--device", "auto").code == 0


def test_memory_that_does_not_suffice(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def certify_too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(certificate, "certify", certify_too_much)
    outcome = cli("mine:make", "--data", "digits", "--device", "cpu")
    assert (outcome.code, outcome.error) == (2, "cpu: out of memory; give fewer --samples, a smaller --size, or --dtype float32")


def test_the_data_lie_where_it_is_said(cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "mnist.yaml").write_text("root: ${oc.env:DATA_ROOT,data}\nmirrors: []\nfallback: ${at_scale:{a:b}}\n")
    monkeypatch.setattr(certify, "CONF", conf)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "default"))
    for arguments, root in (((), "default"), (("--data-root", str(tmp_path / "other")), "other")):
        outcome = cli("mine:make", "--data", "mnist", *arguments)
        assert outcome.code == 2
        assert outcome.error.startswith(f"mnist could not be fetched into {tmp_path / root} (data.mirrors is empty)")


def test_every_data_set_has_a_configuration() -> None:
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100", "digits"):
        assert certify._data_config(argparse.Namespace(data=name, data_root=None)).name == name


# --- as a command


def test_torchvision_as_a_command_of_its_own(tmp_path: Path) -> None:
    """As the README has it, on images so small that it takes seconds."""
    command = [sys.executable, "-m", "src.certify", "torchvision:resnet18", "--data", "digits", "--samples", "1"]
    out = tmp_path / "out.json"
    done = subprocess.run([*command, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "torchvision:resnet18, random weights; 1 test images of digits, grey repeated on the 3 channels of the first convolution\n"
    )
    content = json.loads(out.read_text())
    assert column(content, "severity", "stage")[0] == "conv1"
    assert column(content, "layers", "rank")[-1] == 10
    assert content["provenance"]["commit"] != "unknown"


def test_a_wrong_command_line_is_answered_before_anything_heavy_is_imported() -> None:
    script = (
        "import sys; from src import certify; code = certify.main(['a:b']); print(code, {'torch', 'pandas', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "2 set()\n"
    assert done.stderr == "error: the following arguments are required: --data; see python -m src.certify --help\n"


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        certify.main(["--help"])
    assert "python -m src.certify torchvision:resnet18 --data cifar10" in capsys.readouterr().out
