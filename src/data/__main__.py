"""Fetches image sets ahead of time: `python -m src.data fetch mnist cifar10 [--root DIR]`."""

import argparse
import sys
from pathlib import Path

from omegaconf import OmegaConf

from src.data.catalogue import CATALOGUE
from src.data.fetch import fetch
from src.data.files import verify
from src.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"


def main(arguments: list[str] | None = None) -> int:
    """Fetch the named sets and check their files; return 0, or 2 after one line on what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m src.data", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser("fetch", help="download image sets that are missing, and check their files")
    command.add_argument("names", nargs="+", choices=CATALOGUE, metavar="NAME", help=", ".join(CATALOGUE))
    command.add_argument("--root", type=Path, help="where the sets lie (default: DATA_ROOT, else data)")
    options = parser.parse_args(arguments)
    try:
        for name in options.names:
            # Only these keys are resolved: others need the whole configuration.
            config = OmegaConf.load(CONF / f"{name}.yaml")
            root = (options.root or Path(config.root)).expanduser()
            fetch(CATALOGUE[name], root, list(config.mirrors))
            verify(CATALOGUE[name], root)
            print(f"{name}: complete in {root}" if CATALOGUE[name].files else f"{name}: bundled, nothing to fetch")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
