"""``distill``: the network learns the logits of a real-valued teacher.

Hinton et al. 2015; as the distributional loss of ReActNet (ECCV 2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from bonn_plugin.errors import SessionError
from bonn_plugin.functional import distillation_loss
from bonn_plugin.modifiers.base import (
    Batch,
    FrozenModel,
    Modifier,
    Path,
    PrepareContext,
    Real,
    RunOf,
    Stage,
    WindowConfig,
    register_modifier,
)


class FolderOf(FrozenModel):
    """A packed checkpoint, such as the folder of a finished run of a full-precision recipe."""

    folder: Annotated[str, Field(min_length=1)]


class TimmNetwork(FrozenModel):
    """A network of timm's registry with weights from a file.

    Attributes:
        name: its name there.
        weights: a .safetensors file with timm's names, or the folder of a run.
        args: further arguments of ``timm.create_model``.
    """

    name: Annotated[str, Field(min_length=1)]
    weights: Annotated[str, Field(min_length=1)]
    args: dict[str, Any] = Field(default_factory=dict)


def _kind(value: Any) -> str:
    keys = (
        set(type(value).model_fields)
        if isinstance(value, FrozenModel)
        else set(value)
        if isinstance(value, dict)
        else set()
    )
    return "a run" if "recipe" in keys else "a folder" if "folder" in keys else "a network"


TeacherSource = Annotated[
    Annotated[RunOf, Tag("a run")] | Annotated[FolderOf, Tag("a folder")] | Annotated[TimmNetwork, Tag("a network")],
    Discriminator(_kind),
]


class DistillConfig(WindowConfig):
    """Settings of ``distill``.

    Attributes:
        teacher: ``{recipe: NAME}``, the run of another recipe, trained first; ``{folder: DIR}``, a checkpoint; or
            ``{name: NETWORK, weights: FILE}``, a network of timm.
        alpha: weight of the loss.
        temperature: T, by which both networks' logits are divided.
        task_weight: weight of the task's own loss in the window; 0 leaves it out, as ReActNet does.
    """

    type: Literal["distill"] = "distill"
    teacher: TeacherSource
    alpha: Annotated[Real, Field(gt=0)] = 1.0
    temperature: Annotated[Real, Field(gt=0)] = 1.0
    task_weight: Annotated[float, Field(ge=0, le=1)] = 1.0

    stage: ClassVar[Stage | None] = Stage.TRAIN

    def refusal(self, task: str) -> str | None:
        """See ``ModifierConfig``: it compares logits."""
        return None if task == "classification" else f"distill compares logits; for {task} a network makes none"

    def runs(self) -> Iterator[tuple[Path, RunOf]]:
        """See ``ModifierConfig.runs``."""
        if isinstance(self.teacher, RunOf):
            yield ("teacher",), self.teacher

    def files(self) -> Iterator[tuple[Path, str]]:
        """See ``ModifierConfig.files``."""
        if isinstance(self.teacher, FolderOf):
            yield ("teacher", "folder"), self.teacher.folder
        elif isinstance(self.teacher, TimmNetwork):
            yield ("teacher", "weights"), self.teacher.weights


@register_modifier("distill", DistillConfig)
class Distill(Modifier[DistillConfig]):
    """Adds alpha times the divergence from the teacher, which is neither trained nor stored with the student."""

    _teacher: nn.Module | None = None

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Load the teacher; see ``Modifier.prepare``."""
        if context.load_teacher is not None:
            self._teacher = context.load_teacher(self.config.teacher).eval().requires_grad_(False)

    @property
    def task_weight(self) -> float:
        """See ``Modifier.task_weight``."""
        return self.config.task_weight

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return ``{"distill": alpha * loss}``; the only place where alpha is applied."""
        if batch.images is None or batch.outputs is None:
            raise SessionError(
                "distill needs the images and the network's logits: call "
                "session.loss(labels=y, images=x, outputs=logits)"
            )
        if self._teacher is None:
            raise SessionError("distill has no teacher: the session was prepared with training=False")
        loss = distillation_loss(batch.outputs, self.logits(batch.images), self.config.temperature)
        return {"distill": self.config.alpha * loss}

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the teacher's logits (B, classes) of images (B, C, H, W), on their device."""
        assert self._teacher is not None
        first = next(iter(self._teacher.state_dict().values()))
        if first.device != images.device:
            self._teacher.to(images.device)
        logits: Tensor = self._teacher(images)
        return logits


__all__ = ["Distill", "DistillConfig", "FolderOf", "TeacherSource", "TimmNetwork"]
