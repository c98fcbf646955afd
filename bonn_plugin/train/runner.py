"""The runner: epochs, states on the disk, and the finished checkpoint."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bonn_plugin.checkpoint import CONFIG, RECIPE, WEIGHTS, load_packed, load_state, load_weights, save_packed
from bonn_plugin.data import epoch_seed
from bonn_plugin.errors import CheckpointError, SessionError, TrainingError, one_line
from bonn_plugin.files import write_file
from bonn_plugin.nn.distribution import latent_valleys
from bonn_plugin.optim import make_optimizer, make_scheduler
from bonn_plugin.recipe import Recipe, dump_recipe, recipe_model
from bonn_plugin.report import Report, make_report, to_markdown
from bonn_plugin.session import Session
from bonn_plugin.train.device import amp_dtype
from bonn_plugin.train.start import Start, start_place
from bonn_plugin.train.task import Task, placed
from bonn_plugin.train.tasks import make_task

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
        self.task: Task = make_task(recipe, pin=device.type == "cuda")
        torch.manual_seed(training.seed)
        model = self.task.build()
        place = start_place(recipe, folder)
        with placed(recipe, "model", "init_from"):
            weights = load_weights(place) if place else None
        start = None if weights is None else Start(recipe, str(place), weights, progress.line)
        if start is not None:
            start.fill(model)
        self.session = Session(recipe, len(self.task.loader))
        self.model = self.session.prepare(model, folder=folder)
        if start is not None:
            start.fill(self.model, added_only=True)
        self.model.to(device)
        for modifier in self.session.modifiers:
            for module in modifier.modules().values():
                module.to(device)
        groups = self.session.param_groups()
        with placed(recipe, "training", "optimizer"):
            self.optimizer = make_optimizer(training.optimizer, groups)
        self.scheduler = make_scheduler(training, self.optimizer, len(self.task.loader))
        self.amp = amp_dtype(recipe, device)
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
        else:
            check_free(self.folder)
            write_file(self.folder / "training" / RECIPE, dump_recipe(self.recipe).encode())
        precision = "float32" if self.amp is None else str(self.amp).removeprefix("torch.")
        self.progress.line(
            f"{self.recipe.name}: {self.recipe.model.name}, {self.task.sizes[0]:,} training and "
            f"{self.task.sizes[1]:,} test samples, device {self.device}, {precision}, "
            f"epochs {self.session.epoch + 1} to {self.session.epochs}"
            if self.session.epoch < self.session.epochs
            else f"{self.recipe.name}: trained already"
        )
        for epoch in range(self.session.epoch, self.session.epochs):
            began = time.perf_counter()
            record = {"epoch": epoch + 1, **self._epoch(epoch)}
            self._check_weights(epoch)
            record.update(self.session.metrics())
            record.update(self.task.measure(self.model, self.device))
            valleys = latent_valleys(self.model)
            if valleys:
                record["valley"] = {"mean": sum(valleys.values()) / len(valleys), "max": max(valleys.values())}
            record["seconds"] = time.perf_counter() - began
            self.metrics.append(record)
            self._save(state)
            self.progress.line(_epoch_line(record, self.session.epochs, self.task.headline))

    def finish(self) -> Outcome:
        """Convert, save, reload from the files, compare and report.

        Raises:
            TrainingError: the reloaded model computes something else than the trained one.
        """
        trained = self.model.eval().cpu()
        for modifier in self.session.modifiers:
            for module in modifier.modules().values():
                module.cpu()
        converted = self.session.convert(self.task.calibration)
        save_packed(converted, self.folder, self.recipe)
        packed = load_packed(self.folder)
        accuracy = self.task.compare(trained, converted, packed, exact=self.session.exact)
        files = [self.folder / name for name in (WEIGHTS, CONFIG, RECIPE)]
        report = make_report(
            self.recipe.name,
            self.recipe.model.name,
            packed,
            recipe_model(self.recipe),
            torch.zeros(1, *self.task.image_shape),
            (self.folder / WEIGHTS).stat().st_size,
            sum(file.stat().st_size for file in files),
            accuracy,
        )
        write_report(self.folder, report)
        return Outcome(self.folder, report)

    def _epoch(self, epoch: int) -> dict[str, Any]:
        training = self.recipe.training
        self.task.sampler.epoch = epoch
        torch.manual_seed(epoch_seed(training.seed, epoch))
        self.model.train()
        sums: dict[str, Tensor] = {}
        steps = len(self.task.loader)
        batches = self.progress.steps(self.task.loader, epoch, self.session.epochs, steps)
        for step, batch in enumerate(batches):
            self.optimizer.zero_grad()
            with self._autocast():
                made = self.task.step(self.model, batch, self.device)
            terms = self.session.loss(labels=made.labels, images=made.images, outputs=made.outputs)
            loss: Any = terms.with_task(sum(made.losses.values(), terms.zero))
            self.scaler.scale(loss).backward()
            if training.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_grad)
            self.session.before_step()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.session.step()
            self.scheduler.step_update(epoch * steps + step + 1)
            for name, value in {**made.losses, **terms.terms}.items():
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
                    self._diverged(f"{name} is not finite", epoch, len(self.task.loader) - 1)

    def _diverged(self, what: str, epoch: int, step: int) -> None:
        last = f"{self.folder / STATE} holds epoch {epoch}" if epoch else "no epoch was finished"
        raise TrainingError(
            f"{what} at epoch {epoch + 1}, step {step + 1}: lower the learning rate or the loss's weight; {last}"
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)

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


def check_free(folder: Path) -> None:
    """Raise CheckpointError where ``folder`` holds a run or a checkpoint."""
    if (folder / STATE).exists() or (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder} holds a run already: go on with it by --resume, or choose another folder by --out"
        )


def write_report(folder: Path, report: Report) -> None:
    """Write report.json and report.md into ``folder``."""
    write_file(folder / "report.json", (report.model_dump_json(indent=1) + "\n").encode())
    write_file(folder / "report.md", to_markdown(report).encode())


def _epoch_line(record: dict[str, Any], epochs: int, headline: tuple[str, str]) -> str:
    losses = "  ".join(f"{name} {value:.4g}" for name, value in record["loss"].items())
    name, unit = headline
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  {losses}  lr {record['lr']:.3g}  "
        f"test {record[name]:.2f} {unit}  {record['seconds']:.1f} s"
    )


__all__ = ["METRICS", "STATE", "Outcome", "Progress", "Runner", "check_free", "write_report"]
