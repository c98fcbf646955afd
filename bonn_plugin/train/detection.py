"""Detection: the detectors' own losses, and COCO's mean average precision."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bonn_plugin.collective import gather_objects
from bonn_plugin.data import Target, collate_detections, evaluation_loader, load_detection_splits
from bonn_plugin.errors import BonnError, DataError, ModelError, TrainingError, one_line
from bonn_plugin.recipe import Recipe, recipe_model
from bonn_plugin.report import Precision
from bonn_plugin.sampling import ALONE, Share
from bonn_plugin.train.task import Scores, Step, placed, training_batches

TOLERANCE = 1e-3
"""Largest difference of a raw output between two forms of one network, relative to the largest output."""
METRICS = {"test_map": "map", "test_map50": "map_50", "test_map75": "map_75"}

Found = Mapping[str, Tensor]
"""The detections in one image: ``boxes`` (N, 4) x1 y1 x2 y2 in pixels, ``scores`` (N,), ``labels`` (N,)."""


class Detection:
    """See ``Task``.

    Raises:
        DataError: the recipe's data set is not there, or has other classes; or pycocotools is missing.
    """

    headline = ("test_map", "mAP")

    def __init__(self, recipe: Recipe, *, pin: bool = False, share: Share = ALONE) -> None:
        self.recipe = recipe
        training, workers = recipe.training, recipe.data.workers
        with placed(recipe, "data"):
            _need_pycocotools()
            self.splits = load_detection_splits(recipe.data, recipe.model.num_classes)
        self.loader, self.sampler = training_batches(recipe, self.splits, share, pin=pin, collate=collate_detections)
        collate = collate_detections
        self.test = evaluation_loader(self.splits, training.batch_size, workers, pin, collate)
        self.own_test = evaluation_loader(self.splits, training.batch_size, workers, pin, collate, share)
        self.sizes = (len(self.splits.train), len(self.splits.test))
        size = recipe.data.image_size
        self.image_shape = (3, size, size)

    def build(self) -> nn.Module:
        """See ``Task``."""
        model = recipe_model(self.recipe)
        with placed(self.recipe, "model"):
            check_detector(model, *self.splits.train[0])
        return model

    def step(self, model: nn.Module, batch: Any, device: torch.device) -> Step:
        """See ``Task``."""
        images, targets = batch
        images = [image.to(device, non_blocking=True) for image in images]
        return Step(model(images, [_to_learn(target, device) for target in targets]))

    def calibration(self) -> Iterator[Tensor]:
        """See ``Task``; images of several sizes come one by one."""
        loader, _ = training_batches(self.recipe, self.splits, ALONE, collate=collate_detections)
        for images, _ in loader:
            if len({image.shape for image in images}) == 1:
                yield torch.stack(images)
            else:
                yield from (image[None] for image in images)

    def measure(self, model: nn.Module, device: torch.device) -> Scores:
        """See ``Task``."""
        model.eval()
        found, targets = self._found(lambda images: model([image.to(device) for image in images]), self.own_test)
        everyone = gather_objects((found, targets))
        return mean_average_precision(
            [one for part, _ in everyone for one in part], [one for _, part in everyone for one in part]
        )

    def measure_by(self, predict: Callable[[list[Tensor]], Sequence[Found]]) -> Scores:
        """Return the measurements of whatever makes detections of a list of images, (3, H, W) on the CPU."""
        return mean_average_precision(*self._found(predict, self.test))

    @torch.no_grad()
    def _found(
        self, predict: Callable[[list[Tensor]], Sequence[Found]], loader: DataLoader[Any]
    ) -> tuple[list[Found], list[Target]]:
        found: list[Found] = []
        targets: list[Target] = []
        for images, truth in loader:
            found += [{key: value.cpu() for key, value in one.items()} for one in predict(images)]
            targets += truth
        return found, targets

    def describe(self, scores: Scores) -> str:
        """See ``Task``."""
        return f"mAP {scores['test_map']:.3f}, mAP50 {scores['test_map50']:.3f}, mAP75 {scores['test_map75']:.3f}"

    @torch.no_grad()
    def compare(self, trained: nn.Module, converted: nn.Module, packed: nn.Module, *, exact: bool) -> Precision:
        """See ``Task``."""
        identical, lost = True, 0.0
        before: list[Found] = []
        after: list[Found] = []
        targets: list[Target] = []
        for images, truth in self.test:
            here, saved, there = trained(images), converted(images), packed(images)
            pairs = ((saved, there), (here, there)) if exact else ((saved, there),)
            same = all(equal_detections(a, b) for a, b in pairs)
            identical = identical and same
            if not same:
                _compare_raw(converted, packed, images)
            if not (exact and same):
                lost = max(lost, _compare_raw(trained, packed, images, allowed=TOLERANCE if exact else float("inf")))
            before += here
            after += there
            targets += truth
        scores = mean_average_precision(before, targets), mean_average_precision(after, targets)
        return Precision(
            samples=self.sizes[1],
            trained_map=scores[0]["test_map"],
            packed_map=scores[1]["test_map"],
            trained_map50=scores[0]["test_map50"],
            packed_map50=scores[1]["test_map50"],
            trained_map75=scores[0]["test_map75"],
            packed_map75=scores[1]["test_map75"],
            identical_detections=identical,
            conversion_difference=0.0 if exact else lost,
        )


def mean_average_precision(found: Sequence[Found], targets: Sequence[Target]) -> dict[str, float]:
    """Return COCO's mAP, mAP50 and mAP75 from 0 to 1 by torchmetrics and pycocotools.

    Ignored objects count as COCO's crowds do: what is found there is neither right nor wrong. Without any object to
    find each measurement is -1, as COCO has it.

    An image whose ``image_id`` came before is left out: of several processes two may have been given it.

    Args:
        found: detections by image.
        targets: what is there, in the same order.
    """
    from torchmetrics.detection import MeanAveragePrecision

    first = {int(target["image_id"]): i for i, target in reversed(list(enumerate(targets)))}
    chosen = sorted(first.values())
    meter = MeanAveragePrecision(
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),  # its own are float32: a recall of 1/5 misses 0.2
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        backend="pycocotools",
        sync_on_compute=False,
    )
    meter.warn_on_many_detections = False
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells its steps
        meter.update(
            [dict(found[i]) for i in chosen],
            [
                {
                    "boxes": targets[i]["boxes"],
                    "labels": targets[i]["labels"],
                    "iscrowd": targets[i]["ignored"].long(),
                }
                for i in chosen
            ],
        )
        values = meter.compute()
    return {name: float(values[key]) for name, key in METRICS.items()}


def equal_detections(one: Sequence[Found], other: Sequence[Found]) -> bool:
    """Whether boxes, scores and labels of all images are equal bit for bit."""
    pairs = zip(one, other, strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


@torch.no_grad()
def check_detector(model: nn.Module, image: Tensor, target: Target) -> None:
    """Raise ModelError where a copy of ``model`` makes no losses of an image and its target."""
    try:
        with torch.random.fork_rng(devices=[]):
            target = _to_learn(target, torch.device("cpu"))
            losses = copy.deepcopy(model).train()([image, image], [target, target])
            broken = [name for name, value in losses.items() if not bool(torch.isfinite(value))]
    except BonnError:
        raise
    except Exception as error:
        raise ModelError(
            f"the detector does not take the images of the data set, {tuple(image.shape)}: {one_line(error)}"
        ) from error
    if broken:
        raise ModelError(f"the detector's {broken[0]} loss of an image of the data set is not a number")


def _to_learn(target: Target, device: torch.device) -> Any:
    """Return the target without what is to be ignored, as torchvision's detectors take it."""
    kept = ~target["ignored"]
    return {key: value[kept].to(device, non_blocking=True) for key, value in _objects(target).items()}


def _objects(target: Target) -> dict[str, Tensor]:
    return {"boxes": target["boxes"], "labels": target["labels"]}


def _compare_raw(one: nn.Module, other: nn.Module, images: list[Tensor], allowed: float = TOLERANCE) -> float:
    """Return the largest difference of the raw outputs; raise TrainingError where it is more than ``allowed``."""
    largest = 0.0
    for image in images:
        a, b = (_raw(model, image[None]) for model in (one, other))
        difference = float((a - b).abs().max())
        if not difference <= allowed * max(1.0, float(a.abs().max())):
            raise TrainingError(
                f"the reloaded checkpoint's raw outputs differ from the trained detector's by {difference:.3g}: "
                "a fault of this package"
            )
        largest = max(largest, difference)
    return largest


def _raw(model: nn.Module, image: Tensor) -> Tensor:
    probe: Any = model.probe
    numbers: Tensor = probe(image)
    return numbers


def _need_pycocotools() -> None:
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise DataError(
            "detection is measured by pycocotools, which is not installed: pip install 'bonn_plugin[detection]'"
        ) from None


__all__ = ["Detection", "check_detector", "equal_detections", "mean_average_precision"]
