"""What stands in an image for detection: boxes, classes, and what a measurement leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


class Target(TypedDict):
    """The objects of one image.

    Attributes:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels; N may be 0.
        labels: (N,) int64, classes from 1.
        ignored: (N,) bool: difficult ones and crowds, neither to be learned nor to be counted.
        image_id: int64 scalar, unlike those of all other images of the set.
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    image_id: Tensor


@dataclass(frozen=True)
class Annotation:
    """One object: x1 y1 x2 y2 in pixels, its class from 1, and whether a measurement leaves it out."""

    box: tuple[float, float, float, float]
    label: int
    ignored: bool = False


def make_target(objects: Sequence[Annotation], image_id: int) -> Target:
    """Return tensors of ``objects``, which may be none."""
    return Target(
        boxes=torch.tensor([o.box for o in objects], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([o.label for o in objects], dtype=torch.int64),
        ignored=torch.tensor([o.ignored for o in objects], dtype=torch.bool),
        image_id=torch.tensor(image_id),
    )


class Photos:
    """Transforms of a photograph with its target: to float32 from 0 to 1, flipped at random while training.

    Boxes are cut at the image's border; those with a side of less than a pixel, as some annotations have, are left
    out: they trip the detectors, and nothing can be found in them.

    Args:
        flip: random horizontal flips.
    """

    def __init__(self, *, flip: bool) -> None:
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                *([v2.RandomHorizontalFlip()] if flip else []),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(labels_getter=_by_object),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __call__(self, image: Any, target: Target) -> tuple[Tensor, Target]:
        """Transform a PIL image in RGB."""
        width, height = image.size
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(height, width))
        picture, found = self.transform(image, {**target, "boxes": boxes})
        found["boxes"] = found["boxes"].as_subclass(Tensor)
        return picture.as_subclass(Tensor), found


def _by_object(inputs: tuple[Any, Target]) -> tuple[Tensor, Tensor]:
    """What ``SanitizeBoundingBoxes`` is to cut with the boxes."""
    return inputs[1]["labels"], inputs[1]["ignored"]


__all__ = ["Annotation", "Photos", "Target", "make_target"]
