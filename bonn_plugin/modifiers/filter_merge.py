"""``filter_merge``: similar filters become one, stored once and computed once (IJCV 2022, Eq. 3.104-3.107)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from bonn_plugin.collective import from_first
from bonn_plugin.errors import ModelError
from bonn_plugin.functional import group_count, group_filters, sensitivity_keeps
from bonn_plugin.modifiers.base import (
    Batch,
    Modifier,
    ModifierConfig,
    Path,
    PrepareContext,
    Stage,
    WindowConfig,
    register_modifier,
)
from bonn_plugin.modifiers.binarize import method_problem
from bonn_plugin.modifiers.select import match_convolutions, selector_problem
from bonn_plugin.nn import BinaryConv2d, FilterMerge
from bonn_plugin.nn.merge import model_pruning_loss

Share = Annotated[float, Field(gt=0, le=1)]
Keep = Annotated[
    Annotated[Share, Tag("share")] | Annotated[dict[str, Share], Tag("shares")],
    Discriminator(lambda value: "shares" if isinstance(value, dict) else "share"),
]


class FilterMergeConfig(WindowConfig):
    """Settings of ``filter_merge``.

    In the first epoch of the window K-means divides each layer's filters into groups; over the window's
    steps gamma rises from 0 to 1, and from the end of the window on the filters of a group are equal. Epochs
    after the window train the groups' means on.

    Attributes:
        keep: share of filters kept in each layer: max(1, round(keep * C_out)) groups. Or a mapping of
            selectors to shares: the last selector that matches a layer counts, other layers are left alone.
        sensitivity: ``keep`` is the share of all 1-bit weights; how much of it a layer gets follows from the
            variance within its groups.
        loss_weight: weight of the pruning loss; 0 leaves it out.
        nu: variance of the error in the pruning loss.
        sigma_floor: smallest spread of a group, in units of the weights.
        others: what becomes of the filters of a group but its first. ``share``: they give the first one's
            outputs, which is exact. ``zero``: their outputs are zero from the end of the window on, as in
            the paper; that is not exact, and needs epochs after the window to fine-tune.
        seed: of K-means.
    """

    type: Literal["filter_merge"] = "filter_merge"
    keep: Keep
    sensitivity: bool = False
    loss_weight: Annotated[float, Field(ge=0)] = 1e-4
    nu: Annotated[float, Field(gt=0)] = 1e-3
    sigma_floor: Annotated[float, Field(gt=0)] = 1e-3
    others: Literal["share", "zero"] = "share"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    stage: ClassVar[Stage | None] = Stage.TRAIN
    needs: ClassVar[Mapping[str, str]] = {"binarize": "it merges 1-bit filters"}

    def problems(self, epochs: int, before: tuple[ModifierConfig, ...]) -> Iterator[tuple[Path, str]]:
        """See ``ModifierConfig.problems``."""
        yield from super().problems(epochs, before)
        yield from method_problem(self.type, "bonn", before)
        if isinstance(self.keep, dict):
            if self.sensitivity:
                yield ("sensitivity",), "sensitivity chooses the shares of the layers: keep must be one number then"
            if not self.keep:
                yield ("keep",), "keep is an empty mapping: no layer would be merged"
            for selector in self.keep:
                problem = selector_problem(selector)
                if problem:
                    yield ("keep", selector), problem
        if self.others == "zero" and self.window(epochs).stop >= epochs:
            yield ("others",), "others 'zero' needs epochs after the window, to fine-tune without the zeroed filters"


@register_modifier("filter_merge", FilterMergeConfig)
class FilterMergeModifier(Modifier[FilterMergeConfig]):
    """Gives the binarised layers a ``FilterMerge``, groups their filters, and moves gamma with the clock."""

    layers: Mapping[str, BinaryConv2d]
    _keeps: dict[str, float]
    _distances: Mapping[str, float] | None = None

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Choose the layers; see ``Modifier.prepare``."""
        config = self.config
        binary = {n: m for n, m in model.named_modules() if isinstance(m, BinaryConv2d)}
        if not binary:
            raise ModelError("filter_merge finds no binarised layer in the model: binarize it first")
        self._keeps = _keeps(model, binary, config.keep)
        self.layers = {name: binary[name] for name in binary if name in self._keeps}
        for name, layer in self.layers.items():
            if layer.merge is not None:
                raise ModelError(f"the filters of {name} are merged by an earlier filter_merge already", ("keep",))
            filters = layer.geometry.out_channels
            if not config.sensitivity and round(self._keeps[name] * filters) < 1:
                path = _path(model, config.keep, name)
                raise ModelError(
                    f"keep {self._keeps[name]:g} leaves none of the {filters} filters of {name}: "
                    f"it must be at least {1 / filters:g} there",
                    path,
                )
            groups = filters if config.sensitivity else group_count(filters, self._keeps[name])
            layer.merge = FilterMerge(filters, groups, config.sigma_floor).to(layer.weight)

    def on_epoch_begin(self) -> None:
        """Group the filters when the window opens."""
        if self.clock.epoch == self.config.start:
            self._choose_keeps()
            for name, layer in self.layers.items():
                groups = group_filters(layer.weight, self._keeps[name], self.config.seed)
                _merge(layer).start(layer.weight, from_first(groups))  # another CPU may round K-means another way

    def on_step_begin(self) -> None:
        """Move gamma: 0 in the first step of the window, 1 from the last one on."""
        window = self.config.window(self.clock.epochs)
        steps = len(window) * self.clock.steps_per_epoch
        step = (self.clock.epoch - window.start) * self.clock.steps_per_epoch + self.clock.step
        gamma = 1.0 if step >= steps - 1 else max(0.0, step / max(1, steps - 1))
        for layer in self.layers.values():
            _merge(layer).gamma = gamma

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return ``{"pruning": loss_weight * sum over layers}``; the only place where loss_weight is applied."""
        config = self.config
        if config.loss_weight == 0:
            return {}
        layers = tuple(self.layers.values())
        loss = model_pruning_loss([_merge(layer) for layer in layers], [layer.weight for layer in layers], config.nu)
        return {"pruning": config.loss_weight * loss}

    def on_epoch_end(self) -> None:
        """Measure; at the window's end and after it, make the filters of each group their mean."""
        epoch, end = self.clock.epoch, self.config.window(self.clock.epochs).stop
        if epoch < self.config.start:
            return
        self._distances = {n: _merge(layer).distance(layer.weight) for n, layer in self.layers.items()}
        if epoch >= end - 1:
            for layer in self.layers.values():
                _merge(layer).settle(layer.weight)
                _merge(layer).zeroed = self.config.others == "zero"

    def metrics(self) -> Mapping[str, Any]:
        """Return gamma and each layer's ||X - X̄|| / ||X|| at the end of the epoch; nothing before the window."""
        if self._distances is None:
            return {}
        gamma = next(_merge(layer).gamma for layer in self.layers.values())
        return {"gamma": gamma, "within_group_distance": dict(self._distances)}

    def foresee(self) -> None:
        """Put the filters in as many groups as there will be: any groups, since nothing is trained yet."""
        self._choose_keeps()
        for name, layer in self.layers.items():
            merge, filters = _merge(layer), layer.geometry.out_channels
            merge.set_groups(torch.arange(filters) % group_count(filters, self._keeps[name]))
            merge.gamma = 1.0
            merge.zeroed = self.config.others == "zero"

    def state_dict(self) -> dict[str, Any]:
        """Return groups and pull of each layer."""
        merges = {name: _merge(layer) for name, layer in self.layers.items()}
        return {name: {"groups": m.groups.cpu(), "gamma": m.gamma, "zeroed": m.zeroed} for name, m in merges.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        for name, layer in self.layers.items():
            merge = _merge(layer)
            merge.set_groups(state[name]["groups"])
            merge.gamma, merge.zeroed = float(state[name]["gamma"]), bool(state[name]["zeroed"])

    def _choose_keeps(self) -> None:
        if self.config.sensitivity:
            assert isinstance(self.config.keep, float | int)
            shares = sensitivity_keeps([layer.weight for layer in self.layers.values()], self.config.keep)
            self._keeps = dict(zip(self.layers, shares, strict=True))


def _merge(layer: BinaryConv2d) -> FilterMerge:
    assert layer.merge is not None
    return layer.merge


def _keeps(model: nn.Module, binary: Mapping[str, BinaryConv2d], keep: float | dict[str, float]) -> dict[str, float]:
    """Return the share of each layer that is merged. Raises ModelError for a selector that selects none."""
    if not isinstance(keep, dict):
        mergeable = {name: keep for name, layer in binary.items() if layer.geometry.groups == 1}
        if not mergeable:
            raise ModelError("filter_merge: all binarised convolutions are grouped; their filters can't be merged")
        return mergeable
    chosen: dict[str, float] = {}
    for selector, share in keep.items():
        try:
            names = match_convolutions(model, selector)
        except ModelError as error:
            raise ModelError(str(error), ("keep", selector)) from None
        for name in names:
            if name not in binary:
                raise ModelError(f"{name} is not binarised: only 1-bit filters are merged", ("keep", selector))
            if binary[name].geometry.groups > 1:
                raise ModelError(f"{name} is a grouped convolution: its filters can't be merged", ("keep", selector))
            chosen[name] = share
    return chosen


def _path(model: nn.Module, keep: float | dict[str, float], name: str) -> tuple[str, ...]:
    if not isinstance(keep, dict):
        return ("keep",)
    return ("keep", [s for s in keep if name in match_convolutions(model, s)][-1])
