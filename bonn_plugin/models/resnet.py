"""bonn_resnet18 and bonn_resnet34: ResNet in the Bi-Real structure of the paper's ImageNet network.

Every 3x3 convolution has a shortcut of its own (Bi-Real Net, ECCV 2018, Fig. 3; BONN, section 3.1.3), so
that the real-valued activations go past the sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from bonn_plugin.models.head import ConvNet

Norm = Literal["before", "after"]
Shortcut = Literal["block", "conv"]


class BiRealBlock(nn.Module):
    """BN -> (sign ->) 3x3 convolution -> + shortcut -> PReLU, one convolution a block.

    With the norm ``"after"`` it is (sign ->) 3x3 convolution -> BN -> + shortcut -> PReLU, the order of Bi-Real Net,
    which has no activation there.
    The shortcut that halves the size is average pooling, then a 1x1 convolution in full precision:
    the same function as the other order at a quarter of the cost.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm = "before") -> None:
        super().__init__()
        self.norm_first = norm == "before"
        self.bn = nn.BatchNorm2d(in_channels if self.norm_first else channels)
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.downsample = _shortcut(in_channels, channels, stride)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        made = self.conv(self.bn(x)) if self.norm_first else self.bn(self.conv(x))
        y: Tensor = self.act(made + self.downsample(x))
        return y


class PairBlock(nn.Module):
    """BN -> (sign ->) 3x3 convolution -> PReLU, twice, and a shortcut round both, before the second PReLU.

    The structure of ResNet18 in the order of XNOR-Net (ECCV 2016, Fig. 3), or with the norm ``"after"`` each
    convolution, as BNN has it: for the methods before Bi-Real Net.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm = "before") -> None:
        super().__init__()
        self.norm_first = norm == "before"
        self.bn1 = nn.BatchNorm2d(in_channels if self.norm_first else channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.act1 = nn.PReLU(channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.downsample = _shortcut(in_channels, channels, stride)
        self.act2 = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        y = self.act1(self.conv1(self.bn1(x)) if self.norm_first else self.bn1(self.conv1(x)))
        y = self.conv2(self.bn2(y)) if self.norm_first else self.bn2(self.conv2(y))
        out: Tensor = self.act2(y + self.downsample(x))
        return out


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(
        nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity(),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    )


class BonnResNet(ConvNet):
    """Stem 7x7 convolution, BN, PReLU, max-pool; four stages of ``BiRealBlock``; average pool; linear.

    Args:
        depths: convolutions a stage.
        widths: channels a stage; the stem has the first.
        num_classes: outputs; 0 leaves the features.
        in_chans: channels of the input.
        global_pool: ``"avg"`` or ``""``.
        drop_rate: dropout before the classifier.
        shortcut: ``"conv"``, round each convolution, or ``"block"``, round each two of them (``PairBlock``), at the
            same number of parameters.
        norm: ``"before"`` each 3x3 convolution or ``"after"`` it.

    Raises:
        ValueError: an unknown shortcut or norm, or an odd depth with ``"block"``.
    """

    def __init__(
        self,
        depths: Sequence[int] = (4, 4, 4, 4),
        widths: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        shortcut: Shortcut = "conv",
        norm: Norm = "before",
    ) -> None:
        super().__init__()
        if shortcut not in ("block", "conv"):
            raise ValueError(f"unknown shortcut {shortcut!r}: 'conv' or 'block'")
        if norm not in ("before", "after"):
            raise ValueError(f"unknown norm {norm!r}: 'before' or 'after'")
        convs = 1 if shortcut == "conv" else 2
        if any(depth % convs for depth in depths):
            raise ValueError(f"depths {list(depths)}: shortcut 'block' takes two convolutions at a time")
        block = BiRealBlock if shortcut == "conv" else PairBlock
        width = int(widths[0])
        self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.PReLU(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.feature_info = [{"num_chs": width, "reduction": 2, "module": "act1"}]
        self.stages = [f"layer{i}" for i in range(1, len(depths) + 1)]
        for i, (depth, channels) in enumerate(zip(depths, widths, strict=True)):
            stride = 1 if i == 0 else 2
            blocks = [
                block(width if j == 0 else channels, channels, stride if j == 0 else 1, norm)
                for j in range(depth // convs)
            ]
            width = int(channels)
            setattr(self, self.stages[i], nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": 4 << i, "module": self.stages[i]})
        self._init_head(width, num_classes, global_pool, drop_rate)

    def forward_stem(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, in_chans, H, W) to [(B, C, H / 2, W / 2)] and its half."""
        x = self.act1(self.bn1(self.conv1(x)))
        return [x], self.maxpool(x)


default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in ("bonn_resnet18.untrained", "bonn_resnet34.untrained")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> BonnResNet:
    model: BonnResNet = build_model_with_cfg(BonnResNet, variant, pretrained, **kwargs)
    return model


@register_model
def bonn_resnet18(pretrained: bool = False, **kwargs: Any) -> BonnResNet:
    """ResNet18 with a shortcut round each of its 16 3x3 convolutions."""
    return _create("bonn_resnet18", pretrained, **{"depths": (4, 4, 4, 4), **kwargs})


@register_model
def bonn_resnet34(pretrained: bool = False, **kwargs: Any) -> BonnResNet:
    """ResNet34 with a shortcut round each of its 32 3x3 convolutions."""
    return _create("bonn_resnet34", pretrained, **{"depths": (6, 8, 12, 6), **kwargs})


__all__ = ["BiRealBlock", "BonnResNet", "PairBlock", "bonn_resnet18", "bonn_resnet34"]
