"""Table of the certificate zoo: every architecture, the entries of its K_back at initialisation, and the accuracy that it reached."""

import pandas as pd

from experiments.certificate import networks
from paper_figures.sidecar import Product, tabular
from paper_figures.sources import Shelf, lacking, require_one

NAMES = {
    "kind": "kind",
    "activation": "activation",
    "norm": "norm",
    "weight_var": "σw²",
    "depth": "depth",
    "width": "width",
    "attenuation": "Σ ln ‖J_l‖ (nats)",
    "rank": "min rank J_l",
    "conditioning": "max cond J_l",
    "skip_depth": "skip depth",
    "gradient_ratio": "|ln ‖g_1‖/‖g_L‖| (nats)",
    "severity": "mean λ",
    "accuracy": "test accuracy",
}
# in LaTeX, with widths in cm
PRINTED: dict[str, float | None] = {heading: 2.0 if heading == "kind" else 1.3 for heading in NAMES.values()}
# readings are greater where less is locked: these are told as what they are
NEGATIVE = ["conditioning", "skip_depth", "gradient_ratio", "severity"]


def product(shelf: Shelf, mixed: bool) -> Product:
    """The table of the newest run."""
    source = shelf.newest("certificate")
    rows = source.read()
    if not mixed:
        require_one(source.stamps, str(source.rows))
    with lacking(source.rows):
        return Product(tabular(table(rows), PRINTED), [source])


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line an architecture, the most accurate of each kind first."""
    nets = networks(rows).sort_values(["kind", "accuracy"], ascending=[True, False])
    nets[NEGATIVE] = -nets[NEGATIVE]
    return nets[list(NAMES)].astype({"rank": int, "skip_depth": int}).rename(columns=NAMES)
