"""A network from its name in timm's registry; nothing is downloaded."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import is_model, list_models
from torch import nn

from bonn_plugin.errors import BonnError


class ModelBuildError(BonnError):
    """A network that can't be made. ``key`` is the setting at fault, such as ``"name"`` or ``"args"``."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


def build_model(name: str, num_classes: int, args: Mapping[str, Any]) -> nn.Module:
    """Return ``timm.create_model(name, num_classes=num_classes, **args)`` with random weights.

    Raises:
        ModelBuildError: timm knows no such network, or it does not take the arguments.
    """
    if not is_model(name):
        near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ModelBuildError(f"timm has no model named {name!r}.{hint}", "name")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Initializing zero-element tensors")
            return timm.create_model(name, pretrained=False, num_classes=num_classes, **args)
    except Exception as error:
        text = " ".join(str(error).split())
        raise ModelBuildError(f"{name} can't be built with args {dict(args)}: {text}", "args") from error


def build_outline(name: str, num_classes: int, args: Mapping[str, Any] | None = None) -> nn.Module:
    """Return ``build_model(name, num_classes, args)`` on the meta device: shapes without values, and no memory.

    Raises:
        ModelBuildError: as ``build_model``.
    """
    with torch.device("meta"):
        return build_model(name, num_classes, args or {})
