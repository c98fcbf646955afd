"""The algorithm ``bonn_pruning``: similar filters of binarised convolutions become one (IJCV 2022, Eq. 3.104-3.107)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from neural_compressor.common.base_config import DEFAULT_WHITE_LIST, register_config
from neural_compressor.common.utils import Mode
from neural_compressor.torch.quantization.config import FRAMEWORK_NAME
from neural_compressor.torch.utils.utility import register_algo
from torch import Tensor, nn

from bonn_plugin.errors import ModelError, SessionError
from bonn_plugin.functional import group_count, group_filters
from bonn_plugin.inc.base import SelectorConfig, pack_layers, validated
from bonn_plugin.modifiers import FilterMergeConfig
from bonn_plugin.nn import BinaryConv2d
from bonn_plugin.nn.merge import FilterMerge, model_pruning_loss

ALGORITHM = "bonn_pruning"
_WANTED = "_bonn_pruning"
_STARTED = "_bonn_pruning_started"


@register_config(framework_name=FRAMEWORK_NAME, algo_name=ALGORITHM, priority=0)
class BonnPruningConfig(SelectorConfig):
    """Merge similar filters of convolutions that ``BonnConfig`` binarises; names as in ``SelectorConfig``.

    Compose it with a ``BonnConfig``, or prepare with one after the other; then add ``pruning_loss`` in training.

    Args:
        keep: share of filters kept in each layer.
        loss_weight: weight of the pruning loss; 0 leaves it out and merges all the same.
        nu: variance of the error in the pruning loss.
        seed: of K-means.
        white_list: what to take; ``"*"`` is the default selection, None nothing but what is set locally.

    Raises:
        BonnError: a value makes no sense.
    """

    name = ALGORITHM
    op_type: ClassVar[str] = "Conv2d.prune"

    def __init__(
        self,
        keep: float = 0.5,
        loss_weight: float = 1e-4,
        nu: float = 1e-3,
        seed: int = 0,
        white_list: Any = DEFAULT_WHITE_LIST,
    ) -> None:
        super().__init__(white_list=white_list)
        self.keep = keep
        self.loss_weight = loss_weight
        self.nu = nu
        self.seed = seed
        settings = {"keep": keep, "loss_weight": loss_weight, "nu": nu, "seed": seed}
        self.merge_config: FilterMergeConfig = validated("BonnPruningConfig", FilterMergeConfig, settings)
        self._finish(white_list)

    @classmethod
    def get_config_set_for_tuning(cls) -> BonnPruningConfig:
        """Return the default configuration, for users who tune over everybody's configurations."""
        return cls()


@register_algo(name=ALGORITHM)  # type: ignore[untyped-decorator]
def bonn_pruning_entry(
    model: nn.Module, configs_mapping: Mapping[tuple[str, str], Any], mode: Mode = Mode.QUANTIZE, **kwargs: Any
) -> nn.Module:
    """Do for the framework what it asks of the algorithm ``bonn_pruning``; it comes before ``bonn``.

    Args:
        model: changed in place.
        configs_mapping: configurations by (name, op type).
        mode: ``PREPARE`` for training, ``CONVERT`` to finish, ``QUANTIZE`` for both at once, without training.
        kwargs: nothing that is used.

    Raises:
        ModelError: a convolution is not binarised, nor going to be.
    """
    own = {name: config for (name, _), config in configs_mapping.items() if config.name == ALGORITHM}
    binarised = {name for (name, _), config in configs_mapping.items() if config.name == "bonn"}
    if mode in (Mode.PREPARE, Mode.QUANTIZE):
        for name in own:
            if name not in binarised and not isinstance(model.get_submodule(name), BinaryConv2d):
                raise ModelError(
                    f"bonn_pruning merges 1-bit filters, and {name} is not binarised: compose it with a BonnConfig, "
                    "BonnConfig() + BonnPruningConfig(), or prepare with a BonnConfig first"
                )
        setattr(model, _WANTED, own)
        attach_merges(model)
    if mode is Mode.CONVERT and not binarised:
        # a second prepare made the framework forget the first: what that one binarised is packed all the same
        settle_merges(model, told=False)
        pack_layers(model, BinaryConv2d.names_in(model))
    return model


def attach_merges(model: nn.Module) -> None:
    """Give the layers that are to be merged, and are binarised by now, what merges them."""
    wanted: Mapping[str, BonnPruningConfig] = getattr(model, _WANTED, {})
    for name, config in wanted.items():
        layer = model.get_submodule(name)
        if isinstance(layer, BinaryConv2d) and layer.merge is None and layer.geometry.groups == 1:
            filters = layer.geometry.out_channels
            groups = group_count(filters, config.keep)
            layer.merge = FilterMerge(filters, groups, config.merge_config.sigma_floor).to(layer.weight)


def pruning_loss(model: nn.Module, progress: float) -> Tensor:
    """Return the weighted Bayesian pruning loss, a scalar, and move the filters towards their groups' means.

    The first call divides the filters into groups.

    Args:
        model: prepared with a ``BonnPruningConfig``.
        progress: share of the merging that is done, 0 to 1: the strength gamma of the pull. At 1 the filters of
            a group are equal.

    Raises:
        SessionError: the model was not prepared for it, or ``progress`` is out of range.
    """
    if not 0 <= progress <= 1:
        raise SessionError(f"pruning_loss: progress is {progress}: it goes from 0 to 1")
    layers = _merged_layers(model)
    if not layers:
        raise SessionError("pruning_loss: the model is not in training with a BonnPruningConfig: call prepare first")
    _start(model, layers)
    wanted: Mapping[str, BonnPruningConfig] = getattr(model, _WANTED)
    total = torch.zeros((), device=next(model.parameters()).device)
    for name, layer in layers.items():
        assert layer.merge is not None
        layer.merge.gamma = progress
        config = wanted[name]
        if config.loss_weight:
            total = total + config.loss_weight * model_pruning_loss([layer.merge], [layer.weight], config.nu)
    return total


def _merged_layers(model: nn.Module) -> dict[str, BinaryConv2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BinaryConv2d) and m.merge is not None}


def _start(model: nn.Module, layers: Mapping[str, BinaryConv2d]) -> None:
    if getattr(model, _STARTED, False):
        return
    setattr(model, _STARTED, True)
    wanted: Mapping[str, BonnPruningConfig] = getattr(model, _WANTED)
    for name, layer in layers.items():
        assert layer.merge is not None
        config = wanted[name]
        layer.merge.start(layer.weight, group_filters(layer.weight, config.keep, config.seed))


def settle_merges(model: nn.Module, *, told: bool) -> None:
    """Make the filters of each group equal; warn where they never learned to be and that is not ``told``."""
    layers = _merged_layers(model)
    if layers and not getattr(model, _STARTED, False):
        if not told:
            warnings.warn(
                "bonn_pruning: pruning_loss was never added in training: the filters are merged now, without learning",
                stacklevel=2,
            )
        _start(model, layers)
    for layer in layers.values():
        assert layer.merge is not None
        layer.merge.gamma = 1.0
