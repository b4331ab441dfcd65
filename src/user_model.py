"""Somebody's model: found by its name, loaded with its weights, and given images that it takes."""

import difflib
import importlib
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.errors import UserError


def build(name: str, classes: int) -> nn.Module:
    """The model of a name.

    Args:
        name: `torchvision:NAME`, built for the classes with random weights, or `package.module:callable`, called without arguments.
        classes: of the data set.

    Raises: UserError when there is none, its code raises, or what it gives is no model.
    """
    origin, _, attribute = name.partition(":")
    return _of_torchvision(attribute, classes) if origin == "torchvision" else _of_user(origin, attribute)


def _of_torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classifier '{name}'{_near(name, known)}")
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return model


def _of_user(origin: str, name: str) -> nn.Module:
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


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a state dict, or the one under a checkpoint's `state_dict`, strictly and with `weights_only=True`.

    Raises: UserError when the file is none that torch saved, holds more than tensors, or does not fit the model.
    """
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


def adapt(images: torch.Tensor, model: nn.Module, size: int | None) -> tuple[torch.Tensor, list[str]]:
    """Make the images what the model takes: in its dtype, grey ones of 3 channels where its first convolution has 3, of the size asked for.

    Returns: the images, and what was done to them.
    """
    changes = []
    images = images.to(next(model.parameters(), images).dtype)
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if images.shape[1] == 1 and channels == 3:
        images = images.repeat(1, 3, 1, 1)
        changes.append("grey repeated on the 3 channels of the first convolution")
    if size:
        changes.append(f"resized from {images.shape[2]}×{images.shape[3]} to {size}×{size}")
        images = nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images, changes


def require_classifier(name: str, model: nn.Module, images: torch.Tensor, classes: int) -> None:
    """Raise UserError unless the model takes the images and gives a score for every class."""
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


def _told(error: Exception) -> str:
    """An error of somebody else's code in a line."""
    return textwrap.shorten(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", 200, placeholder=" …")


def _near(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
