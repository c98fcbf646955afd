"""Runs to draw, made up from a seed: their reports are real, their epochs and weights are not trained."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bonn_plugin import Session, parse_recipe
from bonn_plugin.recipe import recipe_model
from bonn_plugin.report import Accuracy, Precision, Report, make_report

RECIPE = """version: 1
name: tiny
model: {name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 16]}}
data: {name: digits, size: 8}
training:
  epochs: 4
  batch_size: 128
  optimizer: {name: adam, lr: 1e-2}
modifiers:
  - {type: binarize}
  - {type: filter_merge, keep: 0.5}
"""
LAYERS = tuple(f"layer{stage}.0.conv{number}" for stage in (1, 2, 3) for number in (1, 2))
BINS = (-4.0, 4.0, 128)


@cache
def tiny_report() -> Report:
    """Return the report of a small network with merged filters."""
    session = Session(parse_recipe(RECIPE), 1)
    session.prepare(recipe_model(session.recipe))
    for modifier in session.modifiers:
        modifier.foresee()
    accuracy = Accuracy(
        samples=450, trained_top1=91.5, packed_top1=91.5, trained_top5=99.0, packed_top5=99.0, identical_logits=True
    )
    original = recipe_model(session.recipe)
    return make_report("tiny", "net", session.convert(), original, torch.zeros(1, 3, 8, 8), 1000, 2000, accuracy)


def counted(weights: Sequence[float], mean: float, bins: tuple[float, float, int] = BINS) -> list[int]:
    """Count weights over their mean magnitude, one after the other."""
    low, high, number = bins
    counts = [0] * (number + 2)
    for weight in weights:
        value = weight / mean
        if value < low:
            counts[0] += 1
        elif value > high:
            counts[-1] += 1
        else:
            counts[1 + min(number - 1, int((value - low) / (high - low) * number))] += 1
    return counts


def drawn_weights(spread: float, seed: int, number: int = 1000) -> list[float]:
    """Draw weights with two modes at -1 and 1, of one spread."""
    source = random.Random(seed)
    return [source.choice((-1.0, 1.0)) + source.gauss(0, spread) for _ in range(number)]


def moment(
    epoch: int, layers: Sequence[str] = LAYERS, spread: float = 0.5, bins: tuple[float, float, int] = BINS
) -> dict[str, Any]:
    """Return a line of distributions.jsonl."""
    told = {}
    for seed, name in enumerate(layers):
        weights = drawn_weights(spread, 100 * epoch + seed)
        mean = sum(map(abs, weights)) / len(weights)
        counts = counted(weights, mean, bins)
        told[name] = {"mean_abs": mean, "scale": 0.1 + 0.01 * seed * epoch, "counts": counts}
    return {"epoch": epoch, "bins": list(bins), "layers": told}


def record(epoch: int, scores: dict[str, float], *, merged: bool = True) -> dict[str, Any]:
    """Return a line of metrics.jsonl."""
    told: dict[str, Any] = {
        "epoch": epoch,
        "lr": 0.01 / epoch,
        "loss": {"task": 2.3 / epoch, "kernel": -0.01 * epoch},
        "valley": {"mean": 1.4 / epoch, "max": 1.6 / epoch},
        **scores,
        "seconds": 1.5,
    }
    if merged:
        distances = {name: 0.5 / (1 + i) for i, name in enumerate(LAYERS)}
        told["filter_merge"] = {"gamma": epoch / 4, "within_group_distance": distances}
    return told


def write_lines(path: Path, lines: Sequence[object]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_run(
    folder: Path,
    *,
    name: str = "tiny",
    epochs: int = 4,
    metrics: bool = True,
    distributions: bool = True,
    detection: bool = False,
    spread: float = 0.3,
) -> Path:
    """Write what ``bonn report`` reads of a run into ``folder``."""
    folder.mkdir(parents=True)
    report = tiny_report().model_copy(update={"name": name})
    if detection:
        precision = Precision(
            samples=12,
            trained_map=0.61,
            packed_map=0.61,
            trained_map50=0.8,
            packed_map50=0.8,
            trained_map75=0.7,
            packed_map75=0.7,
            identical_detections=True,
        )
        report = report.model_copy(update={"accuracy": precision})
    (folder / "report.json").write_text(report.model_dump_json(), encoding="utf-8")
    if metrics:
        scores = [
            {"test_map": 0.1 * e, "test_map50": 0.2 * e, "test_map75": 0.15 * e}
            if detection
            else {"test_top1": 20.0 * e, "test_top5": 90.0 + 2 * e}
            for e in range(1, epochs + 1)
        ]
        lines = [record(e, told) for e, told in enumerate(scores, 1)]
        write_lines(folder / "training" / "metrics.jsonl", lines)
    if distributions:
        write_lines(folder / "distributions.jsonl", [moment(e, spread=spread) for e in range(epochs + 1)])
    return folder
