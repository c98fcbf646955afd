"""The session: what a user with a training loop of his own holds in his hand, and what the runner uses.

It keeps the order of the modifiers, the clock, the losses and the state.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.errors import ModelError, SessionError
from bonn_plugin.modifiers import Batch, Clock, ConvertContext, LossTerms, Modifier, PrepareContext, make_modifier
from bonn_plugin.nn.inputs import image_channels
from bonn_plugin.nn.modes import forget_cached
from bonn_plugin.recipe import Recipe
from bonn_plugin.teacher import TeacherLoader

STATE_VERSION = 1


class Session:
    """Applies a recipe's modifiers to a model and to its training.

    Use, in this order: ``prepare`` the model, make an optimizer from ``param_groups``, then per step
    forward, ``loss``, backward, optimizer, ``step``; at last ``convert``. The clock counts the steps:
    epochs begin and end by themselves.

    Args:
        recipe: what to do.
        steps_per_epoch: optimizer steps an epoch.

    Raises:
        SessionError: ``steps_per_epoch`` is not positive; and from every method that is called out of order.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        if steps_per_epoch < 1:
            problem = recipe.source.problem(
                ("training", "batch_size"),
                f"steps_per_epoch is {steps_per_epoch}: the data set is smaller than one batch of "
                f"{recipe.training.batch_size}; lower training.batch_size",
            )
            raise SessionError(str(problem))
        self.recipe = recipe
        self.clock = Clock(recipe.training.epochs, steps_per_epoch)
        self.modifiers: tuple[Modifier[Any], ...] = tuple(
            make_modifier(config, self.clock) for config in recipe.modifiers
        )
        self._model: nn.Module | None = None
        self._begun = self._ended = False
        self._in_step = False
        self._loss_asked = self._before_asked = False
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def epochs(self) -> int:
        """Length of the training, in epochs."""
        return self.clock.epochs

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; after a resume the one to go on with."""
        return self.clock.epoch

    @property
    def model(self) -> nn.Module:
        """The model under training. Raises SessionError before ``prepare``."""
        if self._model is None:
            raise SessionError("there is no model yet: call session.prepare(model) first")
        return self._model

    def prepare(
        self,
        model: nn.Module,
        example_input: Tensor | None = None,
        folder: str | os.PathLike[str] | None = None,
        *,
        training: bool = True,
    ) -> nn.Module:
        """Let each modifier change ``model``, in place; before the optimizer is made.

        Args:
            model: the network, its weights as they should start.
            example_input: (B, C, H, W); one of the recipe's image size is made where there is none.
            folder: where this run goes, ``runs/NAME`` where not given: runs of other recipes that a modifier
                needs lie beside it.
            training: False where the network is only looked at: what only its training needs is not loaded.

        Returns:
            The same model.

        Raises:
            SessionError: the session has a model already.
            ModelError: recipe and model do not fit; the message begins with the place in the recipe.
        """
        if self._model is not None:
            raise SessionError("session.prepare was called before: one session serves one model")
        if example_input is None:
            example_input = self._example(model)
        place = Path("runs", self.recipe.name) if folder is None else Path(folder)
        loader = TeacherLoader(self.recipe, place, example_input) if training else None
        context = PrepareContext(example_input, self.clock.epochs, loader)
        for i, modifier in enumerate(self.modifiers):
            with self._placed(i):
                modifier.prepare(model, context)
        self._model = model
        self._attach()
        return model

    def param_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer, by role, with ``lr`` and ``weight_decay`` of the recipe.

        No weight decay on w, mu, sigma, thresholds, norms and biases. Each group has a ``role``.
        """
        optimizer = self.recipe.training.optimizer
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for parameter, role in self._roles():
            decays = role == "weight" or (role == "rest" and parameter.dim() > 1)
            groups.setdefault((role, decays), []).append(parameter)
        rates: Mapping[str, float] = {str(k): v for k, v in optimizer.lr_by_role.items()}
        unused = sorted(set(rates) - {role for role, _ in groups})
        if unused:
            problem = self.recipe.source.problem(
                ("training", "optimizer", "lr_by_role", unused[0]),
                f"no parameter has the role {unused[0]!r} in this recipe",
                at_key=True,
            )
            raise ModelError(str(problem))
        return [
            {
                "params": parameters,
                "role": role,
                "lr": rates.get(role, optimizer.lr),
                "weight_decay": optimizer.weight_decay if decays else 0.0,
            }
            for (role, decays), parameters in groups.items()
        ]

    def loss(
        self, labels: Tensor | None = None, images: Tensor | None = None, outputs: Tensor | None = None
    ) -> LossTerms:
        """Return the modifiers' losses of this step; add ``.total`` to the task's loss before ``backward``.

        Where a modifier weights the task's own loss, take ``.with_task(loss)`` instead.

        Args:
            labels: class indices of the batch, (B,), which ``feature_loss`` needs.
            images: what the network was given, (B, C, H, W).
            outputs: its logits, (B, classes).

        Raises:
            SessionError: out of order, or something that an active modifier needs is missing.
        """
        if self._ended:
            raise SessionError(f"the training is over: the recipe has {self.clock.epochs} epochs")
        self._begin_step()
        self._loss_asked = True
        terms: dict[str, Tensor] = {}
        batch = Batch(labels, images, outputs)
        for modifier in self.modifiers:
            if modifier.active and modifier.adds_loss():
                for name, value in modifier.losses(batch).items():
                    terms[name] = terms[name] + value if name in terms else value
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        task_weight = math.prod(modifier.task_weight for modifier in self.modifiers if modifier.active)
        return LossTerms(terms, torch.zeros((), device=device), task_weight)

    def before_step(self) -> None:
        """Call after ``backward`` and before ``optimizer.step()``, where a modifier asks for it."""
        self._before_asked = True
        for modifier in self.modifiers:
            modifier.on_before_optimizer_step()

    def step(self) -> None:
        """Count one optimizer step; call after ``optimizer.step()``.

        Raises:
            SessionError: a modifier that adds a loss is active and ``loss`` was not called in this step, or
                one that works before the optimizer and ``before_step`` was not called.
        """
        if self._ended:
            raise SessionError(f"the training is over: the recipe has {self.clock.epochs} epochs")
        self._begin_step()
        for modifier in self.modifiers:
            if not self._loss_asked and modifier.active and modifier.adds_loss():
                raise SessionError(
                    f"{modifier.config.type} is active, but its loss was never added: put "
                    "`loss = loss + session.loss(labels=y).total` before `loss.backward()`"
                )
            if not self._before_asked and modifier.active and modifier.needs_before_step():
                raise SessionError(
                    f"{modifier.config.type} works on the gradients: put `session.before_step()` "
                    "before `optimizer.step()`"
                )
        for modifier in self.modifiers:
            modifier.on_after_optimizer_step()
        self._count_step()

    def skip_step(self) -> None:
        """Count a step whose optimizer step was left out; instead of ``step``.

        Raises:
            SessionError: the training is over.
        """
        if self._ended:
            raise SessionError(f"the training is over: the recipe has {self.clock.epochs} epochs")
        self._begin_step()
        self._count_step()

    def _count_step(self) -> None:
        self._in_step = self._loss_asked = self._before_asked = False
        if self.clock.step + 1 == self.clock.steps_per_epoch:
            for modifier in self.modifiers:
                modifier.on_epoch_end()
        if self.clock.tick() and self.clock.epoch == self.clock.epochs:
            self._ended = True
            for modifier in self.modifiers:
                modifier.on_train_end()

    def metrics(self) -> dict[str, Any]:
        """Return what the modifiers tell of the last epoch, JSON-ready, by their type (``type.2`` for a second one)."""
        found: dict[str, Any] = {}
        for modifier in self.modifiers:
            values = modifier.metrics()
            if values:
                kind = modifier.config.type
                same = sum(name.partition(".")[0] == kind for name in found)
                found[f"{kind}.{same + 1}" if same else kind] = values
        return found

    @property
    def exact(self) -> bool:
        """Whether the converted model computes what the trained one does, up to the order of sums."""
        return all(modifier.exact for modifier in self.modifiers)

    def convert(self, calibration: Callable[[], Iterable[Tensor]] | None = None) -> nn.Module:
        """Return a packed copy of the model, in eval mode; the model itself stays as it is.

        Args:
            calibration: returns batches of training images, (B, C, H, W), the same ones at each call, for passes
                that choose their scales by what the layers see.

        Raises:
            SessionError: there is no model.
            ModelError: a modifier can't do its part; the message begins with the place in the recipe.
        """
        return self._convert(ConvertContext(calibration))

    def forecast(self, example: Tensor) -> nn.Module:
        """Return what ``convert`` would, but that what a pass would compute has the right shapes and no meaning.

        Nothing is calibrated and neural-compressor is not imported.

        Args:
            example: (1, C, H, W).

        Raises:
            SessionError: there is no model.
            ModelError: a modifier can't do its part; the message begins with the place in the recipe.
        """
        return self._convert(ConvertContext(forecast=example))

    def own_modules(self) -> list[nn.Module]:
        """Return the modules with parameters or state that modifiers keep outside the model."""
        return [module for modifier in self.modifiers for module in modifier.modules().values()]

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Take the hooks out of the model while the context is open: for who copies it."""
        self._detach()
        forget_cached(self.model)
        try:
            yield
        finally:
            self._attach()

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs besides the model's and the optimizer's state."""
        return {
            "version": STATE_VERSION,
            "recipe": self.recipe.fingerprint,
            "steps_per_epoch": self.clock.steps_per_epoch,
            "epoch": self.clock.epoch,
            "step": self.clock.step,
            "modifiers": [
                {
                    "modules": {name: module.state_dict() for name, module in modifier.modules().items()},
                    "state": modifier.state_dict(),
                }
                for modifier in self.modifiers
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; after ``prepare``.

        Raises:
            SessionError: the state is from another version, another recipe or another number of steps.
        """
        self.model  # noqa: B018 - raises before prepare
        if state.get("version") != STATE_VERSION:
            raise SessionError(f"the state has version {state.get('version')}, this is version {STATE_VERSION}")
        if state["recipe"] != self.recipe.fingerprint:
            raise SessionError(
                f"the state is from another recipe than {self.recipe.name!r} as it is now: resume with the recipe "
                "that the run was started with, or start a new run"
            )
        if state["steps_per_epoch"] != self.clock.steps_per_epoch:
            raise SessionError(
                f"the state has {state['steps_per_epoch']} steps an epoch, the data now gives "
                f"{self.clock.steps_per_epoch}: the data set has changed"
            )
        self.clock.epoch, self.clock.step = int(state["epoch"]), int(state["step"])
        self._ended = self.clock.epoch >= self.clock.epochs
        for modifier, saved in zip(self.modifiers, state["modifiers"], strict=True):
            for name, module in modifier.modules().items():
                module.load_state_dict(saved["modules"][name])
            modifier.load_state_dict(saved["state"])

    def _convert(self, context: ConvertContext) -> nn.Module:
        model = self.model
        with self.detached():
            packed = copy.deepcopy(model)
        packed.eval()
        for i, modifier in enumerate(self.modifiers):
            with self._placed(i):
                modifier.convert(packed, context)
        return packed.eval()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what modifiers do, such as K-means, is not the network's
    def _begin_step(self) -> None:
        self.model  # noqa: B018 - raises before prepare
        if self._in_step:
            return
        self._in_step = True
        if not self._begun:
            self._begun = True
            for modifier in self.modifiers:
                modifier.on_train_begin()
        if self.clock.step == 0:
            for modifier in self.modifiers:
                modifier.on_epoch_begin()
        for modifier in self.modifiers:
            modifier.on_step_begin()

    @contextmanager
    def _placed(self, i: int) -> Iterator[None]:
        """Put the place of the recipe's ``i``-th modifier before the message of an error."""
        try:
            yield
        except ModelError as error:
            problem = self.recipe.source.problem(("modifiers", i, *error.path), str(error))
            raise ModelError(str(problem), error.path) from error

    def _attach(self) -> None:
        def begin(module: nn.Module, _: Any) -> None:
            if module.training and not self._ended:
                self._begin_step()

        self._hook = self.model.register_forward_pre_hook(begin)
        for modifier in self.modifiers:
            modifier.attach()

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        for modifier in self.modifiers:
            modifier.detach()

    def _roles(self) -> Iterator[tuple[nn.Parameter, str]]:
        """Yield every trainable parameter once with its role."""
        roots = [self.model, *self.own_modules()]
        seen: set[int] = set()
        for root in roots:
            for module in root.modules():
                roles: Mapping[str, str] = getattr(module, "parameter_roles", {})
                for name, parameter in module.named_parameters(recurse=False):
                    if id(parameter) not in seen and parameter.requires_grad:
                        seen.add(id(parameter))
                        yield parameter, roles.get(name, "rest")

    def _example(self, model: nn.Module) -> Tensor | None:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            return None
        size = self.recipe.data.image_size
        channels = image_channels(model, self.recipe.model.args, (size, size))
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(2, channels, size, size, generator=generator)
        return example.to(first.weight)
