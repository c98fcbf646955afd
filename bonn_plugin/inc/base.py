"""What this package's configurations for neural-compressor share: checked names, dictionaries that survive."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from neural_compressor.common.base_config import GLOBAL, LOCAL
from neural_compressor.torch.quantization.config import TorchBaseConfig
from pydantic import ValidationError
from torch import Tensor, nn

from bonn_plugin.errors import BonnError
from bonn_plugin.modifiers import near_names, select_convolutions
from bonn_plugin.modifiers.select import selector_problem
from bonn_plugin.nn import BinaryConv2d, replace_module
from bonn_plugin.recipe.positions import parse_yaml

KERNEL_LOSS = "_bonn_kernel_loss"
"""Attribute of a prepared model: (lambda, nu) of each layer that has a kernel loss, by name."""


class SelectorConfig(TorchBaseConfig):  # type: ignore[misc]
    """A configuration whose names are this package's selectors.

    Names in ``white_list`` and in ``set_local`` are an exact name, ``re:`` with a pattern that matches the whole
    name, or ``class:``; or a type, ``torch.nn.Conv2d``. A name that matches nothing is an error. Without names every
    plain convolution larger than 1x1 is taken, but the first and depthwise ones.
    """

    op_type: ClassVar[str]

    def _finish(self, white_list: Any) -> None:
        """Check the white list and let the framework build its global and local parts; at the end of ``__init__``."""
        for entry in white_list if isinstance(white_list, list) else []:
            _check_selector(type(self).__name__, entry)
        self._post_init()

    def set_local(self, operator_name_or_list: Any, config: SelectorConfig) -> Self:
        """Give some convolutions settings of their own; names as in the class's description."""
        for name in operator_name_or_list if isinstance(operator_name_or_list, list) else [operator_name_or_list]:
            _check_selector(type(self).__name__, name)
        super().set_local(operator_name_or_list, config)
        return self

    def get_model_info(self, model: nn.Module, *_: Any, **__: Any) -> list[tuple[str, str]]:
        """Return (name, op type) of what this configuration takes, in a float model or in a prepared one.

        Raises:
            ModelError: a name matches nothing.
        """
        prepared = BinaryConv2d.names_in(model)
        if prepared:
            return [(name, self.op_type) for name in prepared]
        names: dict[str, None] = {}
        if self.global_config is not None or any(isinstance(key, type) for key in self.local_config):
            names.update(dict.fromkeys(select_convolutions(model, None)))
        for key in self.local_config:
            if isinstance(key, str):
                names.update(dict.fromkeys(select_convolutions(model, (key,))))
        return [(name, self.op_type) for name in names]

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
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """Read a flat dictionary, or one of ``global`` and ``local``; ``lambda`` may be written as in recipes.

        Raises:
            BonnError: an unknown key, or a value that makes no sense.
        """
        if GLOBAL not in config_dict and LOCAL not in config_dict:
            return cls(**cls._known(config_dict))
        config = cls(**cls._known(config_dict.get(GLOBAL) or {}))
        for name, own in (config_dict.get(LOCAL) or {}).items():
            config.set_local(name, cls(**cls._known(own or {})))
        return config

    @classmethod
    def from_json_file(cls, filename: str | os.PathLike[str]) -> Self:
        """Read what ``to_json_file`` wrote."""
        return cls.from_dict(cls._unwrapped(json.loads(Path(filename).read_text(encoding="utf-8"))))

    @classmethod
    def from_yaml_file(cls, filename: str | os.PathLike[str]) -> Self:
        """Read the YAML of one of the dictionaries, with or without the algorithm's name around it.

        Raises:
            BonnError: it is no YAML, or not such a dictionary.
        """
        value, _ = parse_yaml(Path(filename).read_text(encoding="utf-8"), os.fspath(filename))
        if not isinstance(value, dict):
            raise BonnError(f"{os.fspath(filename)}: not a mapping of {cls.name}'s settings")
        return cls.from_dict(cls._unwrapped(value))

    def expand(self) -> list[Self]:
        """Return this configuration alone: there is nothing that a tuner could choose without training."""
        return [self]

    @classmethod
    def register_supported_configs(cls) -> None:
        """Nothing to register (the framework asks every configuration)."""

    @classmethod
    def _known(cls, settings: Any) -> dict[str, Any]:
        if not isinstance(settings, Mapping):
            raise BonnError(f"{cls.__name__}: {settings!r} is not a mapping of settings")
        known = cls._generate_params_list()
        given = {("lambda_" if key == "lambda" else key): value for key, value in settings.items()}
        for key in given:
            if key not in known:
                hint = near_names(str(key), [*known, GLOBAL, LOCAL])
                raise BonnError(f"{cls.__name__}: unknown key {key!r}.{hint}")
        return given

    @classmethod
    def _unwrapped(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        if set(value) == {cls.name} and isinstance(value[cls.name], Mapping):
            inner: Mapping[str, Any] = value[cls.name]
            return inner
        return value


def validated(who: str, cls: type[Any], settings: Mapping[str, Any]) -> Any:
    """Return ``cls`` made from ``settings``. Raises BonnError, beginning with ``who``, where they make no sense."""
    try:
        return cls.model_validate(settings)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise BonnError(f"{who}: {where}: {detail['msg']}, not {detail['input']!r}") from None


def example_input(model: nn.Module, given: Any) -> Tensor | None:
    """Return the batch to probe a model with: the user's, or noise of the size that timm states; else None."""
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


def pack_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Replace binarised layers by their packed ones, in place; the model is in eval mode then."""
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, BinaryConv2d)
        replace_module(model, name, layer.pack())
    if hasattr(model, KERNEL_LOSS):
        delattr(model, KERNEL_LOSS)
    model.eval()


def _check_selector(who: str, entry: Any) -> None:
    if isinstance(entry, type):
        if entry is not nn.Conv2d:
            raise BonnError(f"{who} takes convolutions of the type torch.nn.Conv2d, not {entry.__name__}")
        return
    problem = selector_problem(entry) if isinstance(entry, str) else f"{entry!r} is neither a name nor a type"
    if problem:
        raise BonnError(f"{who}: {problem}")


def _pattern(key: Any) -> str:
    if isinstance(key, type):
        return ".*"
    kind, _, rest = key.partition(":")
    if kind == "re":
        return f"(?:{rest})$"
    return ".*" if kind == "class" else f"{re.escape(key)}$"
