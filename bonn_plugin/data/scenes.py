"""digit_scenes: scikit-learn's handwritten digits on crops of its photographs, made from a seed; no file needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.random import PCG64, Generator
from numpy.typing import NDArray
from torch import Tensor

from bonn_plugin.data.targets import Annotation, Target, make_target
from bonn_plugin.errors import DataError, one_line
from bonn_plugin.recipe import DigitScenesConfig

SHARE_TEST = 0.25
TRIES = 20
"""Places that are tried for a digit that may not hide another."""
LARGEST_OVERLAP = 0.1
"""Of the smaller of two digits' boxes."""
SHADE = 0.3
"""Ink is within so much of black on light ground, and of white on dark ground, in each colour."""
DENSER = 1.5
"""The scanned strokes are grey at their middle."""
INK = 0.25
"""A pixel with so much ink belongs to the digit."""

Pixels = NDArray[Any]


class DigitScenes:
    """Scenes (3, size, size) float32 from 0 to 1 with their targets; each follows from the seed and its number.

    Args:
        config: see ``DigitScenesConfig``.
        part: 0 for training, 1 for test: they have different handwritten digits.
        photos: (H, W, 3) uint8.
        digits: (N, 8, 8) from 0 to 16, those of this part.
        labels: (N,), 0 to 9.
    """

    def __init__(
        self, config: DigitScenesConfig, part: int, photos: list[Pixels], digits: Pixels, labels: Pixels
    ) -> None:
        self.config = config
        self.part = part
        self.photos = photos
        self.digits = digits
        self.labels = labels
        self._made: dict[int, tuple[Tensor, Target]] = {}

    def __len__(self) -> int:
        return self.config.test if self.part else self.config.train

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._made:  # a scene takes a millisecond, and 28 kB at 96 pixels
            self._made[index] = self._make(index)
        image, target = self._made[index]
        return image.float() / 255, target

    def _make(self, index: int) -> tuple[Tensor, Target]:
        config = self.config
        rng = Generator(PCG64([config.seed, self.part, index]))
        canvas = _crop(rng, self.photos[rng.integers(len(self.photos))], config.size)
        objects: list[Annotation] = []
        for _ in range(rng.integers(config.digits[0], config.digits[1] + 1)):
            chosen = rng.integers(len(self.digits))
            side = max(8, round(rng.uniform(*config.scale) * config.size))
            ink = _enlarged(self.digits[chosen], side)
            rows, columns = (np.flatnonzero((ink > INK).any(axis)) for axis in (1, 0))
            for _ in range(TRIES):
                x, y = rng.integers(0, config.size - side + 1, 2)
                box = (float(x + columns[0]), float(y + rows[0]), float(x + columns[-1] + 1), float(y + rows[-1] + 1))
                if all(_overlap(box, other.box) <= LARGEST_OVERLAP for other in objects):
                    _write(rng, canvas[y : y + side, x : x + side], ink)
                    objects.append(Annotation(box, 1 if config.one_class else int(self.labels[chosen]) + 1))
                    break
        pixels = torch.from_numpy((canvas * 255).round().astype(np.uint8)).permute(2, 0, 1).contiguous()
        return pixels, make_target(objects, index)


def digit_scenes(config: DigitScenesConfig) -> tuple[DigitScenes, DigitScenes, tuple[str, ...]]:
    """Return training scenes, test scenes, and the classes' names from label 1 on.

    Raises:
        DataError: scikit-learn's photographs can't be read.
    """
    from sklearn.datasets import load_digits, load_sample_images
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    try:
        photos = [np.asarray(photo) for photo in load_sample_images().images]
    except Exception as error:
        raise DataError(f"scikit-learn's photographs can't be read; they need pillow: {one_line(error)}") from error
    if config.size > min(min(photo.shape[:2]) for photo in photos):
        raise DataError(f"size {config.size} is larger than scikit-learn's photographs")
    parts = train_test_split(np.arange(len(labels)), test_size=SHARE_TEST, stratify=labels, random_state=0)
    digits = images.reshape(-1, 8, 8)
    train, test = (DigitScenes(config, i, photos, digits[part], labels[part]) for i, part in enumerate(parts))
    names = ("digit",) if config.one_class else tuple(str(digit) for digit in range(10))
    return train, test, names


def _crop(rng: Generator, photo: Pixels, size: int) -> Pixels:
    """Return a random square of the photograph scaled to (size, size, 3), float64 from 0 to 1."""
    from PIL import Image

    height, width = photo.shape[:2]
    side = int(rng.integers(size, min(height, width) + 1))
    x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    part = Image.fromarray(photo[y : y + side, x : x + side])
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR), np.float64) / 255


def _enlarged(digit: Pixels, side: int) -> Pixels:
    """Return the share of ink in each pixel, (side, side)."""
    from PIL import Image

    small = Image.fromarray((digit / 16).astype(np.float32))
    grey = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR), np.float64)
    return (DENSER * grey).clip(0, 1)


def _write(rng: Generator, place: Pixels, ink: Pixels) -> None:
    """Draw ink of a colour that stands out into a part of the canvas, (side, side, 3), in place."""
    under = float(np.average(place.mean(2), weights=ink))
    colour = rng.uniform(0, SHADE, 3) if under > 0.5 else rng.uniform(1 - SHADE, 1, 3)
    place += ink[:, :, None] * (colour - place)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0.0, width) * max(0.0, height) / smaller


__all__ = ["DigitScenes", "digit_scenes"]
