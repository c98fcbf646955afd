"""The real-valued network that ``distill`` learns from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bonn_plugin.checkpoint import CONFIG, load_packed, load_weights
from bonn_plugin.errors import BonnError, ModelError, one_line
from bonn_plugin.models import ModelBuildError, build_model
from bonn_plugin.modifiers.base import RunOf
from bonn_plugin.modifiers.distill import FolderOf, TeacherSource, TimmNetwork
from bonn_plugin.recipe import Recipe, RecipeError, needed_runs, recipe_of_run


class TeacherLoader:
    """Loads teachers for the run of ``recipe`` in ``folder``.

    Args:
        recipe: the student's.
        folder: the student's; runs of other recipes lie beside it.
        example: (B, C, H, W), an input of the student.
    """

    def __init__(self, recipe: Recipe, folder: Path, example: Tensor | None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.example = example

    def __call__(self, source: TeacherSource) -> nn.Module:
        """Return the teacher, in eval mode.

        Raises:
            RecipeError: it is the run of a recipe that can't be found.
            ModelError: it is not there, does not fit its weights, or makes other outputs than the student needs.
        """
        try:
            teacher = self._make(source)
        except (ModelError, RecipeError):  # the place is in them already, or the session puts it there
            raise
        except ModelBuildError as error:
            raise ModelError(f"the teacher: {error}", ("teacher", error.key)) from error
        except BonnError as error:
            raise ModelError(f"the teacher: {error}", ("teacher",)) from error
        self._fits(teacher.eval())
        return teacher

    def _make(self, source: TeacherSource) -> nn.Module:
        if isinstance(source, TimmNetwork):
            return self._network(source)
        return self._packed(self._folder(source))

    def _folder(self, source: RunOf | FolderOf) -> Path:
        if isinstance(source, FolderOf):
            return Path(source.folder)
        path = next(path for path, run in needed_runs(self.recipe) if run == source)
        return self.folder.parent / recipe_of_run(self.recipe, source, path).name

    def _packed(self, folder: Path) -> nn.Module:
        if folder.absolute() == self.folder.absolute():
            raise ModelError(f"the teacher is this run's own folder, {folder}", ("teacher",))
        if (folder / "training").is_dir() and not (folder / CONFIG).exists():
            raise ModelError(f"the teacher: the run in {folder} is not finished", ("teacher",))
        return load_packed(folder)

    def _network(self, source: TimmNetwork) -> nn.Module:
        network = build_model(source.name, self.recipe.model.num_classes, source.args)
        weights = load_weights(source.weights)
        own = network.state_dict()
        for name, target in own.items():
            if name.endswith("num_batches_tracked"):
                weights.setdefault(name, target)
            if name not in weights:
                raise ModelError(
                    f"the teacher: {source.weights} has no {name!r}, which {source.name} needs", ("teacher", "weights")
                )
            if weights[name].shape != target.shape:
                raise ModelError(
                    f"the teacher: {name!r} of {source.weights} has shape {tuple(weights[name].shape)}, "
                    f"{source.name} with {self.recipe.model.num_classes} classes needs {tuple(target.shape)}",
                    ("teacher", "weights"),
                )
        network.load_state_dict({name: weights[name] for name in own})
        return network

    @torch.no_grad()
    def _fits(self, teacher: nn.Module) -> None:
        if self.example is None:
            return
        try:
            logits = teacher(self.example.cpu())
        except Exception as error:
            raise ModelError(
                f"the teacher does not take the student's images, {tuple(self.example.shape[1:])}: {one_line(error)}",
                ("teacher",),
            ) from error
        classes = self.recipe.model.num_classes
        if getattr(logits, "shape", None) != (len(self.example), classes):
            made = tuple(logits.shape[1:]) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ModelError(f"the teacher makes {made} of an image, the student has {classes} classes", ("teacher",))


__all__ = ["TeacherLoader"]
