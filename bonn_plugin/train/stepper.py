"""One optimizer step: micro-batches, mixed precision, averaging over processes, and the moving average of weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bonn_plugin.collective import mean_over_ranks
from bonn_plugin.nn.synced_norm import restore_norms, synchronise_norms
from bonn_plugin.optim import make_optimizer, make_scheduler
from bonn_plugin.recipe import Recipe
from bonn_plugin.sampling import seed_step
from bonn_plugin.session import Session
from bonn_plugin.train.device import amp_dtype
from bonn_plugin.train.task import Task, placed
from bonn_plugin.train.world import World

Losses = Mapping[str, Tensor]


@dataclass(frozen=True)
class Taken:
    """A step.

    Attributes:
        losses: means over the micro-batches by name, scalars without gradient.
        moved: whether the optimizer moved; False where the step was bad and the recipe lets it be skipped.
    """

    losses: Losses
    moved: bool = True


class WholeStep(nn.Module):
    """Network, task's loss and modifiers' losses as one module: DDP must see every parameter that gets a gradient."""

    def __init__(self, task: Task, session: Session, device: torch.device, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.network = session.model
        self.own = nn.ModuleList(session.own_modules())
        self.task = task
        self.session = session
        self.device = device
        self.autocast = autocast

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch, and the single losses by name without gradient."""
        mixed: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            mixed = torch.autocast(self.device.type, self.autocast)
        with mixed:
            made = self.task.step(self.network, batch, self.device)
        terms = self.session.loss(labels=made.labels, images=made.images, outputs=made.outputs)
        loss = terms.with_task(sum(made.losses.values(), terms.zero))
        return loss, {name: value.detach() for name, value in {**made.losses, **terms.terms}.items()}


class Stepper:
    """Everything that a step moves.

    Args:
        recipe: what to do.
        task: its losses.
        session: its model is prepared, and on the device.
        device: where.
        world: the processes that take the step together.

    Raises:
        BonnError: the optimizer can't be made.
    """

    def __init__(self, recipe: Recipe, task: Task, session: Session, device: torch.device, world: World) -> None:
        training = recipe.training
        self.recipe = recipe
        self.session = session
        self.device = device
        self.world = world
        self.model = model = session.model
        self.steps = session.clock.steps_per_epoch
        self._norms = synchronise_norms(model) if training.sync_norms and world.ranks > 1 else {}
        if training.channels_last:
            model.to(memory_format=torch.channels_last)
        groups = session.param_groups()
        with placed(recipe, "training", "optimizer"):
            self.optimizer = make_optimizer(training.optimizer, groups)
        self.scheduler = make_scheduler(training, self.optimizer, self.steps)
        self.amp = amp_dtype(recipe, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        self.ema: ModelEmaV3 | None = None
        if training.ema is not None:
            with session.detached():  # the copy must not carry the session's hooks
                self.ema = ModelEmaV3(model, decay=training.ema)
        if training.compile:
            model.compile()
        self._whole = WholeStep(task, session, device, self.amp)
        self._shared: DistributedDataParallel | None = None
        self._shared_epoch = -1

    def take(self, epoch: int, step: int, parts: Sequence[Any]) -> Taken:
        """Take one step.

        Args:
            epoch: from 0.
            step: of the epoch, from 0.
            parts: this process's micro-batches.
        """
        training = self.recipe.training
        seed_step(training.seed, epoch, step, self.world.rank)
        before = self._buffers() if training.skip_bad_steps else None
        self.optimizer.zero_grad()
        if epoch != self._shared_epoch:
            self._shared, self._shared_epoch = None, epoch
        losses = self._gradients(parts)
        if self.world.ranks > 1 and self._shared is None:
            self._share()
        if training.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_grad)
        bad = before is not None and self._bad(losses)
        if bad:
            assert before is not None
            self._put_back(before)
            self.optimizer.zero_grad()
            self.session.skip_step()
        else:
            self.session.before_step()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.session.step()
            if self.ema is not None:
                self.ema.update(self.model, step=epoch * self.steps + step + 1)
        self.scheduler.step_update(epoch * self.steps + step + 1)
        return Taken(losses, moved=not bad)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Lend the model with the weights that are measured: the moving average where the recipe keeps one."""
        if self.ema is None:
            yield self.model
            return
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema.module.state_dict())
        try:
            yield self.model
        finally:
            self.model.load_state_dict(own)

    def release(self) -> nn.Module:
        """Return the plain trained model, with the moving average where there is one; no step can be taken after."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        restore_norms(self.model, self._norms)
        self._norms = {}
        return self.model.to(memory_format=torch.contiguous_format)

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": {} if self.ema is None else dict(self.ema.module.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])

    def _gradients(self, parts: Sequence[Any]) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        for i, batch in enumerate(parts):
            last = i == len(parts) - 1
            alone: AbstractContextManager[Any] = nullcontext()
            if self._shared is not None and not last:
                alone = self._shared.no_sync()
            with alone:
                loss, losses = (self._shared or self._whole)(batch)
                self.scaler.scale(loss if len(parts) == 1 else loss / len(parts)).backward()
            for name, value in losses.items():
                share = value / len(parts)
                means[name] = means[name] + share if name in means else share
        return means

    def _share(self) -> None:
        """Average the gradients of an epoch's first step, and leave those of its other steps to DDP.

        DDP must know whether there are parameters without a gradient, such as mu and sigma outside their windows;
        windows are whole epochs, so the first step shows it.
        """
        parameters = [p for p in self._whole.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = mean_over_ranks(parameter.grad)
        options: dict[str, Any] = {"find_unused_parameters": any(p.grad is None for p in parameters)}
        known = inspect.signature(DistributedDataParallel).parameters
        renamed = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options[renamed] = not self.recipe.training.sync_norms  # without it the first process's statistics count
        self._shared = DistributedDataParallel(self._whole, **options)

    def _bad(self, losses: Losses) -> bool:
        """Return whether loss or gradient of any process is not finite; with the scaler of float16 the loss alone."""
        worst = sum(float(value) for value in losses.values())
        if not self.scaler.is_enabled():
            grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            worst += float(nn.utils.get_total_norm(grads))
        return self.world.most([float(not math.isfinite(worst))])[0] > 0

    def _buffers(self) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        """Return what a forward pass changes: statistics of norms, thresholds that follow their input."""
        kept = []
        for root in (self.model, *self.session.own_modules()):
            learned = {name for name, _ in root.named_parameters() if not name.endswith("threshold")}
            kept.append((root, {n: t.clone() for n, t in root.state_dict().items() if n not in learned}))
        return kept

    @staticmethod
    def _put_back(kept: list[tuple[nn.Module, dict[str, Tensor]]]) -> None:
        for root, tensors in kept:
            root.load_state_dict(tensors, strict=False)
