"""What the networks share: the head, and the methods that timm asks of a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn


class ConvNet(nn.Module):
    """A convolutional network with timm's methods; subclasses build a body, then call ``_init_head``.

    Attributes:
        stages: names of the stages, each a feature map of ``feature_info``, the last maps of it in order.
    """

    stages: list[str]
    feature_info: list[dict[str, Any]]
    num_features: int
    head_hidden_size: int

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
    def forward_stem(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the feature maps of ``feature_info`` that lie before the stages, and the first stage's input."""

    def forward_end(self, x: Tensor) -> Tensor:
        """Return what follows the last stage, before pooling."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last feature map."""
        _, x = self.forward_stem(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.forward_end(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return feature maps, as timm's networks do.

        Args:
            x: images, (B, in_chans, H, W).
            indices: which entries of ``feature_info``: these, or the last so many; None for all.
            norm: apply what follows the last stage to its map too.
            stop_early: leave stages out that no wanted map needs.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the maps alone, not (the last feature map, the maps).

        Raises:
            ValueError: another ``output_fmt``, or an index that no map has.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"feature maps are NCHW, not {output_fmt!r}")
        take, last = _wanted(len(self.feature_info), indices)
        maps, x = self.forward_stem(x)
        before = len(maps)
        stages = self.stages[: last + 1 - before] if stop_early else self.stages
        for i, stage in enumerate(stages):
            x = getattr(self, stage)(x)
            maps.append(self.forward_end(x) if norm and i + 1 == len(self.stages) else x)
        wanted = [maps[i] for i in take]
        return wanted if intermediates_only else (self.forward_end(x), wanted)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take the stages away that no wanted map needs, and the head (timm's contract); return the indices."""
        take, last = _wanted(len(self.feature_info), indices)
        before = len(self.feature_info) - len(self.stages)
        for stage in self.stages[max(0, last + 1 - before) :]:
            delattr(self, stage)
        pruned = last + 1 < len(self.feature_info)
        self.stages = self.stages[: max(0, last + 1 - before)]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.feature_info = self.feature_info[: last + 1]
        if prune_norm or pruned:
            self._prune_end()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take

    def _prune_end(self) -> None:
        """Take away what follows the last stage."""

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


def _wanted(maps: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Return the indices of wanted maps, counted from the first, and the largest."""
    if indices is None or isinstance(indices, int):
        chosen = list(range(maps))[-(maps if indices is None else indices) :]
        outside = indices is not None and not 0 < indices <= maps
    else:
        chosen = [maps + i if i < 0 else i for i in indices]
        outside = any(not 0 <= i < maps for i in chosen)
    if outside or not chosen:
        raise ValueError(f"feature maps {indices} are not among the {maps} that there are")
    return chosen, max(chosen)
