"""Data for detection: scenes from a seed, and folders in the true formats of Pascal VOC and COCO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bonn_plugin.data import collate_detections, load_detection_splits, train_loader
from bonn_plugin.data.scenes import digit_scenes
from bonn_plugin.errors import DataError
from bonn_plugin.recipe import CocoConfig, DataConfig, DigitScenesConfig, DigitsConfig, VocConfig

SMALL = DigitScenesConfig(size=64, train=60, test=30)


# --- digit_scenes --------------------------------------------------------------------------------


def test_a_scene_follows_from_the_seed_and_its_number_alone() -> None:
    one, other = digit_scenes(SMALL)[0], digit_scenes(SMALL)[0]
    order = [5, 0, 59, 5]
    for index in order:
        (a, first), (b, second) = one[index], other[index]
        assert torch.equal(a, b)
        assert all(torch.equal(first[key], second[key]) for key in first)  # type: ignore[literal-required]
    assert not torch.equal(one[0][0], one[1][0])
    reseeded = digit_scenes(SMALL.model_copy(update={"seed": 1}))[0]
    assert not torch.equal(one[0][0], reseeded[0][0])
    longer = digit_scenes(SMALL.model_copy(update={"train": 70}))[0]
    assert torch.equal(one[59][0], longer[59][0])
    with pytest.raises(IndexError):
        one[60]


def test_boxes_lie_within_the_scene_round_the_ink() -> None:
    train, test, names = digit_scenes(SMALL)
    assert names == tuple("0123456789")
    counts = set()
    for part in (train, test):
        for image, target in (part[i] for i in range(len(part))):
            assert image.shape == (3, 64, 64)
            assert image.dtype == torch.float32
            assert 0 <= float(image.min()) <= float(image.max()) <= 1
            boxes = target["boxes"]
            counts.add(len(boxes))
            assert bool((boxes >= 0).all())
            assert bool((boxes <= 64).all())
            sides = boxes[:, 2:] - boxes[:, :2]
            assert bool((sides >= 4).all())
            assert bool((sides <= 0.6 * 64 + 1).all())
            assert bool(((target["labels"] >= 1) & (target["labels"] <= 10)).all())
    assert counts == {1, 2, 3}


def test_training_and_test_scenes_have_other_handwritten_digits() -> None:
    train, test, _ = digit_scenes(SMALL)
    a, b = ({digit.tobytes() for digit in part.digits} for part in (train, test))
    assert len(a) == 1347
    assert len(b) == 450
    assert not a & b


def test_the_box_is_where_the_scene_differs_from_the_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL.model_copy(update={"digits": (1, 1)})
    scenes = digit_scenes(config)[0]
    drawn = [scenes[i] for i in range(10)]
    monkeypatch.setattr("bonn_plugin.data.scenes.write_ink", lambda *_: None)
    empty = digit_scenes(config)[0]
    for i in range(10):
        image, target = drawn[i]
        differs = ((image - empty[i][0]).abs().amax(0) > 0.12).nonzero()
        low, high = differs.amin(0).flip(0), differs.amax(0).flip(0) + 1
        (box,) = target["boxes"]
        assert float((box[:2] - low).abs().max()) <= 3
        assert float((box[2:] - high).abs().max()) <= 3


def test_one_class_means_digits_of_any_kind() -> None:
    splits = load_detection_splits(SMALL.model_copy(update={"one_class": True}), 2)
    assert splits.names == {1: "digit"}
    assert {int(label) for i in range(20) for label in splits.train[i][1]["labels"]} == {1}


def test_what_can_not_be_drawn_is_refused() -> None:
    with pytest.raises(DataError, match="larger than scikit-learn's photographs"):
        digit_scenes(SMALL.model_copy(update={"size": 500}))
    with pytest.raises(ValueError, match="the first is the smaller one"):
        DigitScenesConfig(digits=(3, 1))
    with pytest.raises(DataError, match=r"11 classes, the background included, model.num_classes is 10"):
        load_detection_splits(SMALL, 10)
    with pytest.raises(DataError, match="no loader for the data set 'digits'"):
        load_detection_splits(DigitsConfig(), 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_lists_and_an_epoch_comes_again(workers: int) -> None:
    def epoch() -> list[Any]:
        splits = load_detection_splits(SMALL, 11)
        loader, sampler = train_loader(splits, 8, 3, workers, collate=collate_detections)
        sampler.epoch = 2
        torch.manual_seed(0)
        return list(loader)

    first, again = epoch(), epoch()
    assert len(first) == 7
    for (images, targets), (same, others) in zip(first, again, strict=True):
        assert len(images) == len(targets) == 8
        assert all(torch.equal(a, b) for a, b in zip(images, same, strict=True))
        assert [int(t["image_id"]) for t in targets] == [int(t["image_id"]) for t in others]


# --- Pascal VOC ----------------------------------------------------------------------------------


def voc_object(name: str, box: Sequence[float], difficult: int | None = 0) -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, box, strict=True))
    extra = "" if difficult is None else f"<truncated>0</truncated><difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name><pose>Left</pose>{extra}<bndbox>{corners}</bndbox></object>"


def write_picture(path: Path, size: tuple[int, int], boxes: Sequence[Sequence[float]] = ()) -> None:
    """Write a grey JPEG with bright boxes in it."""
    width, height = size
    pixels = np.random.default_rng(len(path.stem)).integers(60, 100, (height, width, 3), dtype=np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[int(y0) : int(y1), int(x0) : int(x1)] = 230
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def write_voc(root: Path, year: int = 2012, images: int = 6) -> Path:
    """Write Pascal VOC in its true layout: with an image without objects, a difficult and a degenerate object."""
    base = root / "VOCdevkit" / f"VOC{year}"
    (base / "Annotations").mkdir(parents=True)
    (base / "ImageSets" / "Main").mkdir(parents=True)
    names = {"train": [], "val": []}
    for part in names:
        for i in range(images):
            name = f"{year}_{'0' if part == 'train' else '1'}{i:05d}"
            names[part].append(name)
            box = (11 + 5 * i, 9, 40 + 5 * i, 48)
            objects = [voc_object(("dog", "person")[i % 2], box)]
            if i == 1:
                objects.append(voc_object("cat", (50, 30, 70, 60), 1))
            if i == 2:
                objects = []
            if i == 3:
                objects.append(voc_object("cat", (50, 30, 20, 30), None))
            write_picture(base / "JPEGImages" / f"{name}.jpg", (96, 64), [box] if objects else [])
            (base / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><folder>VOC{year}</folder><filename>{name}.jpg</filename><size><width>96</width>"
                f"<height>64</height><depth>3</depth></size><segmented>0</segmented>{''.join(objects)}</annotation>"
            )
    for part, listed in names.items():
        (base / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in listed))
        (base / "ImageSets" / "Main" / f"dog_{part}.txt").write_text("")
    return base


def test_voc_gives_boxes_labels_and_what_is_difficult(tmp_path: Path) -> None:
    write_voc(tmp_path)
    splits = load_detection_splits(VocConfig(root=str(tmp_path), flip=False), 21)
    assert splits.names[12] == "dog"
    image, target = splits.train[0]
    assert image.shape == (3, 64, 96)
    assert target["boxes"].tolist() == [[10, 8, 40, 48]]  # counted from 0, the far border outside
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [12]
    assert float(image[:, 20, 20].mean()) > 0.8
    assert splits.train[1][1]["ignored"].tolist() == [False, True]
    assert splits.train[2][1]["boxes"].shape == (0, 4)
    assert splits.train[3][1]["labels"].tolist() == [15]  # the degenerate cat is left out
    assert [int(splits.test[i][1]["image_id"]) for i in range(3)] == [0, 1, 2]


def test_flips_take_the_boxes_along_while_training_alone(tmp_path: Path) -> None:
    write_voc(tmp_path)
    splits = load_detection_splits(VocConfig(root=str(tmp_path)), 21)
    torch.manual_seed(0)
    seen = {tuple(splits.train[0][1]["boxes"][0].tolist()) for _ in range(20)}
    assert seen == {(10, 8, 40, 48), (56, 8, 86, 48)}
    assert {tuple(splits.test[0][1]["boxes"][0].tolist()) for _ in range(20)} == {(10, 8, 40, 48)}


def test_another_folders_classes_can_be_named(tmp_path: Path) -> None:
    write_voc(tmp_path)
    config = VocConfig(root=str(tmp_path), names=("person", "dog", "cat"))
    assert load_detection_splits(config, 4).test[0][1]["labels"].tolist() == [2]
    with pytest.raises(DataError, match=r"_100000.xml: unknown class 'dog': name the folder's classes in data.names"):
        load_detection_splits(config.model_copy(update={"names": ("person", "cat")}), 3).test[0]


def _without(part: str) -> Any:
    def damage(base: Path) -> None:
        next(base.rglob(part)).unlink()

    return damage


@pytest.mark.parametrize(
    ("damage", "change", "message"),
    [
        (None, {"root": "/no/such"}, "no Pascal VOC of 2012 in /no/such"),
        (None, {"year": 2010}, "VOC2010 is missing; there is VOC2012"),
        (None, {"train": "trainval"}, "no image set 'trainval'; there is train, val"),
        (_without("2012_000001.xml"), {}, "2012_000001.xml: missing; .*train.txt names it"),
        (_without("2012_100003.jpg"), {}, "2012_100003.jpg: missing; .*val.txt names it"),
    ],
)
def test_a_voc_that_is_not_there_is_told_before_training(
    tmp_path: Path, damage: Any, change: dict[str, Any], message: str
) -> None:
    base = write_voc(tmp_path)
    if damage:
        damage(base)
    config = VocConfig(root=str(tmp_path)).model_copy(update=change)
    with pytest.raises(DataError, match=message):
        load_detection_splits(config, 21)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation><object>", "damaged"),
        ("<annotation><object><name>dog</name></object></annotation>", "not an annotation of Pascal VOC"),
        (f"<annotation>{voc_object('dog', (1, 2, 3, 4)).replace('<xmin>1', '<xmin>one')}</annotation>", "not an annot"),
    ],
)
def test_a_damaged_annotation_of_voc_is_named(tmp_path: Path, content: str, message: str) -> None:
    base = write_voc(tmp_path)
    (base / "Annotations" / "2012_000000.xml").write_text(content)
    with pytest.raises(DataError, match=rf"2012_000000.xml.*{message}"):
        load_detection_splits(VocConfig(root=str(tmp_path)), 21).train[0]


# --- COCO ----------------------------------------------------------------------------------------

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 90, "name": "toothbrush"}]


def write_coco(root: Path, images: int = 6) -> Path:
    """Write COCO in its true layout: with an image without annotations, a crowd and a box without area."""
    for part in ("train", "val"):
        described, annotations = [], []
        for i in range(images):
            width, height = 96 + 8 * i, 64
            name, image_id = f"{i:012d}.jpg", 1000 + 7 * i
            described.append({"id": image_id, "file_name": name, "width": width, "height": height})
            box = [10 + 5 * i, 8, 30, 40]
            boxes = [] if i == 2 else [box]
            write_picture(root / f"{part}2017" / name, (width, height), [(x, y, x + w, y + h) for x, y, w, h in boxes])

            objects = [((18, 90)[i % 2], one, 0) for one in boxes]
            if i == 1:
                objects.append((1, [40, 5, 50, 50], 1))
            if i == 3:
                objects.append((1, [20, 20, 0, 10], 0))
            for category, bbox, crowd in objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": bbox,
                        "area": bbox[2] * bbox[3],
                        "iscrowd": crowd,
                        "segmentation": [],
                    }
                )
        file = root / "annotations" / f"instances_{part}2017.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"images": described, "annotations": annotations, "categories": CATEGORIES}))
    return root


def test_coco_gives_boxes_labels_and_crowds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = load_detection_splits(CocoConfig(root=str(write_coco(tmp_path)), flip=False), 91)
    assert capsys.readouterr().out == ""
    assert splits.names[90] == "toothbrush"
    image, target = splits.train[0]
    assert image.shape == (3, 64, 96)
    assert target["boxes"].tolist() == [[10, 8, 40, 48]]
    assert target["labels"].tolist() == [18]
    assert int(target["image_id"]) == 1000
    assert splits.train[1][1]["ignored"].tolist() == [False, True]
    empty = splits.test[2][1]
    assert (empty["boxes"].shape, empty["labels"].shape, empty["ignored"].shape) == ((0, 4), (0,), (0,))
    assert splits.test[3][1]["labels"].tolist() == [90]


def change_coco(part: str, change: Any) -> Any:
    def damage(root: Path) -> None:
        file = root / "annotations" / f"instances_{part}2017.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return damage


def _break(root: Path) -> None:
    (root / "annotations" / "instances_val2017.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "classes", "message"),
    [
        (lambda root: (root / "annotations" / "instances_train2017.json").unlink(), 91, "train2017.json: missing"),
        (lambda root: (root / "val2017").rename(root / "other"), 91, "the folder val2017 is missing"),
        (_break, 91, "val2017.json: not annotations of COCO"),
        (change_coco("val", lambda c: c.pop("categories")), 91, "val2017.json: not annotations of COCO: KeyError"),
        (lambda root: None, 81, "category ids reach 90, so model.num_classes must be 91 or more"),
        (
            change_coco("train", lambda c: c["annotations"][2].update(category_id=5)),
            91,
            "train2017.json: annotation 3 has the category 5, which is not among 'categories'",
        ),
        (change_coco("val", lambda c: c["categories"].pop()), 91, "category"),
        (change_coco("val", lambda c: c.update(images=[], annotations=[])), 91, "names no image"),
    ],
)
def test_a_coco_that_is_not_there_is_told_before_training(
    tmp_path: Path, damage: Any, classes: int, message: str
) -> None:
    damage(write_coco(tmp_path))
    with pytest.raises(DataError, match=message):
        load_detection_splits(CocoConfig(root=str(tmp_path)), classes)


def test_a_root_that_is_no_folder_is_told() -> None:
    with pytest.raises(DataError, match="no COCO in /no/such: no such folder"):
        load_detection_splits(CocoConfig(root="/no/such"), 91)


def test_a_picture_of_coco_that_is_missing_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "train2017" / "000000000004.jpg").unlink()
    splits = load_detection_splits(CocoConfig(root=str(tmp_path)), 91)
    with pytest.raises(DataError, match=r"train2017/000000000004.jpg: missing or damaged"):
        splits.train[4]


def test_categories_must_be_the_same_in_both_parts(tmp_path: Path) -> None:
    change_coco("val", lambda c: c["categories"].append({"id": 2, "name": "bicycle"}))(write_coco(tmp_path))
    with pytest.raises(DataError, match=r"its categories are not those of instances_train2017.json"):
        load_detection_splits(CocoConfig(root=str(tmp_path)), 91)


def test_a_config_without_a_loader_is_told() -> None:
    with pytest.raises(DataError, match="no loader for the data set 'mine'"):
        load_detection_splits(DataConfig(name="mine"), 2)
