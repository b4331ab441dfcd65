"""The certificate of anybody's classifier of images, from the command line.

    python -m src.certify torchvision:resnet18 --data cifar10 --weights file.pt --json out.json --figure out.png
    python -m src.certify my_package.my_module:make_model --data mnist --fail-if locked

Exit code 0: certified; 1: a stage is locked, with --fail-if locked; 2: the user can mend it; 3: a fault of this program.
"""

import argparse
import difflib
import hashlib
import importlib
import math
import os
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from src.data.catalogue import CATALOGUE
from src.errors import UserError

if TYPE_CHECKING:
    import torch

    import src.certificate
    import src.cost
    import src.data.load

CONF = Path(__file__).resolve().parent.parent / "conf" / "data"
FIGURES = (".png", ".pdf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the command line; return the exit code."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        certificate = certify_as(options)
        print(certificate)
        if options.diagnose:
            print(certificate.diagnosis())
        return _fail(certificate) if options.fail_if == "locked" else 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception:  # a fault of ours, which must not look like a locked stage
        traceback.print_exc()
        return 3


class _Parser(argparse.ArgumentParser):
    """A parser that answers in one line, where argparse would print its usage too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m src.certify --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported.

    Raises: UserError for what is wrong with it.
    """
    parser = _Parser(
        prog="python -m src.certify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "model",
        type=_model,
        help="torchvision:NAME (random weights), or package.module:callable, importable from the current directory or PYTHONPATH: "
        "what returns a torch.nn.Module, or is one",
    )
    add("--weights", type=_input, metavar="FILE", help="a state dict, or a checkpoint with one under 'state_dict'")
    add("--data", required=True, choices=CATALOGUE, help="the images; a set that is nowhere is fetched")
    add("--data-root", metavar="DIR", help="where image sets lie (default: DATA_ROOT, else data)")
    add("--samples", type=_count, default=8, metavar="N", help="test images that are measured (default: 8)")
    add("--size", type=_count, metavar="H", help="resize the images to H×H")
    add("--seed", type=int, default=0, help="of the images drawn and of random weights (default: 0)")
    add("--stages", nargs="+", metavar="NAME", help="stages to cut after (default: after every one)")
    add("--method", choices=("auto", "exact", "matrix_free"), default="auto", help="how Jacobians are taken (default: auto)")
    add("--batch-norm", choices=("eval", "train"), default="eval", help="frozen statistics, or the batch's own (default: eval)")
    add("--dtype", choices=("float64", "float32"), default="float64", help="the arithmetic of the measurement (default: float64)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
    add("--diagnose", action="store_true", help="say why stages are locked, and try what would help")
    add("--json", type=_output, metavar="FILE", help="write the certificate, its tables and where they come from")
    add("--figure", type=_figure, metavar="FILE", help="draw it, as .png or .pdf")
    add(
        "--fail-if",
        choices=("locked",),
        help="exit code 1 when a stage fails the lock condition, or its ‖g‖ is a decade below the last one's",
    )
    options = parser.parse_args(arguments)
    options.command = shlex.join(["python", "-m", "src.certify", *arguments])
    available = CATALOGUE[options.data].test_size
    if options.samples > available:
        raise UserError(f"--samples: {options.samples} asked for, {options.data} has {available} test images")
    return options


def certify_as(options: argparse.Namespace) -> "src.certificate.Certificate":
    """Certify the model as the command line asks, and write the files it names.

    Raises: UserError for what the user can mend in the model, its weights, the data or the files.
    """
    import torch

    from src.certificate import certify
    from src.data.load import load
    from src.experiment import choose_device

    device, dtype = choose_device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(options.seed)
    model = build(options.model, CATALOGUE[options.data].classes)
    if options.weights:
        load_weights(model, options.weights)
    model = model.to(device).eval()
    data = load(_data_config(options), device)
    chosen, images, labels = draw(data, options.samples, options.seed)
    images, changes = adapt(images.to(_own_dtype(model)), model, options.size)
    weights = options.weights or ("random weights" if options.model.startswith("torchvision:") else "its own weights")
    said = "".join(f", {change}" for change in changes)
    print(f"{options.model}, {weights}; {len(images)} test images of {data.name}{said}", flush=True)
    try:
        _require_classifier(options.model, model, images, data.classes)
        certificate = certify(
            model,
            images,
            labels,
            stages=options.stages,
            method=options.method,
            dtype=dtype,
            batch_norm=options.batch_norm,
            watch=Watched(device, dtype),
        )
    except torch.OutOfMemoryError as error:
        raise UserError(f"{device}: out of memory; give fewer --samples, a smaller --size, or --dtype float32") from error
    if options.json:
        _write(options.json, to_json(certificate, _provenance(options, data, device, chosen, changes), options.diagnose))
    if options.figure:
        _write(options.figure, _draw(certificate, options.figure.suffix[1:].lower()))
    return certificate


class Watched:
    """Prints the plan, then a bar on standard error while it is carried out, where that is a terminal."""

    def __init__(self, device: "torch.device", dtype: "torch.dtype"):
        from rich.console import Console
        from rich.progress import Progress

        self.device, self.dtype = device, dtype
        self.bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    def __call__(self, planned: "list[src.cost.Planned]", done: int) -> None:
        """Show how far the plan is; the last stage is measured first."""
        from src.cost import described

        if done == 0:
            print(described(planned, self.device, self.dtype), flush=True)
            self.task = self.bar.add_task("certifying", total=sum(entry.gflop for entry in planned))
            self.bar.start()
        else:
            entry = planned[-done]
            self.bar.update(self.task, advance=entry.gflop, description=entry.stage)
        if done == len(planned):
            self.bar.stop()


def _own_dtype(model: "torch.nn.Module") -> "torch.dtype":
    import torch

    return next((parameter.dtype for parameter in model.parameters()), torch.get_default_dtype())


def build(name: str, classes: int) -> "torch.nn.Module":
    """The model of a name.

    Args:
        name: `torchvision:NAME`, built for the classes with random weights, or `package.module:callable`, called without arguments.
        classes: of the data set.

    Raises: UserError when there is none, its code raises, or what it gives is no model.
    """
    origin, _, attribute = name.partition(":")
    return _of_torchvision(attribute, classes) if origin == "torchvision" else _of_user(origin, attribute)


def _of_torchvision(name: str, classes: int) -> "torch.nn.Module":
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classifier '{name}'{_near(name, known)}")
    model: torch.nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return model


def _of_user(origin: str, name: str) -> "torch.nn.Module":
    from torch import nn

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(origin)
    except Exception as error:  # importing runs the user's own code: anything may be raised
        if isinstance(error, ModuleNotFoundError) and f"{origin}.".startswith(f"{error.name}."):
            raise UserError(f"no module '{error.name}' in the current directory or on PYTHONPATH") from error
        raise UserError(f"importing {origin} raised {_told(error)}; python -c 'import {origin}' shows where") from error
    if not hasattr(module, name):
        raise UserError(f"module {origin} has no '{name}'{_near(name, vars(module))}")
    found = getattr(module, name)
    if callable(found) and not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:  # the user's own code again
            raise UserError(f"{origin}:{name}() raised {_told(error)}") from error
    if not isinstance(found, nn.Module):
        raise UserError(f"{origin}:{name} gives a {type(found).__name__}, not a torch.nn.Module")
    return found


def load_weights(model: "torch.nn.Module", file: Path) -> None:
    """Load a state dict, or the one under a checkpoint's `state_dict`, strictly and with `weights_only=True`.

    Raises: UserError when the file is none that torch saved, holds more than tensors, or does not fit the model.
    """
    import torch

    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch's several readers
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{file}: holds {code[1]}, which weights_only=True refuses; save model.state_dict() alone") from error
        raise UserError(f"{file}: damaged, or not saved by torch.save ({_told(error)})") from error
    if isinstance(stored, Mapping) and "state_dict" in stored:
        stored = stored["state_dict"]
    if not isinstance(stored, Mapping):
        raise UserError(f"{file}: holds a {type(stored).__name__}, not a state dict; save model.state_dict()")
    try:
        model.load_state_dict(stored, strict=True)
    except RuntimeError as error:
        faults = textwrap.shorten(str(error).partition("\n")[2], 300, placeholder=" …")
        raise UserError(f"{file}: not the weights of this {type(model).__name__}: {faults}") from error


def draw(data: "src.data.load.Data", count: int, seed: int) -> tuple[list[int], "torch.Tensor", "torch.Tensor"]:
    """Draw test images without replacement, the same as the experiments draw from this seed.

    Returns: their places in the test set; the images, standardised; their labels.
    """
    import torch

    from src.seeds import generator

    chosen = torch.randperm(len(data.test), generator=generator(seed, "samples"))[:count]
    here = chosen.to(data.test.labels.device)
    return chosen.tolist(), data.standardise(data.test.images[here]), data.test.labels[here]


def adapt(images: "torch.Tensor", model: "torch.nn.Module", size: int | None) -> tuple["torch.Tensor", list[str]]:
    """Make the images what the model takes: grey ones of 3 channels where its first convolution has 3, and of the size asked for.

    Returns: the images, and what was done to them.
    """
    from torch import nn

    changes = []
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if images.shape[1] == 1 and channels == 3:
        images = images.repeat(1, 3, 1, 1)
        changes.append("grey repeated on the 3 channels of the first convolution")
    if size:
        changes.append(f"resized from {images.shape[2]}×{images.shape[3]} to {size}×{size}")
        images = nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images, changes


def _require_classifier(name: str, model: "torch.nn.Module", images: "torch.Tensor", classes: int) -> None:
    """Raise UserError unless the model takes the images and gives a score for every class."""
    import torch

    shape = "×".join(map(str, images.shape[1:]))
    try:
        with torch.no_grad():
            scores = model(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's own code
        raise UserError(f"{name} can't take images of {shape} ({_told(error)}); change --size or --data") from error
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2 or scores.shape[1] < classes:
        given = "×".join(map(str, scores.shape)) if isinstance(scores, torch.Tensor) else f"a {type(scores).__name__}"
        raise UserError(f"{name} gives {given} for {len(images)} images; a classifier gives {len(images)}×{classes}, a score a class")


def to_json(certificate: "src.certificate.Certificate", provenance: Mapping[str, Any], diagnosed: bool = False) -> str:
    """K_back, its tables as a record a row, and where they come from, as strict JSON: NaN is null, ±∞ the string ±Infinity."""
    import json

    tables = {"layers": certificate.layers.to_dict("records"), "severity": certificate.severity.to_dict("records")}
    if diagnosed:
        found = certificate.diagnosis()
        tables |= {"causes": found.causes.to_dict("records"), "what_ifs": found.what_ifs.to_dict("records")}
    content = {**certificate.to_dict(), **tables, "provenance": provenance}
    return json.dumps(_strict(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _provenance(
    options: argparse.Namespace, data: "src.data.load.Data", device: "torch.device", chosen: list[int], changes: list[str]
) -> dict[str, Any]:
    """Where the numbers come from: code, versions, machine, model, data."""
    from src.provenance import surroundings

    return {
        **surroundings(device),
        "command": options.command,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "command"},
        "weights_sha256": hashlib.sha256(options.weights.read_bytes()).hexdigest() if options.weights else None,
        "data": data.name,
        "data_sha256": data.sha256,
        "test_images": chosen,
        "image_changes": changes,
    }


def _data_config(options: argparse.Namespace) -> Any:
    """Where the data set lies and comes from, as its configuration says."""
    from omegaconf import OmegaConf

    from src.config import DataConfig

    # only these keys are resolved: others need the whole configuration
    shipped: Any = OmegaConf.load(CONF / f"{options.data}.yaml")
    root, mirrors = options.data_root or shipped.root, list(shipped.mirrors)
    return DataConfig(name=options.data, root=root, mirrors=mirrors, fallback="none", train_size=None, test_size=None)


def _draw(certificate: "src.certificate.Certificate", kind: str) -> bytes:
    out = BytesIO()
    # without the time it was made
    certificate.plot().savefig(out, format=kind, dpi=200, metadata={"CreationDate": None} if kind == "pdf" else None)
    return out.getvalue()


def _write(file: Path, content: bytes | str) -> None:
    from src.results import write_atomically

    try:
        write_atomically(file, content)
    except OSError as error:
        raise UserError(f"{file}: can't be written ({error.strerror})") from error


def _fail(certificate: "src.certificate.Certificate") -> int:
    """Name the locked stages in one line; return the exit code."""
    from src.diagnosis import locked as are_locked

    locked = [stage for stage, is_locked in zip(certificate.severity["stage"], are_locked(certificate), strict=True) if is_locked]
    if locked:
        print(f"locked: {', '.join(locked)} ({len(locked)} of {len(certificate.severity)} stages)", file=sys.stderr)
    return 1 if locked else 0


def _told(error: Exception) -> str:
    """An error of somebody else's code in a line."""
    return textwrap.shorten(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", 200, placeholder=" …")


def _near(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _model(text: str) -> str:
    if not re.fullmatch(r"[\w.]+:\w+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither torchvision:NAME nor package.module:callable")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _input(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: there is no such file")
    return Path(text)


def _output(text: str) -> Path:
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{file}: {'a folder' if file.is_dir() else 'its folder does not exist'}; name a file")
    return file


def _figure(text: str) -> Path:
    if Path(text).suffix.lower() not in FIGURES:
        raise argparse.ArgumentTypeError(f"{text}: end it with {' or '.join(FIGURES)}")
    return _output(text)


if __name__ == "__main__":
    sys.exit(main())
