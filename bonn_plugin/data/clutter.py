"""digits_clutter: one handwritten digit on a crop of a photograph, for classification; made from a seed, no files.

Hard enough that a binarised network stays behind one in full precision, which on digits alone it hardly does.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import PCG64, Generator
from torch import Tensor

from bonn_plugin.data.drawing import Handwriting, Pixels, crop_photo, digits_and_photos, enlarged, write_ink
from bonn_plugin.recipe import DigitsClutterConfig

MEAN, STD = 0.46, 0.31
"""Of the pixels from 0 to 1, over all three colours."""


def digits_clutter(config: DigitsClutterConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) for training and for the test: float32 (N, 3, size, size), normalised; int64 (N,).

    Each image follows from the seed, its part and its number alone. The two parts have different handwritten digits.

    Raises:
        DataError: scikit-learn's photographs can't be read, or are smaller than the images.
    """
    photos, parts = digits_and_photos(config.size)
    train, test = (
        _make(config, i, count, photos, part)
        for i, (count, part) in enumerate(zip((config.train, config.test), parts, strict=True))
    )
    return train, test


def _make(
    config: DigitsClutterConfig, part: int, count: int, photos: list[Pixels], hand: Handwriting
) -> tuple[Tensor, Tensor]:
    size = config.size
    images = torch.empty(count, 3, size, size)
    labels = torch.empty(count, dtype=torch.long)
    for index in range(count):
        rng = Generator(PCG64([config.seed, part, index]))
        canvas = crop_photo(rng, photos[rng.integers(len(photos))], size)
        chosen = rng.integers(len(hand.digits))
        side = max(8, round(rng.uniform(*config.scale) * size))
        x, y = rng.integers(0, size - side + 1, 2)
        write_ink(rng, canvas[y : y + side, x : x + side], enlarged(hand.digits[chosen], side))
        images[index] = torch.from_numpy(canvas.astype(np.float32)).permute(2, 0, 1)
        labels[index] = int(hand.labels[chosen])
    return images.sub_(MEAN).div_(STD), labels


__all__ = ["digits_clutter"]
