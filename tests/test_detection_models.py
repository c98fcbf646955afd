"""Detectors on timm's backbones: their parts, their settings, and what a checkpoint of them holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bonn_plugin import ModelConfig, Session, load_packed, parse_recipe, save_packed, verify_packed
from bonn_plugin.errors import ModelError
from bonn_plugin.models import Detector
from bonn_plugin.models.detection import Backbone
from bonn_plugin.modifiers import left_alone, select_convolutions
from bonn_plugin.recipe import DetectionModelConfig, Recipe, RecipeError, build_network, dump_recipe, recipe_model
from bonn_plugin.report import ledger

DETECTORS = ("fcos", "fasterrcnn", "retinanet", "ssd")
NARROW = {"widths": [8, 16, 16, 32]}

RECIPE = """
version: 1
name: detector
model: {task: detection, detector: DETECTOR, name: NAME, num_classes: 4, args: ARGS,
        strides: STRIDES, fpn: 32, min_size: 64, max_size: 64, score_thresh: 0.0}
data: {name: coco, root: /data/coco}
training: {epochs: 1, batch_size: 2, optimizer: {name: adamw, lr: 1e-3}}
modifiers:
  - {type: binarize, targets: TARGETS}
"""
BACKBONES = {
    # kernels larger than 1x1 but the stem: 12 of the first three stages
    "bonn_resnet18": ("{widths: [8, 16, 16, 32]}", r"['re:backbone\.body\.layer\d\.\d\.conv']", 12),
    "resnet18": ("{channels: [8, 16, 16, 32], stem_width: 8}", r"['re:backbone\.body\.layer\d\.\d\.conv\d']", 12),
    "mobilenetv3_small_100": (
        "{}",
        r"['re:backbone\.body\.blocks\..*\.conv_pwl?']",
        None,
    ),
    "convnext_atto": ("{dims: [8, 16, 16, 32]}", r"['re:backbone\.body\.stages\.\d\.downsample\.1']", 2),
}


def make_recipe(detector: str, name: str = "bonn_resnet18", strides: str = "[8, 16]", **changes: str) -> Recipe:
    args, targets, _ = BACKBONES[name]
    text = RECIPE.replace("DETECTOR", detector).replace("NAME", name).replace("STRIDES", strides)
    text = text.replace("ARGS", args).replace("TARGETS", targets)
    for old, new in changes.items():
        text = text.replace(old, new)
    return parse_recipe(text)


def pictures(n: int = 2, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, size, size, generator=generator) for _ in range(n)]


def truths(n: int = 2) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 10.0, 60.0, 60.0]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 3])} for _ in range(n)]


def one_step(session: Session, model: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.AdamW(session.param_groups())
    losses = model(pictures(), truths())
    total = sum(losses.values()) + session.loss().total
    assert bool(torch.isfinite(total))
    total.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None]
    assert not dead
    optimizer.step()
    session.step()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_on_every_backbone_trains_packs_and_comes_back(detector: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = make_recipe(detector, name)
    session = Session(recipe, 1)
    model = session.prepare(recipe_model(recipe))
    one_step(session, model)
    packed = session.convert()
    save_packed(packed, tmp_path, recipe)
    loaded = load_packed(tmp_path)
    wanted, found, trained = (m(pictures()) for m in (packed, loaded, model.eval()))
    assert all(len(one["scores"]) > 10 for one in found)
    for a, b, c in zip(wanted, found, trained, strict=True):
        for key in ("boxes", "scores", "labels"):
            assert torch.equal(a[key], b[key])
            assert torch.equal(a[key], c[key])
    assert torch.equal(packed.probe(torch.stack(pictures())), loaded.probe(torch.stack(pictures())))
    found = verify_packed(tmp_path)
    assert found.identical
    assert found.tensors > 10
    assert sum(type(m).__name__ == "PackedConv2d" for m in loaded.modules()) >= 2
    assert not [n for n, m in loaded.named_modules() if type(m).__name__ == "PackedConv2d" and "body" not in n]


@pytest.mark.parametrize("detector", DETECTORS)
def test_without_targets_the_body_alone_is_binarised(detector: str) -> None:
    model = build_network(make_recipe(detector).model)
    names = list(select_convolutions(model, None))
    assert len(names) == 12
    assert all(name.startswith("backbone.body.layer") for name in names)
    reasons = {left.name: left.reason for left in left_alone(model)}
    assert reasons["backbone.body.conv1"] == "the network's first convolution"
    assert reasons["backbone.fpn.layer_blocks.0.0"] == "outside of backbone.body"
    assert {reasons[name] for name in reasons if "head" in name or "fpn" in name} == {"outside of backbone.body"}


@pytest.mark.parametrize("name", BACKBONES)
def test_levels_have_the_strides_of_the_recipe_and_the_channels_of_the_backbone(name: str) -> None:
    model = build_network(make_recipe("fcos", name, "[8, 16, 32, 64]").model)
    backbone = model.backbone
    assert isinstance(backbone, Backbone)
    levels = backbone(torch.rand(1, 3, 128, 128))
    assert [level.shape[-1] for level in levels.values()] == [16, 8, 4, 2]
    assert {level.shape[1] for level in levels.values()} == {32}
    batch, _ = model.transform([torch.rand(3, 50, 64)])
    anchors = model.anchor_generator(batch, list(backbone(batch.tensors).values()))[0]
    height, width = batch.tensors.shape[-2:]
    assert (height % 64, width % 64) == (0, 0)
    assert len(anchors) == sum((height // s) * (width // s) for s in (8, 16, 32, 64))
    first = anchors[: (width // 8) + 1]
    assert torch.equal(first[1] - first[0], torch.tensor([8.0, 0, 8, 0]))
    assert torch.equal(first[-1] - first[0], torch.tensor([0.0, 8, 0, 8]))


@pytest.mark.parametrize("detector", DETECTORS)
def test_everything_trains_norms_included(detector: str) -> None:
    model = build_network(make_recipe(detector, "resnet18").model)
    assert all(p.requires_grad for p in model.parameters())
    norms = [m for m in model.backbone.body.modules() if "Norm" in type(m).__name__]
    assert norms
    assert all(type(m) is not None and list(m.parameters()) for m in norms)


@pytest.mark.parametrize("detector", DETECTORS)
def test_under_mixed_precision_places_and_losses_are_float32(detector: str) -> None:
    model = build_network(make_recipe(detector).model).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(pictures(), truths())
        features = model.backbone(torch.rand(1, 3, 64, 64))
    assert {level.dtype for level in features.values()} == {torch.float32}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(bool(torch.isfinite(loss)) for loss in losses.values())


@pytest.mark.parametrize("detector", DETECTORS)
def test_an_image_without_objects_is_background(detector: str) -> None:
    model = build_network(make_recipe(detector).model).train()
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    assert all(bool(torch.isfinite(loss)) for loss in model(pictures(), nothing).values())


def test_the_probe_is_the_heads_raw_outputs_and_sees_every_part() -> None:
    for detector in DETECTORS:
        torch.manual_seed(0)
        model = build_network(make_recipe(detector).model).eval()
        images = torch.stack(pictures())
        before = model.probe(images)
        assert torch.equal(before, model.probe(images))
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or ".rpn." in name:
                continue
            with torch.no_grad():
                old = parameter.clone()
                parameter.add_(0.5 * torch.randn_like(parameter))
                assert not torch.equal(model.probe(images), before), (detector, name)
                parameter.copy_(old)


def test_the_classifiers_configuration_in_old_checkpoints_still_loads(tmp_path: Path) -> None:
    recipe = parse_recipe(
        "version: 1\nname: c\nmodel: {name: bonn_wrn22_16, num_classes: 10, args: {depth: 10, widths: [8, 8, 8]}}\n"
        "data: {name: digits, size: 8}\ntraining: {epochs: 1, batch_size: 8, optimizer: {lr: 0.1}}\n"
        "modifiers: [{type: binarize}]\n"
    )
    session = Session(recipe, 1)
    session.prepare(recipe_model(recipe))
    folder = save_packed(session.convert(), tmp_path, recipe)
    text = (folder / "config.json").read_text()
    assert '"task": "classification"' in text
    assert "detector" not in text
    assert verify_packed(folder).identical


def test_a_detectors_settings_come_back_from_the_checkpoint(tmp_path: Path) -> None:
    recipe = make_recipe("fcos", fpn="anchor_scale: 0.5, head_convs: 1, center_radius: 3, fpn")
    session = Session(recipe, 1)
    session.prepare(recipe_model(recipe))
    save_packed(session.convert(), tmp_path, recipe)
    loaded = load_packed(tmp_path)
    assert isinstance(loaded, Detector)
    assert loaded.anchor_generator.sizes == ((4.0,), (8.0,))
    assert loaded.center_sampling_radius == 3
    assert loaded.score_thresh == 0.0
    assert parse_recipe(dump_recipe(recipe)) == recipe
    config = recipe.model
    assert isinstance(config, DetectionModelConfig)
    assert save_packed(session.convert(), tmp_path / "by_model", config).exists()


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("task: detection", "task: detektion", "unknown task 'detektion'. Did you mean 'detection'?"),
        ("detector: fcos", "detector: focs", "Did you mean 'fcos'?"),
        ("detector: fcos, ", "", "missing key 'detector' in model"),
        ("fpn: 32", "fpm: 32", "unknown key 'fpm' in model. Did you mean 'fpn'?"),
        ("fpn: 32", "fpn: 48", "fpn must be a multiple of 32"),
        ("fpn: 32", "fpn: 32, box_head: 64", "'box_head' has no meaning for detector 'fcos': it is fasterrcnn's"),
        ("[8, 16]", "[16, 8]", "strides must rise"),
        ("[8, 16]", "[]", "strides"),
        ("max_size: 64", "max_size: 32", "max_size 32 is smaller than min_size 64"),
        ("detector: fcos", "detector: ssd", None),
        ("max_size: 64", "max_size: 64, anchor_scale: 0.1", "no smaller than 2"),
        ("{name: coco, root: /data/coco}", "{name: digits}", "'digits' is a data set for classification"),
        ("{name: coco, root: /data/coco}", "{name: digit_scenes}", "has 11 classes, the background included"),
        ("widths", "in_chans: 1, widths", "three channels"),
        ("type: binarize", "type: feature_loss, theta: 1e-3", "in detection an image has no one class"),
        ("type: binarize", "type: distill, teacher: {name: resnet18, weights: x}", "distill compares logits"),
        ("type: binarize", "type: channel_prune, ratio: 0.5", "channel_prune follows channels"),
    ],
)
def test_a_mistake_in_a_detectors_recipe_is_told_with_its_place(old: str, new: str, wanted: str | None) -> None:
    text = RECIPE.replace("DETECTOR", "fcos").replace("NAME", "bonn_resnet18").replace("STRIDES", "[8, 16]")
    text = text.replace("ARGS", BACKBONES["bonn_resnet18"][0]).replace(", targets: TARGETS", "")
    text = text.replace("epochs: 1", "epochs: 2")
    assert old in text
    if wanted is None:
        parse_recipe(text.replace(old, new))
        return
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text.replace(old, new), "r.yaml")
    assert len(caught.value.problems) == 1
    assert wanted in str(caught.value)
    assert caught.value.problems[0].line > 1


@pytest.mark.parametrize(
    ("name", "strides", "wanted"),
    [
        ("bonn_resnet18", "[3, 5]", "bonn_resnet18 has maps of strides 2, 4, 8, 16, 32"),
        ("bonn_resnet18", "[4, 8, 12]", "stride 12"),
        ("bonn_resnet18", "[8, 32, 128]", "stride 128"),
    ],
)
def test_strides_that_a_backbone_has_not_are_told_with_their_place(name: str, strides: str, wanted: str) -> None:
    with pytest.raises(ModelError, match=wanted) as caught:
        recipe_model(make_recipe("fcos", name, strides))
    assert str(caught.value).startswith("recipe:5:")


def test_a_classifier_can_not_be_a_detectors_configuration() -> None:
    assert ModelConfig(name="resnet18", num_classes=2).task == "classification"
    with pytest.raises(ValueError, match="task"):
        ModelConfig(task="detection", name="resnet18", num_classes=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [18, 34])
def test_the_backbone_of_a_resnet_is_compressed_more_than_18_times(depth: int) -> None:
    """All four stages by parameters, without a classifier: 20.81 and 24.64."""
    text = RECIPE.replace("DETECTOR", "fcos").replace("NAME", f"bonn_resnet{depth}").replace("STRIDES", "[8, 16, 32]")
    recipe = parse_recipe(text.replace("ARGS", "{}").replace(", targets: TARGETS", ""))
    session = Session(recipe, 1)
    session.prepare(recipe_model(recipe))
    book = ledger(session.convert())
    assert book.within("backbone.body").rate() == pytest.approx({18: 20.81, 34: 24.64}[depth], abs=0.005)
