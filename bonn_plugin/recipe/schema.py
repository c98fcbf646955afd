"""The recipe: what a run is, validated and frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, SerializeAsAny, field_validator
from timm.optim import list_optimizers

from bonn_plugin.modifiers import near_names
from bonn_plugin.modifiers.base import FrozenModel, ModifierConfig, Real
from bonn_plugin.recipe.data import DataConfig
from bonn_plugin.recipe.model import NetworkConfig
from bonn_plugin.recipe.positions import Path, SourceMap

Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]

PARAMETER_ROLES = ("weight", "modulation", "mu", "sigma", "threshold", "feature_sigma", "group_sigma", "rest")
"""Roles of parameters: latent 1-bit kernels, w, mu, sigma, activation thresholds, sigma_m, the spread of merged
filters, and all others."""

ParameterRole = Literal["weight", "modulation", "mu", "sigma", "threshold", "feature_sigma", "group_sigma", "rest"]


class OptimizerConfig(FrozenModel):
    """An optimizer of timm.

    Attributes:
        name: name in ``timm.optim.list_optimizers()``.
        lr: learning rate.
        weight_decay: decay of the latent kernels and of the rest's weights; never of norms, biases, w, mu,
            sigma and thresholds.
        momentum: where the optimizer has one.
        lr_by_role: learning rates of single roles.
    """

    name: Annotated[str, Field(min_length=1)] = "sgd"
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 0.0
    lr_by_role: dict[ParameterRole, Positive] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        names = [str(known) for known in list_optimizers()]
        if name not in names:
            raise ValueError(f"timm has no optimizer named {name!r}.{near_names(name, names)}")
        return name


class ScheduleConfig(FrozenModel):
    """A learning-rate schedule of timm, in whole epochs except ``cosine`` and ``linear``, which move with each step.

    Attributes:
        name: kind of schedule.
        milestones: epochs at which ``multistep`` multiplies by ``gamma``.
        gamma: factor of ``multistep`` and ``step``.
        every: epochs between the steps of ``step``.
        warmup_epochs: linear warm-up from a hundredth of the rate.
        final_lr: where ``cosine`` and ``linear`` end, as a share of the learning rate.
    """

    name: Literal["constant", "multistep", "step", "cosine", "linear"] = "constant"
    milestones: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    every: Count | None = None
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0

    def problems(self, epochs: int) -> Iterator[tuple[Path, str]]:
        """Yield (path, message) for keys that this kind of schedule would ignore or can't use."""
        used = {
            "multistep": {"milestones", "gamma"},
            "step": {"every", "gamma"},
            "cosine": {"final_lr"},
            "linear": {"final_lr"},
        }
        allowed = {"name", "warmup_epochs"} | used.get(self.name, set())
        for key in sorted(self.model_fields_set - allowed):
            yield (key,), f"{key!r} has no meaning for schedule {self.name!r}"
        if self.name == "multistep":
            if not self.milestones:
                yield (), "schedule 'multistep' needs milestones"
            elif list(self.milestones) != sorted(set(self.milestones)):
                yield ("milestones",), "milestones must rise"
            elif self.milestones[-1] >= epochs:
                last = self.milestones[-1]
                yield ("milestones",), f"milestone {last} lies after the training, which has {epochs} epochs"
        if self.name == "step" and self.every is None:
            yield (), "schedule 'step' needs 'every', the epochs between two steps"
        if self.warmup_epochs >= epochs and self.warmup_epochs:
            yield ("warmup_epochs",), f"warm-up of {self.warmup_epochs} epochs leaves nothing of {epochs}"


class TrainingConfig(FrozenModel):
    """How long and with what.

    Attributes:
        epochs: passes over the training set.
        batch_size: samples a step, over all processes; the last, smaller batch of an epoch is dropped.
        optimizer: see ``OptimizerConfig``.
        schedule: see ``ScheduleConfig``.
        seed: of weights, order and augmentation.
        label_smoothing: of the cross entropy.
        clip_grad: largest norm of the gradient; None for no clipping.
        amp: automatic mixed precision: ``auto`` is bfloat16 on a GPU and off on a CPU.
        accumulate: micro-batches that a process takes one after the other for one step: the gradient is that of
            the whole batch, but norms and first values of thresholds see the micro-batches.
        sync_norms: with several processes, batch norms take their statistics over all of them.
        channels_last: memory format of weights and images.
        compile: compile the network by ``torch.compile``.
        ema: decay of a moving average of all weights and statistics (timm's ModelEmaV3), which is then what is
            measured, packed and reported; None for none.
        skip_bad_steps: how many steps of the run whose loss or gradient is not finite are left out; each step
            then waits for the device.
    """

    epochs: Annotated[int, Field(ge=1, le=100_000)]
    batch_size: Count
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_grad: Positive | None = None
    amp: Literal["auto", "off", "bfloat16", "float16"] = "auto"
    accumulate: Annotated[int, Field(ge=1, le=65_536)] = 1
    sync_norms: bool = True
    channels_last: bool = False
    compile: bool = False
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    skip_bad_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0

    def problems(self) -> Iterator[tuple[Path, str]]:
        """Yield (path, message) for keys that do not fit each other."""
        if self.batch_size % self.accumulate:
            yield ("accumulate",), f"a batch_size of {self.batch_size} can't be cut into {self.accumulate} equal parts"
        for path, message in self.schedule.problems(self.epochs):
            yield ("schedule", *path), message


class RecipeName(FrozenModel):
    """The name of a run, which is also that of its folder."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Recipe(RecipeName):
    """One run: a network, its data, its training, and the modifiers in order.

    ``load_recipe`` makes one from a file and knows the place of each mistake; it is what to use.
    """

    version: Literal[1] = 1
    model: SerializeAsAny[NetworkConfig]
    data: SerializeAsAny[DataConfig]
    training: TrainingConfig
    modifiers: tuple[SerializeAsAny[ModifierConfig], ...] = ()

    _source: SourceMap = PrivateAttr(default_factory=SourceMap)

    @property
    def source(self) -> SourceMap:
        """Where its parts stood in the file."""
        return self._source

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all settings, defaults included: equal for recipes that mean the same run."""
        return hashlib.sha256(self.model_dump_json(by_alias=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Recipes are equal that mean the same run, wherever they were written."""
        return self.fingerprint == other.fingerprint if isinstance(other, Recipe) else NotImplemented

    def __hash__(self) -> int:
        """Agree with equality."""
        return hash(self.fingerprint)
