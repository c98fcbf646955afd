"""The lowering of ``PackedConv2d``: signs, the binary convolution, merged filters, scale and bias."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bonn_plugin.errors import ExportError
from bonn_plugin.export.builder import GraphBuilder, Value, shape_of
from bonn_plugin.export.cut import Cut
from bonn_plugin.export.engine import compile_for_cpu
from bonn_plugin.functional import unpack_signs
from bonn_plugin.nn import ConvGeometry, PackedConv2d

BINARY = "bits"
FLOAT = "float32"
CHANNEL_BLOCK = 8
"""The engine reads activations by whole bytes; other channel counts give wrong sums."""


def lower_packed(b: GraphBuilder, module: PackedConv2d, x: Value) -> Value:
    """Lower w̄ * conv(sign(x - t), sign(X)) + bias, (B, C_in, H, W) to (B, C_out, H', W').

    Where the engine's ``BinaryConvolution`` can't express the geometry, or computes it wrongly, the
    same sums are made by a float convolution from the same bits.
    """
    signs = _unique_signs(module)
    g = module.geometry
    source = x
    index = getattr(module, "weight_index", None)
    if index is not None and g.groups > 1:  # filters of two groups read different channels: nothing to share
        signs, index = signs[index.cpu().long()], None
    threshold = None if module.threshold is None else module.threshold.detach().cpu().float()
    if engine_computes(g, signs.shape[0], shape_of(x)[2:]):
        x, cut = _cut(b, x, threshold)
        y = _by_bits(b, g, signs, cut, x)
        b.paths[b.where] = BINARY
    else:
        y = _by_floats(b, g, signs, threshold, x)
        b.paths[b.where] = FLOAT
    if index is not None:  # merged filters: each computed once, then gathered
        rows = b.ops.constant(index.detach().cpu().numpy().astype(np.int32))
        y = b.ops.gather(y, rows, np.array(1, np.int32)).output(0)
    scale = module.weight_scale.detach().cpu().float()
    factor = _output_sign(module)
    if factor is None and not b.integer and not scale.dim():
        by = b.constant(scale, like=y)
    else:
        by = b.scales(scale * (torch.ones(g.out_channels) if factor is None else factor.cpu()))
    y = b.name(b.ops.multiply(y, by), ".scale")
    if module.input_scale:
        y = b.name(b.ops.multiply(y, _input_scale(b, g, threshold, source)), ".input_scale")
    if module.bias is not None:
        y = b.name(b.ops.add(y, b.channels(module.bias)), ".bias")
    return b.stay_float(y)


def _input_scale(b: GraphBuilder, g: ConvGeometry, threshold: Tensor | None, x: Value) -> Value:
    """Lower K, the mean of |x - t| over the window of each output, (B, 1, H', W')."""
    if g.groups > 1:
        raise b.refuse("the mean of the input over a group of channels has no lowering: set input_scale to false")
    if threshold is not None:
        x = b.ops.subtract(x, b.channels(threshold)).output(0)
    mean = b.ops.reduce_mean(b.ops.absolute(x), np.array([1]), True)
    box = torch.full((1, 1, *g.kernel_size), 1 / (g.kernel_size[0] * g.kernel_size[1]))
    (sh, sw), (ph, pw), (dh, dw) = g.stride, g.padding, g.dilation
    return b.name(b.ops.convolution(mean, b.constant(box), [sh, sw], [ph, pw], [ph, pw], [dh, dw]))


def engine_computes(geometry: ConvGeometry, filters: int, size: tuple[int, ...]) -> bool:
    """Whether the engine's binary convolution gives the right sums for a geometry and an input size.

    It is tried: some paddings and kernels are refused, and strides above 2 are computed wrongly without a word.
    """
    return geometry.groups == 1 and _tried(geometry, filters, int(size[0]), int(size[1]))


@lru_cache(maxsize=512)
def _tried(geometry: ConvGeometry, filters: int, height: int, width: int) -> bool:
    generator = torch.Generator().manual_seed(0)

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1

    x = signs(1, geometry.in_channels, height, width)
    weight = signs(filters, *geometry.weight_shape[1:])
    b = GraphBuilder()
    parameter = b.ops.parameter(list(x.shape), np.float32)
    y = _by_bits(b, geometry, weight, Cut.at(torch.zeros(geometry.in_channels)), parameter.output(0))
    try:
        compiled = compile_for_cpu(b.ov.Model([y], [parameter]), 1)
        got = torch.from_numpy(compiled(x.numpy())[0].copy())
    except (ExportError, RuntimeError):
        return False
    return torch.equal(got, geometry.convolve(x, weight))


def _output_sign(module: nn.Module) -> Tensor | None:
    """+1, -1 or 0 for each output, (C_out,); None where the layer has no such factors."""
    output_sign = getattr(module, "output_sign", None)
    factor: Tensor | None = output_sign() if callable(output_sign) else None
    return factor


def _unique_signs(module: PackedConv2d) -> Tensor:
    rows = module.weight_packed.shape[0]
    return unpack_signs(module.weight_packed.cpu(), (rows, *module.geometry.weight_shape[1:]))


def _cut(b: GraphBuilder, x: Value, threshold: Tensor | None) -> tuple[Value, Cut]:
    """Return where the sign is taken, before a norm if there is one, and at which values."""
    zero = torch.zeros(shape_of(x)[1])
    norm = b.norms.get(x.get_node().get_friendly_name())
    if norm is None:
        return x, Cut.at(zero if threshold is None else threshold)
    before, by_torch = norm
    at = zero if threshold is None else threshold
    return before, Cut.through(by_torch, at)


def _bits_of(b: GraphBuilder, x: Value, cut: Cut) -> Value:
    """Return the sign as 0 and 1: with other numbers the engine computes in float without a word."""
    edge = b.channels(cut.above)
    falling = cut.falling.float()
    low, high = (falling, 1 - falling) if bool(cut.falling.any()) else (falling[:1], 1 - falling[:1])
    return b.name(b.ops.fake_quantize(x, edge, edge, b.channels(low), b.channels(high), 2), ".sign")


def _by_bits(b: GraphBuilder, g: ConvGeometry, signs: Tensor, cut: Cut, x: Value) -> Value:
    padded = -g.in_channels % CHANNEL_BLOCK
    if padded:
        # Added channels hold 0, so their sign is +1; their weights alternate and cancel in pairs.
        shape = shape_of(x)
        zeros = b.constant(np.zeros((shape[0], padded, *shape[2:]), np.float32))
        x = b.ops.concat([x, zeros], 1).output(0)
        alternating = torch.tensor([1.0, -1.0]).repeat(padded)[:padded]
        more = alternating[None, :, None, None].expand(signs.shape[0], -1, *signs.shape[2:])
        signs = torch.cat([signs, more], 1)
        cut = cut.joined(Cut.at(torch.zeros(padded)))
    bits = _bits_of(b, x, cut)
    (sh, sw), (ph, pw), (dh, dw) = g.stride, g.padding, g.dilation
    node = b.ops.binary_convolution(bits, b.bits(signs), [sh, sw], [ph, pw], [ph, pw], [dh, dw], "xnor-popcount", 0.0)
    y = b.name(node)
    if padded % 2:
        y = b.ops.subtract(y, b.constant(_inside(g, shape_of(x)[2:]))).output(0)
    return y


def _inside(g: ConvGeometry, size: tuple[int, ...]) -> Tensor:
    """How many kernel positions lie inside the image, (1, 1, H', W'): what one channel of +1 adds."""
    return torch.nn.functional.conv2d(
        torch.ones(1, 1, *size), torch.ones(1, 1, *g.kernel_size), None, g.stride, g.padding, g.dilation
    )


def lower_signs(b: GraphBuilder, threshold: Tensor | None, x: Value) -> Value:
    """Lower sign(x - t) to ±1 in float32."""
    # Not FakeQuantize: as float arithmetic it divides by the width of its range, which is 0.
    at = b.constant(0.0, like=x) if threshold is None else b.channels(threshold)
    positive = b.ops.greater_equal(x, at)
    return b.name(b.ops.select(positive, b.constant(1.0, like=x), b.constant(-1.0, like=x)), ".sign")


def _by_floats(b: GraphBuilder, g: ConvGeometry, signs: Tensor, threshold: Tensor | None, x: Value) -> Value:
    a = lower_signs(b, threshold, x)
    bits = b.ops.convert(b.bits(signs, lowest_first=False), "f32")
    weight: Any = b.ops.subtract(b.ops.multiply(bits, b.constant(2.0)), b.constant(1.0))
    (sh, sw), (ph, pw), (dh, dw) = g.stride, g.padding, g.dilation
    args = ([sh, sw], [ph, pw], [ph, pw], [dh, dw])
    if g.groups == 1:
        return b.name(b.ops.convolution(a, weight, *args))
    grouped = [g.groups, signs.shape[0] // g.groups, *signs.shape[1:]]
    return b.name(b.ops.group_convolution(a, b.reshape(weight.output(0), grouped), *args))


__all__ = ["BINARY", "FLOAT", "engine_computes", "lower_packed", "lower_signs"]
