"""timm's optimizers and schedulers from a recipe."""

from __future__ import annotations

from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from bonn_plugin.errors import BonnError, one_line
from bonn_plugin.recipe import OptimizerConfig, TrainingConfig

WARMUP_START = 0.01
"""Where a warm-up begins, as a share of the learning rate."""


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """Return timm's optimizer ``config.name`` over groups that carry ``lr`` and ``weight_decay``.

    Raises:
        BonnError: timm has no such optimizer, or it can't be made here.
    """
    try:
        optimizer = create_optimizer_v2(
            groups, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
    except Exception as error:
        raise BonnError(f"optimizer {config.name!r} can't be made: {one_line(error)}") from error
    if getattr(optimizer, "is_second_order", False):
        raise BonnError(f"optimizer {config.name!r} needs second derivatives, which a sign has not: take another")
    return optimizer


def make_scheduler(config: TrainingConfig, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    """Return timm's scheduler for the recipe's schedule; it moves by ``step_update`` after each step."""
    schedule = config.schedule
    total, warmup = config.epochs * steps_per_epoch, schedule.warmup_epochs * steps_per_epoch
    # timm takes a list of epochs or steps alike: counting steps throughout leaves one way to advance
    common: dict[str, Any] = {
        "warmup_t": warmup,
        "warmup_lr_init": config.optimizer.lr * WARMUP_START,
        "t_in_epochs": False,
        "warmup_prefix": False,
    }
    final = config.optimizer.lr * schedule.final_lr
    if schedule.name == "cosine":
        return CosineLRScheduler(optimizer, total - warmup, lr_min=final, **{**common, "warmup_prefix": True})
    if schedule.name == "linear":
        return PolyLRScheduler(optimizer, total - warmup, 1.0, lr_min=final, **{**common, "warmup_prefix": True})
    if schedule.name == "step":
        assert schedule.every is not None
        return StepLRScheduler(optimizer, schedule.every * steps_per_epoch, schedule.gamma, **common)
    milestones = [m * steps_per_epoch for m in schedule.milestones] if schedule.name == "multistep" else []
    return MultiStepLRScheduler(optimizer, milestones, schedule.gamma, **common)
