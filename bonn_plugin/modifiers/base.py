"""What a modifier is: a frozen configuration, a behaviour with the hooks of the training lifecycle, a registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from bonn_plugin.errors import BonnError, SessionError

ENTRY_POINT_GROUP = "bonn_plugin.modifiers"
Path = tuple[str | int, ...]


LARGEST_SETTING = 1e30
"""No setting is larger, so that products with it still fit into float32."""


def _in_range(value: float) -> float:
    if abs(value) > LARGEST_SETTING:
        raise PydanticCustomError("too_large", f"is larger than {LARGEST_SETTING:g}")
    return value


Real = Annotated[float, AfterValidator(_in_range)]


class FrozenModel(BaseModel):
    """Settings that let nothing unknown through, coerce nothing and never change."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class RunOf(FrozenModel):
    """The run of another recipe, which is trained first.

    Attributes:
        recipe: a recipe file, or the name of a shipped recipe. Its folder lies beside that of the run which names it.
    """

    recipe: Annotated[str, Field(min_length=1)]


class Stage(IntEnum):
    """What a modifier works on, in the order in which they must stand in a recipe."""

    SHRINK = 1
    """The real-valued network, whose channels it takes away."""
    BINARIZE = 2
    """Real-valued convolutions, which it makes 1-bit."""
    TRAIN = 3
    """The network as it is trained: losses, merging, pruning of what stays real."""
    STORE = 4
    """What stays real after the training, in another number format."""

    @property
    def reason(self) -> str:
        """Why a modifier of this stage can't follow a later one."""
        return {
            Stage.SHRINK: "it takes channels from the real-valued network",
            Stage.BINARIZE: "it takes real-valued convolutions",
            Stage.TRAIN: "it works while the network is trained",
            Stage.STORE: "it comes last",
        }[self]


class ModifierConfig(FrozenModel):
    """Settings of a modifier; subclasses add their own keys.

    Attributes:
        stage: its place in a recipe: no modifier may stand behind one of a later stage. None is anywhere.
        needs: types of which one must stand before it, each with the reason.
    """

    stage: ClassVar[Stage | None] = None
    needs: ClassVar[Mapping[str, str]] = MappingProxyType({})

    type: str

    def order_problems(self, before: tuple[ModifierConfig, ...]) -> Iterator[str]:
        """Yield why it can't stand behind ``before``, the modifiers earlier in the list."""
        types = [config.type for config in before]
        for needed, reason in self.needs.items():
            if needed not in types:
                yield f"{self.type} needs a {needed} before it in the list: {reason}"
        if self.stage is not None:
            for i, config in enumerate(before):
                told = self.type in config.needs and self.type not in types[:i]  # by that one, which misses it
                if config.stage is not None and config.stage > self.stage and not told:
                    yield f"{self.type} must stand before {config.type} in the list: {self.stage.reason}"
                    return

    def runs(self) -> Iterator[tuple[Path, RunOf]]:
        """Yield (path within these settings, run) for each run of another recipe that must be there before."""
        yield from ()

    def files(self) -> Iterator[tuple[Path, str]]:
        """Yield (path within these settings, name) for each file or folder that must be there before."""
        yield from ()

    def problems(self, epochs: int, before: tuple[ModifierConfig, ...]) -> Iterator[tuple[Path, str]]:
        """Yield (path within these settings, message) for what does not fit the rest of the recipe.

        Args:
            epochs: length of the training.
            before: settings of the modifiers that stand earlier in the list.
        """
        yield from ()

    def refusal(self, task: str) -> str | None:
        """Return why the modifier has no meaning in a network for ``task``, or None if it has one."""
        return None


class WindowConfig(ModifierConfig):
    """Settings of a modifier that is active in the epochs ``start <= epoch < end``."""

    start: Annotated[int, Field(ge=0)] = 0
    end: Annotated[int, Field(ge=1)] | None = None

    shortest_window: ClassVar[int] = 1
    """Epochs that the window must have for the modifier to have any effect."""

    def window(self, epochs: int) -> range:
        """Return the epochs in which the modifier is active."""
        return range(self.start, epochs if self.end is None else self.end)

    def problems(self, epochs: int, before: tuple[ModifierConfig, ...]) -> Iterator[tuple[Path, str]]:
        """See ``ModifierConfig.problems``."""
        window = self.window(epochs)
        if window.stop > epochs:
            yield ("end",), f"end {window.stop} lies after the training, which has {epochs} epochs"
        elif len(window) < self.shortest_window:
            path = ("start",) if "start" in self.model_fields_set else ()
            yield (
                path,
                f"the window {window.start} to {window.stop} has {len(window)} epochs; "
                f"{self.type} needs at least {self.shortest_window}",
            )


@dataclass
class Clock:
    """Where the training stands. ``epoch`` and ``step`` (within the epoch) count from 0."""

    epochs: int
    steps_per_epoch: int
    epoch: int = 0
    step: int = 0

    def tick(self) -> bool:
        """Go one step on; return whether that ended an epoch."""
        self.step += 1
        if self.step < self.steps_per_epoch:
            return False
        self.step = 0
        self.epoch += 1
        return True


@dataclass(frozen=True)
class LossTerms:
    """The losses that modifiers add to the task's loss, by name, already weighted by lambda and theta.

    Attributes:
        terms: scalars by name, such as ``"kernel"``.
        task_weight: what the task's own loss is multiplied by; 1 unless a modifier takes its place.
    """

    terms: Mapping[str, Tensor]
    zero: Tensor = field(default_factory=lambda: torch.zeros(()))
    task_weight: float = 1.0

    @property
    def total(self) -> Tensor:
        """Sum of the terms, a scalar with gradient; 0 when no modifier is active.

        Raises:
            SessionError: a modifier weights the task's own loss, which a sum can't do.
        """
        if self.task_weight != 1:
            raise SessionError(
                f"the task's loss has the weight {self.task_weight:g} in this epoch: write "
                "`loss = session.loss(...).with_task(task_loss)` instead of adding .total"
            )
        return self._sum

    def with_task(self, loss: Tensor) -> Tensor:
        """Return the terms and the task's ``loss``, a scalar, with its weight."""
        return self._sum + (self.task_weight * loss if self.task_weight else 0.0)

    @property
    def _sum(self) -> Tensor:
        return sum(self.terms.values(), self.zero)

    def __getitem__(self, name: str) -> Tensor:
        return self.terms[name]


@dataclass(frozen=True)
class Batch:
    """What a loss modifier sees of a step; each is None if it was not given.

    Attributes:
        labels: class indices, (B,).
        images: what the network was given, (B, C, H, W).
        outputs: what it made of them, logits (B, classes).
    """

    labels: Tensor | None = None
    images: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class PrepareContext:
    """What a modifier may use in ``prepare``.

    Attributes:
        example_input: a random input of the right shape, (B, C, H, W).
        epochs: the training's length.
        load_teacher: returns the network that a ``TeacherSource`` of ``distill`` names; None where the model is
            only looked at.
    """

    example_input: Tensor | None
    epochs: int
    load_teacher: Callable[[Any], nn.Module] | None = None


@dataclass(frozen=True)
class ConvertContext:
    """What a modifier may use in ``convert``.

    Attributes:
        calibration: returns batches of training images, (B, C, H, W), the same ones at each call, as the network
            takes them; None where the caller gave none.
        forecast: an image, (1, C, H, W), where only the shapes of what is stored are asked for: the values of
            what a pass would compute then have no meaning. None for a real conversion.
    """

    calibration: Callable[[], Iterable[Tensor]] | None = None
    forecast: Tensor | None = None


C = TypeVar("C", bound=ModifierConfig)


class Modifier(Generic[C]):
    """One entry of a recipe's ``modifiers`` at work. Subclasses override the hooks that they need.

    The order of calls: ``prepare`` once before the optimizer exists, ``on_train_begin``; per epoch
    ``on_epoch_begin``, per step ``on_step_begin``, ``loss``, ``on_before_optimizer_step`` and
    ``on_after_optimizer_step``, ``on_epoch_end``; ``on_train_end``; ``convert``.

    Attributes:
        exact: whether ``convert`` leaves the outputs as they are; where not, the report says what it costs.
    """

    exact: ClassVar[bool] = True

    def __init__(self, config: C, clock: Clock) -> None:
        self.config = config
        self.clock = clock

    @property
    def active(self) -> bool:
        """Whether the current epoch lies in the modifier's window."""
        if isinstance(self.config, WindowConfig):
            return self.clock.epoch in self.config.window(self.clock.epochs)
        return True

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Change the model for training. Raises ModelError where settings and model do not fit."""

    def attach(self) -> None:
        """Put hooks into the model; called after ``prepare``, and again after ``convert``."""

    def detach(self) -> None:
        """Take the hooks away: ``convert`` works on a copy that must not carry them."""

    @property
    def task_weight(self) -> float:
        """What the task's own loss is multiplied by while the modifier is active."""
        return 1.0

    def modules(self) -> Mapping[str, nn.Module]:
        """Return modules with parameters and state of the modifier's own, outside the model, by name."""
        return {}

    def on_train_begin(self) -> None:
        """Before the first step, after ``prepare`` and after a resume."""

    def on_epoch_begin(self) -> None:
        """Before the first step of an epoch."""

    def on_step_begin(self) -> None:
        """At the first forward pass in training mode of a step."""

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the weighted losses of this step by name; called while the modifier is active."""
        return {}

    def on_before_optimizer_step(self) -> None:
        """After the backward pass, before the optimizer moves."""

    def on_after_optimizer_step(self) -> None:
        """After the optimizer has moved."""

    def on_epoch_end(self) -> None:
        """After the last step of an epoch; the clock still shows that epoch."""

    def on_train_end(self) -> None:
        """After the last epoch."""

    def metrics(self) -> Mapping[str, Any]:
        """Return what is worth keeping of the last epoch, JSON-ready; nothing where there is nothing to tell."""
        return {}

    def foresee(self) -> None:
        """Bring a model that was not trained to the shape of the trained one: for a forecast of what is stored."""

    def convert(self, model: nn.Module, context: ConvertContext) -> None:
        """Change a copy of the trained model into what is stored. Raises ModelError where that can't be done."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs besides ``modules``: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""

    @classmethod
    def adds_loss(cls) -> bool:
        """Whether the modifier has losses, so that a step without ``session.loss()`` is a mistake."""
        return cls.losses is not Modifier.losses

    @classmethod
    def needs_before_step(cls) -> bool:
        """Whether a step without ``session.before_step()`` is a mistake."""
        return cls.on_before_optimizer_step is not Modifier.on_before_optimizer_step


@dataclass(frozen=True)
class Registration:
    """A modifier type: its name in recipes, its settings and its behaviour."""

    name: str
    config: type[ModifierConfig]
    modifier: type[Modifier[Any]]


_REGISTRY: dict[str, Registration] = {}


def register_modifier(name: str, config: type[ModifierConfig]) -> Callable[[type[Modifier[Any]]], type[Modifier[Any]]]:
    """Class decorator that makes a modifier known to recipes as ``type: name``.

    Raises:
        ValueError: the name is taken.
    """

    def register(modifier: type[Modifier[Any]]) -> type[Modifier[Any]]:
        if name in _REGISTRY:
            raise ValueError(f"a modifier of type {name!r} is registered already")
        _REGISTRY[name] = Registration(name, config, modifier)
        return modifier

    return register


def registered_modifiers() -> Mapping[str, Registration]:
    """Return all modifier types by name, those of installed entry points included.

    Raises:
        BonnError: an entry point does not load, or loads without registering its name.
    """
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name not in _REGISTRY:
            try:
                point.load()
            except Exception as error:
                raise BonnError(f"entry point {point.name!r} ({point.value}) does not load: {error}") from error
            if point.name not in _REGISTRY:
                raise BonnError(
                    f"entry point {point.name!r} ({point.value}) did not call @register_modifier({point.name!r}, ...)"
                )
    return dict(_REGISTRY)


def make_modifier(config: ModifierConfig, clock: Clock) -> Modifier[Any]:
    """Build the behaviour that belongs to ``config``."""
    try:
        registration = registered_modifiers()[config.type]
    except KeyError:
        raise SessionError(f"no modifier of type {config.type!r} is registered") from None
    return registration.modifier(config, clock)
