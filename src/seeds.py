"""One root seed, one generator per purpose: a new purpose moves no other number."""

import hashlib

import torch


def generator(root: int, *purpose: str | int | float) -> torch.Generator:
    """Derive the generator of a purpose: its seed is the first 63 bits of sha256(root, purpose).

    Args:
        root: the root seed of the run.
        purpose: what the numbers are for, for example ("init", "tanh", depth, k).

    Returns: a CPU generator that no other purpose shares; drawn on the CPU, numbers are the same for every device.
    """
    digest = hashlib.sha256(repr((root, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
