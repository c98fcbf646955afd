"""What the lowerings hold in their hands: the engine's operations, constants, and the name of the current layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bonn_plugin.errors import ExportError
from bonn_plugin.export.engine import import_openvino

Value: TypeAlias = Any
"""A value of the graph: an ``openvino.Output`` with a static shape."""

Pair: TypeAlias = tuple[int, int]


LARGEST = 3e38
"""Nearly the largest float32."""
FOLDED = ".norm"
"""Suffix of the name under which a convolution runs that took in the factor of its norm."""


class GraphBuilder:
    """Builds one OpenVINO graph.

    Args:
        half: store weights of real convolutions and linear layers as float16. Norms, slopes,
            thresholds and scales stay float32: they are few, and a sign hangs on them.
        integer: whether the graph has layers in 8 bits, see ``stay_float``.

    Attributes:
        where: the module or function being lowered, for names and messages.
        norms: the input of a norm and what torch makes of it, by the name of the norm's result; for signs.
        paths: how each binary convolution was expressed, by module name.
    """

    def __init__(self, *, half: bool = False, integer: bool = False) -> None:
        self.ov = import_openvino()
        self.ops = self.ov.opset14
        self.half = half
        self.integer = integer
        self.where = ""
        self.norms: dict[str, tuple[Value, Callable[[Tensor], Tensor]]] = {}
        self.paths: dict[str, str] = {}

    def refuse(self, why: str) -> ExportError:
        """Return the error that says that the current module can't be exported, and why."""
        return ExportError(f"{self.where} can't be exported to OpenVINO: {why}")

    def name(self, node: Any, suffix: str = "") -> Value:
        """Give a node the name of the current layer and return its output."""
        node.set_friendly_name(f"{self.where}{suffix}")
        return node.output(0)

    def constant(self, value: Tensor | np.ndarray[Any, Any] | float, *, like: Value | None = None) -> Value:
        """Return a float32 constant; ``like`` makes a number of a scalar's worth of dimensions as ``like`` has."""
        array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float32)
        if like is not None:
            array = array.reshape((1,) * len(like.shape))
        return self.ops.constant(np.array(array, order="C")).output(0)

    def weight(self, value: Tensor) -> Value:
        """Return the constant of a real weight, stored as float16 if the export is to be small."""
        if not self.half:
            return self.constant(value)
        stored = self.ops.constant(value.detach().cpu().numpy().astype(np.float16))
        return self.ops.convert(stored, "f32").output(0)

    def half_constant(self, value: Tensor) -> Value:
        """Return a constant of a float16 or bfloat16 tensor in its own format."""
        kind = self.ov.Type.bf16 if value.dtype is torch.bfloat16 else self.ov.Type.f16
        raw = np.ascontiguousarray(value.detach().cpu().contiguous().view(torch.int16).numpy()).view(np.uint8)
        return self._raw(raw, value.shape, kind)

    def integer_constant(self, value: Tensor, bits: int) -> Value:
        """Return a constant of integers of 8 bits, or of 4, two a byte."""
        integers = value.detach().cpu().contiguous()
        if bits == 8:
            return self.ops.constant(np.array(integers.numpy(), np.int8, order="C")).output(0)
        nibbles = integers.reshape(-1).numpy().astype(np.uint8) & 15
        nibbles = np.append(nibbles, np.uint8(0)) if len(nibbles) % 2 else nibbles
        return self._raw(nibbles[0::2] | nibbles[1::2] << 4, value.shape, self.ov.Type.i4)

    def _raw(self, content: np.ndarray[Any, Any], shape: Any, kind: Any) -> Value:
        tensor = self.ov.Tensor(np.ascontiguousarray(content), self.ov.Shape(list(shape)), kind)
        return self.ov.op.Constant(tensor, shared_memory=False).output(0)

    def stay_float(self, x: Value) -> Value:
        """Return ``x``, where a float value must not be taken for a quantised one.

        As soon as one layer of a graph computes in 8 bits, the engine takes every Multiply by a constant for a
        dequantisation, and moves it through additions and activations: more work, and other rounding. A Clamp to all
        floats stops it and is fused with the convolution before.
        """
        return self.ops.clamp(x, -LARGEST, LARGEST).output(0) if self.integer else x

    def scales(self, value: Tensor) -> Value:
        """Return the constant of factors per channel, (C,), behind which ``stay_float`` works.

        The engine moves equal factors through a Clamp all the same: then the first becomes the next larger float.
        """
        if self.integer and bool((value == value[0]).all()):
            value = value.clone()
            value[0] = torch.nextafter(value[0], torch.tensor(torch.inf))
        return self.channels(value)

    def channels(self, value: Tensor, rank: int = 4) -> Value:
        """Return a constant per channel, (C,), shaped to broadcast over (B, C, ...)."""
        return self.constant(value.detach().reshape(1, -1, *(1,) * (rank - 2)))

    def bits(self, signs: Tensor, *, lowest_first: bool = True) -> Value:
        """Return the constant u1 of a kernel: 1 for +1, 0 for -1.

        The engine is of two minds about the first weight of a byte: its binary convolution takes the lowest
        bit, its Convert the highest.
        """
        order: Literal["little", "big"] = "little" if lowest_first else "big"
        packed = np.packbits((signs > 0).cpu().numpy().reshape(-1), bitorder=order)
        tensor = self.ov.Tensor(packed, self.ov.Shape(list(signs.shape)), self.ov.Type.u1)
        return self.ov.op.Constant(tensor, shared_memory=False).output(0)

    def reshape(self, x: Value, shape: list[int]) -> Value:
        """Reshape; one entry may be -1."""
        if -1 in shape:
            known = -math.prod(shape)
            shape = [math.prod(x.shape) // known if n == -1 else n for n in shape]
        return self.ops.reshape(x, np.array(shape, np.int64), False).output(0)

    def channel_affine(self, x: Value, scale: Tensor, shift: Tensor) -> Value:
        """Return x * scale + shift, (C,) each; the engine folds it into a neighbour where it can."""
        rank = len(x.shape)
        y = self.ops.multiply(x, self.channels(scale, rank))
        producer = x.get_node()
        if producer.get_type_name() in ("Convolution", "GroupConvolution"):
            # The engine folds the factor into the weights and keeps this name for the convolution.
            y.set_friendly_name(f"{producer.get_friendly_name()}{FOLDED}")
        return self.name(self.ops.add(y, self.channels(shift, rank)))


def shape_of(x: Value) -> tuple[int, ...]:
    """Return the static shape of a value."""
    return tuple(int(n) for n in x.shape)


def pair(value: Any) -> Pair:
    """Return (height, width) of an int or a pair."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def batch_norm_affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of a batch norm in eval mode, (C,) each, rounded as torch's CPU kernel does."""
    scale = 1 / torch.sqrt(var.detach() + eps)
    if weight is not None:
        scale = scale * weight.detach()
    shift = -mean.detach() * scale
    return scale, shift if bias is None else bias.detach() + shift


__all__ = ["FOLDED", "GraphBuilder", "Pair", "Value", "batch_norm_affine", "pair", "shape_of"]
