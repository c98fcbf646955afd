"""The face to Intel neural-compressor: importing this module registers ``BonnConfig`` and the algorithm ``bonn``.

Use it as any configuration of that framework::

    from neural_compressor.torch.quantization import prepare, convert
    from bonn_plugin.inc import BonnConfig, kernel_loss

    model = prepare(model, BonnConfig(), example_inputs=images)
    ...  # train; loss = criterion(model(x), y) + kernel_loss(model)
    model = convert(model)
    save_packed(model, "out", ModelConfig(name="resnet18", num_classes=1000))

The framework's own ``load`` returns None for an algorithm that is not its own: use ``load_packed``.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from neural_compressor.common.base_config import DEFAULT_WHITE_LIST, GLOBAL, LOCAL, register_config
from neural_compressor.common.utils import Mode
from neural_compressor.torch.quantization.config import FRAMEWORK_NAME, TorchBaseConfig
from neural_compressor.torch.utils.utility import register_algo
from pydantic import ValidationError
from torch import Tensor, nn

from bonn_plugin.errors import BonnError, ModelError, SessionError
from bonn_plugin.modifiers import (
    BinarizeConfig,
    Clock,
    KernelLossConfig,
    PrepareContext,
    make_modifier,
    model_kernel_loss,
    near_names,
    select_convolutions,
)
from bonn_plugin.modifiers.select import selector_problem
from bonn_plugin.nn import BimodalPrior, BinaryConv2d, PackedConv2d, replace_module
from bonn_plugin.recipe.positions import parse_yaml

ALGORITHM = "bonn"
OP_TYPE = "Conv2d"
_KERNEL_LOSS = "_bonn_kernel_loss"
_KERNEL_LOSS_READ = "_bonn_kernel_loss_read"


@register_config(framework_name=FRAMEWORK_NAME, algo_name=ALGORITHM, priority=0)
class BonnConfig(TorchBaseConfig):  # type: ignore[misc]
    """Binarise convolutions, with the Bayesian kernel loss at hand.

    Names in ``white_list`` and in ``set_local`` are this package's selectors: an exact name, ``re:`` with a pattern
    that matches the whole name, or ``class:``; or a type, ``torch.nn.Conv2d``. A name that matches nothing is an
    error here. Without names every plain convolution larger than 1x1 is taken, but the first and depthwise ones.

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
        for entry in white_list if isinstance(white_list, list) else []:
            _check_selector(entry)
        self.binarize_config(("re:.*",))
        if lambda_ != 0:
            _validated(KernelLossConfig, {"lambda": lambda_, "nu": nu})
        self._post_init()

    def binarize_config(self, targets: tuple[str, ...]) -> BinarizeConfig:
        """Return the settings of the ``binarize`` modifier for these convolutions."""
        settings = {"targets": targets, "ste": self.ste, "bound": self.bound, "threshold": self.threshold}
        config: BinarizeConfig = _validated(BinarizeConfig, settings)
        return config

    def set_local(self, operator_name_or_list: Any, config: BonnConfig) -> BonnConfig:
        """Give some convolutions settings of their own; names as in the class's description."""
        for name in operator_name_or_list if isinstance(operator_name_or_list, list) else [operator_name_or_list]:
            _check_selector(name)
        super().set_local(operator_name_or_list, config)
        return self

    def get_model_info(self, model: nn.Module, *_: Any, **__: Any) -> list[tuple[str, str]]:
        """Return (name, op type) of what this configuration takes, in a float model or in a prepared one.

        Raises:
            ModelError: a name matches nothing.
        """
        prepared = BinaryConv2d.names_in(model)
        if prepared:
            return [(name, OP_TYPE) for name in prepared]
        names: dict[str, None] = {}
        if self.global_config is not None or any(isinstance(key, type) for key in self.local_config):
            names.update(dict.fromkeys(select_convolutions(model, None)))
        for key in self.local_config:
            if isinstance(key, str):
                names.update(dict.fromkeys(select_convolutions(model, (key,))))
        return [(name, OP_TYPE) for name in names]

    def _get_op_name_op_type_config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # The framework matches names by re.match, so that 'conv1' takes 'conv10' too: anchor them. A composed
        # configuration forgets the global part: as a pattern it stays.
        patterns: dict[str, Any] = {} if self.global_config is None else {".*": self.global_config}
        for key, config in self.local_config.items():
            patterns[_pattern(key)] = config
        return {}, patterns

    def get_params_dict(self) -> dict[str, Any]:
        """Return the settings by name, without the white list."""
        return {key: getattr(self, key) for key in self.params_list if key != "white_list"}

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that ``from_dict`` reads back to an equal configuration, the white list included."""
        own = self.get_params_dict()
        by_type = [config for key, config in self.local_config.items() if isinstance(key, type)]
        if by_type:  # the one type there is stands for the default selection, as the global part does
            own = by_type[-1].get_params_dict()
        elif self.global_config is None:
            own["white_list"] = None
        local = {key: c.get_params_dict() for key, c in self.local_config.items() if isinstance(key, str)}
        return {GLOBAL: own, LOCAL: local} if local else own

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> BonnConfig:
        """Read a flat dictionary, or one of ``global`` and ``local``; ``lambda`` may be written as in recipes.

        Raises:
            BonnError: an unknown key, or a value that makes no sense.
        """
        if GLOBAL not in config_dict and LOCAL not in config_dict:
            return cls(**_known(config_dict, cls))
        config = cls(**_known(config_dict.get(GLOBAL) or {}, cls))
        for name, own in (config_dict.get(LOCAL) or {}).items():
            config.set_local(name, cls(**_known(own or {}, cls)))
        return config

    @classmethod
    def from_json_file(cls, filename: str | os.PathLike[str]) -> BonnConfig:
        """Read what ``to_json_file`` wrote."""
        return cls.from_dict(_unwrapped(json.loads(Path(filename).read_text(encoding="utf-8"))))

    @classmethod
    def from_yaml_file(cls, filename: str | os.PathLike[str]) -> BonnConfig:
        """Read the YAML of one of the dictionaries, with or without ``bonn:`` around it.

        Raises:
            BonnError: it is no YAML, or not such a dictionary.
        """
        value, _ = parse_yaml(Path(filename).read_text(encoding="utf-8"), os.fspath(filename))
        if not isinstance(value, dict):
            raise BonnError(f"{os.fspath(filename)}: not a mapping of {ALGORITHM}'s settings")
        return cls.from_dict(_unwrapped(value))

    def expand(self) -> list[BonnConfig]:
        """Return this configuration alone: there is nothing that a tuner could choose without training."""
        return [self]

    @classmethod
    def register_supported_configs(cls) -> None:
        """Nothing to register (the framework asks every configuration)."""

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
        _convert(model, own, told=mode is Mode.QUANTIZE)
    return model


def kernel_loss(model: nn.Module) -> Tensor:
    """Return lambda times the Bayesian kernel loss over the binarised layers of a prepared model, a scalar.

    Raises:
        SessionError: the model was not prepared with a ``BonnConfig``, or is converted already.
    """
    weights: Mapping[str, tuple[float, float]] | None = getattr(model, _KERNEL_LOSS, None)
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
    context = PrepareContext(_example(model, example), 1)
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
        if config.lambda_:
            layer.prior = BimodalPrior(layer.weight, KernelLossConfig.model_fields["sigma_floor"].default)
            weights[name] = (config.lambda_, config.nu)
    setattr(model, _KERNEL_LOSS, weights)


def _convert(model: nn.Module, configs: Mapping[str, BonnConfig], *, told: bool) -> None:
    if any(config.lambda_ for config in configs.values()) and not told and not hasattr(model, _KERNEL_LOSS_READ):
        warnings.warn(
            "bonn: the kernel loss was never added in training; put `loss = loss + bonn_plugin.inc.kernel_loss(model)` "
            "before `loss.backward()`, or set lambda_=0",
            stacklevel=2,
        )
    for name in configs:
        layer = model.get_submodule(name)
        assert isinstance(layer, BinaryConv2d)
        replace_module(model, name, layer.pack())
    delattr(model, _KERNEL_LOSS)
    model.eval()


def _example(model: nn.Module, given: Any) -> Tensor | None:
    if isinstance(given, (tuple, list)) and given:
        given = given[0]
    if isinstance(given, Tensor):
        return given
    settings: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    size = settings.get("input_size")
    if size is None:
        return None
    parameter = next(model.parameters())
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(parameter)


def _check_selector(entry: Any) -> None:
    if isinstance(entry, type):
        if entry is not nn.Conv2d:
            raise BonnError(f"bonn takes convolutions of the type torch.nn.Conv2d, not {entry.__name__}")
        return
    problem = selector_problem(entry) if isinstance(entry, str) else f"{entry!r} is neither a name nor a type"
    if problem:
        raise BonnError(f"BonnConfig: {problem}")


def _pattern(key: Any) -> str:
    if isinstance(key, type):
        return ".*"
    kind, _, rest = key.partition(":")
    if kind == "re":
        return f"(?:{rest})$"
    return ".*" if kind == "class" else f"{re.escape(key)}$"


def _known(settings: Mapping[str, Any], cls: type[BonnConfig]) -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        raise BonnError(f"BonnConfig: {settings!r} is not a mapping of settings")
    known = cls._generate_params_list()
    given = {("lambda_" if key == "lambda" else key): value for key, value in settings.items()}
    for key in given:
        if key not in known:
            raise BonnError(f"BonnConfig: unknown key {key!r}.{near_names(str(key), [*known, 'global', 'local'])}")
    return given


def _unwrapped(value: Mapping[str, Any]) -> Mapping[str, Any]:
    if set(value) == {ALGORITHM} and isinstance(value[ALGORITHM], Mapping):
        inner: Mapping[str, Any] = value[ALGORITHM]
        return inner
    return value


def _validated(cls: type[Any], settings: Mapping[str, Any]) -> Any:
    try:
        return cls.model_validate(settings)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise BonnError(f"BonnConfig: {where}: {detail['msg']}, not {detail['input']!r}") from None
