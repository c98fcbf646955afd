"""Detectors at OpenVINO: the backbone with its pyramid in the engine, transform and heads in torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("openvino")

from bonn_plugin import Recipe, Session, load_packed, parse_recipe, save_packed
from bonn_plugin.errors import DataError, ExportError
from bonn_plugin.export.detection import load_detector, padded_size
from bonn_plugin.export.engine import compile_for_cpu
from bonn_plugin.export.lowering import build_graph
from bonn_plugin.export.openvino import _digest, export_openvino, load, read_info, verify_export
from bonn_plugin.export.part import exported_part
from bonn_plugin.export.samples import input_shape_for, samples_for
from bonn_plugin.export.selftest import self_test
from bonn_plugin.models import Detector
from bonn_plugin.recipe import recipe_model
from bonn_plugin.train import DETECTIONS_PLOT, draw_detections
from tests.conftest import randomize_norms
from tests.small import Command
from tests.test_detection import BINARY
from tests.test_detection_data import write_voc

DETECTORS = ("fcos", "fasterrcnn", "retinanet", "ssd")
RECIPE = """
version: 1
name: exported
model: {task: detection, detector: DETECTOR, name: NAME, num_classes: CLASSES, args: ARGS,
        strides: STRIDES, fpn: 32, min_size: MIN, max_size: MAX, score_thresh: 0.0}
data: DATA
training: {epochs: 1, batch_size: 2, optimizer: {name: adamw, lr: 1e-3}}
modifiers:
  - {type: binarize, targets: ['re:backbone.body.*'], threshold: always}
"""
SCENES = "{name: digit_scenes, size: 64, train: 4, test: 6, one_class: true}"
BACKBONES = {
    "bonn_resnet18": ("{widths: [16, 16, 32, 32]}", r"layer\d\.\d\.conv"),
    "resnet18": ("{channels: [8, 16, 16, 32], stem_width: 8}", r"layer\d\.\d\.conv\d"),
    "mobilenetv3_small_100": ("{}", r"blocks\..*\.conv_pwl"),
}


def make_recipe(
    detector: str = "fcos",
    name: str = "bonn_resnet18",
    *,
    min_size: int = 64,
    max_size: int = 64,
    data: str = SCENES,
    classes: int = 2,
    **changes: str,
) -> Recipe:
    args, targets = BACKBONES[name]
    text = RECIPE.replace("DETECTOR", detector).replace("NAME", name).replace("ARGS", changes.get("args", args))
    text = text.replace("body.*", rf"body\.{targets}").replace("MIN", str(min_size)).replace("MAX", str(max_size))
    text = text.replace("STRIDES", changes.get("strides", "[8, 16, 32]")).replace("DATA", data)
    return parse_recipe(text.replace("CLASSES", str(classes)))


def make_checkpoint(folder: Path, recipe: Recipe, seed: int = 0) -> Detector:
    """An untrained detector with norms as after training, packed."""
    torch.manual_seed(seed)
    session = Session(recipe, 1)
    session.prepare(randomize_norms(recipe_model(recipe)))
    save_packed(session.convert(), folder, recipe)
    return loaded(folder)


def loaded(folder: Path) -> Detector:
    detector = load_packed(folder)
    assert isinstance(detector, Detector)
    return detector


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def export(folder: Path, size: tuple[int, int] | None = None, batch: int = 1) -> None:
    image = input_shape_for(folder, size)
    export_openvino(loaded(folder), folder, (batch, *image), samples_for(folder, image, 4))


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-4 * max(1.0, float(want.abs().max()))


@torch.no_grad()
def same_detections(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Rounding may swap detections of equal scores: each must have a twin."""
    assert len(want["scores"]) >= 5
    close(got["scores"].sort().values, want["scores"].sort().values)
    near = (got["boxes"][:, None] - want["boxes"]).abs().amax(2) <= 1e-2
    near &= got["labels"][:, None] == want["labels"]
    near &= (got["scores"][:, None] - want["scores"]).abs() <= 1e-4
    assert float(near.any(1).float().mean()) >= 0.95


# --- the same as torch ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("detector", DETECTORS)
def test_heads_on_the_engines_features_find_what_torch_finds(detector: str, name: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, make_recipe(detector, name))
    export(tmp_path)
    info = read_info(tmp_path)
    assert (info.part, info.outputs, info.input_shape) == ("backbone", ("0", "1", "2"), (1, 3, 64, 64))
    assert info.self_test.agreement is None
    assert info.self_test.samples == 4
    assert all(layer.startswith("backbone.body.") for layer in info.binary_layers)
    images = pictures((64, 64), (64, 64), (64, 64))
    found = load_detector(tmp_path, threads=1)
    close(found.probe(torch.stack(images)), model.probe(torch.stack(images)))
    for got, want in zip(found(images), model(images), strict=True):
        same_detections(got, want)


def test_layers_of_one_bit_stay_one_bit(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, make_recipe())
    export(tmp_path)
    assert set(read_info(tmp_path).binary_layers.values()) == {"bits"}
    assert len(read_info(tmp_path).binary_layers) == 16


def test_levels_beyond_the_backbones_are_exported_too(tmp_path: Path) -> None:
    for detector in ("fasterrcnn", "retinanet"):
        recipe = make_recipe(detector, strides="[16, 32, 64]", min_size=128, max_size=128)
        model = make_checkpoint(tmp_path / detector, recipe)
        export(tmp_path / detector)
        image = torch.stack(pictures((128, 128)))
        close(load_detector(tmp_path / detector).probe(image), model.probe(image))
        assert read_info(tmp_path / detector).input_shape == (1, 3, 128, 128)
        assert read_info(tmp_path / detector).outputs == ("0", "1", "2")


# --- images of several sizes -----------------------------------------------------------------------


@pytest.mark.parametrize("detector", ["fcos", "fasterrcnn", "retinanet"])
def test_images_of_any_shape_are_padded_as_torchvision_pads_a_batch(detector: str, tmp_path: Path) -> None:
    recipe = make_recipe(detector, max_size=128, data="{name: voc, root: /nowhere}", classes=21)
    model = make_checkpoint(tmp_path, recipe)
    export(tmp_path)
    assert read_info(tmp_path).input_shape == (1, 3, 128, 128)
    found = load_detector(tmp_path)
    wide, high, small = pictures((40, 60), (90, 50), (33, 33))
    landscape, portrait = torch.zeros(3, 64, 128), torch.zeros(3, 128, 64)
    for image in (wide, high, small):
        # torchvision's own batch: beside these two, which are scaled by 1, every image is padded to 128x128
        want = model([image, landscape, portrait])[0]
        same_detections(found([image])[0], want)
        same_detections(found([image, wide])[0], want)


def test_ssd_has_one_size_whatever_the_images(tmp_path: Path) -> None:
    recipe = make_recipe("ssd", data="{name: voc, root: /nowhere}", classes=21)
    model = make_checkpoint(tmp_path, recipe)
    export(tmp_path)
    assert read_info(tmp_path).input_shape == (1, 3, 64, 64)
    for image in pictures((40, 60), (90, 50)):
        same_detections(load_detector(tmp_path)([image])[0], model([image])[0])


def test_a_given_size_is_scaled_and_padded_as_the_transform_does(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, make_recipe(max_size=128))
    assert padded_size(model, (480, 640)) == (64, 96)
    assert padded_size(model, (64, 64)) == (64, 64)
    assert padded_size(model, None) == (128, 128)
    assert input_shape_for(tmp_path) == (3, 64, 64)
    assert input_shape_for(tmp_path, (480, 640)) == (3, 64, 96)


def test_an_image_that_does_not_fit_is_refused_with_the_remedy(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, make_recipe(max_size=128))
    export(tmp_path, (48, 64))
    found = load_detector(tmp_path)
    found(pictures((96, 128)))
    with pytest.raises(ExportError, match=r"image of 64x48, scaled to 85x64, does not fit .* 64x96: .* --size 64x48"):
        found(pictures((48, 64), (64, 48)))


# --- what is not right is found out ----------------------------------------------------------------


def test_an_export_of_another_checkpoint_is_not_taken(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, make_recipe())
    export(tmp_path)
    model = make_checkpoint(tmp_path, make_recipe(), seed=1)
    with pytest.raises(ExportError, match=r"the export is not of this checkpoint: make it again by: bonn export"):
        load_detector(tmp_path)
    with pytest.raises(ExportError, match="if the checkpoint is newer, export it again"):
        verify_export(model, tmp_path, samples_for(tmp_path, (3, 64, 64), 2))


def test_a_wrong_level_fails_the_self_test(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, make_recipe())
    _, backbone = exported_part(model)
    graph, _ = build_graph(backbone, (1, 3, 64, 64))
    assert isinstance(backbone.fpn, nn.Module)
    sample = torch.randn(2, 3, 64, 64)
    assert self_test(backbone, graph, (1, 3, 64, 64), [sample], "noise").outputs == ("0", "1", "2")
    with torch.no_grad():
        conv = backbone.fpn.get_submodule("layer_blocks.2.0")
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        conv.bias += 0.01  # of the last level alone
    with pytest.raises(ExportError, match=r"its features differ from torch's by 0\.01"):
        self_test(backbone, graph, (1, 3, 64, 64), [sample], "noise")


def test_a_backbones_export_gives_features_and_no_logits(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, make_recipe())
    export(tmp_path, batch=2)
    exported = load(tmp_path)
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        want = model.backbone(x)
    got = exported.features(x)
    assert list(got) == list(want)
    for level, features in want.items():
        close(got[level], features)
    assert {name: part.shape for name, part in exported.features(x[:0].numpy()).items()} == {
        name: (0, *value.shape[1:]) for name, value in want.items()
    }
    with pytest.raises(ExportError, match=r"gives 0, 1, 2, no logits: .*load_detector"):
        exported(x)


def test_an_export_of_version_1_is_still_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    x = torch.randn(2, 3, 6, 6)
    export_openvino(model, tmp_path, (1, 3, 6, 6), [x])
    place = tmp_path / "openvino" / "export.json"
    body = json.loads(place.read_text())
    for key in ("self", "part", "outputs", "fingerprint"):
        del body[key]
    del body["self_test"]["outputs"]
    body["version"] = 1
    place.write_text(json.dumps({**body, "self": _digest(body)}))
    with torch.no_grad():
        close(load(tmp_path)(x), model(x))
    assert read_info(tmp_path).outputs == ("logits",)
    assert verify_export(model, tmp_path, [x]).agreement == 100


# --- operations ------------------------------------------------------------------------------------


class _Steps(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Slices and sizes that are not multiples."""
        part = x[:, :, ::2, 1:]
        return {
            "part": part,
            "last": x[:, 1:2, -3:],
            "larger": F.interpolate(part, size=x.shape[-2:], mode="nearest"),
            "uneven": F.interpolate(x, size=(19, 38), mode="nearest"),
            "smaller": F.interpolate(x, size=4),
        }


def test_slices_and_nearest_neighbours_are_torchs_for_any_size() -> None:
    x = torch.randn(2, 3, 7, 10)
    graph, _ = build_graph(_Steps(), (2, 3, 7, 10))
    got = compile_for_cpu(graph, 1)(x.numpy())
    want = _Steps()(x)
    assert {output.any_name for output in graph.outputs} == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value.numpy())


class _Bilinear(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(8, 8), mode="bilinear")


class _Picked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


@pytest.mark.parametrize(("model", "why"), [(_Bilinear(), "nearest neighbour"), (_Picked(), "made of slices")])
def test_what_has_no_lowering_is_refused(model: nn.Module, why: str) -> None:
    with pytest.raises(ExportError, match=why):
        build_graph(model, (1, 3, 4, 4))


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export") / "run"
    make_checkpoint(place, make_recipe())
    (place / "training").mkdir()
    (place / "training" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    return place


@pytest.fixture
def bonn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


def test_the_command_exports_verifies_and_evaluates_a_detector(bonn: Command, folder: Path) -> None:
    pytest.importorskip("pycocotools")
    done = bonn("export", folder, "--samples", "3")
    assert done.status == 0, done.err
    assert "input 1 x 3 x 64 x 64, 16 of 16 binary convolutions computed with bits" in done.out
    assert "the backbone, 3 levels: scaling, padding to 64x64 and heads stay in torch" in done.out
    assert "features of 3 levels within" in done.out
    assert "on 3 samples (test set of digit_scenes)" in done.out
    assert "/openvino: checksums right, features of 3 levels within" in bonn("verify", folder).out
    by_torch, by_engine = bonn("evaluate", folder), bonn("evaluate", folder, "--engine", "openvino")
    assert by_engine.status == 0, by_engine.err
    assert "by openvino: mAP " in by_engine.out
    assert by_torch.out.split(": mAP")[1] == by_engine.out.split(": mAP")[1]


def test_bench_measures_a_detectors_backbone_and_says_so(bonn: Command, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    make_checkpoint(tmp_path / "run", make_recipe(args="{widths: [16, 16, 16], depths: [1, 1, 1]}", strides="[8, 16]"))
    options = ["--seconds", "0.01", "--no-torch-compile", "--no-memory", "--batch", "1", "--out", tmp_path]
    done = bonn("bench", tmp_path / "run", *options)
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [layer["name"] for layer in found["layers"]] == [f"body.layer{i}.0.conv" for i in (1, 2, 3)]
    assert any("measured is the backbone with its pyramid" in note for note in found["notes"])
    assert "packed checkpoint, heads and all, model.safetensors" in found["files"]


def test_a_detector_is_drawn_beside_the_truth(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    monkeypatch.setattr("bonn_plugin.train.pictures.SHOWN", 0.0)
    recipe = make_recipe()
    place = draw_detections(folder, recipe)
    assert place == folder / DETECTIONS_PLOT
    assert place.read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes
    assert len(axes) == 12
    from bonn_plugin.data import load_detection_splits

    test = load_detection_splits(recipe.data, 2).test
    for i in range(6):
        image, target = test[i]
        assert [(*p.get_xy(), p.get_width(), p.get_height()) for p in reversed(axes[i].patches)] == [
            (x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in target["boxes"].tolist()
        ]
        assert {text.get_text() for text in axes[i].texts} == {"digit"}
        with torch.no_grad():
            found = load_packed(folder)([image])[0]
        boxes, best = axes[6 + i].patches, found["scores"].argsort(descending=True)[:20]
        assert [patch.get_xy() for patch in reversed(boxes)] == [
            tuple(corner) for corner in found["boxes"][best, :2].tolist()
        ]
        scores = [float(text.get_text().split()[-1]) for text in axes[6 + i].texts]
        assert scores[0] == round(float(found["scores"].max()), 2)
        assert scores == sorted(scores, reverse=True)
        assert len(scores) >= 5
    drawn[0].canvas.draw()
    for one in axes:
        labels = [text.get_window_extent() for text in one.texts]
        whole = one.get_window_extent()
        assert all(whole.x0 <= label.x0 and label.x1 <= whole.x1 + 1 for label in labels)
        assert all(whole.y0 - 1 <= label.y0 and label.y1 <= whole.y1 + 1 for label in labels)
        assert not any(a.overlaps(b) for k, a in enumerate(labels) for b in labels[:k])


def test_the_report_of_a_run_draws_its_detections(bonn: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("pycocotools")
    (tmp_path / "r.yaml").write_text(BINARY)
    assert bonn("compress", tmp_path / "r.yaml", "--out", "run", "--set", "training.epochs=1").status == 0
    done = bonn("report", "run", "--plots", "--format", "json", "--set", "data.test=3")
    assert (done.status, done.lines) == (0, [f"drawn: run/{DETECTIONS_PLOT}"])
    assert (tmp_path / "run" / DETECTIONS_PLOT).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run" / "within_group_distance.png").exists()


def test_pictures_without_the_data_say_where_it_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recipe = make_recipe(data=f"{{name: voc, root: {tmp_path / 'voc'}}}", classes=21, max_size=128)
    make_checkpoint(tmp_path / "run", recipe)
    with pytest.raises(DataError, match=r"pictures of detections need the data set: .*voc.*--set"):
        draw_detections(tmp_path / "run", recipe)
    write_voc(tmp_path / "voc")
    assert draw_detections(tmp_path / "run", recipe).exists()
