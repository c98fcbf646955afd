"""Drawing of scikit-learn's handwritten digits on crops of its photographs, for the data sets made from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from bonn_plugin.errors import DataError, one_line

SHARE_TEST = 0.25
SHADE = 0.3
"""Ink is within so much of black on light ground, and of white on dark ground, in each colour."""
DENSER = 1.5
"""The scanned strokes are grey at their middle."""

Pixels = NDArray[Any]


@dataclass(frozen=True)
class Handwriting:
    """Handwritten digits of one part: ``digits`` (N, 8, 8) from 0 to 16, ``labels`` (N,) from 0 to 9."""

    digits: Pixels
    labels: Pixels


def digits_and_photos(size: int) -> tuple[list[Pixels], tuple[Handwriting, Handwriting]]:
    """Return the photographs, (H, W, 3) uint8 each, and the digits for training and for the test, no two the same.

    Raises:
        DataError: the photographs can't be read, or are smaller than ``size``.
    """
    from sklearn.datasets import load_digits, load_sample_images
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    try:
        photos = [np.asarray(photo) for photo in load_sample_images().images]
    except Exception as error:
        raise DataError(f"scikit-learn's photographs can't be read; they need pillow: {one_line(error)}") from error
    if size > min(min(photo.shape[:2]) for photo in photos):
        raise DataError(f"size {size} is larger than scikit-learn's photographs")
    parts = train_test_split(np.arange(len(labels)), test_size=SHARE_TEST, stratify=labels, random_state=0)
    digits = images.reshape(-1, 8, 8)
    train, test = (Handwriting(digits[part], labels[part]) for part in parts)
    return photos, (train, test)


def crop_photo(rng: Generator, photo: Pixels, size: int) -> Pixels:
    """Return a random square of the photograph scaled to (size, size, 3), float64 from 0 to 1."""
    from PIL import Image

    height, width = photo.shape[:2]
    side = int(rng.integers(size, min(height, width) + 1))
    x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    part = Image.fromarray(photo[y : y + side, x : x + side])
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR), np.float64) / 255


def enlarged(digit: Pixels, side: int) -> Pixels:
    """Return the share of ink in each pixel, (side, side)."""
    from PIL import Image

    small = Image.fromarray((digit / 16).astype(np.float32))
    grey = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR), np.float64)
    return (DENSER * grey).clip(0, 1)


def write_ink(rng: Generator, place: Pixels, ink: Pixels) -> None:
    """Draw ink of a colour that stands out into a part of the canvas, (side, side, 3), in place."""
    under = float(np.average(place.mean(2), weights=ink))
    colour = rng.uniform(0, SHADE, 3) if under > 0.5 else rng.uniform(1 - SHADE, 1, 3)
    place += ink[:, :, None] * (colour - place)
