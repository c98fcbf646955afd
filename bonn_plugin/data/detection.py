"""Data sets for detection: digit_scenes, Pascal VOC and COCO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bonn_plugin.data.coco import Coco
from bonn_plugin.data.scenes import digit_scenes
from bonn_plugin.data.splits import SizedDataset, Splits
from bonn_plugin.data.targets import Photos, Target
from bonn_plugin.data.voc import Voc
from bonn_plugin.errors import DataError
from bonn_plugin.recipe import CocoConfig, DataConfig, DigitScenesConfig, VocConfig


@dataclass(frozen=True)
class DetectionSplits(Splits):
    """Training and test set of (image (3, H, W) float32 from 0 to 1, ``Target``).

    Attributes:
        names: the classes' names by label; the background, 0, has none.
    """

    names: dict[int, str]


def load_detection_splits(config: DataConfig, num_classes: int) -> DetectionSplits:
    """Open the data set of a recipe.

    Args:
        config: which one.
        num_classes: of the detector, the background included.

    Raises:
        DataError: it is not where the recipe says, is damaged, or has other classes than the model.
    """
    if isinstance(config, DigitScenesConfig):
        splits = _numbered(*digit_scenes(config))
    elif isinstance(config, VocConfig):
        train, test = Voc(config, config.train, Photos(flip=config.flip)), Voc(config, config.test, Photos(flip=False))
        splits = _numbered(train, test, config.names)
    elif isinstance(config, CocoConfig):
        train_part, test_part = Coco(config, "train", Photos(flip=config.flip)), Coco(config, "val", Photos(flip=False))
        if train_part.names != test_part.names:
            raise DataError(f"{test_part.file}: its categories are not those of {train_part.file.name}")
        largest = max(train_part.names, default=0)
        if largest >= num_classes:
            raise DataError(
                f"{train_part.file}: category ids reach {largest}, so model.num_classes must be {largest + 1} or more, "
                f"the background included; it is {num_classes}"
            )
        return DetectionSplits(train_part, test_part, num_classes, train_part.names)
    else:
        raise DataError(f"no loader for the data set {config.name!r}")
    if splits.classes != num_classes:
        raise DataError(
            f"the data set has {splits.classes} classes, the background included, model.num_classes is {num_classes}"
        )
    return splits


def _numbered(train: SizedDataset, test: SizedDataset, names: tuple[str, ...]) -> DetectionSplits:
    return DetectionSplits(train, test, len(names) + 1, {i + 1: name for i, name in enumerate(names)})


def collate_detections(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Return a batch of images, which may differ in size, and their targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


__all__ = ["DetectionSplits", "Target", "collate_detections", "load_detection_splits"]
