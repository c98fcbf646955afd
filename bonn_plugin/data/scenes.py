"""digit_scenes: scikit-learn's handwritten digits on crops of its photographs, made from a seed; no file needed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import PCG64, Generator
from torch import Tensor

from bonn_plugin.data.drawing import Pixels, crop_photo, digits_and_photos, enlarged, write_ink
from bonn_plugin.data.targets import Annotation, Target, make_target
from bonn_plugin.recipe import DigitScenesConfig

TRIES = 20
"""Places that are tried for a digit that may not hide another."""
LARGEST_OVERLAP = 0.1
"""Of the smaller of two digits' boxes."""
INK = 0.25
"""A pixel with so much ink belongs to the digit."""


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
        canvas = crop_photo(rng, self.photos[rng.integers(len(self.photos))], config.size)
        objects: list[Annotation] = []
        for _ in range(rng.integers(config.digits[0], config.digits[1] + 1)):
            chosen = rng.integers(len(self.digits))
            side = max(8, round(rng.uniform(*config.scale) * config.size))
            ink = enlarged(self.digits[chosen], side)
            rows, columns = (np.flatnonzero((ink > INK).any(axis)) for axis in (1, 0))
            for _ in range(TRIES):
                x, y = rng.integers(0, config.size - side + 1, 2)
                box = (float(x + columns[0]), float(y + rows[0]), float(x + columns[-1] + 1), float(y + rows[-1] + 1))
                if all(_overlap(box, other.box) <= LARGEST_OVERLAP for other in objects):
                    write_ink(rng, canvas[y : y + side, x : x + side], ink)
                    objects.append(Annotation(box, 1 if config.one_class else int(self.labels[chosen]) + 1))
                    break
        pixels = torch.from_numpy((canvas * 255).round().astype(np.uint8)).permute(2, 0, 1).contiguous()
        return pixels, make_target(objects, index)


def digit_scenes(config: DigitScenesConfig) -> tuple[DigitScenes, DigitScenes, tuple[str, ...]]:
    """Return training scenes, test scenes, and the classes' names from label 1 on.

    Raises:
        DataError: scikit-learn's photographs can't be read.
    """
    photos, parts = digits_and_photos(config.size)
    train, test = (DigitScenes(config, i, photos, part.digits, part.labels) for i, part in enumerate(parts))
    names = ("digit",) if config.one_class else tuple(str(digit) for digit in range(10))
    return train, test, names


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0.0, width) * max(0.0, height) / smaller


__all__ = ["DigitScenes", "digit_scenes"]
