"""Classification: cross entropy, top-1 and top-5.

The loss on the test set is the plain cross entropy, without label smoothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from bonn_plugin.collective import gather_objects
from bonn_plugin.data import evaluation_loader, load_splits
from bonn_plugin.errors import ModelError, TrainingError, one_line
from bonn_plugin.recipe import Recipe, recipe_model
from bonn_plugin.report import Accuracy
from bonn_plugin.sampling import ALONE, Share
from bonn_plugin.train.task import Scores, Step, placed, training_batches

TOLERANCE = 1e-3
"""Largest difference of a logit between two forms of one network."""


class Classification:
    """See ``Task``.

    Raises:
        DataError: the recipe's data set is not there, or has another number of classes.
    """

    headline = ("test_top1", "%")

    def __init__(self, recipe: Recipe, *, pin: bool = False, share: Share = ALONE) -> None:
        self.recipe = recipe
        training, workers = recipe.training, recipe.data.workers
        with placed(recipe, "data"):
            self.splits = load_splits(recipe.data, recipe.model.num_classes)
        self.loader, self.sampler = training_batches(recipe, self.splits, share, pin=pin)
        self.test = evaluation_loader(self.splits, training.batch_size, workers, pin)
        self.own_test = evaluation_loader(self.splits, training.batch_size, workers, pin, share=share)
        self.sizes = (len(self.splits.train), len(self.splits.test))
        channels, height, width = self.splits.test[0][0].shape
        self.image_shape = (int(channels), int(height), int(width))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)

    def build(self) -> nn.Module:
        """See ``Task``."""
        model = recipe_model(self.recipe)
        with placed(self.recipe, "model"):
            image = self.splits.test[0][0]
            check_images(model, image, self.recipe.training.batch_size, self.recipe.model.num_classes)
        return model

    def step(self, model: nn.Module, batch: Any, device: torch.device) -> Step:
        """See ``Task``."""
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        if self.recipe.training.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits = model(images)
        return Step({"task": self.criterion(logits, labels)}, labels, images, logits)

    def calibration(self) -> Iterator[Tensor]:
        """See ``Task``."""
        loader, _ = training_batches(self.recipe, self.splits, ALONE)
        for images, _ in loader:
            yield images

    def measure(self, model: nn.Module, device: torch.device) -> Scores:
        """See ``Task``."""
        model.eval()
        return self._scores(lambda images: model(images.to(device)).float().cpu(), self.own_test, together=True)

    def measure_by(self, predict: Callable[[Tensor], Tensor]) -> Scores:
        """Return the measurements of whatever makes logits (B, classes), on the CPU, of images."""
        return self._scores(predict, self.test, together=False)

    @torch.no_grad()
    def _scores(self, predict: Callable[[Tensor], Tensor], loader: DataLoader[Any], *, together: bool) -> Scores:
        top1, top5 = self._meters(together=together)
        loss, samples = 0.0, 0
        for images, labels in loader:
            logits = predict(images)
            top1.update(logits, labels)
            top5.update(logits, labels)
            loss += float(nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
            samples += len(labels)
        shares = gather_objects((loss, samples)) if together else [(loss, samples)]
        return {
            "test_loss": sum(part for part, _ in shares) / sum(count for _, count in shares),
            "test_top1": 100 * float(top1.compute()),
            "test_top5": 100 * float(top5.compute()),
        }

    def describe(self, scores: Scores) -> str:
        """See ``Task``."""
        return f"top-1 {scores['test_top1']:.2f} %, top-5 {scores['test_top5']:.2f} %"

    @torch.no_grad()
    def compare(self, trained: nn.Module, converted: nn.Module, packed: nn.Module, *, exact: bool) -> Accuracy:
        """See ``Task``."""
        meters = (*self._meters(), *self._meters())
        identical, worst, lost = True, 0.0, 0.0
        for images, labels in self.test:
            before, saved, after = trained(images), converted(images), packed(images)
            pairs = ((saved, after), (before, after)) if exact else ((saved, after),)
            identical = identical and all(torch.equal(a, b) for a, b in pairs)
            worst = max(worst, float((saved - after).abs().max()))
            lost = max(lost, float((before - after).abs().max()))
            for meter, logits in zip(meters, (before, before, after, after), strict=True):
                meter.update(logits, labels)
        if not worst <= TOLERANCE or (exact and not lost <= TOLERANCE):
            raise TrainingError(
                f"the reloaded checkpoint's logits differ from the trained model's by {max(worst, lost):.3g}: "
                "a fault of this package"
            )
        top = [100 * float(meter.compute()) for meter in meters]
        return Accuracy(
            samples=self.sizes[1],
            trained_top1=top[0],
            trained_top5=top[1],
            packed_top1=top[2],
            packed_top5=top[3],
            identical_logits=identical,
            conversion_difference=0.0 if exact else lost,
        )

    def _meters(self, *, together: bool = False) -> tuple[MulticlassAccuracy, MulticlassAccuracy]:
        """Return meters of top-1 and top-5; ``together`` they count the samples of all processes."""
        classes = self.recipe.model.num_classes
        top1, top5 = (
            MulticlassAccuracy(classes, top_k=min(k, classes), average="micro", sync_on_compute=together)
            for k in (1, 5)
        )
        return top1, top5


@torch.no_grad()
def check_images(model: nn.Module, image: Tensor, batch_size: int, classes: int) -> None:
    """Raise ModelError where a copy of ``model`` in training mode makes no logits of an ``image``, (C, H, W)."""
    n = min(batch_size, 2)
    try:
        with torch.random.fork_rng(devices=[]):
            logits = copy.deepcopy(model).train()(image.expand(n, *image.shape))
    except Exception as error:
        raise ModelError(
            f"the network does not take the images of the data set, {tuple(image.shape)} in batches of {batch_size}: "
            f"{one_line(error)}"
        ) from error
    if getattr(logits, "shape", None) != (n, classes):
        made = str(tuple(logits.shape)) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(f"the network makes {made} of {n} images, not logits ({n}, {classes})")
