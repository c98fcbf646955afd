"""Images for self-tests and calibration: the test set of the checkpoint's recipe, or noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bonn_plugin.checkpoint import load_recipe_of
from bonn_plugin.data import load_splits
from bonn_plugin.errors import BonnError
from bonn_plugin.recipe import Recipe, parse_recipe

NOISE_SAMPLES = 16
CHUNK = 32


@dataclass(frozen=True)
class Samples:
    """Images, (N, C, H, W) in batches, that can be gone through more than once; ``source`` says what they are."""

    source: str
    batches: tuple[Tensor, ...]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def samples_for(folder: Path, shape: tuple[int, int, int], limit: int, recipe: Recipe | None = None) -> Samples:
    """Return up to ``limit`` test images of a checkpoint's recipe, or noise where its data is not to be had.

    Args:
        folder: the checkpoint.
        shape: (C, H, W); images of another size give noise.
        limit: how many, spread over the whole test set.
        recipe: in place of the one that the checkpoint carries.
    """
    text = None if recipe is not None else load_recipe_of(folder)
    try:
        if recipe is None and text is not None:
            recipe = parse_recipe(text, str(folder / "recipe.yaml"), [])
        if recipe is None:
            return noise(shape, "no recipe in the checkpoint")
        test = load_splits(recipe.data, recipe.model.num_classes).test
    except BonnError:
        return noise(shape, "the recipe's data set is not here")
    chosen = np.unique(np.linspace(0, len(test) - 1, min(limit, len(test))).round().astype(int))
    if tuple(test[0][0].shape) != shape:
        return noise(shape, "the recipe's images have another size")
    images = torch.stack([test[int(i)][0] for i in chosen])
    return Samples(f"test set of {recipe.data.name}", torch.split(images, CHUNK))


def noise(shape: tuple[int, int, int], why: str) -> Samples:
    """Return seeded noise between -2 and 2, (16, C, H, W)."""
    values = np.random.Generator(np.random.PCG64(1)).random((NOISE_SAMPLES, *shape), dtype=np.float32) * 4 - 2
    return Samples(f"noise: {why}", (torch.from_numpy(values),))


__all__ = ["Samples", "noise", "samples_for"]
