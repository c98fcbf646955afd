"""What a network takes: the channels and the size of its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bonn_plugin.nn.modes import evaluating

IMAGE_CHANNELS = 4
"""Images have no more channels, but for those of special cameras."""


def image_channels(model: nn.Module, args: Mapping[str, Any], size: tuple[int, int]) -> int:
    """Return C of the images (B, C, H, W) that ``model`` takes.

    Its first convolution tells, unless that sees what the network has made of the image before, such as blocks of
    pixels folded into channels: then timm's ``pretrained_cfg`` does. Where both may be, the network is run.

    Args:
        model: the network.
        args: what it was built with; ``in_chans`` among them decides.
        size: (H, W).
    """
    if "in_chans" in args:
        return int(args["in_chans"])
    stated = _input_size(model)[0]
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.in_channels <= IMAGE_CHANNELS or first.in_channels == stated:
        return stated if first is None else first.in_channels
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, first.in_channels, *size).to(first.weight))
    except Exception:  # whatever a network makes of the wrong number of channels
        return stated
    return first.in_channels


def image_size(model: nn.Module) -> tuple[int, int]:
    """Return (H, W) that timm states for ``model``, 224 x 224 where it states none."""
    return _input_size(model)[1:]


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    settings: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = settings.get("input_size") or (3, 224, 224)
    return int(channels), int(height), int(width)
