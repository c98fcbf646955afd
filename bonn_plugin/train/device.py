"""Where to train, and in which precision."""

from __future__ import annotations

import torch

from bonn_plugin.errors import TrainingError, one_line
from bonn_plugin.recipe import Recipe


def choose_device(name: str) -> torch.device:
    """Return the device: ``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        TrainingError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainingError(f"device {name!r} can't be used: {one_line(error)}") from error
    return device


def amp_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """Return the dtype of automatic mixed precision, None where the recipe wants none.

    Raises:
        TrainingError: the device can't train in it.
    """
    amp = recipe.training.amp
    if amp == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    if amp == "float16" and device.type == "cpu":
        problem = recipe.source.problem(("training", "amp"), "float16 trains on a GPU alone: use bfloat16 or off")
        raise TrainingError(str(problem))
    return None if amp == "off" else getattr(torch, amp)
