"""What the networks share: the head, and the methods that timm asks of a model."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn


class ConvNet(nn.Module):
    """A convolutional network with timm's methods; subclasses build a body, then call ``_init_head``."""

    def _init_head(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(num_features, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last feature map."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the last feature map and classify it: (B, num_classes), or (B, C) with ``pre_logits``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the linear layer (timm's contract)."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **_: Any) -> None:
        """Replace the linear layer (timm's contract)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
