"""Data sets by recipe, and the loaders whose order a resumed run repeats."""

from bonn_plugin.data.classification import load_splits
from bonn_plugin.data.detection import DetectionSplits, Target, collate_detections, load_detection_splits
from bonn_plugin.data.splits import (
    SizedDataset,
    Splits,
    evaluation_loader,
    train_loader,
)

__all__ = [
    "DetectionSplits",
    "SizedDataset",
    "Splits",
    "Target",
    "collate_detections",
    "evaluation_loader",
    "load_detection_splits",
    "load_splits",
    "train_loader",
]
