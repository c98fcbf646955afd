"""Detectors whose backbone OpenVINO computes: torchvision's transform and heads run in torch on its features.

    detect = load_detector("runs/digit_scenes_fcos_resnet18")
    found = detect([image])          # (3, H, W) each, from 0 to 1: boxes, scores and labels, as the torch model gives

An export has one size, and every image must fit into it. Images are scaled as in torch. Then all are padded with zeros
at the right and at the bottom, as torchvision pads the smaller images of a batch, but up to the exported size.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from bonn_plugin.checkpoint import load_packed
from bonn_plugin.errors import ExportError
from bonn_plugin.export.openvino import Exported, load
from bonn_plugin.export.part import exported_part, fingerprint
from bonn_plugin.models import Detector

Size = tuple[int, int]
"""(height, width) in pixels."""


def padded_size(detector: Detector, image: Size | None) -> Size:
    """Return the size to which a detector's transform scales and pads images.

    Args:
        detector: any of this package.
        image: of the images; None for any: then it is that of a square which holds every scaled image.
    """
    transform = cast(Any, detector.transform)
    if image is not None:
        height, width = transform([torch.zeros(3, *image)])[0].tensors.shape[-2:]
        return int(height), int(width)
    if transform.fixed_size is not None:
        width, height = transform.fixed_size
        return int(height), int(width)
    side = math.ceil(transform.max_size / transform.size_divisible) * transform.size_divisible
    return side, side


class Padded(nn.Module):
    """A detector's transform that pads every batch to one size.

    Args:
        transform: torchvision's.
        size: to which.
    """

    def __init__(self, transform: nn.Module, size: Size) -> None:
        super().__init__()
        self.transform = transform
        self.size = size

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        """See torchvision's ``GeneralizedRCNNTransform``.

        Raises:
            ExportError: an image is too large once it is scaled.
        """
        batch, targets = self.transform(images, targets)
        for image, (height, width) in zip(images, batch.image_sizes, strict=True):
            if height > self.size[0] or width > self.size[1]:
                given = f"{image.shape[-2]}x{image.shape[-1]}"
                raise ExportError(
                    f"an image of {given}, scaled to {height}x{width}, does not fit into the export, which takes "
                    f"{self.size[0]}x{self.size[1]}: export again with --size {given}, or without --size for images "
                    "of any shape"
                )
        below, right = self.size[0] - batch.tensors.shape[-2], self.size[1] - batch.tensors.shape[-1]
        return ImageList(nn.functional.pad(batch.tensors, (0, right, 0, below)), batch.image_sizes), targets

    def postprocess(self, result: Any, image_shapes: list[Size], original_image_sizes: list[Size]) -> Any:
        """Scale boxes back, see torchvision."""
        transform = cast(Any, self.transform)
        return transform.postprocess(result, image_shapes, original_image_sizes)


class EngineBackbone(nn.Module):
    """A backbone with its pyramid, computed by OpenVINO on the CPU.

    Args:
        exported: the export of it.
        out_channels: of each level.
    """

    def __init__(self, exported: Exported, out_channels: int) -> None:
        super().__init__()
        self.exported = exported
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) of the exported size to the pyramid's maps by level, float32 on the CPU."""
        return OrderedDict(self.exported.features(images))


def load_detector(path: str | os.PathLike[str], threads: int | None = None) -> Detector:
    """Load a detector's checkpoint, in eval mode, with its backbone computed by the export in the same folder.

    Args:
        path: the checkpoint's folder.
        threads: how many the engine may use; None for all.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ExportError: there is no export, it is damaged or of another checkpoint, or OpenVINO is missing; and, when
            called, an image does not fit into the exported size.
    """
    detector = load_packed(path)
    if not isinstance(detector, Detector):
        raise ExportError(f"{path}: not a detector: take bonn_plugin.export.openvino.load")
    exported = load(path, threads)
    _, backbone = exported_part(detector)
    if exported.info.fingerprint != fingerprint(backbone):
        raise ExportError(f"{path}: the export is not of this checkpoint: make it again by: bonn export {path}")
    height, width = exported.info.input_shape[2:]
    multiple = cast(Any, detector.transform).size_divisible
    if height % multiple or width % multiple:
        raise ExportError(f"{path}: the exported size {height}x{width} is no multiple of {multiple}: export it again")
    return on_features(detector, EngineBackbone(exported, cast(int, backbone.out_channels)), (height, width))


def on_features(detector: Detector, backbone: nn.Module, size: Size) -> Detector:
    """Put a detector's transform and heads on another backbone that takes images of one size; in place."""
    detector.transform = Padded(detector.transform, size)
    detector.backbone = backbone
    for module in detector.modules():
        if isinstance(module, MultiScaleRoIAlign):
            # It takes a level's stride from the first images it sees, without their padding, and keeps it
            features = backbone(torch.zeros(1, 3, *size))
            module(features, [torch.tensor([[0.0, 0.0, 8.0, 8.0]])], [size])
    return detector


__all__ = ["EngineBackbone", "Padded", "load_detector", "on_features", "padded_size"]
