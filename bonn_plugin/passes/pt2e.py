"""Static and dynamic int8: neural-compressor's PT2E passes, one layer at a time.

The framework exports, prepares, observes and converts a layer and the norm behind it, as if they were the whole
network. So a network need not be exportable as a whole, layers that are not named are not touched, and nothing is
quantised in between. The observers see what the layer sees in the network, in full precision, as in the framework's
own calibration: the scales are the same.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bonn_plugin.errors import ModelError
from bonn_plugin.nn import ConvGeometry
from bonn_plugin.passes.host import exporting, hosted, quantization


@dataclass(frozen=True)
class IntegerLayer:
    """What the pass made of a layer; see ``nn.IntegerConv2d``.

    Attributes:
        weight: int8, first axis C_out.
        weight_scale: float32 (C_out,).
        bias: float32 (C_out,), None where there is none.
        input_scale: float32 (), None where it is chosen at run time.
        input_zero_point: uint8 (), as that.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None


class _Alone(nn.Module):
    """A layer and the norm behind it as a network."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.layer = _plain(layer)
        self.norm = nn.Identity() if norm is None else copy.deepcopy(norm)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer(x))
        return y


def _plain(layer: nn.Module) -> nn.Module:
    """Return a copy without hooks, its padding in numbers."""
    if isinstance(layer, nn.Conv2d):
        g = ConvGeometry.of(layer)
        plain: nn.Module = nn.Conv2d(
            g.in_channels,
            g.out_channels,
            g.kernel_size,
            g.stride,
            g.padding,
            g.dilation,
            g.groups,
            bias=layer.bias is not None,
        )
    else:
        assert isinstance(layer, nn.Linear)
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.load_state_dict(layer.state_dict())
    return plain


class StaticCalibration:
    """Static int8 of one layer: call it with each input that the layer sees, then ``finish``.

    Args:
        name: the layer's name, for messages.
        layer: a convolution or linear layer; left as it is.
        norm: the batch norm behind it that is folded in, None if none.
        example: an input, (B, ...).

    Raises:
        ModelError: the framework is missing or fails.
    """

    def __init__(self, name: str, layer: nn.Module, norm: nn.Module | None, example: Tensor) -> None:
        self.name = name
        with hosted(f"{name}: static int8"):
            api = quantization()
            exported = _export(layer, norm, example)
            self._prepared = api.prepare(exported, api.StaticQuantConfig())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        """Let the framework's observers see one input.

        Raises:
            ModelError: it has values that are not finite.
        """
        if not bool(torch.isfinite(x).all()):
            raise ModelError(f"{self.name} sees values that are not finite in calibration: look at the images")
        with hosted(f"{self.name}: calibration"):
            self._prepared(x.detach())

    def finish(self) -> IntegerLayer:
        """Convert the layer and return its integers and scales."""
        with hosted(f"{self.name}: static int8"):
            return _read(self.name, quantization().convert(self._prepared))


@torch.no_grad()
def quantize_dynamic(name: str, layer: nn.Module, norm: nn.Module | None, example: Tensor) -> IntegerLayer:
    """Return the integers and scales of a layer's weight, a scale for each output; the input's come at run time.

    Args and errors are those of ``StaticCalibration``.
    """
    with hosted(f"{name}: dynamic int8"):
        api = quantization()
        exported = _export(layer, norm, example)
        prepared = api.prepare(exported, api.DynamicQuantConfig(w_granularity="per_channel"))
        prepared(example)  # the weight's observer looks when it is called
        return _read(name, api.convert(prepared))


def _export(layer: nn.Module, norm: nn.Module | None, example: Tensor) -> Any:
    # Of a batch of one the framework makes a network for batches of one.
    x = torch.cat([example, example]) if len(example) == 1 else example
    shape = dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO)
    return exporting().export(_Alone(layer, norm).eval(), (x,), dynamic_shapes=(shape,))


_OPERATIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)


def _read(name: str, graph: Any) -> IntegerLayer:
    """Read integers and scales off a converted graph: quantize -> dequantize -> convolution or linear."""
    try:
        (node,) = [n for n in graph.graph.nodes if n.target in _OPERATIONS]
        weight, weight_scale = _weight(graph, _quantize_node(node.args[1]))
        bias = _value(graph, node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
        quantize = _quantize_node(node.args[0])
        source = "tensor" if isinstance(quantize.args[1], fx.Node) else "default"
        scale, zero_point = quantize.args[1:3]
        expected = getattr(torch.ops.quantized_decomposed.quantize_per_tensor, source)
        if quantize.target is not expected or quantize.args[3:6] != (0, 255, torch.uint8):
            raise ValueError(f"the input is quantised by {quantize.target} {quantize.args[3:6]}")
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ModelError(
            f"{name}: neural-compressor's converted graph has a form that is not known: {error}"
        ) from error
    if bias is not None:
        bias = bias.detach().float()
    if source == "tensor":
        return IntegerLayer(weight, weight_scale, bias)
    if not isinstance(scale, float) or not isinstance(zero_point, int):
        raise ModelError(f"{name}: neural-compressor gives a scale {scale!r} and a zero point {zero_point!r}")
    return IntegerLayer(weight, weight_scale, bias, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.uint8))


def _quantize_node(dequantize: fx.Node) -> fx.Node:
    """Return the node that makes the integers which ``dequantize`` takes."""
    if "dequantize" not in str(dequantize.target):
        raise ValueError(f"{dequantize.target} stands where integers are expected")
    node = dequantize.args[0]
    if not isinstance(node, fx.Node):
        raise ValueError("integers come from no node")
    return node


def _weight(graph: Any, quantize: fx.Node) -> tuple[Tensor, Tensor]:
    _, scale, zero_point, axis, low, high, dtype = quantize.args
    if (axis, low, high, dtype) != (0, -128, 127, torch.int8) or bool(_value(graph, zero_point).any()):
        raise ValueError(f"a weight is quantised by {quantize.args[3:]}")
    return _value(graph, quantize), _value(graph, scale).float()


@torch.no_grad()
def _value(graph: Any, node: Any) -> Any:
    """Compute a node that depends on no input."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(graph)
    if node.op != "call_function" or not callable(node.target):
        raise ValueError(f"{node.name} depends on the input")
    kwargs: Mapping[str, Any] = node.kwargs
    return node.target(*(_value(graph, a) for a in node.args), **{k: _value(graph, v) for k, v in kwargs.items()})


__all__ = ["IntegerLayer", "StaticCalibration", "quantize_dynamic"]
