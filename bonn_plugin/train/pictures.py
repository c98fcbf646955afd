"""Pictures of what a packed detector finds, beside the truth. matplotlib is an extra: ``bonn_plugin[plots]``."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bonn_plugin.checkpoint import load_packed, model_config_of
from bonn_plugin.data import DetectionSplits, load_detection_splits
from bonn_plugin.errors import BonnError, DataError
from bonn_plugin.files import write_file
from bonn_plugin.recipe import Recipe

DETECTIONS_PLOT = "detections.png"
IMAGES = 6
"""Test images that are drawn, spread over the test set."""
SHOWN = 0.3
"""Detections of a lower score are not drawn: most of them are wrong, and they would hide the others."""
MOST = 20
"""Detections that are drawn in one image, those of the highest scores."""
INCHES = 2.6
SMALL = 160
"""Images with a longer side of up to so many pixels are drawn by their pixels, without smoothing."""
LETTER, LINE = 0.031, 0.068
"""Width of a label's letter and height of its line, as shares of a picture's longer side."""
COLOURS = ("#ff3b30", "#34c759", "#0a84ff", "#ffcc00", "#ff2d95", "#00c7be", "#ff9500", "#bf5af2", "#a2845e", "#64d2ff")


@torch.no_grad()
def draw_detections(folder: Path, recipe: Recipe) -> Path:
    """Draw test images of a recipe with the boxes that are there, and below with those a packed detector finds.

    Args:
        folder: the detector's checkpoint, where the picture goes.
        recipe: its data set.

    Returns:
        The PNG file.

    Raises:
        BonnError: matplotlib is not installed; the checkpoint is damaged; the data set is not here.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BonnError("plots need matplotlib: pip install 'bonn_plugin[plots]'") from None
    try:
        splits = load_detection_splits(recipe.data, model_config_of(folder).num_classes)
    except DataError as error:
        raise DataError(
            f"the pictures of detections need the data set: {error}; --set data.root= names another"
        ) from error
    model = load_packed(folder)
    chosen = np.unique(np.linspace(0, len(splits.test) - 1, min(IMAGES, len(splits.test))).round().astype(int))
    figure = Figure(figsize=(INCHES * len(chosen) + 0.3, 2 * INCHES + 0.5), layout="constrained")
    rows = figure.subplots(2, len(chosen), squeeze=False)
    rows[0][0].set_ylabel("truth")
    rows[1][0].set_ylabel(f"found, score of {SHOWN} or more")
    for column, index in enumerate(chosen):
        image, target = splits.test[int(index)]
        found = model([image])[0]
        kept = [i for i in found["scores"].argsort(descending=True).tolist() if found["scores"][i] >= SHOWN][:MOST]
        rows[0][column].set_title(f"test image {int(target['image_id'])}", fontsize=8)
        _draw(rows[0][column], image, target["boxes"], _truths(splits, target), target["labels"])
        words = [f"{_name(splits, found['labels'][i])} {found['scores'][i]:.2f}" for i in kept]
        _draw(rows[1][column], image, found["boxes"][kept], words, found["labels"][kept])
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    place = folder / DETECTIONS_PLOT
    write_file(place, picture.getvalue())
    return place


def _truths(splits: DetectionSplits, target: Mapping[str, Tensor]) -> list[str]:
    """Names of the objects; those that no measurement counts are in brackets."""
    pairs = zip(target["labels"], target["ignored"], strict=True)
    return [f"({_name(splits, label)})" if ignored else _name(splits, label) for label, ignored in pairs]


def _name(splits: DetectionSplits, label: Tensor) -> str:
    return splits.names.get(int(label), f"class {int(label)}")


def _draw(axes: Any, image: Tensor, boxes: Tensor, words: list[str], labels: Tensor) -> None:
    from matplotlib.patches import Rectangle

    height, width = image.shape[-2:]
    smoothing = "nearest" if max(height, width) <= SMALL else "antialiased"
    # a pixel's square goes from its number to the next one, as boxes count
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), extent=(0, width, height, 0), interpolation=smoothing)
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    objects = list(zip(boxes.tolist(), words, labels.tolist(), strict=True))
    for (x1, y1, x2, y2), _, label in reversed(objects):  # the best lies on top
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=_colour(label), linewidth=1.6))
    letter, line = LETTER * max(height, width) / width, LINE * max(height, width) / height
    taken: list[tuple[float, float, float]] = []
    for (x1, y1, _, _), text, label in objects:
        box = {"facecolor": _colour(label), "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
        place = _place(taken, x1 / width, y1 / height, letter * (len(text) + 1), line)
        if place is not None:
            axes.text(place[0] * width, place[1] * height, text, fontsize=8, color="black", va="top", bbox=box)


def _colour(label: int) -> str:
    return COLOURS[label % len(COLOURS)]


def _place(
    taken: list[tuple[float, float, float]], x: float, y: float, length: float, line: float
) -> tuple[float, float] | None:
    """Return where a label of a box begins, as shares of the picture, and note it.

    It hides no earlier one: it goes down to the next free line, and is left out (None) where there is none.
    """
    x = max(0.01, min(x, 1 - length))
    y = y - line if y > line else y + 0.01
    while any(abs(y - other) < line and x < end and begin < x + length for begin, end, other in taken):
        y += line
    if y > 1 - line:
        return None
    taken.append((x, x + length, y))
    return x, y


__all__ = ["DETECTIONS_PLOT", "draw_detections"]
