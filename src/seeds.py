"""One root seed, one generator per purpose: a new purpose moves no other number."""

import hashlib

import torch


def generator(root: int, *purpose: str | int | float, device: torch.device | str = "cpu") -> torch.Generator:
    """Derive the generator of a purpose: its seed is the first 63 bits of sha256(root, purpose).

    Args:
        root: the root seed of the run.
        purpose: what the numbers are for, for example ("init", "tanh", depth, k).
        device: where the numbers are drawn.

    Returns: a `torch.Generator` that no other purpose shares.
    """
    digest = hashlib.sha256(repr((root, *purpose)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
