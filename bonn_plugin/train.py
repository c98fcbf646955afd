"""The runner: a recipe from the first batch to the verified checkpoint."""

from __future__ import annotations

import copy
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from bonn_plugin.checkpoint import (
    CONFIG,
    RECIPE,
    WEIGHTS,
    load_packed,
    load_state,
    load_weights,
    model_config_of,
    save_packed,
)
from bonn_plugin.data import epoch_seed, evaluation_loader, load_splits, train_loader
from bonn_plugin.errors import BonnError, CheckpointError, ModelError, SessionError, TrainingError, one_line
from bonn_plugin.export.openvino import load as load_export
from bonn_plugin.files import write_file
from bonn_plugin.nn.distribution import latent_valleys
from bonn_plugin.optim import make_optimizer, make_scheduler
from bonn_plugin.recipe import Recipe, dump_recipe, recipe_model
from bonn_plugin.report import Accuracy, Report, make_report, to_markdown
from bonn_plugin.session import Session

STATE = Path("training") / "state.pt"
METRICS = Path("training") / "metrics.jsonl"
LOOK_EVERY = 20
"""Steps between two looks at the loss on a GPU: each look waits for the device."""


class Progress(Protocol):
    """Where the runner tells how far it is."""

    def line(self, text: str) -> None:
        """Show a line that stays."""

    def steps(self, batches: Iterable[Any], epoch: int, epochs: int, total: int) -> Iterator[Any]:
        """Pass the batches of an epoch on and show how many are done."""
        ...


@dataclass(frozen=True)
class Outcome:
    """A finished run: its folder and its report."""

    folder: Path
    report: Report


def choose_device(name: str) -> torch.device:
    """Return the device: ``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        TrainingError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainingError(f"device {name!r} can't be used: {one_line(error)}") from error
    return device


class Runner:
    """Trains one recipe in one folder.

    Args:
        recipe: what to do.
        folder: where everything goes.
        device: where to train.
        progress: where to tell.

    Attributes:
        saved: epochs whose state is on the disk.

    Raises:
        BonnError: anything of the recipe does not fit data, model or machine.
    """

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device, progress: Progress) -> None:
        self.recipe = recipe
        self.folder = folder
        self.device = device
        self.progress = progress
        training = recipe.training
        with _placed(recipe, "data"):
            self.splits = load_splits(recipe.data, recipe.model.num_classes)
        gpu = device.type == "cuda"
        workers = recipe.data.workers
        self.loader, self.sampler = train_loader(self.splits, training.batch_size, training.seed, workers, pin=gpu)
        self.test: DataLoader[Any] = evaluation_loader(self.splits, training.batch_size, workers, pin=gpu)
        torch.manual_seed(training.seed)
        model = recipe_model(recipe)
        with _placed(recipe, "model"):
            _check_images(model, self.splits.test[0][0], training.batch_size, recipe.model.num_classes)
        with _placed(recipe, "model", "init_from"):
            start = load_weights(recipe.model.init_from) if recipe.model.init_from else None
        if start is not None:
            self._start_from(model, start)
        self.session = Session(recipe, len(self.loader))
        self.model = self.session.prepare(model)
        if start is not None:
            self._start_from(model, start, added_only=True)
        self.model.to(device)
        for modifier in self.session.modifiers:
            for module in modifier.modules().values():
                module.to(device)
        groups = self.session.param_groups()
        with _placed(recipe, "training", "optimizer"):
            self.optimizer = make_optimizer(training.optimizer, groups)
        self.scheduler = make_scheduler(training, self.optimizer, len(self.loader))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)
        self.amp = _amp_dtype(recipe, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        self.metrics: list[dict[str, Any]] = []
        self.saved = 0

    def train(self, *, resume: bool) -> None:
        """Run the epochs that are left, with a state on disk after each.

        Raises:
            CheckpointError: the folder holds a run already and ``resume`` is off, or holds none and it is on.
            TrainingError: the loss is not a number any more.
        """
        state = self.folder / STATE
        if resume:
            self._load(state)
        elif state.exists() or (self.folder / CONFIG).exists():
            raise CheckpointError(
                f"{self.folder} holds a run already: go on with it by --resume, or choose another folder by --out"
            )
        else:
            write_file(self.folder / "training" / RECIPE, dump_recipe(self.recipe).encode())
        precision = "float32" if self.amp is None else str(self.amp).removeprefix("torch.")
        self.progress.line(
            f"{self.recipe.name}: {self.recipe.model.name}, {len(self.splits.train):,} training and "
            f"{len(self.splits.test):,} test samples, device {self.device}, {precision}, "
            f"epochs {self.session.epoch + 1} to {self.session.epochs}"
            if self.session.epoch < self.session.epochs
            else f"{self.recipe.name}: trained already"
        )
        for epoch in range(self.session.epoch, self.session.epochs):
            began = time.perf_counter()
            record = {"epoch": epoch + 1, **self._epoch(epoch)}
            self._check_weights(epoch)
            record.update(self.session.metrics())
            record["test_top1"], record["test_top5"] = self._accuracy(self.model)
            valleys = latent_valleys(self.model)
            if valleys:
                record["valley"] = {"mean": sum(valleys.values()) / len(valleys), "max": max(valleys.values())}
            record["seconds"] = time.perf_counter() - began
            self.metrics.append(record)
            self._save(state)
            self.progress.line(_epoch_line(record, self.session.epochs))

    def finish(self) -> Outcome:
        """Convert, save, reload from the files, compare and report.

        Raises:
            TrainingError: the reloaded model computes something else than the trained one.
        """
        trained = self.model.eval().cpu()
        for modifier in self.session.modifiers:
            for module in modifier.modules().values():
                module.cpu()
        save_packed(self.session.convert(), self.folder, self.recipe)
        packed = load_packed(self.folder)
        accuracy = self._compare(trained, packed)
        files = [self.folder / name for name in (WEIGHTS, CONFIG, RECIPE)]
        shape = next(iter(self.test))[0].shape[1:]
        report = make_report(
            self.recipe.name,
            self.recipe.model.name,
            packed,
            recipe_model(self.recipe),
            torch.zeros(1, *shape),
            (self.folder / WEIGHTS).stat().st_size,
            sum(file.stat().st_size for file in files),
            accuracy,
        )
        write_report(self.folder, report)
        return Outcome(self.folder, report)

    def _epoch(self, epoch: int) -> dict[str, Any]:
        training = self.recipe.training
        self.sampler.epoch = epoch
        torch.manual_seed(epoch_seed(training.seed, epoch))
        self.model.train()
        sums: dict[str, Tensor] = {}
        steps = len(self.loader)
        batches = self.progress.steps(self.loader, epoch, self.session.epochs, steps)
        for step, (images, labels) in enumerate(batches):
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            self.optimizer.zero_grad()
            with self._autocast():
                task = self.criterion(self.model(images), labels)
            terms = self.session.loss(labels=labels)
            loss = task + terms.total
            self.scaler.scale(loss).backward()
            if training.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_grad)
            self.session.before_step()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.session.step()
            self.scheduler.step_update(epoch * steps + step + 1)
            for name, value in {"task": task, **terms.terms}.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach()
            if self.device.type == "cpu" or step % LOOK_EVERY == 0 or step == steps - 1:
                self._check(sums, epoch, step)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return {"lr": lr, "loss": {name: float(value) / steps for name, value in sums.items()}}

    def _check(self, sums: dict[str, Tensor], epoch: int, step: int) -> None:
        for name, value in sums.items():
            if not math.isfinite(float(value)):
                self._diverged(f"the {name} loss is {float(value)}", epoch, step)

    def _check_weights(self, epoch: int) -> None:
        """Stop where the last step, whose loss was fine, left weights that no state should hold."""
        roots = [self.model, *(m for modifier in self.session.modifiers for m in modifier.modules().values())]
        for root in roots:
            for name, tensor in root.state_dict().items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    self._diverged(f"{name} is not finite", epoch, len(self.loader) - 1)

    def _diverged(self, what: str, epoch: int, step: int) -> None:
        last = f"{self.folder / STATE} holds epoch {epoch}" if epoch else "no epoch was finished"
        raise TrainingError(
            f"{what} at epoch {epoch + 1}, step {step + 1}: lower the learning rate or the loss's weight; {last}"
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> tuple[float, float]:
        top1, top5 = self._meters()
        model.eval()
        for images, labels in self.test:
            logits = model(images.to(self.device)).float().cpu()
            top1.update(logits, labels)
            top5.update(logits, labels)
        return 100 * float(top1.compute()), 100 * float(top5.compute())

    def _meters(self) -> tuple[MulticlassAccuracy, MulticlassAccuracy]:
        classes = self.recipe.model.num_classes
        top1, top5 = (MulticlassAccuracy(classes, top_k=min(k, classes), average="micro") for k in (1, 5))
        return top1, top5

    @torch.no_grad()
    def _compare(self, trained: nn.Module, packed: nn.Module) -> Accuracy:
        meters = (*self._meters(), *self._meters())
        identical, worst = True, 0.0
        for images, labels in self.test:
            before, after = trained(images), packed(images)
            identical = identical and bool(torch.equal(before, after))
            worst = max(worst, float((before - after).abs().max()))
            for meter, logits in zip(meters, (before, before, after, after), strict=True):
                meter.update(logits, labels)
        if not worst <= 1e-3:
            raise TrainingError(
                f"the reloaded checkpoint's logits differ from the trained model's by {worst:.3g}: "
                "a fault of this package"
            )
        top = [100 * float(meter.compute()) for meter in meters]
        return Accuracy(
            samples=len(self.splits.test),
            trained_top1=top[0],
            trained_top5=top[1],
            packed_top1=top[2],
            packed_top5=top[3],
            identical_logits=identical,
        )

    def _save(self, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(
            {
                "session": self.session.state_dict(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "metrics": self.metrics,
            },
            buffer,
        )
        write_file(path, buffer.getvalue())
        self.saved = self.session.epoch
        self._write_metrics()

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.metrics)
        write_file(self.folder / METRICS, lines.encode())

    def _load(self, path: Path) -> None:
        if not path.exists():
            raise CheckpointError(f"{path}: no state to resume from; start the run without --resume")
        state = load_state(path)
        try:
            self.session.load_state_dict(state["session"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except SessionError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:
            raise CheckpointError(f"{path}: does not fit the recipe's run: {one_line(error)}") from error
        self.metrics = state["metrics"]
        self.saved = self.session.epoch
        self._write_metrics()  # a run that was killed after its state may lack the last line

    @torch.no_grad()
    def _start_from(self, model: nn.Module, weights: dict[str, Tensor], *, added_only: bool = False) -> None:
        """Copy ``weights`` into ``model``; with ``added_only`` what binarisation added, where it is given."""
        place = self.recipe.source.problem(("model", "init_from"), "").__str__()
        classifier = {
            f"{n}.{p}" for n, m in model.named_modules() if m is _classifier(model) for p in ("weight", "bias")
        }
        own = model.state_dict()
        missing = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
        if missing and not added_only:
            raise CheckpointError(
                f"{place}{self.recipe.model.init_from} has no {missing[0]!r}, which {self.recipe.model.name} needs "
                f"({len(missing)} of {len(own)} tensors are missing): is it of another network?"
            )
        for name, target in own.items():
            given = weights.get(name)
            if given is None:
                continue
            if given.shape == target.shape:
                target.copy_(given)
            elif name in classifier:
                if not added_only:
                    shapes = f"{tuple(given.shape)}, needed is {tuple(target.shape)}"
                    self.progress.line(f"init_from: {name} starts anew: the given one has shape {shapes}")
            else:
                raise CheckpointError(
                    f"{place}{self.recipe.model.init_from}: {name!r} has shape {tuple(given.shape)}, "
                    f"{self.recipe.model.name} needs {tuple(target.shape)}"
                )


def write_report(folder: Path, report: Report) -> None:
    """Write report.json and report.md into ``folder``."""
    write_file(folder / "report.json", (report.model_dump_json(indent=1) + "\n").encode())
    write_file(folder / "report.md", to_markdown(report).encode())


def evaluate(folder: Path, recipe: Recipe, device: torch.device) -> tuple[float, float, int]:
    """Return top-1 and top-5 in percent of a packed checkpoint on the recipe's test set, and its samples."""
    model = load_packed(folder, device)
    return _measure(folder, recipe, lambda images: model(images.to(device)).float().cpu())


def evaluate_export(folder: Path, recipe: Recipe) -> tuple[float, float, int]:
    """Return what ``evaluate`` does, of the folder's OpenVINO export."""
    return _measure(folder, recipe, load_export(folder))


@torch.no_grad()
def _measure(folder: Path, recipe: Recipe, predict: Callable[[Tensor], Tensor]) -> tuple[float, float, int]:
    classes = model_config_of(folder).num_classes
    with _placed(recipe, "data"):
        splits = load_splits(recipe.data, classes)
    meters = [MulticlassAccuracy(classes, top_k=min(k, classes), average="micro") for k in (1, 5)]
    for images, labels in evaluation_loader(splits, recipe.training.batch_size, recipe.data.workers):
        logits = predict(images)
        for meter in meters:
            meter.update(logits, labels)
    return 100 * float(meters[0].compute()), 100 * float(meters[1].compute()), len(splits.test)


@contextmanager
def _placed(recipe: Recipe, *path: str | int) -> Iterator[None]:
    """Put the place in the recipe before the message of an error."""
    try:
        yield
    except BonnError as error:
        raise type(error)(str(recipe.source.problem(path, str(error)))) from error


@torch.no_grad()
def _check_images(model: nn.Module, image: Tensor, batch_size: int, classes: int) -> None:
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


def _classifier(model: nn.Module) -> Any:
    getter: Any = getattr(model, "get_classifier", None)
    return getter() if callable(getter) else None


def _amp_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    amp = recipe.training.amp
    if amp == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    if amp == "float16" and device.type == "cpu":
        problem = recipe.source.problem(("training", "amp"), "float16 trains on a GPU alone: use bfloat16 or off")
        raise TrainingError(str(problem))
    return None if amp == "off" else getattr(torch, amp)


def _epoch_line(record: dict[str, Any], epochs: int) -> str:
    losses = "  ".join(f"{name} {value:.4g}" for name, value in record["loss"].items())
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  {losses}  lr {record['lr']:.3g}  "
        f"test {record['test_top1']:.2f} %  {record['seconds']:.1f} s"
    )


__all__ = ["Outcome", "Progress", "Runner", "choose_device", "evaluate", "evaluate_export", "write_report"]
