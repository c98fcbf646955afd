"""The networks that a recipe may name, by task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from bonn_plugin.models import DetectorSettings
from bonn_plugin.models.detection import DetectorKind
from bonn_plugin.modifiers.base import FrozenModel, Path, RunOf

InitFrom = Annotated[
    Annotated[str, Tag("a path")] | Annotated[RunOf, Tag("a run")],
    Discriminator(lambda value: "a run" if isinstance(value, (dict, RunOf)) else "a path"),
]


class NetworkConfig(FrozenModel):
    """What the networks of all tasks have in common; ``task`` tells which kind it is.

    Attributes:
        task: what it is trained for.
        name: a name in timm's registry, where this package's networks stand too.
        num_classes: see the kinds.
        args: further arguments of ``timm.create_model``, such as ``in_chans`` or ``drop_rate``.
        init_from: where the weights start: a checkpoint folder, a .safetensors file, or the run of another recipe.
    """

    task: str
    name: Annotated[str, Field(min_length=1)]
    num_classes: Annotated[int, Field(ge=2, le=1_000_000)]
    args: dict[str, Any] = Field(default_factory=dict)
    init_from: InitFrom | None = None

    @field_validator("args")
    @classmethod
    def _not_elsewhere(cls, args: dict[str, Any]) -> dict[str, Any]:
        for key in ("num_classes", "pretrained", "checkpoint_path", "pretrained_cfg", "features_only", "scriptable"):
            if key in args:
                raise ValueError(f"{key!r} is no network argument of a recipe")
        for key, value in args.items():
            for v in value if isinstance(value, list) else [value]:
                if not isinstance(v, (bool, int, float, str)) or (isinstance(v, float) and not math.isfinite(v)):
                    raise ValueError(f"{key!r} must be a number, a string, true, false, or a list of these")
        return args

    def problems(self) -> Iterator[tuple[Path, str]]:
        """Yield (path, message) for settings that have no meaning together."""
        yield from ()


class ModelConfig(NetworkConfig):
    """A classifier; ``num_classes`` are its outputs."""

    task: Literal["classification"] = "classification"


Stride = Annotated[int, Field(ge=1, le=1024)]
Side = Annotated[int, Field(ge=16, le=8192)]


class DetectionModelConfig(NetworkConfig):
    """A detector of torchvision on a backbone of timm.

    ``num_classes`` counts as torchvision does: the data's classes, from 1, and the background, 0. The other keys
    are those of ``DetectorSettings``.
    """

    task: Literal["detection"]
    detector: DetectorKind
    strides: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(strict=False, min_length=1)] = (
        8,
        16,
        32,
    )
    fpn: Annotated[int, Field(ge=32, le=4096, multiple_of=32)] = 256
    min_size: Side
    max_size: Side
    anchor_scale: Annotated[float, Field(gt=0, le=64)] | None = None
    head_convs: Annotated[int, Field(ge=1, le=16)] | None = None
    center_radius: Annotated[float, Field(gt=0, le=64)] | None = None
    box_head: Annotated[int, Field(ge=1, le=65_536)] | None = None
    score_thresh: Annotated[float, Field(ge=0, lt=1)] = 0.05
    detections: Annotated[int, Field(ge=1, le=10_000)] = 100

    @field_validator("args")
    @classmethod
    def _three_channels(cls, args: dict[str, Any]) -> dict[str, Any]:
        if args.get("in_chans", 3) != 3:
            raise ValueError("a detector takes images of three channels")
        return args

    @property
    def settings(self) -> DetectorSettings:
        """What the detector is besides its backbone."""
        return DetectorSettings(**{field.name: getattr(self, field.name) for field in fields(DetectorSettings)})

    def problems(self) -> Iterator[tuple[Path, str]]:
        """See ``NetworkConfig``."""
        for key, owner in (("head_convs", "fcos"), ("center_radius", "fcos"), ("box_head", "fasterrcnn")):
            if key in self.model_fields_set and self.detector != owner:
                yield (key,), f"{key!r} has no meaning for detector {self.detector!r}: it is {owner}'s"
        if list(self.strides) != sorted(set(self.strides)):
            yield ("strides",), "strides must rise"
        if self.max_size < self.min_size:
            yield ("max_size",), f"max_size {self.max_size} is smaller than min_size {self.min_size}"
        if self.detector == "ssd" and self.max_size != self.min_size:
            yield ("max_size",), f"ssd scales to a square: max_size must be min_size, {self.min_size}"
        sides = [self.settings.anchor_side(stride) for stride in self.strides]
        if min(sides) < 2:
            yield ("anchor_scale",), f"anchors of {min(sides):g} pixels: torchvision's are no smaller than 2"


MODEL_CONFIGS: dict[str, type[NetworkConfig]] = {"classification": ModelConfig, "detection": DetectionModelConfig}

AnyModelConfig = Annotated[ModelConfig | DetectionModelConfig, Field(discriminator="task")]
"""A network in a file that names its task."""
