"""Images for self-tests and calibration: the test set of the checkpoint's recipe, or noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bonn_plugin.checkpoint import input_shape_of, load_recipe_of, model_config_of
from bonn_plugin.data import SizedDataset, load_detection_splits, load_splits
from bonn_plugin.errors import BonnError, ExportError
from bonn_plugin.export.detection import Padded, padded_size
from bonn_plugin.models import Detector
from bonn_plugin.recipe import (
    DetectionModelConfig,
    NetworkConfig,
    PhotosConfig,
    Recipe,
    build_network,
    parse_recipe,
)

NOISE_SAMPLES = 16
CHUNK = 32


@dataclass(frozen=True)
class Samples:
    """Images, (N, C, H, W) in batches, that can be gone through more than once; ``source`` says what they are."""

    source: str
    batches: tuple[Tensor, ...]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def input_shape_for(folder: Path, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Return (C, H, W) of what a checkpoint's export takes.

    Args:
        folder: the checkpoint.
        size: (height, width) of the images, None for the recipe's. A detector scales and pads them; without a size,
            and where the data set's images have several, every image fits in.
    """
    channels, *own = input_shape_of(folder)
    config = model_config_of(folder)
    if not isinstance(config, DetectionModelConfig):
        height, width = size or own
        return channels, height, width
    recipe = _recipe(folder)
    if size is None and recipe is not None and not isinstance(recipe.data, PhotosConfig):
        size = recipe.data.image_size, recipe.data.image_size
    return channels, *padded_size(_detector(config), size)


def samples_for(folder: Path, shape: tuple[int, int, int], limit: int, recipe: Recipe | None = None) -> Samples:
    """Return up to ``limit`` test images of a checkpoint's recipe, or noise where its data is not to be had.

    Args:
        folder: the checkpoint.
        shape: (C, H, W); images of another size give noise. A detector's are scaled, normalised and padded to it.
        limit: how many, spread over the whole test set.
        recipe: in place of the one that the checkpoint carries.
    """
    config = model_config_of(folder)
    recipe = recipe or _recipe(folder)
    if recipe is None:
        return noise(shape, "no recipe in the checkpoint")
    try:
        test = _test_set(recipe, config)
        chosen = np.unique(np.linspace(0, len(test) - 1, min(limit, len(test))).round().astype(int))
        images = [test[int(i)][0] for i in chosen]
    except BonnError:
        return noise(shape, "the recipe's data set is not here")
    if isinstance(config, DetectionModelConfig):
        detector = _detector(config)
        transform = Padded(detector.transform, (shape[1], shape[2]))
        try:
            batches = tuple(transform([image])[0].tensors for image in images)
        except ExportError:
            return noise(shape, "the recipe's images have another size")
        return Samples(f"test set of {recipe.data.name}", batches)
    if tuple(images[0].shape) != shape:
        return noise(shape, "the recipe's images have another size")
    return Samples(f"test set of {recipe.data.name}", torch.split(torch.stack(images), CHUNK))


def _recipe(folder: Path) -> Recipe | None:
    text = load_recipe_of(folder)
    try:
        return None if text is None else parse_recipe(text, str(folder / "recipe.yaml"), [])
    except BonnError:
        return None


def _test_set(recipe: Recipe, config: NetworkConfig) -> SizedDataset:
    load = load_detection_splits if isinstance(config, DetectionModelConfig) else load_splits
    return load(recipe.data, config.num_classes).test


def _detector(config: DetectionModelConfig) -> Detector:
    """Return a detector in eval mode for its transform alone: its weights are random."""
    detector = build_network(config).eval()
    assert isinstance(detector, Detector)
    return detector


def noise(shape: tuple[int, int, int], why: str) -> Samples:
    """Return seeded noise between -2 and 2, (16, C, H, W)."""
    values = np.random.Generator(np.random.PCG64(1)).random((NOISE_SAMPLES, *shape), dtype=np.float32) * 4 - 2
    return Samples(f"noise: {why}", (torch.from_numpy(values),))


__all__ = ["Samples", "input_shape_for", "noise", "samples_for"]
