"""Detectors by recipe: training, measuring, resuming, packing, and the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bonn_plugin import Recipe, load_packed, load_recipe, parse_recipe, verify_packed
from bonn_plugin.checkpoint import load_state
from bonn_plugin.cli import main
from bonn_plugin.data.targets import Annotation, Target, make_target
from bonn_plugin.errors import CheckpointError, DataError, ModelError
from bonn_plugin.report import Report
from bonn_plugin.shipped import find_recipe
from bonn_plugin.train import STATE, Detection, Runner, equal_detections, mean_average_precision
from tests.small import Command, run_ranks
from tests.test_detection_data import write_coco, write_voc
from tests.test_train import Lines

CPU = torch.device("cpu")
REAL = """
version: 1
name: scenes
model: {task: detection, detector: fcos, name: bonn_resnet18, num_classes: 2, args: {widths: [8, 16, 16, 16]},
        strides: [8, 16], fpn: 32, head_convs: 1, anchor_scale: 0.5, center_radius: 3, min_size: 64, max_size: 64}
data: {name: digit_scenes, size: 64, train: 24, test: 12, digits: [1, 2], scale: [0.3, 0.8], one_class: true}
training:
  epochs: 2
  batch_size: 8
  optimizer: {name: adamw, lr: 3e-3}
"""
BINARY = REAL + "modifiers:\n  - {type: binarize, threshold: always}\n  - {type: kernel_loss, lambda: 1e-5, nu: 1e-3}\n"


def run(recipe: Recipe, folder: Path) -> Runner:
    runner = Runner(recipe, folder, CPU, Lines())
    runner.train(resume=False)
    return runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("detection") / "run"
    run(parse_recipe(BINARY, "scenes.yaml"), place).finish()
    return place


@pytest.fixture
def bonn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


# --- the measurement -----------------------------------------------------------------------------


def slow_average_precision(
    found: list[dict[str, Tensor]], targets: list[Target], label: int, threshold: float
) -> float | None:
    """COCO's average precision of one class at one IoU, after its description: 101 recalls, 100 detections."""

    def iou(a: list[float], b: list[float], crowd: bool) -> float:
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        inter = max(0.0, w) * max(0.0, h)
        own = (a[2] - a[0]) * (a[3] - a[1])
        return inter / (own if crowd else own + (b[2] - b[0]) * (b[3] - b[1]) - inter)

    rows: list[tuple[float, bool]] = []
    objects = 0
    for one, target in zip(found, targets, strict=True):
        truth = [
            (box, bool(ignored))
            for box, kind, ignored in zip(target["boxes"].tolist(), target["labels"], target["ignored"], strict=True)
            if int(kind) == label
        ]
        objects += sum(not ignored for _, ignored in truth)
        mine = [
            (float(s), b)
            for s, b, k in zip(one["scores"], one["boxes"].tolist(), one["labels"], strict=True)
            if int(k) == label
        ]
        taken: set[int] = set()
        for score, box in sorted(mine, key=lambda pair: -pair[0])[:100]:
            best, chosen = threshold, None
            for i, (other, ignored) in enumerate(truth):
                if not ignored and i not in taken and iou(box, other, False) >= best:
                    best, chosen = iou(box, other, False), i
            if chosen is not None:
                taken.add(chosen)
                rows.append((score, True))
            elif not any(ignored and iou(box, other, True) >= threshold for other, ignored in truth):
                rows.append((score, False))
    if not objects:
        return None
    rows.sort(key=lambda row: -row[0])
    right = np.cumsum([hit for _, hit in rows])
    precision = right / np.arange(1, len(rows) + 1)
    recall = right / objects
    best = [float(precision[i:].max()) for i in range(len(rows))]
    pairs = list(zip(best, recall, strict=True))
    return float(np.mean([next((p for p, r in pairs if r >= at), 0.0) for at in np.linspace(0, 1, 101)]))


def guesses(seed: int, ignored: bool) -> tuple[list[dict[str, Tensor]], list[Target]]:
    rng = np.random.default_rng(seed)
    found, targets = [], []
    scores = iter(rng.permutation(2000) / 2000)  # none twice
    for i in range(12):
        boxes = rng.uniform(0, 60, (int(rng.integers(0, 5)), 4))
        boxes[:, 2:] = boxes[:, :2] + rng.uniform(20, 40, boxes[:, 2:].shape)
        labels = rng.integers(1, 4, len(boxes))
        objects = [
            Annotation(tuple(box), int(label), ignored and rng.random() < 0.3)
            for box, label in zip(boxes.tolist(), labels, strict=True)
        ]
        targets.append(make_target(objects, i))
        moved = np.repeat(boxes, 3, 0) + rng.normal(0, 3, (3 * len(boxes), 4))
        extra = rng.uniform(0, 30, (4, 4)) + np.array([0, 0, 40, 40])
        kinds = np.where(rng.random(3 * len(boxes)) < 0.8, np.repeat(labels, 3), rng.integers(1, 4, 3 * len(boxes)))
        made = np.concatenate([moved, extra])
        found.append(
            {
                "boxes": torch.tensor(made, dtype=torch.float32),
                "scores": torch.tensor([next(scores) for _ in made], dtype=torch.float32),
                "labels": torch.tensor(np.concatenate([kinds, rng.integers(1, 4, 4)])),
            }
        )
    return found, targets


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_mean_average_precision_is_cocos(seed: int, ignored: bool) -> None:
    found, targets = guesses(seed, ignored)
    measured = mean_average_precision(found, targets)
    for name, thresholds in (
        ("test_map50", [0.5]),
        ("test_map75", [0.75]),
        ("test_map", [0.5 + 0.05 * i for i in range(10)]),
    ):
        values = [slow_average_precision(found, targets, label, t) for t in thresholds for label in (1, 2, 3)]
        assert measured[name] == pytest.approx(np.mean([v for v in values if v is not None]), abs=1e-6)


def test_an_image_that_came_twice_counts_once() -> None:
    found, targets = guesses(0, False)
    once = mean_average_precision(found, targets)
    assert mean_average_precision([*found, *found[:3]], [*targets, *targets[:3]]) == once


def test_where_there_is_nothing_to_find_there_is_no_measurement() -> None:
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    assert set(mean_average_precision([nothing], [make_target([], 0)]).values()) == {-1.0}
    assert mean_average_precision([nothing], [make_target([Annotation((1, 1, 9, 9), 1)], 0)])["test_map"] == 0


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_and_a_report_of_the_detector(folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "training" / "metrics.jsonl").read_text().splitlines()]
    assert set(records[0]["loss"]) == {"classification", "bbox_regression", "bbox_ctrness", "kernel"}
    assert all(0 <= records[1][name] <= 1 for name in ("test_map", "test_map50", "test_map75"))
    report = Report.model_validate_json((folder / "report.json").read_bytes())
    assert report.accuracy is not None
    assert report.accuracy.identical_detections
    assert report.accuracy.samples == 12
    assert report.accuracy.packed_map == report.accuracy.trained_map == records[1]["test_map"]
    assert report.part is not None
    assert report.part.name == "backbone.body"
    assert report.part.rates[0].rate > report.rates[0].rate > 1
    text = (folder / "report.md").read_text()
    assert "| parameters, of backbone.body alone |" in text
    assert "| boxes, scores and labels equal bit for bit | yes |" in text


def test_the_commands_work_on_a_detector(folder: Path, bonn: Command, tmp_path: Path) -> None:
    report = Report.model_validate_json((folder / "report.json").read_bytes())
    assert report.accuracy is not None
    evaluated = bonn("evaluate", folder)
    assert evaluated.status == 0
    assert f"mAP {report.accuracy.packed_map:.3f}, mAP50 {report.accuracy.packed_map50:.3f}" in evaluated.out
    assert "on 12 test samples" in evaluated.out
    verified = bonn("verify", folder)
    assert (verified.status, "equal bit for bit" in verified.out) == (0, True)
    shown = bonn("report", folder)
    assert "mAP50" in shown.out
    (tmp_path / "r.yaml").write_text(BINARY)
    checked = bonn("check", "r.yaml")
    assert checked.status == 0, checked.err
    assert "outside of backbone.body" in checked.out
    assert re.search(r"compression rate by parameters: \d+\.\d\d, of backbone.body alone \d+\.\d\d", checked.out)
    assert "backbone.body.layer3.3.conv" in checked.out


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    recipe = parse_recipe((folder / "recipe.yaml").read_text())
    first = Runner(recipe, tmp_path, CPU, Lines())
    epoch = first._epoch
    first._epoch = lambda e, *a: epoch(e, *a) if e < 1 else (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        first.train(resume=False)
    torch.manual_seed(99)
    second = Runner(recipe, tmp_path, CPU, Lines())
    second.train(resume=True)
    second.finish()
    whole, resumed = (load_state(f / STATE) for f in (folder, tmp_path))
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    assert [{**r, "seconds": 0} for r in whole["metrics"]] == [{**r, "seconds": 0} for r in resumed["metrics"]]
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_new_process_finds_the_same_boxes_scores_and_labels(folder: Path, tmp_path: Path) -> None:
    task = Detection(parse_recipe((folder / "recipe.yaml").read_text()))
    images = [task.splits.test[i][0] for i in range(12)]
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch; from bonn_plugin import load_packed\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad(): found = load_packed(sys.argv[1])(torch.load(sys.argv[2]))\n"
        "torch.save(found, sys.argv[3])\n"
    )
    paths = [str(folder), str(tmp_path / "images.pt"), str(tmp_path / "found.pt")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    model = load_packed(folder)
    with torch.no_grad():
        here = model(images)
    assert sum(len(one["scores"]) for one in here) > 0
    assert equal_detections(here, torch.load(tmp_path / "found.pt"))


@pytest.mark.parametrize("start", ["state", "packed"])
def test_a_detector_starts_from_the_full_precision_one(start: str, tmp_path: Path) -> None:
    first = run(parse_recipe(REAL), tmp_path / "real")
    first.finish()
    if start == "packed":
        (tmp_path / "real" / "training" / "state.pt").unlink()
    text = BINARY.replace("fpn: 32", f"fpn: 32, init_from: '{tmp_path / 'real'}'")
    second = Runner(parse_recipe(text), tmp_path / "binary", CPU, Lines())
    given = first.model.state_dict()
    for name, tensor in second.model.state_dict().items():
        if name in given and not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, given[name]), name
    with pytest.raises(CheckpointError, match=r"needs \(32|needs \("):
        Runner(parse_recipe(text.replace("[8, 16, 16, 16]", "[8, 16, 32, 32]")), tmp_path / "other", CPU, Lines())


def test_other_modifiers_and_mixed_precision_work_on_the_body(tmp_path: Path) -> None:
    text = BINARY.replace("epochs: 2", "epochs: 3\n  amp: bfloat16") + "  - {type: filter_merge, keep: 0.5, end: 2}\n"
    report = run(parse_recipe(text), tmp_path).finish().report
    assert report.accuracy is not None
    assert report.accuracy.identical_detections
    assert report.merging is not None
    assert all(row.name.startswith("backbone.body.") for row in report.merging.layers)


def test_a_detector_that_does_not_take_the_images_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes\ncannot be multiplied")

    monkeypatch.setattr("bonn_plugin.models.detection.Backbone.forward", fails)
    with pytest.raises(ModelError, match=r"scenes.yaml:4:8: the detector does not take .*64\): mat1 and mat2"):
        Runner(parse_recipe(REAL, "scenes.yaml"), Path(), CPU, Lines())


def test_neck_and_heads_can_be_int8(tmp_path: Path) -> None:
    text = BINARY.replace("epochs: 2", "epochs: 1")
    text += "  - {type: inc_int8, targets: ['re:backbone.fpn.*', 're:head.*'], expect: 9, calibration_batches: 2}\n"
    report = run(parse_recipe(text), tmp_path).finish().report
    assert report.accuracy is not None
    assert report.accuracy.identical_detections
    assert 0 < report.accuracy.conversion_difference < 0.1
    assert [row.name for row in report.layers if row.kind == "IntegerConv2d" and "body" in row.name] == []
    assert sum(row.kind == "IntegerConv2d" for row in report.layers) == 9
    assert verify_packed(tmp_path).identical


def test_without_pycocotools_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(DataError, match=r"pip install 'bonn_plugin\[detection\]'"):
        Detection(parse_recipe(REAL))


def compress_in_each() -> None:
    sys.argv = ["bonn", "compress", "recipe.yaml", "--out", "run", "--device", "cpu"]
    main()


def test_two_processes_train_a_detector_and_measure_every_image_once(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(BINARY.replace("test: 12", "test: 13"))  # 7 for the one, 6 for the other
    ended = run_ranks(compress_in_each, ranks=2, cwd=tmp_path)
    assert [one.status for one in ended] == [0, 0], [one.err for one in ended]
    records = [json.loads(line) for line in (tmp_path / "run" / "training" / "metrics.jsonl").read_text().splitlines()]
    report = Report.model_validate_json((tmp_path / "run" / "report.json").read_bytes())
    assert report.accuracy is not None
    assert len(records) == 2
    assert records[-1]["test_map"] == pytest.approx(report.accuracy.trained_map, abs=1e-3)
    assert report.accuracy.identical_detections


# --- folders in the formats of VOC and COCO ------------------------------------------------------

SHORT = ["training.epochs=2", "training.batch_size=2", "training.schedule={name: constant}", "data.workers=0"]
SHORT += ["model.min_size=64", "model.max_size=96", "model.fpn=32", "model.args={widths: [8, 8, 16, 16]}"]


@pytest.mark.parametrize(
    ("name", "write", "more"),
    [
        ("voc_fasterrcnn_resnet18", write_voc, ["model.box_head=32"]),
        ("coco_retinanet_resnet34", write_coco, []),
    ],
)
def test_the_recipe_trains_two_epochs_and_is_evaluated(
    name: str, write: object, more: list[str], bonn: Command, tmp_path: Path
) -> None:
    write(tmp_path / "data")  # type: ignore[operator]
    changes = [part for change in (*SHORT, *more, f"data.root={tmp_path / 'data'}") for part in ("--set", change)]
    done = bonn("compress", name, "--out", "run", "--device", "cpu", *changes)
    assert done.status == 0, done.err
    assert "boxes, scores and labels equal bit for bit" in done.out
    records = [json.loads(line) for line in (tmp_path / "run" / "training" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all(np.isfinite(value) for record in records for value in record["loss"].values())
    evaluated = bonn("evaluate", "run")
    assert evaluated.status == 0, evaluated.err
    assert "on 6 test samples" in evaluated.out
    missing = bonn("evaluate", "run", "--set", "data.root=/no/such")
    assert missing.status == 2
    assert len(missing.lines) == 1
    assert "/no/such" in missing.err


# --- learning ------------------------------------------------------------------------------------


def test_a_one_bit_detector_learns_from_the_full_precision_one(tmp_path: Path) -> None:
    """The demonstration in small: 300 scenes of 64 pixels, four epochs and three."""
    larger = REAL.replace("[8, 16, 16, 16]", "[16, 32, 64, 128]").replace(
        "train: 24, test: 12", "train: 300, test: 100"
    )
    cosine = larger.replace("lr: 3e-3}", "lr: 3e-3}\n  schedule: {name: cosine, warmup_epochs: 1}")
    run(parse_recipe(cosine.replace("epochs: 2", "epochs: 4")), tmp_path / "real")
    text = cosine.replace("epochs: 2", "epochs: 3").replace("fpn: 32", f"fpn: 32, init_from: '{tmp_path / 'real'}'")
    text += "modifiers:\n  - {type: binarize, threshold: always}\n"
    recipe = parse_recipe(text.replace("lr: 3e-3}", "lr: 3e-3, lr_by_role: {weight: 5e-3}}"))
    second = Runner(recipe, tmp_path / "binary", CPU, Lines())
    untrained = second.task.build()
    assert second.task.measure(untrained, CPU)["test_map50"] < 0.02
    second.train(resume=False)
    assert second.metrics[-1]["test_map50"] >= 0.35


def test_the_demonstration_is_the_same_network_in_both_stages() -> None:
    real, binary = (load_recipe(find_recipe(f"digit_scenes_fcos_resnet18{part}")) for part in ("_real", ""))
    assert binary.model.model_copy(update={"init_from": None}) == real.model
    assert binary.data == real.data
    assert real.modifiers == ()
