"""From a torch model to an OpenVINO graph: one small function per module or function that torch.fx meets."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bonn_plugin.errors import ExportError
from bonn_plugin.export.binary import lower_packed, lower_signs
from bonn_plugin.export.builder import GraphBuilder, Value, batch_norm_affine, pair, shape_of
from bonn_plugin.export.integer import (
    has_integer_layers,
    lower_half_weight,
    lower_integer_conv,
    lower_integer_linear,
    lower_weight_only,
)
from bonn_plugin.export.trace import trace
from bonn_plugin.models.detection import Widen
from bonn_plugin.nn import (
    FoldedNorm,
    HalfConv2d,
    HalfLinear,
    IntegerConv2d,
    IntegerLinear,
    PackedBasesConv2d,
    PackedConv2d,
    RPReLU,
    SparseConv2d,
    SparseLinear,
    StoredSignConv2d,
    WeightOnlyLinear,
)

Lowering = Callable[..., Any]
MODULES: dict[type[nn.Module], Lowering] = {}
FUNCTIONS: dict[Any, Lowering] = {}
"""Lowerings by function, or by name for methods of tensors."""

INPUT, OUTPUT = "images", "logits"
"""Names of a graph's input, and of its output where the model gives one tensor."""


def build_graph(model: nn.Module, shape: tuple[int, ...], *, half: bool = False) -> tuple[Any, dict[str, str]]:
    """Return the ``openvino.Model`` of a torch model for inputs of one shape, and how it expressed binary convolutions.

    Args:
        model: packed or in full precision; left as it is. It gives one tensor or a dictionary of tensors.
        shape: (B, C, H, W), static.
        half: store real weights as float16.

    Returns:
        The graph, float32 ``images`` to float32 ``logits``, or to the dictionary's keys, and ``"bits"`` or
        ``"float32"`` by module name.

    Raises:
        ExportError: a module or function has no lowering; the message names it and says why.
    """
    b = GraphBuilder(half=half, integer=has_integer_layers(model))
    frozen, graph = trace(model, lambda module: type(module) in MODULES)
    parameter = b.ops.parameter(list(shape), np.float32, name=INPUT)
    parameter.output(0).set_names({INPUT})
    with torch.no_grad():
        made = _Walk(b, frozen, graph).run(parameter.output(0))
    outputs = made if isinstance(made, dict) else {OUTPUT: made}
    ends = []
    for name, value in outputs.items():
        if not _is_value(b, value):
            raise ExportError(
                f"{type(model).__name__} can't be exported to OpenVINO: its output is neither one tensor nor a "
                "dictionary of tensors"
            )
        end = b.ops.result(value)
        end.output(0).set_names({name})
        ends.append(end)
    graph_made = b.ov.Model(ends, [parameter], type(model).__name__)
    if any(isinstance(module, WeightOnlyLinear) for module in model.modules()):
        # else the engine would round the activations to 8 bits at run time
        graph_made.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return graph_made, b.paths


def _is_value(b: GraphBuilder, x: Any) -> bool:
    return isinstance(x, b.ov.Output)


class _Walk:
    """Runs the steps of a traced graph with lowerings in place of torch."""

    def __init__(self, b: GraphBuilder, model: nn.Module, graph: fx.Graph) -> None:
        self.b = b
        self.model = model
        self.graph = graph
        self.values: dict[fx.Node, Any] = {}
        self._names: set[str] = set()

    def run(self, images: Value) -> Any:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if self.values and not node.args:
                    raise ExportError(f"the model takes a second input, {node.name}: only images are given")
                self.values[node] = node.args[0] if self.values else images
            elif node.op == "output":
                return self._take(node.args[0])
            else:
                self.values[node] = self._step(node)
        raise AssertionError("a traced graph ends in an output")

    def _step(self, node: fx.Node) -> Any:
        args, kwargs = self._take(node.args), self._take(dict(node.kwargs))
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.model)
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            self.b.where = self._unique(str(node.target))
            lowering = MODULES.get(type(module))
            if lowering is None:
                raise self.b.refuse(f"there is no lowering for {type(module).__name__}")
            return self._call(lowering, (module, *args), kwargs)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if not any(_is_value(self.b, a) for a in _flat((args, kwargs))):
            if node.op == "call_function" and callable(node.target):
                return node.target(*args, **kwargs)  # of weights or sizes: its value is known now
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        self.b.where = self._unique(f"{self._module_of(node)}{name}")
        lowering = FUNCTIONS.get(node.target)
        if lowering is None:
            raise self.b.refuse(f"there is no lowering for the function {name}")
        return self._call(lowering, args, kwargs)

    def _call(self, lowering: Lowering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return lowering(self.b, *args, **kwargs)
        except ExportError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise self.b.refuse(f"its arguments have no lowering: {text}") from error

    def _take(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return self.values[arg]
        if isinstance(arg, slice):
            return slice(self._take(arg.start), self._take(arg.stop), self._take(arg.step))
        if isinstance(arg, (tuple, list)):
            return tuple(self._take(a) for a in arg)
        return {k: self._take(v) for k, v in arg.items()} if isinstance(arg, dict) else arg

    def _unique(self, name: str) -> str:
        """Return the name, with a number if a step has it already: a module may be called twice."""
        number = 1
        while (f"{name}_{number}" if number > 1 else name) in self._names:
            number += 1
        name = f"{name}_{number}" if number > 1 else name
        self._names.add(name)
        return name

    @staticmethod
    def _module_of(node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed(stack), "") if stack else ""
        return f"{path}." if path else ""


def _flat(arg: Any) -> list[Any]:
    if isinstance(arg, (tuple, list)):
        return [x for a in arg for x in _flat(a)]
    return [x for a in arg.values() for x in _flat(a)] if isinstance(arg, dict) else [arg]


def _module(*types: type[nn.Module]) -> Callable[[Lowering], Lowering]:
    def register(lowering: Lowering) -> Lowering:
        MODULES.update(dict.fromkeys(types, lowering))
        return lowering

    return register


def _function(*keys: Any) -> Callable[[Lowering], Lowering]:
    def register(lowering: Lowering) -> Lowering:
        FUNCTIONS.update(dict.fromkeys(keys, lowering))
        return lowering

    return register


# Convolutions and linear layers


MODULES[PackedConv2d] = lower_packed
MODULES[IntegerConv2d] = lower_integer_conv
MODULES[IntegerLinear] = lower_integer_linear
MODULES[WeightOnlyLinear] = lower_weight_only


@_module(StoredSignConv2d)
def _sign_conv_module(b: GraphBuilder, m: StoredSignConv2d, x: Value) -> Value:
    g = m.geometry
    signs = lower_signs(b, m.threshold, x)
    return _conv(b, signs, m.weight, m.bias, g.stride, g.padding, g.dilation, g.groups)


@_module(PackedBasesConv2d)
def _bases_conv_module(b: GraphBuilder, m: PackedBasesConv2d, x: Value) -> Value:
    raise b.refuse(
        f"it reads its input as {m.code.words}, with {m.bases} base(s) of weights. Exported are layers that read "
        "sign(x - t) and have one base: methods bonn, bnn, xnor, bireal, pcnn and reactnet"
    )


@_module(SparseConv2d)
def _sparse_conv_module(b: GraphBuilder, m: SparseConv2d, x: Value) -> Value:
    g = m.geometry
    return _conv(b, x, m.dense_weight(), m.bias, g.stride, g.padding, g.dilation, g.groups)


@_module(SparseLinear)
def _sparse_linear_module(b: GraphBuilder, m: SparseLinear, x: Value) -> Value:
    return _linear(b, x, m.dense_weight(), m.bias)


@_module(nn.Conv2d)
def _conv_module(b: GraphBuilder, m: nn.Conv2d, x: Value) -> Value:
    if m.padding_mode != "zeros":
        raise b.refuse(f"padding mode {m.padding_mode!r}: only zeros can be expressed")
    return _conv(b, x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


@_function(F.conv2d, torch.conv2d)
def _conv(
    b: GraphBuilder,
    input: Value,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    if not isinstance(weight, Tensor):
        raise b.refuse("its weight is computed from the input")
    grouped = (groups, weight.shape[0] // groups, *weight.shape[1:])
    constant = b.weight(weight if groups == 1 else weight.reshape(grouped))
    begin, end = _padding(padding, weight.shape[2:], pair(dilation))
    return _convolve(b, input, constant, bias, (pair(stride), begin, end, pair(dilation)), groups)


def _convolve(b: GraphBuilder, x: Value, weight: Value, bias: Tensor | None, geometry: Any, groups: int) -> Value:
    stride, begin, end, dilation = (list(part) for part in geometry)
    kind = b.ops.convolution if groups == 1 else b.ops.group_convolution
    y = b.name(kind(x, weight, stride, begin, end, dilation))
    return y if bias is None else b.name(b.ops.add(y, b.channels(bias)), ".bias")


@_module(HalfConv2d)
def _half_conv_module(b: GraphBuilder, m: HalfConv2d, x: Value) -> Value:
    g = m.geometry
    weight = lower_half_weight(b, m)
    if g.groups > 1:
        weight = b.reshape(weight, [g.groups, g.out_channels // g.groups, *g.weight_shape[1:]])
    bias = None if m.bias is None else m.bias.float()
    return _convolve(b, x, weight, bias, (g.stride, g.padding, g.padding, g.dilation), g.groups)


def _padding(padding: Any, kernel: Any, dilation: tuple[int, int]) -> tuple[list[int], list[int]]:
    if padding == "valid":
        padding = 0
    if padding == "same":  # torch puts the odd one at the end
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    return list(pair(padding)), list(pair(padding))


@_module(nn.Linear)
def _linear_module(b: GraphBuilder, m: nn.Linear, x: Value) -> Value:
    return _linear(b, x, m.weight, m.bias)


@_function(F.linear)
def _linear(b: GraphBuilder, input: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    return _matmul(b, input, b.weight(weight), bias)


@_module(HalfLinear)
def _half_linear_module(b: GraphBuilder, m: HalfLinear, x: Value) -> Value:
    return _matmul(b, x, lower_half_weight(b, m), None if m.bias is None else m.bias.float())


def _matmul(b: GraphBuilder, x: Value, weight: Value, bias: Tensor | None) -> Value:
    y = b.name(b.ops.matmul(x, weight, False, True))
    if bias is None:
        return y
    return b.name(b.ops.add(y, b.constant(bias.reshape(*(1,) * (len(y.shape) - 1), -1))), ".bias")


# Norms


@_module(nn.BatchNorm2d, nn.BatchNorm1d, nn.SyncBatchNorm)
def _batch_norm_module(b: GraphBuilder, m: Any, x: Value) -> Value:
    if m.running_mean is None:
        raise b.refuse("a batch norm without running statistics depends on the batch")
    return _batch_norm(b, x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)


@_function(F.batch_norm)
def _batch_norm(
    b: GraphBuilder,
    input: Value,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    if training or running_mean is None or running_var is None:
        raise b.refuse("a batch norm without running statistics depends on the batch")
    y = b.channel_affine(input, *batch_norm_affine(weight, bias, running_mean, running_var, eps))

    def by_torch(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)

    b.norms[y.get_node().get_friendly_name()] = (input, by_torch)
    return y


# Activations


@_module(nn.PReLU)
def _prelu_module(b: GraphBuilder, m: nn.PReLU, x: Value) -> Value:
    return _prelu(b, x, m.weight)


@_function(F.prelu, torch.prelu)
def _prelu(b: GraphBuilder, input: Value, weight: Tensor) -> Value:
    return b.name(b.ops.prelu(input, b.constant(weight.reshape(-1))))


@_module(RPReLU)
def _rprelu_module(b: GraphBuilder, m: RPReLU, x: Value) -> Value:
    shifted = b.ops.subtract(x, b.channels(m.shift_in)).output(0)
    bent = b.ops.prelu(shifted, b.constant(m.weight.reshape(-1))).output(0)
    return b.name(b.ops.add(bent, b.channels(m.shift_out)))


@_module(nn.LeakyReLU)
def _leaky_module(b: GraphBuilder, m: nn.LeakyReLU, x: Value) -> Value:
    return _leaky(b, x, m.negative_slope)


@_function(F.leaky_relu)
def _leaky(b: GraphBuilder, input: Value, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    return b.name(b.ops.prelu(input, b.constant(np.array([negative_slope]))))


@_module(nn.GELU)
def _gelu_module(b: GraphBuilder, m: nn.GELU, x: Value) -> Value:
    return _gelu(b, x, m.approximate)


@_function(F.gelu)
def _gelu(b: GraphBuilder, input: Value, approximate: str = "none") -> Value:
    return b.name(b.ops.gelu(input, "tanh" if approximate == "tanh" else "erf"))


@_module(nn.Hardtanh)
def _hardtanh_module(b: GraphBuilder, m: nn.Hardtanh, x: Value) -> Value:
    return b.name(b.ops.clamp(x, m.min_val, m.max_val))


@_module(nn.ELU)
def _elu_module(b: GraphBuilder, m: nn.ELU, x: Value) -> Value:
    return b.name(b.ops.elu(x, m.alpha))


def _pointwise(operation: Callable[[GraphBuilder, Value], Any]) -> tuple[Lowering, Lowering]:
    def function(b: GraphBuilder, input: Value, inplace: bool = False) -> Value:
        return b.name(operation(b, input))

    def module(b: GraphBuilder, m: nn.Module, x: Value) -> Value:
        return b.name(operation(b, x))

    return module, function


_SIMPLE: list[tuple[Callable[[GraphBuilder, Value], Any], list[type[nn.Module]], list[Any]]] = [
    (lambda b, x: b.ops.relu(x), [nn.ReLU], [F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"]),
    (lambda b, x: b.ops.clamp(x, 0.0, 6.0), [nn.ReLU6], [F.relu6]),
    (lambda b, x: b.ops.hswish(x), [nn.Hardswish], [F.hardswish]),
    (lambda b, x: b.ops.hsigmoid(x), [nn.Hardsigmoid], [F.hardsigmoid]),
    (lambda b, x: b.ops.swish(x), [nn.SiLU], [F.silu]),
    (lambda b, x: b.ops.sigmoid(x), [nn.Sigmoid], [F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"]),
    (lambda b, x: b.ops.tanh(x), [nn.Tanh], [F.tanh, torch.tanh, "tanh", "tanh_"]),
]
for _operation, _types, _keys in _SIMPLE:
    _of_module, _of_function = _pointwise(_operation)
    _module(*_types)(_of_module)
    _function(*_keys)(_of_function)


@_module(nn.Identity, FoldedNorm, Widen, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
def _identity_module(b: GraphBuilder, m: nn.Module, x: Value, *_: Any) -> Value:
    return x


@_function(F.dropout, F.dropout2d, "contiguous", "clone", "detach", "float", torch.clone)
def _identity(b: GraphBuilder, input: Value, *args: Any, **kwargs: Any) -> Value:
    if kwargs.get("training"):
        raise b.refuse("dropout that is active in eval mode")
    return input


# Pooling


@_module(nn.MaxPool2d)
def _max_pool_module(b: GraphBuilder, m: nn.MaxPool2d, x: Value) -> Value:
    return _max_pool(b, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)


@_function(F.max_pool2d, torch.max_pool2d)
def _max_pool(
    b: GraphBuilder,
    input: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    if return_indices:
        raise b.refuse("max pooling that returns indices")
    kernel, pads = pair(kernel_size), list(pair(padding))
    strides = kernel if stride is None or stride == [] else pair(stride)
    rounding = "ceil_torch" if ceil_mode else "floor"
    node = b.ops.max_pool(input, list(strides), list(pair(dilation)), pads, pads, list(kernel), rounding)
    return b.name(node)


@_module(nn.AvgPool2d)
def _avg_pool_module(b: GraphBuilder, m: nn.AvgPool2d, x: Value) -> Value:
    return _avg_pool(b, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)


@_function(F.avg_pool2d)
def _avg_pool(
    b: GraphBuilder,
    input: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    if divisor_override is not None:
        raise b.refuse("average pooling with divisor_override")
    kernel, pads = pair(kernel_size), list(pair(padding))
    strides = kernel if stride is None or stride == [] else pair(stride)
    rounding = "ceil_torch" if ceil_mode else "floor"
    exclude = not count_include_pad or pads == [0, 0]
    if ceil_mode and not exclude:  # torch counts the padding, but not what the last window reaches beyond it
        shape = shape_of(input)
        outputs = [_ceil_windows(n, *g) for n, g in zip(shape[2:], zip(kernel, strides, pads))]
        around = np.array([0, 0, *pads], np.int64)
        padded = b.ops.pad(input, around, around, "constant", b.constant(0.0))
        y = b.ops.avg_pool(padded, list(strides), [0, 0], [0, 0], list(kernel), True, rounding)
        axes = np.array([2, 3], np.int64)
        return b.name(b.ops.slice(y, 0 * axes, np.array(outputs, np.int64), 0 * axes + 1, axes))
    return b.name(b.ops.avg_pool(input, list(strides), pads, pads, list(kernel), exclude, rounding))


def _ceil_windows(size: int, kernel: int, stride: int, pad: int) -> int:
    """Return how many windows torch takes with ceil_mode: the last must begin inside the image or its left padding."""
    windows = -(-(size + 2 * pad - kernel) // stride) + 1
    return windows - 1 if (windows - 1) * stride >= size + pad else windows


@_module(nn.AdaptiveAvgPool2d)
def _adaptive_module(b: GraphBuilder, m: nn.AdaptiveAvgPool2d, x: Value) -> Value:
    return _adaptive_avg_pool(b, x, m.output_size)


@_function(F.adaptive_avg_pool2d)
def _adaptive_avg_pool(b: GraphBuilder, input: Value, output_size: Any) -> Value:
    height, width = shape_of(input)[2:]
    given = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    rows, columns = (size if n is None else int(n) for n, size in zip(given, (height, width), strict=True))
    if (rows, columns) == (1, 1):
        return _mean(b, input, (2, 3), True)
    return b.name(b.ops.adaptive_avg_pool(input, np.array([rows, columns], np.int64)))


@_module(nn.AdaptiveMaxPool2d)
def _adaptive_max_module(b: GraphBuilder, m: nn.AdaptiveMaxPool2d, x: Value) -> Value:
    size = m.output_size
    if size not in (1, (1, 1)) or m.return_indices:
        raise b.refuse(f"adaptive max pooling to {size}: only to 1")
    return b.name(b.ops.reduce_max(x, np.array([2, 3], np.int64), True))


@_function("mean", torch.mean)
def _mean(b: GraphBuilder, input: Value, dim: Any, keepdim: bool = False) -> Value:
    axes = [dim] if isinstance(dim, int) else list(dim)
    return b.name(b.ops.reduce_mean(input, np.array(axes, np.int64), keepdim))


# Arithmetic and shapes


def _binary(name: str) -> Lowering:
    def lowering(b: GraphBuilder, input: Any, other: Any, *, alpha: float = 1) -> Value:
        if alpha != 1:
            raise b.refuse(f"alpha={alpha}")
        left = input if _is_value(b, input) else _operand(b, input, other)
        right = other if _is_value(b, other) else _operand(b, other, input)
        return b.name(getattr(b.ops, name)(left, right))

    return lowering


def _operand(b: GraphBuilder, value: Any, like: Value) -> Value:
    return b.constant(value) if isinstance(value, Tensor) and value.ndim else b.constant(float(value), like=like)


_function(operator.add, operator.iadd, torch.add, "add", "add_")(_binary("add"))
_function(operator.sub, operator.isub, torch.sub, "sub", "sub_")(_binary("subtract"))
_function(operator.mul, operator.imul, torch.mul, "mul", "mul_")(_binary("multiply"))
_function(operator.truediv, torch.div, "div", "div_")(_binary("divide"))


@_function(torch.cat, torch.concat)
def _cat(b: GraphBuilder, tensors: Any, dim: int = 0) -> Value:
    return b.name(b.ops.concat(list(tensors), dim))


@_module(nn.Flatten)
def _flatten_module(b: GraphBuilder, m: nn.Flatten, x: Value) -> Value:
    return _flatten(b, x, m.start_dim, m.end_dim)


@_function(torch.flatten, "flatten")
def _flatten(b: GraphBuilder, input: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    shape = list(shape_of(input))
    first, last = start_dim % len(shape), end_dim % len(shape)
    return b.reshape(input, [*shape[:first], -1, *shape[last + 1 :]])


@_function("view", "reshape", torch.reshape)
def _reshape(b: GraphBuilder, input: Value, *shape: Any) -> Value:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
    return b.reshape(input, [int(n) for n in sizes])


@_function("size")
def _size(b: GraphBuilder, input: Value, dim: int | None = None) -> Any:
    return shape_of(input) if dim is None else shape_of(input)[dim]


@_function(getattr)
def _getattr(b: GraphBuilder, input: Value, name: str) -> Any:
    if name not in ("shape", "ndim"):
        raise b.refuse(f"the attribute {name} of a tensor")
    return shape_of(input) if name == "shape" else len(shape_of(input))


@_function(operator.getitem)
def _getitem(b: GraphBuilder, input: Value, index: Any) -> Value:
    """Lower slices with positive steps, such as x[:, :, ::2, 1:]."""
    parts = index if isinstance(index, tuple) else (index,)
    shape = shape_of(input)
    if len(parts) > len(shape) or not all(isinstance(part, slice) for part in parts):
        raise b.refuse("an index that is not made of slices")
    bounds = [part.indices(size) for part, size in zip(parts, shape)]
    begin, end, step = (np.array(values, np.int64) for values in zip(*bounds, strict=True))
    return b.name(b.ops.slice(input, begin, end, step, np.arange(len(parts))))


@_function(F.interpolate)
def _interpolate(
    b: GraphBuilder, input: Value, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **rest: Any
) -> Value:
    if mode != "nearest" or size is None or any(value for value in rest.values()):
        raise b.refuse("interpolation other than to a size, by the nearest neighbour")
    y = input
    for axis, (before, after) in enumerate(zip(shape_of(input)[2:], pair(size), strict=True), 2):
        if before != after:  # torch's own choice of neighbours: the engine rounds some of them otherwise
            places = F.interpolate(torch.arange(before)[None, None].double(), size=after).long().flatten()
            y = b.ops.gather(y, b.ops.constant(places.numpy()), np.array(axis, np.int32)).output(0)
    return b.name(y.get_node()) if y is not input else input


@_module(nn.ZeroPad2d)
def _zero_pad_module(b: GraphBuilder, m: nn.ZeroPad2d, x: Value) -> Value:
    left, right, top, bottom = m.padding
    begin, end = np.array([0, 0, top, left], np.int64), np.array([0, 0, bottom, right], np.int64)
    return b.name(b.ops.pad(x, begin, end, "constant", b.constant(0.0)))


__all__ = ["INPUT", "OUTPUT", "build_graph"]
