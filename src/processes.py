"""Processes beside this one: how they are started, and on how many CPUs they run."""

import multiprocessing
import os
import sys

# a server imports what the others import, once, and each is a copy of it; libraries of other systems break in copies. None is a copy of
# this process, whose libraries may have threads
PROCESSES = multiprocessing.get_context("forkserver") if sys.platform == "linux" else multiprocessing.get_context("spawn")


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_once() -> int:
    """How many runs there are CPUs for, of OMP_NUM_THREADS each."""
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # OpenMP takes a number a level
    threads = int(outermost) if outermost.isdecimal() else 1  # what it doesn't understand it passes over
    return max(1, cpus() // max(1, threads))
