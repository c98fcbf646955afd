"""The runner: epochs, states on the disk, and the finished checkpoint."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from bonn_plugin.checkpoint import CONFIG, RECIPE, WEIGHTS, load_packed, load_state, load_weights, save_packed
from bonn_plugin.collective import most_over_ranks
from bonn_plugin.errors import CheckpointError, DataError, Followed, SessionError, TrainingError, one_line
from bonn_plugin.files import write_file
from bonn_plugin.nn.distribution import latent_valleys
from bonn_plugin.recipe import Recipe, dump_recipe, recipe_model
from bonn_plugin.report import Report, make_report, to_markdown
from bonn_plugin.sampling import Corrupt, Share
from bonn_plugin.session import Session
from bonn_plugin.train.book import Book
from bonn_plugin.train.logs import LogOptions, Logs
from bonn_plugin.train.start import Start, start_place
from bonn_plugin.train.stepper import Stepper
from bonn_plugin.train.stop import Stopped, StopRequest
from bonn_plugin.train.task import Task, placed
from bonn_plugin.train.tasks import make_task
from bonn_plugin.train.world import World

STATE = Path("training") / "state.pt"
BAD_STEP = Path("training") / "bad_step.json"
SHOWN = 8
"""Indices that a message shows."""
LOOK_EVERY = 20
"""Steps between two looks at the loss on a GPU: each look waits for the device."""


class Progress(Protocol):
    """Where the runner tells how far it is."""

    def line(self, text: str) -> None:
        """Show a line that stays."""

    def steps(self, batches: Iterable[Any], epoch: int, epochs: int, total: int) -> Iterator[Any]:
        """Pass the batches of an epoch on and show how many are done."""
        ...


class Quiet:
    """A progress that tells nothing: of all processes but the first, and of scripts."""

    def line(self, text: str) -> None:
        """Print nothing."""

    def steps(self, batches: Iterable[Any], epoch: int, epochs: int, total: int) -> Iterator[Any]:
        """Pass ``batches`` on."""
        yield from batches


@dataclass(frozen=True)
class Outcome:
    """A finished run: its folder and its report."""

    folder: Path
    report: Report


class Runner:
    """Trains one recipe in one folder.

    Args:
        recipe: what to do.
        folder: where everything goes; several processes all see it.
        device: where to train.
        progress: where to tell.
        world: the processes that train together; without it this one is alone.
        logs: what to write besides metrics and summary; nothing where it is left out.

    Attributes:
        saved: epochs whose state is on the disk.
        saved_steps: steps of the epoch after them that it holds too.

    Raises:
        BonnError: anything of the recipe does not fit data, model or machine.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        progress: Progress,
        world: World | None = None,
        logs: LogOptions | None = None,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.device = device
        self.progress = progress
        self.world = world = World() if world is None else world
        self.saved = self.saved_steps = 0
        training = recipe.training
        share = Share(world.rank, world.ranks, training.accumulate)
        _check_share(recipe, share)
        self.task: Task = make_task(recipe, pin=device.type == "cuda", share=share)
        self.steps = self.task.sampler.steps
        torch.manual_seed(training.seed)
        model = self.task.build()
        place = start_place(recipe, folder)
        with placed(recipe, "model", "init_from"):
            weights = load_weights(place) if place else None
        start = None if weights is None else Start(recipe, str(place), weights, progress.line)
        if start is not None:
            start.fill(model)
        self.session = Session(recipe, self.steps)
        self.model = self.session.prepare(model, folder=folder)
        if start is not None:
            start.fill(self.model, added_only=True)
        self.model.to(device)
        for module in self.session.own_modules():
            module.to(device)
        self.stepper = Stepper(recipe, self.task, self.session, device, world)
        self.book = Book()
        self.metrics: list[dict[str, Any]] = []
        self.logs = Logs(folder, logs or LogOptions(), self.session.epochs)
        if world.watch is not None:
            world.watch.advice = self._saved_text

    def train(self, *, resume: bool, checkpoint_every: int | None = None, stop: StopRequest | None = None) -> None:
        """Run the epochs that are left, with a state on disk after each.

        Args:
            resume: go on with the run that the folder holds.
            checkpoint_every: optimizer steps between two states in the middle of an epoch; None for none.
            stop: whether to stop; asked after each step.

        Raises:
            CheckpointError: the folder holds a run already and ``resume`` is off, or holds none and it is on.
            TrainingError: the loss is not a number any more; another process died.
            Stopped: ``stop`` was asked; what was trained is on the disk.
        """
        try:
            self._train(StopRequest() if stop is None else stop, checkpoint_every, resume=resume)
        finally:
            self.logs.close()

    def _train(self, stop: StopRequest, checkpoint_every: int | None, *, resume: bool) -> None:
        if resume:
            self._load(self.folder / STATE)
        elif self.world.leads:
            check_free(self.folder)
        self.world.most([0.0])  # none writes before the first has looked
        if not resume and self.world.leads:
            write_file(self.folder / "training" / RECIPE, dump_recipe(self.recipe).encode())
        if self.world.leads:  # a run that was killed after its state may lack the last line
            self.logs.begin(self.metrics, self.session.epoch, resume=resume)
        if self.session.clock.step == 0:
            self._log_weights()
        self.progress.line(self._first_line())
        for epoch in range(len(self.metrics), self.session.epochs):
            if self.session.epoch == epoch:
                self._epoch(epoch, checkpoint_every, stop)
                self._log_weights()
            self._measure(stop)
            self.metrics.append({**self.book.record, "seconds": self.book.seconds})
            self.book.begin()
            self._save()
            self.progress.line(_epoch_line(self.metrics[-1], self.session.epochs, self.task.headline))
            if self.world.most([float(stop.asked)])[0] and epoch + 1 < self.session.epochs:
                raise Stopped

    def finish(self) -> Outcome:
        """Convert, save, reload from the files, compare and report; for one process.

        Raises:
            TrainingError: the reloaded model computes something else than the trained one.
        """
        trained = self.stepper.release().eval().cpu()
        for module in self.session.own_modules():
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

    def _epoch(self, epoch: int, checkpoint_every: int | None = None, stop: StopRequest | None = None) -> None:
        stop = StopRequest() if stop is None else stop
        sampler, first = self.task.sampler, self.session.clock.step
        sampler.epoch, sampler.start = epoch, first
        if first == 0:
            self.book.begin()
        self.model.train()
        groups = _grouped(self.task.loader, self.recipe.training.accumulate)
        batches = self.progress.steps(groups, epoch, self.session.epochs, self.steps - first)
        for step, parts in enumerate(batches, first):
            self.world.mark(f"epoch {epoch + 1}, step {step + 1}")
            taken = self.stepper.take(epoch, step, parts)
            if taken.moved:
                self.book.add(step, taken.losses)
            else:
                self._skipped(epoch, step)
            self.world.mark(f"the end of epoch {epoch + 1}, step {step + 1}")
            last = step == self.steps - 1
            due = checkpoint_every is not None and (epoch * self.steps + step + 1) % checkpoint_every == 0
            if self.device.type == "cpu" or (step + 1) % LOOK_EVERY == 0 or due or last:
                bad, stopping = self.book.look(self.world, stop.asked)
                if bad is not None:
                    self._diverged(bad.what, epoch, bad.step)
                if (due or stopping) and not last:
                    self._check_weights(epoch, step)
                    self._save()
                if stopping and not last:
                    raise Stopped
        self._check_weights(epoch, self.steps - 1)
        self._close(epoch)

    def _close(self, epoch: int) -> None:
        """Note what is known of an epoch before it is measured."""
        lr = max(group["lr"] for group in self.stepper.optimizer.param_groups)
        record: dict[str, Any] = {"epoch": epoch + 1, "lr": lr, "loss": self.book.means()}
        record.update(self.session.metrics())
        valleys = latent_valleys(self.model)
        if valleys:
            record["valley"] = {"mean": sum(valleys.values()) / len(valleys), "max": max(valleys.values())}
        if self.book.skipped:
            record["skipped_steps"] = self.book.skipped
        corrupt = self._corrupt()
        if corrupt:
            record["corrupt_samples"] = len(corrupt)
            self.progress.line(f"{len(corrupt)} training samples can't be read and are skipped: {_few(corrupt)}")
        self.book.record = record

    def _measure(self, stop: StopRequest) -> None:
        # of one process alone: a measurement that is broken off is made again on resume
        urgent = stop.urgent() if self.world.ranks == 1 else nullcontext()
        try:
            with urgent, self.stepper.averaged() as model:
                scores = self.task.measure(model, self.device)
        except Stopped:
            self._save()
            raise
        self.world.mark(f"the measurement of epoch {self.book.record['epoch']}")
        self.book.record.update(scores)

    def _log_weights(self) -> None:
        if self.world.leads:
            self.logs.moment(self.session.epoch, self.model)

    def _corrupt(self) -> list[int]:
        """Return the training samples that no process could read."""
        corrupt: Corrupt | None = getattr(self.task.loader.dataset, "corrupt", None)
        if corrupt is None or not corrupt.limit:
            return []
        corrupt.met.copy_(most_over_ranks(corrupt.met))
        if len(corrupt.indices) > corrupt.limit:
            raise DataError(
                f"{len(corrupt.indices)} training samples can't be read, more than max_corrupt: {corrupt.limit}: "
                f"{_few(corrupt.indices)}"
            )
        return corrupt.indices

    def _skipped(self, epoch: int, step: int) -> None:
        self.book.skipped += 1
        limit = self.recipe.training.skip_bad_steps
        if self.book.skipped > limit:
            self._diverged(f"the loss or its gradient is not finite, for the {limit + 1}. time,", epoch, step)
        samples = _few(self.task.sampler.samples(epoch, step))
        self.progress.line(
            f"epoch {epoch + 1}, step {step + 1}: loss or gradient not finite, step skipped "
            f"({self.book.skipped} of {limit}); samples {samples}"
        )

    def _check_weights(self, epoch: int, step: int) -> None:
        """Stop where the last step, whose loss was fine, left weights that no state should hold."""
        for root in (self.model, *self.session.own_modules()):
            for name, tensor in root.state_dict().items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    self._diverged(f"{name} is not finite", epoch, step)

    def _diverged(self, what: str, epoch: int, step: int) -> NoReturn:
        samples = self.task.sampler.samples(epoch, step)
        place = self.folder / BAD_STEP
        if not self.world.leads:
            raise Followed
        noted = {"epoch": epoch + 1, "step": step + 1, "what": what, "samples": samples}
        write_file(place, (json.dumps(noted) + "\n").encode())
        raise TrainingError(
            f"{what} at epoch {epoch + 1}, step {step + 1}: lower the learning rate or the loss's weight, or look at "
            f"its samples {_few(samples)}, all in {place}; {self._saved_text()}"
        )

    def _saved_text(self) -> str:
        if not (self.saved or self.saved_steps):
            return "no epoch was finished, and no state is saved"
        steps = f" and {self.saved_steps} of {self.steps} steps of the next" if self.saved_steps else ""
        return f"{self.folder / STATE} holds epoch {self.saved}{steps}: go on with --resume"

    def _first_line(self) -> str:
        amp = self.stepper.amp
        precision = "float32" if amp is None else str(amp).removeprefix("torch.")
        together = f", {self.world.ranks} processes" if self.world.ranks > 1 else ""
        if len(self.metrics) == self.session.epochs:
            return f"{self.recipe.name}: trained already"
        step = self.session.clock.step
        return (
            f"{self.recipe.name}: {self.recipe.model.name}, {self.task.sizes[0]:,} training and "
            f"{self.task.sizes[1]:,} test samples, device {self.device}{together}, {precision}, "
            f"epochs {len(self.metrics) + 1} to {self.session.epochs}" + (f", from step {step + 1}" if step else "")
        )

    def _save(self) -> None:
        state = {
            "session": self.session.state_dict(),
            **self.stepper.state_dict(),
            "metrics": self.metrics,
            "epoch": {**self.book.state_dict(self.world.ranks), "corrupt": self._corrupt()},
        }
        if self.world.leads:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_file(self.folder / STATE, buffer.getvalue())
        self.saved, self.saved_steps = self.session.epoch, self.session.clock.step
        if self.world.leads:
            self.logs.write(self.metrics)

    def _load(self, path: Path) -> None:
        if not path.exists():
            raise CheckpointError(f"{path}: no state to resume from; start the run without --resume")
        state = load_state(path)
        try:
            self.session.load_state_dict(state["session"])
            self.stepper.load_state_dict(state)
            self.book.load_state_dict(state["epoch"], self.device)
            corrupt: Corrupt | None = getattr(self.task.loader.dataset, "corrupt", None)
            if corrupt is not None:
                corrupt.met[torch.tensor(state["epoch"]["corrupt"], dtype=torch.long)] = 1
            processes = int(state["epoch"]["processes"])
        except SessionError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:
            raise CheckpointError(f"{path}: does not fit the recipe's run: {one_line(error)}") from error
        self.metrics = state["metrics"]
        self.saved, self.saved_steps = self.session.epoch, self.session.clock.step
        if processes != self.world.ranks:
            norms = "" if self.recipe.training.sync_norms else ", norms see batches of another size"
            self.progress.line(
                f"the state is of {processes} processes, this run has {self.world.ranks}: each step has the same "
                f"samples with the same augmentation, but sums are taken in another order, dropout draws other "
                f"numbers{norms}"
            )


def check_free(folder: Path) -> None:
    """Raise CheckpointError where ``folder`` holds a run or a checkpoint."""
    if (folder / STATE).exists() or (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder} holds a run already: go on with it by --resume, or choose another folder by --out"
        )


def _grouped(loader: Iterable[Any], parts: int) -> Iterator[list[Any]]:
    """Yield a step's micro-batches together."""
    batches = iter(loader)
    while group := list(itertools.islice(batches, parts)):
        yield group


def _check_share(recipe: Recipe, share: Share) -> None:
    size = recipe.training.batch_size
    if size % share.pieces:
        problem = recipe.source.problem(
            ("training", "batch_size"),
            f"batch_size is that of all processes together: {size} can't be cut into equal parts for {share.ranks} "
            f"processes with {share.parts} micro-batches each",
        )
        raise TrainingError(str(problem))


def _few(samples: list[int]) -> str:
    """Return the first indices, and how many there are more."""
    shown = ", ".join(map(str, samples[:SHOWN]))
    return shown if len(samples) <= SHOWN else f"{shown} and {len(samples) - SHOWN} more"


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


__all__ = ["STATE", "Outcome", "Progress", "Runner", "check_free", "write_report"]
