"""The certificate of anybody's classifier of images, from the command line.

    python -m src.certify torchvision:resnet18 --data cifar10 --weights file.pt --json out.json --figure out.png
    python -m src.certify my_package.my_module:make_model --data mnist --fail-if locked

Exit code 0: certified; 1: a stage is locked, with --fail-if locked; 2: the user can mend it; 3: a fault of this program.
"""

import argparse
import hashlib
import math
import re
import shlex
import sys
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
    from src.progress import Watched
    from src.user_model import adapt, build, load_weights, require_classifier

    device, dtype = choose_device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(options.seed)
    model = build(options.model, CATALOGUE[options.data].classes)
    if options.weights:
        load_weights(model, options.weights)
    model = model.to(device).eval()
    data = load(_data_config(options), device)
    chosen, images, labels = draw(data, options.samples, options.seed)
    images, changes = adapt(images, model, options.size)
    weights = options.weights or ("random weights" if options.model.startswith("torchvision:") else "its own weights")
    said = "".join(f", {change}" for change in changes)
    print(f"{options.model}, {weights}; {len(images)} test images of {data.name}{said}", flush=True)
    try:
        require_classifier(options.model, model, images, data.classes)
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


def draw(data: "src.data.load.Data", count: int, seed: int) -> tuple[list[int], "torch.Tensor", "torch.Tensor"]:
    """Draw test images without replacement, the same as the experiments draw from this seed.

    Returns: their places in the test set; the images, standardised; their labels.
    """
    import torch

    from src.seeds import generator

    chosen = torch.randperm(len(data.test), generator=generator(seed, "samples"))[:count]
    here = chosen.to(data.test.labels.device)
    return chosen.tolist(), data.standardise(data.test.images[here]), data.test.labels[here]


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
