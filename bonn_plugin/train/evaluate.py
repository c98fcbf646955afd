"""The measurements of a checkpoint folder on its recipe's test set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bonn_plugin.checkpoint import load_packed, model_config_of
from bonn_plugin.errors import ExportError
from bonn_plugin.export.detection import load_detector
from bonn_plugin.export.openvino import load as load_export
from bonn_plugin.recipe import Recipe
from bonn_plugin.train.classification import Classification
from bonn_plugin.train.detection import Detection
from bonn_plugin.train.task import Scores, Task
from bonn_plugin.train.tasks import make_task


@dataclass(frozen=True)
class Evaluation:
    """Measurements on so many test samples, by name and in words."""

    scores: Scores
    samples: int
    words: str


def evaluate(folder: Path, recipe: Recipe, device: torch.device) -> Evaluation:
    """Measure a packed checkpoint on the recipe's test set."""
    model = load_packed(folder, device)
    task = _task(folder, recipe)
    return _evaluation(task, task.measure(model, device))


def evaluate_export(folder: Path, recipe: Recipe) -> Evaluation:
    """Do what ``evaluate`` does with the folder's OpenVINO export; a detector's heads run in torch on its features."""
    task = _task(folder, recipe)
    if isinstance(task, Classification):
        return _evaluation(task, task.measure_by(load_export(folder)))
    if isinstance(task, Detection):
        return _evaluation(task, task.measure_by(load_detector(folder)))
    raise ExportError(f"{folder}: the export of a {recipe.model.task} network can't be evaluated")


def _evaluation(task: Task, scores: Scores) -> Evaluation:
    return Evaluation(scores, task.sizes[1], task.describe(scores))


def _task(folder: Path, recipe: Recipe) -> Task:
    """Open the recipe's data for the network of the folder, whatever network the recipe names now."""
    return make_task(recipe.model_copy(update={"model": model_config_of(folder)}))
