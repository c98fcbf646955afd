"""``channel_prune``: channels of the real-valued network are taken away before it is binarised (torch-pruning)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from bonn_plugin.errors import ModelError, one_line
from bonn_plugin.modifiers.base import (
    Modifier,
    ModifierConfig,
    Path,
    PrepareContext,
    Stage,
    register_modifier,
)
from bonn_plugin.modifiers.layers import real_layers, select_layers
from bonn_plugin.modifiers.select import selector_problem
from bonn_plugin.nn.modes import evaluating
from bonn_plugin.nn.resize import note_unpruned, own_tensors, size_of


class ChannelPruneConfig(ModifierConfig):
    """Settings of ``channel_prune``.

    Attributes:
        ratio: share of the channels that is taken from each group of layers which must have equally many.
        importance: what stays: ``magnitude``, the channels with the largest sum of |weights| in the group's first
            layer; ``group_norm``, those with the largest sum of squares over all layers of the group.
        round_to: the channels that stay are a multiple of this number.
        ignore: selectors of layers whose outputs keep their number; the classifier always does.
    """

    type: Literal["channel_prune"] = "channel_prune"
    ratio: Annotated[float, Field(gt=0, lt=1)]
    importance: Literal["magnitude", "group_norm"] = "group_norm"
    round_to: Annotated[int, Field(ge=1, le=1024)] | None = None
    ignore: Annotated[tuple[str, ...], Field(strict=False)] = ()

    stage: ClassVar[Stage | None] = Stage.SHRINK

    def refusal(self, task: str) -> str | None:
        """See ``ModifierConfig``: it follows channels from the first layer to the last."""
        if task == "classification":
            return None
        return f"channel_prune follows channels through the whole network, which boxes cut in {task}"

    def problems(self, epochs: int, before: tuple[ModifierConfig, ...]) -> Iterator[tuple[Path, str]]:
        """See ``ModifierConfig.problems``."""
        for i, selector in enumerate(self.ignore):
            problem = selector_problem(selector)
            if problem:
                yield ("ignore", i), problem


@register_modifier("channel_prune", ChannelPruneConfig)
class ChannelPrune(Modifier[ChannelPruneConfig]):
    """Prunes in ``prepare``, by the weights that the network starts with; the same each time for the same weights."""

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Take the channels away; see ``Modifier.prepare``."""
        if context.example_input is None:
            raise ModelError("channel_prune needs a look at the network: pass example_inputs")
        ignored = _ignored(model, self.config.ignore)
        before = {name: {n: t.numel() for n, t in own_tensors(m).items()} for name, m in model.named_modules()}
        widths = {name: layer.weight.shape[0] for name, layer in real_layers(model).items()}
        classes = _output_shape(model, context.example_input)
        modes = {module: module.training for module in model.modules()}
        try:
            _prune(model, context, self.config, ignored)
        finally:
            for module, training in modes.items():
                module.training = training
        for name, module in model.named_modules():
            now = {n: t.numel() for n, t in own_tensors(module).items()}
            if now == before[name]:
                continue
            if size_of(module) is None:
                raise ModelError(f"channel_prune took channels from {name}, a {type(module).__name__}: not stored yet")
            note_unpruned(module, before[name])
        if not any(layer.weight.shape[0] < widths[name] for name, layer in real_layers(model).items()):
            raise ModelError(f"ratio {self.config.ratio:g} takes no channel from any layer", ("ratio",))
        if _output_shape(model, context.example_input) != classes:
            raise ModelError("channel_prune changed the network's outputs: name its last layer in 'ignore'")


def _prune(model: nn.Module, context: PrepareContext, config: ChannelPruneConfig, ignored: list[nn.Module]) -> None:
    tp: Any = _torch_pruning()
    # p, how a group's layers are put together, and no scaling: the channels of one group are compared alone
    p, reduction = (1, "first") if config.importance == "magnitude" else (2, "mean")
    scores = tp.importance.GroupMagnitudeImportance(p=p, group_reduction=reduction, normalizer=None)
    names = {module: name for name, module in model.named_modules()}
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("error")
            pruner = tp.pruner.BasePruner(
                model,
                context.example_input,
                importance=scores,
                pruning_ratio=config.ratio,
                ignored_layers=ignored,
                round_to=config.round_to,
            )
            for group in pruner.DG.get_all_groups(
                ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
            ):
                root = group[0][0].target.module
                channels = pruner.DG.get_out_channels(root)
                left = int(channels * (1 - config.ratio))
                if config.round_to is not None:
                    left -= left % config.round_to
                if left < 1:
                    rounding = f", rounded to a multiple of {config.round_to}," if config.round_to else ""
                    raise ModelError(
                        f"ratio {config.ratio:g}{rounding} leaves none of the {channels} channels of {names.get(root)}",
                        ("ratio",),
                    )
            pruner.step()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"torch-pruning can't prune {type(model).__name__}: {one_line(error)}") from error


def _torch_pruning() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ModelError(
            f"channel_prune needs torch-pruning: pip install 'bonn_plugin[prune]' ({one_line(error)})"
        ) from error


def _ignored(model: nn.Module, selectors: tuple[str, ...]) -> list[nn.Module]:
    getter: Any = getattr(model, "get_classifier", None)
    classifier = getter() if callable(getter) else None
    ignored = list(real_layers(classifier).values()) if isinstance(classifier, nn.Module) else []
    return [*ignored, *select_layers(model, selectors, "ignore").values()]


@torch.no_grad()
def _output_shape(model: nn.Module, example: torch.Tensor) -> tuple[int, ...]:
    try:
        with evaluating(model):
            output = model(example)
    except Exception as error:
        raise ModelError(f"the network does not take its input: {one_line(error)}") from error
    return tuple(output.shape) if isinstance(output, torch.Tensor) else ()


__all__ = ["ChannelPrune", "ChannelPruneConfig"]
