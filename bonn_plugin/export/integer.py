"""The lowerings of layers that a pass quantised: int8 stays int8, on the disk and in the arithmetic.

The form is the one that OpenVINO's low-precision transformations make 8-bit kernels of: a FakeQuantize of 256 levels
on the input (with 255 they shift the grid in silence), and the weight as int8 -> Convert -> Multiply.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from bonn_plugin.export.builder import GraphBuilder, Value, shape_of
from bonn_plugin.functional.integer import LEVELS
from bonn_plugin.nn import HalfConv2d, HalfLinear, IntegerConv2d, IntegerLinear, WeightOnlyLinear

QUANTISED = ".quant"
"""Suffix of the name of the node that makes integers of a layer's input."""
INTEGER, FLOAT = "int8", "float32"


def has_integer_layers(model: nn.Module) -> bool:
    """Whether a model has layers that compute in 8 bits."""
    return any(isinstance(m, (IntegerConv2d, IntegerLinear)) for m in model.modules())


def real_layers(model: nn.Module) -> dict[str, str]:
    """Return how each convolution and linear layer that is not binarised is expressed, by name."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (IntegerConv2d, IntegerLinear)):
            found[name] = INTEGER
        elif isinstance(module, (HalfConv2d, HalfLinear)):
            found[name] = f"{FLOAT} from {module.dtype} weights"
        elif isinstance(module, WeightOnlyLinear):
            found[name] = f"{FLOAT} from int{module.bits} weights"
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            found[name] = FLOAT
    return found


def lower_integer_conv(b: GraphBuilder, m: IntegerConv2d, x: Value) -> Value:
    """Lower a convolution in 8 bits, (B, C_in, H, W) to (B, C_out, H', W')."""
    a = _quantised(b, m, x)
    g = m.geometry
    args = (list(g.stride), list(g.padding), list(g.padding), list(g.dilation))
    if g.groups == 1:
        y = b.name(b.ops.convolution(a, _weight(b, m.weight, m.weight_scale), *args))
    else:
        parts = m.weight.reshape(g.groups, g.out_channels // g.groups, *m.weight.shape[1:])
        scale = m.weight_scale.reshape(g.groups, g.out_channels // g.groups)
        y = b.name(b.ops.group_convolution(a, _weight(b, parts, scale), *args))
    if m.bias is not None:
        y = b.name(b.ops.add(y, b.channels(m.bias)), ".bias")
    return b.stay_float(y)


def lower_integer_linear(b: GraphBuilder, m: IntegerLinear, x: Value) -> Value:
    """Lower a linear layer in 8 bits, (..., in) to (..., out).

    Of rows, (B, in), it becomes a 1x1 convolution: that has the faster kernel.
    """
    if len(x.shape) != 2:
        y = b.name(b.ops.matmul(_quantised(b, m, x), _weight(b, m.weight, m.weight_scale), False, True))
        if m.bias is not None:
            y = b.name(b.ops.add(y, b.constant(m.bias.reshape(*(1,) * (len(y.shape) - 1), -1))), ".bias")
        return b.stay_float(y)
    rows, features = shape_of(x)
    a = _quantised(b, m, b.reshape(x, [rows, features, 1, 1]))
    weight = _weight(b, m.weight[:, :, None, None], m.weight_scale)
    y = b.name(b.ops.convolution(a, weight, [1, 1], [0, 0], [0, 0], [1, 1]))
    if m.bias is not None:
        y = b.name(b.ops.add(y, b.channels(m.bias)), ".bias")
    return b.reshape(b.stay_float(y), [rows, m.weight.shape[0]])


def lower_half_weight(b: GraphBuilder, m: HalfConv2d | HalfLinear) -> Value:
    """Return the constant of a 16-bit weight, as float32 for the arithmetic."""
    return b.ops.convert(b.half_constant(m.weight), "f32").output(0)


def lower_weight_only(b: GraphBuilder, m: WeightOnlyLinear, x: Value) -> Value:
    """Lower a linear layer with integer weights, (..., in) to (..., out)."""
    groups = m.weight_scale.shape[1]
    # Groups of one length: where a row's last one is shorter, zeros fill it up. A 4-bit weight times a constant of
    # its own size comes out wrong without a word.
    row = groups * m.group_size
    filled = nn.functional.pad(m.integers(), (0, row - m.in_features))
    parts = b.integer_constant(filled.reshape(m.out_features, groups, m.group_size), m.bits)
    scaled = b.ops.multiply(b.ops.convert(parts, "f32"), b.constant(m.weight_scale[:, :, None])).output(0)
    weight = b.reshape(scaled, [m.out_features, row])
    if row != m.in_features:
        axis, begin, step = (np.array([n], np.int64) for n in (1, 0, 1))
        weight = b.ops.slice(weight, begin, np.array([m.in_features], np.int64), step, axis).output(0)
    y = b.name(b.ops.matmul(x, weight, False, True))
    if m.bias is None:
        return y
    return b.name(b.ops.add(y, b.constant(m.bias.float().reshape(*(1,) * (len(y.shape) - 1), -1))), ".bias")


def _quantised(b: GraphBuilder, m: IntegerConv2d | IntegerLinear, x: Value) -> Value:
    if m.input_scale is None or m.input_zero_point is None:
        raise b.refuse(
            "its input is scaled at run time by the whole batch, which the engine has no kernel for: use inc_int8"
        )
    scale, zero_point = m.input_scale.detach().cpu().double(), int(m.input_zero_point)
    low = b.constant(float(-zero_point * scale), like=x)
    high = b.constant(float((LEVELS - zero_point) * scale), like=x)
    return b.name(b.ops.fake_quantize(x, low, high, low, high, LEVELS + 1), QUANTISED)


def _weight(b: GraphBuilder, integers: Tensor, scale: Tensor) -> Value:
    """Return int8 weights times the scale of their filter; ``scale`` has the first axes of ``integers``."""
    ones = (1,) * (integers.dim() - scale.dim())
    factor = b.constant(scale.detach().reshape(*scale.shape, *ones))
    return b.ops.multiply(b.ops.convert(b.integer_constant(integers, 8), "f32"), factor).output(0)


def integers_of(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> Tensor:
    """Return the integers, 0 to 255, that the engine's FakeQuantize makes of ``x``: its own float32 arithmetic.

    Args:
        x: float32.
        low: the range's lower end, float32.
        high: its upper end, float32.
    """
    f = np.float32
    inverse = f(LEVELS) / (high.reshape(-1)[0] - low.reshape(-1)[0])
    shift = -low.reshape(-1)[0] * inverse
    q = np.rint((x.astype(f) * inverse).astype(f) + shift)
    return torch.from_numpy(np.clip(q, 0, LEVELS).astype(f))


__all__ = [
    "FLOAT",
    "INTEGER",
    "QUANTISED",
    "has_integer_layers",
    "integers_of",
    "lower_half_weight",
    "lower_integer_conv",
    "lower_integer_linear",
    "lower_weight_only",
    "real_layers",
]
