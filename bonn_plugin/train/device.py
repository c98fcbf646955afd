"""Where to train, and in which precision."""

from __future__ import annotations

import torch

from bonn_plugin.errors import TrainingError, one_line
from bonn_plugin.recipe import Recipe
from bonn_plugin.train.world import launched


def choose_device(name: str) -> torch.device:
    """Return the device: ``auto`` is the first GPU, or the CPU where there is none.

    Where torchrun started several processes on this machine, each takes the GPU of its number.

    Raises:
        TrainingError: there is no such device, or fewer than processes.
    """
    _, ranks, local = launched()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise TrainingError(f"device {name!r} is one for {ranks} processes: use cuda or auto, each takes its own")
        if local >= torch.cuda.device_count():
            raise TrainingError(f"local rank {local} finds {torch.cuda.device_count()} GPUs: start one process a GPU")
        torch.cuda.set_device(local)
        name = f"cuda:{local}"
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
