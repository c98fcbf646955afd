"""The algorithm ``bonn``: binarised convolutions, with the Bayesian kernel loss at hand."""

from __future__ import annotations

import json
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
from bonn_plugin.inc.base import KERNEL_LOSS, SelectorConfig, example_input, pack_layers, validated
from bonn_plugin.inc.pruning import attach_merges, settle_merges
from bonn_plugin.modifiers import (
    BinarizeConfig,
    Clock,
    KernelLossConfig,
    PrepareContext,
    make_modifier,
    model_kernel_loss,
)
from bonn_plugin.nn import BimodalPrior, BinaryConv2d, PackedConv2d

ALGORITHM = "bonn"
_KERNEL_LOSS_READ = "_bonn_kernel_loss_read"
_VERSION_SEEN = "_bonn_version_seen"


@register_config(framework_name=FRAMEWORK_NAME, algo_name=ALGORITHM, priority=0)
class BonnConfig(SelectorConfig):
    """Binarise convolutions, with the Bayesian kernel loss at hand; names as in ``SelectorConfig``.

    Args:
        lambda_: weight of the kernel loss; 0 for none.
        nu: variance of the quantisation error.
        ste: gradient of the activation's sign: ``"clip"`` or ``"polynomial"``.
        bound: half width of the clip.
        threshold: a learned threshold per input channel: ``"auto"``, ``"always"`` or ``"never"``.
        white_list: what to take; ``"*"`` is the default selection, None nothing but what is set locally.

    Raises:
        BonnError: a value makes no sense.
    """

    name = ALGORITHM
    op_type: ClassVar[str] = "Conv2d"

    def __init__(
        self,
        lambda_: float = 1e-4,
        nu: float = 1e-3,
        ste: str = "clip",
        bound: float = 1.0,
        threshold: str = "auto",
        white_list: Any = DEFAULT_WHITE_LIST,
    ) -> None:
        super().__init__(white_list=white_list)
        self.lambda_ = lambda_
        self.nu = nu
        self.ste = ste
        self.bound = bound
        self.threshold = threshold
        self.binarize_config(("re:.*",))
        if lambda_ != 0:
            validated("BonnConfig", KernelLossConfig, {"lambda": lambda_, "nu": nu})
        self._finish(white_list)

    def binarize_config(self, targets: tuple[str, ...]) -> BinarizeConfig:
        """Return the settings of the ``binarize`` modifier for these convolutions."""
        settings = {"targets": targets, "ste": self.ste, "bound": self.bound, "threshold": self.threshold}
        config: BinarizeConfig = validated("BonnConfig", BinarizeConfig, settings)
        return config

    @classmethod
    def get_config_set_for_tuning(cls) -> BonnConfig:
        """Return the default configuration, for users who tune over everybody's configurations."""
        return cls()


@register_algo(name=ALGORITHM)  # type: ignore[untyped-decorator]
def bonn_entry(
    model: nn.Module, configs_mapping: Mapping[tuple[str, str], Any], mode: Mode = Mode.QUANTIZE, **kwargs: Any
) -> nn.Module:
    """Do for the framework what it asks of the algorithm ``bonn``.

    Args:
        model: changed in place.
        configs_mapping: configurations by (name, op type).
        mode: ``PREPARE`` for training, ``CONVERT`` to pack, ``QUANTIZE`` for both at once, without training.
        kwargs: ``example_inputs``, a batch (B, C, H, W), is what ``threshold="auto"`` looks at.

    Raises:
        ModelError: the configuration and the model do not fit.
    """
    own = {name: config for (name, _), config in configs_mapping.items() if config.name == ALGORITHM}
    if mode in (Mode.PREPARE, Mode.QUANTIZE):
        _prepare(model, own, kwargs.get("example_inputs"))
    if mode in (Mode.CONVERT, Mode.QUANTIZE):
        _convert(model, tuple(own), told=mode is Mode.QUANTIZE)
    return model


def kernel_loss(model: nn.Module) -> Tensor:
    """Return lambda times the Bayesian kernel loss over the binarised layers of a prepared model, a scalar.

    Raises:
        SessionError: the model was not prepared with a ``BonnConfig``, or is converted already.
    """
    weights: Mapping[str, tuple[float, float]] | None = getattr(model, KERNEL_LOSS, None)
    if weights is None:
        raise SessionError("kernel_loss: the model is not in training with a BonnConfig: call prepare first")
    setattr(model, _KERNEL_LOSS_READ, True)
    total = torch.zeros((), device=next(model.parameters()).device)
    for name, (lambda_, nu) in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, BinaryConv2d)
        total = total + lambda_ * model_kernel_loss((layer,), nu)
    return total


def _prepare(model: nn.Module, configs: Mapping[str, BonnConfig], example: Any) -> None:
    done = [name for name in configs if isinstance(model.get_submodule(name), (BinaryConv2d, PackedConv2d))]
    if done:
        raise ModelError(f"{done[0]} is binarised already: binarising a module twice is an error")
    context = PrepareContext(example_input(model, example), 1)
    groups: dict[str, tuple[BonnConfig, list[str]]] = {}
    for name, config in configs.items():
        settings = json.dumps(config.get_params_dict())
        groups.setdefault(settings, (config, []))[1].append(name)
    for config, names in groups.values():
        make_modifier(config.binarize_config(tuple(names)), Clock(1, 1)).prepare(model, context)
    weights: dict[str, tuple[float, float]] = {}
    for name, config in configs.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, BinaryConv2d)
        layer.register_forward_pre_hook(_after_step)
        if config.lambda_:
            layer.prior = BimodalPrior(layer.weight, KernelLossConfig.model_fields["sigma_floor"].default)
            weights[name] = (config.lambda_, config.nu)
    setattr(model, KERNEL_LOSS, weights)
    attach_merges(model)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(layer: nn.Module, inputs: Any) -> None:
    """Do what a session does after a step: in the framework's loops there is nobody to tell of one.

    The version of w says whether there was one, so that nothing changes between two forward passes of a step.
    """
    assert isinstance(layer, BinaryConv2d)
    if layer.training and layer.modulation._version != getattr(layer, _VERSION_SEEN, None):
        layer.after_step()
        setattr(layer, _VERSION_SEEN, layer.modulation._version)


def _convert(model: nn.Module, names: tuple[str, ...], *, told: bool) -> None:
    if getattr(model, KERNEL_LOSS, None) and not told and not hasattr(model, _KERNEL_LOSS_READ):
        warnings.warn(
            "bonn: the kernel loss was never added in training; put `loss = loss + bonn_plugin.inc.kernel_loss(model)` "
            "before `loss.backward()`, or set lambda_=0",
            stacklevel=2,
        )
    settle_merges(model, told=told)
    pack_layers(model, names)
