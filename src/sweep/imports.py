"""What every run of a sweep imports, done once by the server that a job's runs are copies of."""

import gc
from contextlib import suppress
from importlib import import_module

from src.code import ROOT, fingerprint

before = fingerprint(ROOT)
gc.disable()  # a quarter of the time of imports goes into looking for garbage in what stays
with suppress(Exception):  # the run that imports it again will tell
    for name in ("src.sweep.work", "src.experiment", "src.report", "paper_figures.style"):
        import_module(name)
gc.freeze()  # nor do copies look through it
gc.enable()
# of what was imported; of nothing where it was changed meanwhile
IMPORTED = before if fingerprint(ROOT) == before else ""
