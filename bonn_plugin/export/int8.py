"""The rival in 8 bits: a full-precision network quantised by NNCF, OpenVINO's own tool."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bonn_plugin.errors import ExportError
from bonn_plugin.export.engine import INSTALL


def quantize(graph: Any, samples: Iterable[Tensor], shape: tuple[int, int, int, int]) -> Any:
    """Return the int8 graph of a float graph: NNCF's post-training quantization with its defaults.

    Args:
        graph: an ``openvino.Model``.
        samples: batches of images to calibrate on, (any number, C, H, W).
        shape: (B, C, H, W) of the graph.

    Raises:
        ExportError: NNCF is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nncf
    except ImportError as error:
        raise ExportError(f"NNCF can't be imported ({error}): {INSTALL}") from None
    logging.getLogger("nncf").setLevel(logging.ERROR)
    batches = []
    for images in samples:
        repeats = -(-shape[0] // len(images))
        parts = torch.split(images.repeat(repeats, 1, 1, 1), shape[0])
        batches += [part.numpy() for part in parts if len(part) == shape[0]]
    # its progress bars go to standard output
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return nncf.quantize(graph, nncf.Dataset(batches), subset_size=len(batches))


def convolutions_in_int8(compiled: Any) -> tuple[int, int]:
    """Return how many convolutions of a compiled model run in 8 bits, and how many there are."""
    eight = total = 0
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        if info["layerType"].astype(str) == "Convolution":
            total += 1
            eight += info["runtimePrecision"].astype(str) in ("i8", "u8")
    return eight, total


__all__ = ["convolutions_in_int8", "quantize"]
