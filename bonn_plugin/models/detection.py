"""torchvision's detectors on timm's backbones, for images of any size in the range 0 to 1.

Faster R-CNN (Ren et al., NIPS 2015), RetinaNet (Lin et al., ICCV 2017), FCOS (Tian et al., ICCV 2019) and SSD
(Liu et al., ECCV 2016), each on a feature pyramid (Lin et al., CVPR 2017) over a network of timm's registry. Channels
and strides come from its ``feature_info``. Every norm trains: a 1-bit layer moves the statistics behind it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from bonn_plugin.collective import mean_over_ranks, ranks
from bonn_plugin.models.build import ModelBuildError, build_model

DetectorKind = Literal["fcos", "fasterrcnn", "retinanet", "ssd"]

ANCHOR_SCALES: Mapping[DetectorKind, float] = {"fcos": 1.0, "fasterrcnn": 8.0, "retinanet": 4.0, "ssd": 4.0}
"""Side of a level's anchors in its strides, as in the papers."""
RATIOS = (0.5, 1.0, 2.0)
OCTAVE = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
"""Sizes of RetinaNet's anchors on one level."""
PROBE_NUMBERS = 2048
"""Numbers that a probe takes of each of a detector's raw outputs."""


@dataclass(frozen=True)
class DetectorSettings:
    """What a detector is besides its backbone.

    Attributes:
        detector: which one.
        strides: of the pyramid's levels, in pixels, rising. Those that the backbone has no map of go on from its
            last by a factor of 2 each.
        fpn: channels of the pyramid, a multiple of 32.
        min_size: images are scaled so that their shorter side has so many pixels,
        max_size: and their longer one no more than so many. SSD scales to a square of ``min_size``.
        anchor_scale: side of a level's anchors in its strides; None for ``ANCHOR_SCALES``.
        head_convs: convolutions of FCOS's head; None for 4.
        center_radius: FCOS takes points for an object's that lie so many anchors from its centre; None for 1.5.
        box_head: width of Faster R-CNN's box head; None for 1024.
        score_thresh: detections of a lower score are dropped.
        detections: so many of an image are kept at most.
    """

    detector: DetectorKind
    strides: tuple[int, ...]
    fpn: int
    min_size: int
    max_size: int
    anchor_scale: float | None = None
    head_convs: int | None = None
    center_radius: float | None = None
    box_head: int | None = None
    score_thresh: float = 0.05
    detections: int = 100

    def anchor_side(self, stride: int) -> float:
        """Return the side of the anchors on the level of ``stride``, in pixels."""
        return stride * (self.anchor_scale or ANCHOR_SCALES[self.detector])


class Detector(nn.Module):
    """What the detectors have beyond torchvision's: a part to compress, and numbers that prove a copy equal.

    In eval mode a detector takes a list of images, (C, H, W) each, or a batch (B, C, H, W), in the range 0 to 1, and
    gives a list of ``{"boxes": (N, 4) x1 y1 x2 y2 in pixels, "scores": (N,), "labels": (N,) from 1}``. In training
    mode it takes targets (``boxes`` and ``labels``) besides, and gives its losses by name.
    """

    compressible: ClassVar[str] = "backbone.body"
    """The submodule to which passes without targets keep."""

    backbone: nn.Module
    transform: nn.Module

    def raw_outputs(self, features: OrderedDict[str, Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Return the heads' outputs before anything is chosen from them.

        Args:
            features: maps of the pyramid, (B, fpn, H, W), by level.
            sizes: (height, width) of each image as scaled.
        """
        head = cast(nn.Module, self.head)
        outputs: Mapping[str, Tensor] = head(list(features.values()))
        return [outputs[name] for name in sorted(outputs)]

    @torch.no_grad()
    def probe(self, images: Tensor) -> Tensor:
        """Return numbers of the heads' raw outputs for ``images``, (B, C, H, W): float32, one dimension.

        Detections are no proof of equality: the threshold may leave none, and a rounding error may swap two.
        """
        batch, _ = self.transform(list(images))
        features = self.backbone(batch.tensors)
        return torch.cat([_sample(output) for output in self.raw_outputs(features, batch.image_sizes)])


def _wide(x: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _for_all(losses: dict[str, Tensor], matched: list[Tensor]) -> dict[str, Tensor]:
    """Norm losses over this process's objects so that their mean over the processes is the loss of the whole batch.

    Args:
        losses: sums over the anchors, divided by how many of them found an object.
        matched: per image, the object that each anchor found; negative for none.
    """
    if ranks() == 1:
        return losses
    found = torch.stack([(found >= 0).sum() for found in matched]).sum()
    count = found.to(next(iter(losses.values())).dtype).clamp(min=1)
    share = count / mean_over_ranks(count)
    return {name: share * loss for name, loss in losses.items()}


class _FcosHead(FCOSHead):  # type: ignore[misc]
    def compute_loss(
        self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        return _for_all(super().compute_loss(targets, head_outputs, anchors, matched_idxs), matched_idxs)


class _Fcos(Detector, FCOS):  # type: ignore[misc]
    pass


class _RetinaNet(Detector, RetinaNet):  # type: ignore[misc]
    pass


class _Ssd(Detector, SSD):  # type: ignore[misc]
    def compute_loss(
        self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        return _for_all(super().compute_loss(targets, head_outputs, anchors, matched_idxs), matched_idxs)


class _FasterRcnn(Detector, FasterRCNN):  # type: ignore[misc]
    rpn: Any
    roi_heads: Any

    def raw_outputs(self, features: OrderedDict[str, Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        objectness, deltas = self.rpn.head(list(features.values()))
        boxes = []
        for height, width in sizes:  # the whole image and its quarters, whatever the proposals are
            places = ((0, 0, 2, 2), (0, 0, 1, 1), (1, 0, 2, 1), (0, 1, 1, 2), (1, 1, 2, 2))
            scale = next(iter(features.values())).new_tensor([width / 2, height / 2, width / 2, height / 2])
            boxes.append(scale.new_tensor(places) * scale)
        heads = self.roi_heads
        logits, regression = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes)))
        return [*objectness, *deltas, logits, regression]


def _sample(output: Tensor) -> Tensor:
    """Return evenly spaced numbers of ``output``, of each of its channels some."""
    flat = output.detach().float().flatten()
    step = max(1, flat.numel() // PROBE_NUMBERS)
    while gcd(step, output.shape[-1]) != 1:
        step += 1
    return flat[::step]


class Widen(nn.Module):
    """Gives half-precision tensors in float32, others as they are; a module, for exports to know it by."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return _wide(x)


class Backbone(nn.Module):
    """A network of timm's without its head, and a feature pyramid on some of its maps.

    Args:
        body: the network.
        indices: which maps of its ``feature_info``.
        channels: theirs.
        fpn: channels of the pyramid.
        more: makes the levels beyond the body's.

    Attributes:
        out_channels: channels of each level, which torchvision's detectors ask for.
    """

    def __init__(
        self,
        body: nn.Module,
        indices: Sequence[int],
        channels: Sequence[int],
        fpn: int,
        more: ExtraFPNBlock | None,
    ) -> None:
        super().__init__()
        prune: Any = body.prune_intermediate_layers
        self.indices = list(prune(list(indices), prune_norm=True))
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(channels), fpn, more)
        self.widen = Widen()
        self.out_channels = fpn

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, C, H, W) to the pyramid's maps by level, finest first, (B, fpn, H / stride, W / stride) float32."""
        take: Any = self.body.forward_intermediates
        maps = take(images, indices=self.indices, output_fmt="NCHW", intermediates_only=True)
        levels = self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))
        # torchvision's anchors take the maps' type: places are not exact in bfloat16
        return OrderedDict((name, self.widen(level)) for name, level in levels.items())


class _Convolved(ExtraFPNBlock):  # type: ignore[misc]
    """Further levels by 3x3 convolutions of stride 2 (RetinaNet, section 4; FCOS, section 3.2)."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(levels))
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(cast(Tensor, conv.bias))

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        for i, conv in enumerate(self.convs):
            results.append(conv(results[-1] if i == 0 else nn.functional.relu(results[-1])))
            names.append(str(len(names)))
        return results, names


class _Subsampled(ExtraFPNBlock):  # type: ignore[misc]
    """Further levels by every other place of the last (FPN, section 4.1)."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        for _ in range(self.levels):
            results.append(results[-1][:, :, ::2, ::2])
            names.append(str(len(names)))
        return results, names


def build_detector(name: str, num_classes: int, args: Mapping[str, Any], settings: DetectorSettings) -> Detector:
    """Return a detector with random weights; nothing is downloaded.

    Args:
        name: the backbone, in timm's registry.
        num_classes: the data's classes and one for the background, which is class 0, as torchvision counts.
        args: further arguments of ``timm.create_model``.
        settings: see ``DetectorSettings``.

    Raises:
        ModelBuildError: timm knows no such network, it does not take the arguments, or it has no maps of these
            strides.
    """
    backbone, mean, std = _backbone(name, args, settings)
    make = {"fcos": _fcos, "fasterrcnn": _fasterrcnn, "retinanet": _retinanet, "ssd": _ssd}[settings.detector]
    scaling = {"image_mean": mean, "image_std": std}
    detector = make(backbone, num_classes, settings, scaling)
    for head in _heads(detector):
        head.register_forward_hook(_to_float32)
    return detector


def _backbone(
    name: str, args: Mapping[str, Any], settings: DetectorSettings
) -> tuple[Backbone, list[float], list[float]]:
    body = build_model(name, 0, args)
    if not hasattr(body, "forward_intermediates") or not hasattr(body, "prune_intermediate_layers"):
        raise ModelBuildError(f"{name} gives no feature maps: take a backbone with forward_intermediates", "name")
    described = cast(Any, body.feature_info)
    entries = described if isinstance(described, list) else described.info
    places = {int(entry["reduction"]): i for i, entry in enumerate(entries)}  # the last map of each stride
    own = [stride for stride in settings.strides if stride in places]
    missing = [stride for stride in settings.strides if stride not in places]
    has = f"{name} has maps of strides {', '.join(map(str, sorted(places)))}"
    if not own:
        raise ModelBuildError(f"strides {list(settings.strides)}: {has}", "strides")
    if missing and missing != [own[-1] << (i + 1) for i in range(len(missing))]:
        raise ModelBuildError(f"stride {missing[0]}: {has}; further ones go on from these by a factor of 2", "strides")
    indices = [places[stride] for stride in own]
    channels = [int(entries[i]["num_chs"]) for i in indices]
    more: ExtraFPNBlock | None = None
    if missing:
        subsample = settings.detector == "fasterrcnn"
        more = _Subsampled(len(missing)) if subsample else _Convolved(settings.fpn, len(missing))
    cfg: Mapping[str, Any] = getattr(body, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean", (0.485, 0.456, 0.406)), cfg.get("std", (0.229, 0.224, 0.225))
    return Backbone(body, indices, channels, settings.fpn, more), list(mean), list(std)


def _common(settings: DetectorSettings) -> dict[str, Any]:
    # torchvision takes a level's stride for image // map: only right where the images' sides are multiples of it
    return {
        "min_size": settings.min_size,
        "max_size": settings.max_size,
        "size_divisible": max(settings.strides),
    }


def _sides(settings: DetectorSettings) -> list[float]:
    return [settings.anchor_side(stride) for stride in settings.strides]


def _fcos(backbone: Backbone, classes: int, settings: DetectorSettings, scaling: dict[str, Any]) -> Detector:
    return _Fcos(
        backbone,
        classes,
        anchor_generator=AnchorGenerator(
            tuple((side,) for side in _sides(settings)), ((1.0,),) * len(settings.strides)
        ),
        head=_FcosHead(backbone.out_channels, 1, classes, settings.head_convs or 4),
        center_sampling_radius=settings.center_radius or 1.5,
        score_thresh=settings.score_thresh,
        detections_per_img=settings.detections,
        **_common(settings),
        **scaling,
    )


def _retinanet(backbone: Backbone, classes: int, settings: DetectorSettings, scaling: dict[str, Any]) -> Detector:
    sizes = tuple(tuple(side * octave for octave in OCTAVE) for side in _sides(settings))
    anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
    norm = partial(nn.GroupNorm, settings.fpn // 8)  # batches are small: as in torchvision's second version
    return _RetinaNet(
        backbone,
        classes,
        anchor_generator=anchors,
        head=RetinaNetHead(backbone.out_channels, len(OCTAVE) * len(RATIOS), classes, norm_layer=norm),
        score_thresh=settings.score_thresh,
        detections_per_img=settings.detections,
        **_common(settings),
        **scaling,
    )


def _fasterrcnn(backbone: Backbone, classes: int, settings: DetectorSettings, scaling: dict[str, Any]) -> Detector:
    sizes = tuple((side,) for side in _sides(settings))
    own = [str(i) for i in range(len(backbone.indices))]  # regions are pooled from the body's levels, as in FPN
    pool = MultiScaleRoIAlign(own, output_size=7, sampling_ratio=2)
    width = settings.box_head or 1024
    return _FasterRcnn(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        box_roi_pool=pool,
        box_head=TwoMLPHead(backbone.out_channels * 7**2, width),
        box_predictor=FastRCNNPredictor(width, classes),
        box_score_thresh=settings.score_thresh,
        box_detections_per_img=settings.detections,
        **_common(settings),
        **scaling,
    )


def _ssd(backbone: Backbone, classes: int, settings: DetectorSettings, scaling: dict[str, Any]) -> Detector:
    size = settings.min_size
    sides = _sides(settings)
    scales = [min(1.0, side / size) for side in (*sides, 2 * sides[-1])]
    anchors = DefaultBoxGenerator([[2]] * len(sides), scales=scales)
    channels = [backbone.out_channels] * len(sides)
    return _Ssd(
        backbone,
        anchors,
        (size, size),
        classes,
        head=SSDHead(channels, anchors.num_anchors_per_location(), classes),
        score_thresh=settings.score_thresh,
        detections_per_img=settings.detections,
        **scaling,
    )


def _heads(detector: Detector) -> list[nn.Module]:
    if isinstance(detector, _FasterRcnn):
        return [detector.rpn.head, detector.roi_heads.box_predictor]
    return [cast(nn.Module, detector.head)]


def _to_float32(_: nn.Module, __: Any, output: Any) -> Any:
    """Give a head's outputs in float32: under automatic mixed precision box coders would compute in its type."""
    return _cast(output)


def _cast(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _wide(value)
    if isinstance(value, dict):
        return {name: _cast(part) for name, part in value.items()}
    return type(value)(_cast(part) for part in value)


__all__ = ["ANCHOR_SCALES", "Backbone", "Detector", "DetectorKind", "DetectorSettings", "build_detector"]
