"""The first convolution, computed in parts that stay in the core's own cache until they are pooled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bonn_plugin.export.builder import Value, shape_of
from bonn_plugin.export.engine import import_openvino

CACHE = 1 << 20
"""Bytes of a map that the level-2 cache of a core holds."""
VECTOR = 16
"""Filters that the engine's direct convolution computes at a time."""
FEW_CHANNELS = 4
"""Input channels of a stem: reading so small an input again for each part costs nothing."""
ELEMENTWISE = ("Add", "Clamp", "Multiply", "PRelu", "Relu")


def split_stem(graph: Any) -> None:
    """Compute a float stem (convolution, norm, activation, max-pool) a quarter of its filters at a time, in place.

    At 224 px the map of ResNet's stem takes 3.2 MB: written and read again for the pooling, it goes through the
    cache that the cores share. A part is pooled while it lies in the core's own. Each filter's sum is computed
    as before. Only stems whose map is too large, and whose parts are small enough, are split.

    Args:
        graph: an ``openvino.Model`` that ``build_graph`` made.
    """
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Convolution" or shape_of(node.input_value(0))[1] > FEW_CHANNELS:
            continue
        chain = _to_pool(node)
        parts = _parts(shape_of(node.output(0)))
        if chain and parts > 1 and all(_splittable(v) for n in chain for v in _constants(n)):
            _split(chain, parts)


def _parts(shape: tuple[int, ...]) -> int:
    """Return into how many equal groups of filters a float32 map is split; 1 if it is left as it is."""
    filters, size = shape[1], 4 * math.prod(shape)
    if size <= CACHE:
        return 1
    fitting = (n for n in range(2, filters // VECTOR + 1) if filters % (n * VECTOR) == 0 and size <= n * CACHE)
    return next(fitting, 1)


def _to_pool(convolution: Any) -> list[Any]:
    """Return the nodes from a convolution to its max-pool; none if something else is in between."""
    chain = [convolution]
    while chain[-1].get_type_name() != "MaxPool":
        readers = [r for output in chain[-1].outputs() for r in output.get_target_inputs()]
        if len(readers) != 1 or readers[0].get_index() != 0:
            return []
        chain.append(readers[0].get_node())
        if chain[-1].get_type_name() not in (*ELEMENTWISE, "MaxPool"):
            return []
    return chain


def _constants(node: Any) -> list[Value]:
    return [node.input_value(i) for i in range(1, node.get_input_size())]


def _splittable(value: Value) -> bool:
    node = value.get_node()
    if node.get_type_name() == "Convert":  # of weights in half precision
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _split(chain: list[Any], parts: int) -> None:
    ops = import_openvino().opset14
    results = []
    for part in range(parts):
        x = chain[0].input_value(0)
        for node in chain:
            others = [_take(v, node.get_type_name(), part, parts) for v in _constants(node)]
            copy = _again(node, [x, *others])
            copy.set_friendly_name(f"{node.get_friendly_name()}.part{part}")
            x = copy.output(0)
        results.append(x)
    whole = ops.concat(results, 1)
    pool = chain[-1]
    whole.set_friendly_name(pool.get_friendly_name())
    for reader in pool.output(0).get_target_inputs():
        reader.replace_source_output(whole.output(0))


def _take(value: Value, reader: str, part: int, parts: int) -> Value:
    """Return a part's share of a constant: of filters, (C, ...), of slopes, (C,), or of a norm, (1, C, 1, 1)."""
    node = value.get_node()
    if node.get_type_name() == "Convert":
        return _again(node, [_take(node.input_value(0), reader, part, parts)]).output(0)
    array = node.data
    axis = 0 if reader in ("Convolution", "PRelu") else array.ndim - 3
    if array.ndim == 0 or axis < 0 or array.shape[axis] == 1:
        return value  # one number for all channels
    share = np.split(array, parts, axis)[part]
    return import_openvino().opset14.constant(np.array(share, order="C")).output(0)


def _again(node: Any, inputs: list[Value]) -> Any:
    from openvino.utils.node_factory import NodeFactory

    return NodeFactory("opset14").create(node.get_type_name(), inputs, node.get_attributes())


__all__ = ["split_stem"]
