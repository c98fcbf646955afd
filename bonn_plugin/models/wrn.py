"""bonn_wrn22_16, bonn_wrn22_64 and bonn_wrn40_16: the pre-activation Wide-ResNets of the paper's Table 3.

The number after the depth is the width of the first stage: 16-16-32-64 and 64-64-128-256 (BONN, section
3.1.2). Depth 6n + 4 with projection shortcuts: 272,282 and 4,326,986 parameters at 10 classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from bonn_plugin.models.head import ConvNet

Shortcut = Literal["block", "conv"]


def _activate(x: Tensor, conv: nn.Module) -> Tensor:
    # The sign is the activation of a 1-bit convolution: after a ReLU it would be +1 everywhere.
    return x if getattr(conv, "binarizes_input", False) else F.relu(x)


class PreActBlock(nn.Module):
    """BN -> activation -> conv, twice, with a shortcut round the block or round each convolution.

    The activation is ReLU, or the sign that belongs to a 1-bit convolution. Dropout stands between
    the first convolution and the second norm: what reaches a sign is never zeroed.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, drop_rate: float, shortcut: Shortcut) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.drop = nn.Dropout(drop_rate)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Conv2d(in_channels, channels, 1, stride, bias=False) if stride > 1 or in_channels != channels else None
        )
        self.each_conv = shortcut == "conv"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        pre = _activate(self.bn1(x), self.conv1)
        around = x if self.shortcut is None else self.shortcut(pre)
        y = self.conv1(pre)
        if self.each_conv:
            around = y = y + around
        y = self.bn2(self.drop(y))
        y = self.conv2(_activate(y, self.conv2))
        out: Tensor = y + around
        return out


class BonnWideResNet(ConvNet):
    """3x3 convolution, three stages of ``PreActBlock``, BN, ReLU, average pool, linear.

    Args:
        depth: 6n + 4 convolutions, as the paper counts.
        widths: channels of the three stages; the stem has the first.
        num_classes: outputs; 0 leaves the features.
        in_chans: channels of the input.
        global_pool: ``"avg"`` or ``""``.
        drop_rate: dropout inside the blocks.
        shortcut: ``"block"``, the WRN of the paper, or ``"conv"``, a shortcut round each convolution as in
            Bi-Real Net, at the same number of parameters.

    Raises:
        ValueError: the depth is not 6n + 4, there are not three widths, or the shortcut is unknown.
    """

    def __init__(
        self,
        depth: int = 22,
        widths: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        shortcut: Shortcut = "block",
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth {depth} is not 6n + 4")
        if len(widths) != 3:
            raise ValueError(f"a wide ResNet has three stages, not {len(widths)}")
        if shortcut not in ("block", "conv"):
            raise ValueError(f"unknown shortcut {shortcut!r}: 'block' or 'conv'")
        width = int(widths[0])
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.feature_info = []
        self.stages = [f"layer{i}" for i in range(1, 4)]
        for i, channels in enumerate(widths):
            blocks = [
                PreActBlock(
                    width if j == 0 else channels,
                    channels,
                    2 if i > 0 and j == 0 else 1,
                    drop_rate,
                    shortcut,
                )
                for j in range((depth - 4) // 6)
            ]
            width = int(channels)
            setattr(self, self.stages[i], nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": 1 << i, "module": self.stages[i]})
        self.bn: nn.Module = nn.BatchNorm2d(width)
        self.act: nn.Module = nn.ReLU()
        self._init_head(width, num_classes, global_pool, 0.0)

    def forward_stem(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, in_chans, H, W) to no map and (B, C, H, W)."""
        return [], self.conv1(x)

    def forward_end(self, x: Tensor) -> Tensor:
        """Return the last map after its norm and ReLU."""
        y: Tensor = self.act(self.bn(x))
        return y

    def _prune_end(self) -> None:
        self.bn = nn.Identity()
        self.act = nn.Identity()


_NAMES = ("bonn_wrn22_16", "bonn_wrn22_64", "bonn_wrn40_16")
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in _NAMES
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> BonnWideResNet:
    features = {"out_indices": (0, 1, 2)}
    model: BonnWideResNet = build_model_with_cfg(BonnWideResNet, variant, pretrained, feature_cfg=features, **kwargs)
    return model


@register_model
def bonn_wrn22_16(pretrained: bool = False, **kwargs: Any) -> BonnWideResNet:
    """WRN22 16-16-32-64 of Table 3: 272,282 parameters at 10 classes."""
    return _create("bonn_wrn22_16", pretrained, **{"depth": 22, "widths": (16, 32, 64), **kwargs})


@register_model
def bonn_wrn22_64(pretrained: bool = False, **kwargs: Any) -> BonnWideResNet:
    """WRN22 64-64-128-256 of Table 3, dropout 0.3: 4,326,986 parameters at 10 classes."""
    defaults = {"depth": 22, "widths": (64, 128, 256), "drop_rate": 0.3}
    return _create("bonn_wrn22_64", pretrained, **{**defaults, **kwargs})


@register_model
def bonn_wrn40_16(pretrained: bool = False, **kwargs: Any) -> BonnWideResNet:
    """WRN40 16-16-32-64."""
    return _create("bonn_wrn40_16", pretrained, **{"depth": 40, "widths": (16, 32, 64), **kwargs})
