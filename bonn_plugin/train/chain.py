"""A chain of runs: what ``model.init_from`` or a teacher needs is trained first, each in its own folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from bonn_plugin.checkpoint import CONFIG, RECIPE
from bonn_plugin.errors import CheckpointError, TrainingError
from bonn_plugin.recipe import Problem, Recipe, RecipeError, earlier_recipes, load_recipe
from bonn_plugin.train.logs import LogOptions
from bonn_plugin.train.runner import STATE, Progress, Runner
from bonn_plugin.train.stop import StopRequest
from bonn_plugin.train.world import World


@dataclass(frozen=True)
class EarlierRun:
    """A run that another one needs; its folder lies beside that one's, under its recipe's name."""

    recipe: Recipe
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether its checkpoint is there.

        Raises:
            CheckpointError: the folder holds the run of another recipe.
        """
        stored = self.folder / "training" / RECIPE
        if stored.exists():
            try:
                same = load_recipe(stored) == self.recipe
            except RecipeError as error:
                raise CheckpointError(f"{self.folder} holds a run whose recipe can't be read: {error}") from None
            if not same:
                raise CheckpointError(
                    f"{self.folder} holds a run of another recipe than {self.recipe.source.source}: "
                    "move it away, or put the new run elsewhere by --out"
                )
        elif (self.folder / CONFIG).exists():
            raise CheckpointError(f"{self.folder} holds a checkpoint that no run left there: move it away")
        return (self.folder / CONFIG).exists()

    def complete(
        self,
        device: torch.device,
        progress: Progress,
        world: World | None = None,
        checkpoint_every: int | None = None,
        stop: StopRequest | None = None,
        logs: LogOptions | None = None,
    ) -> None:
        """Train it, or go on with it, unless it is finished; with the arguments of the runner.

        Raises:
            BonnError: as the runner; or several processes train together, and it is not finished.
        """
        if self.finished:
            progress.line(f"{self.recipe.name}: finished in {self.folder}")
            return
        if world is not None and world.ranks > 1:
            raise TrainingError(
                f"{self.recipe.name} must be finished in {self.folder} before several processes train what needs it: "
                "run it by a torchrun of its own"
            )
        runner = Runner(self.recipe, self.folder, device, progress, logs=logs)
        resume = (self.folder / STATE).exists()
        runner.train(resume=resume, checkpoint_every=checkpoint_every, stop=stop)
        with nullcontext() if stop is None else stop.urgent():
            runner.finish()
        progress.line(f"{self.recipe.name}: packed in {self.folder}")


def earlier_runs(recipe: Recipe, folder: Path) -> Iterator[EarlierRun]:
    """Return what must have run before ``recipe`` runs in ``folder``, in order.

    Raises:
        RecipeError: a recipe of the chain can't be found or has mistakes, or something that no run of the chain
            makes is not there: better told now than after the first run.
        CheckpointError: two runs would share a folder, or one holds the run of another recipe.
    """
    runs = [EarlierRun(earlier, folder.parent / earlier.name) for earlier in earlier_recipes(recipe)]
    for run in runs:
        if run.folder.absolute() == folder.absolute():
            raise CheckpointError(
                f"{folder} is the folder of {run.recipe.name}, which {recipe.name} needs: choose another by --out"
            )
        run.finished  # noqa: B018 - raises where the folder holds something else
    missing = [problem for each in (*(run.recipe for run in runs), recipe) for problem in _missing(each)]
    if missing:
        raise RecipeError(missing)
    return iter(runs)


def _missing(recipe: Recipe) -> Iterator[Problem]:
    names: list[tuple[tuple[str | int, ...], str]] = []
    if isinstance(recipe.model.init_from, str):
        names.append((("model", "init_from"), recipe.model.init_from))
    for i, config in enumerate(recipe.modifiers):
        names += [(("modifiers", i, *path), name) for path, name in config.files()]
    for path, name in names:
        if not Path(name).exists():
            yield recipe.source.problem(path, f"{name}: can't be read: No such file or directory")


__all__ = ["EarlierRun", "earlier_runs"]
