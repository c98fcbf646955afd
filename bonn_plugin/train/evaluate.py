"""The measurements of a checkpoint folder on its recipe's test set."""

from __future__ import annotations

from pathlib import Path

import torch

from bonn_plugin.checkpoint import load_packed, model_config_of
from bonn_plugin.export.openvino import load as load_export
from bonn_plugin.recipe import Recipe
from bonn_plugin.train.classification import Classification


def evaluate(folder: Path, recipe: Recipe, device: torch.device) -> tuple[float, float, int]:
    """Return top-1 and top-5 in percent of a packed checkpoint on the recipe's test set, and its samples."""
    model = load_packed(folder, device)
    task = _task(folder, recipe)
    scores = task.measure(model, device)
    return scores["test_top1"], scores["test_top5"], task.sizes[1]


def evaluate_export(folder: Path, recipe: Recipe) -> tuple[float, float, int]:
    """Return what ``evaluate`` does, of the folder's OpenVINO export."""
    predict = load_export(folder)
    task = _task(folder, recipe)
    scores = task.measure_by(predict)
    return scores["test_top1"], scores["test_top5"], task.sizes[1]


def _task(folder: Path, recipe: Recipe) -> Classification:
    model = recipe.model.model_copy(update={"num_classes": model_config_of(folder).num_classes})
    changed = recipe.model_copy(update={"model": model})
    return Classification(changed)
