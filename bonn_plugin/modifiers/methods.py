"""The methods of ``binarize``: which settings belong to each, and the layer that it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from torch import nn

from bonn_plugin.functional import Ste
from bonn_plugin.functional.methods import (
    abc_weight,
    bireal_weight,
    bnn_weight,
    dorefa_weight,
    reactnet_weight,
    xnor_weight,
)
from bonn_plugin.nn import (
    BinaryConv2d,
    BitsInput,
    MethodConv2d,
    ProjectionConv2d,
    RealInput,
    ShiftedSigns,
    SignInput,
    TernaryInput,
)

MethodName = Literal["bonn", "bnn", "xnor", "bwn", "dorefa", "tbn", "abc", "bireal", "pcnn", "reactnet"]

SIGN_KEYS = frozenset({"ste", "bound", "threshold", "threshold_init"})
"""Settings of the activation's sign."""


class MethodSettings(Protocol):
    """What a method reads of the settings of ``binarize``."""

    @property
    def ste(self) -> Ste: ...
    @property
    def bound(self) -> float: ...
    @property
    def input_scale(self) -> bool: ...
    @property
    def activation_bits(self) -> int: ...
    @property
    def delta(self) -> float: ...
    @property
    def weight_bases(self) -> int: ...
    @property
    def activation_bases(self) -> int: ...


@dataclass(frozen=True)
class Method:
    """One way to binarise.

    Attributes:
        make: builds the layer that takes a convolution's place.
        keys: settings of ``binarize`` that have a meaning for it, besides those of all methods.
        preset: settings that it has where the recipe says nothing.
    """

    make: Callable[[nn.Conv2d, MethodSettings], SignInput]
    keys: frozenset[str] = SIGN_KEYS
    preset: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_signs(self) -> bool:
        """Whether its layers read the sign of their input."""
        return self.keys >= SIGN_KEYS


def _bonn(conv: nn.Conv2d, s: MethodSettings) -> SignInput:
    return BinaryConv2d(conv, ste=s.ste, bound=s.bound)


def _bnn(conv: nn.Conv2d, s: MethodSettings) -> SignInput:
    return MethodConv2d(conv, bnn_weight, ste=s.ste, bound=s.bound, clip=True)


def _xnor(conv: nn.Conv2d, s: MethodSettings) -> SignInput:
    return MethodConv2d(conv, xnor_weight, ste=s.ste, bound=s.bound, input_scale=s.input_scale)


def _bireal(conv: nn.Conv2d, s: MethodSettings) -> SignInput:
    return MethodConv2d(conv, bireal_weight, ste=s.ste, bound=s.bound)


def _reactnet(conv: nn.Conv2d, s: MethodSettings) -> SignInput:
    return MethodConv2d(conv, reactnet_weight, ste=s.ste, bound=s.bound)


def _pcnn(conv: nn.Conv2d, s: MethodSettings) -> SignInput:
    return ProjectionConv2d(conv, ste=s.ste, bound=s.bound)


def _bwn(conv: nn.Conv2d, _: MethodSettings) -> SignInput:
    return MethodConv2d(conv, xnor_weight, RealInput())


def _dorefa(conv: nn.Conv2d, s: MethodSettings) -> SignInput:
    return MethodConv2d(conv, dorefa_weight, BitsInput(s.activation_bits))


def _tbn(conv: nn.Conv2d, s: MethodSettings) -> SignInput:
    return MethodConv2d(conv, xnor_weight, TernaryInput(s.delta))


def _abc(conv: nn.Conv2d, s: MethodSettings) -> SignInput:
    return MethodConv2d(conv, partial(abc_weight, count=s.weight_bases), ShiftedSigns(s.activation_bases))


METHODS: Mapping[MethodName, Method] = {
    "bonn": Method(_bonn, SIGN_KEYS | {"weights"}),
    "bnn": Method(_bnn),
    "xnor": Method(_xnor, SIGN_KEYS | {"input_scale"}),
    "bwn": Method(_bwn, frozenset()),
    "dorefa": Method(_dorefa, frozenset({"activation_bits"})),
    "tbn": Method(_tbn, frozenset({"delta"})),
    "abc": Method(_abc, frozenset({"weight_bases", "activation_bases"})),
    "bireal": Method(_bireal, preset={"ste": "polynomial"}),
    "pcnn": Method(_pcnn),
    "reactnet": Method(
        _reactnet,
        preset={"ste": "polynomial", "threshold": "always", "threshold_init": "zero", "activation": "rprelu"},
    ),
}
OF_SOME: frozenset[str] = frozenset().union(*(method.keys for method in METHODS.values()))
"""Settings that not every method has."""

__all__ = ["METHODS", "OF_SOME", "Method", "MethodName"]
