"""Data sets: what they hold, how they are split and normalised, in which order, and what is said where one is amiss."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets

from bonn_plugin.data import Splits, evaluation_loader, load_splits, train_loader
from bonn_plugin.data.drawing import digits_and_photos
from bonn_plugin.errors import DataError
from bonn_plugin.recipe import CifarConfig, DataConfig, DigitsClutterConfig, DigitsConfig, ImageFolderConfig
from bonn_plugin.sampling import EpochSampler, epoch_seed
from tests.cifar_files import PER_FILE, cifar_pixels, write_cifar10, write_pickle


def stacked(data: Any) -> tuple[Tensor, Tensor]:
    """Return all images and labels of a data set."""
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(images), torch.tensor(labels)


# --- digits --------------------------------------------------------------------------------------


def test_digits_are_the_1797_of_scikit_learn_each_once() -> None:
    splits = load_splits(DigitsConfig(size=8), 10)
    assert (len(splits.train), len(splits.test), splits.classes) == (1347, 450, 10)
    parts = [stacked(part) for part in (splits.train, splits.test)]
    images, labels = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    pixels = ((images[:, 0].double() * 0.3760 + 0.3053) * 16).round().int().flatten(1)
    ours = Counter((*row, int(label)) for row, label in zip(pixels.tolist(), labels, strict=True))
    given, digits = load_digits(return_X_y=True)
    assert ours == Counter((*row, int(d)) for row, d in zip(given.astype(int).tolist(), digits, strict=True))


def test_the_digits_split_is_stratified_and_fixed() -> None:
    first, again = (load_splits(DigitsConfig(size=8), 10) for _ in range(2))
    assert torch.equal(stacked(first.test)[0], stacked(again.test)[0])
    train, test = (torch.bincount(stacked(part)[1], minlength=10) for part in (first.train, first.test))
    assert bool(((test - (train + test) / 4).abs() < 1).all())


def test_digits_have_three_equal_channels_of_mean_0_and_spread_1() -> None:
    images, _ = stacked(load_splits(DigitsConfig(size=8), 10).train)
    assert images.dtype == torch.float32
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01


@pytest.mark.parametrize("size", [8, 16, 33])
def test_digits_are_enlarged_to_the_size_asked_for(size: int) -> None:
    config = DigitsConfig(size=size)
    splits = load_splits(config, 10)
    assert splits.train[0][0].shape == splits.test[0][0].shape == (3, size, size)
    assert (config.image_size, config.classes) == (size, 10)


def test_digits_are_shifted_while_training_and_never_in_the_test() -> None:
    plain, padded = load_splits(DigitsConfig(size=8), 10), load_splits(DigitsConfig(size=8, pad=2), 10)
    assert torch.equal(stacked(plain.test)[0], stacked(padded.test)[0])
    assert torch.equal(plain.train[0][0], plain.train[0][0])
    torch.manual_seed(0)
    image = plain.train[0][0]
    background = float(image.min())
    canvas = torch.full((3, 12, 12), background)
    canvas[:, 2:10, 2:10] = image
    shifts = [canvas[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    seen = set()
    for _ in range(60):
        drawn = padded.train[0][0]
        places = [i for i, shift in enumerate(shifts) if torch.allclose(drawn, shift, atol=1e-6)]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 15


# --- CIFAR ---------------------------------------------------------------------------------------


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-10 in the layout of the original."""
    return write_cifar10(tmp_path, monkeypatch)


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-100 in the layout of the original; torchvision is told its MD5 sums."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    sums = []
    for part, name in enumerate(["train", "test"]):
        fine = [10 * part + i for i in range(PER_FILE)]
        content = {"fine_labels": fine, "coarse_labels": [0] * PER_FILE, "data": cifar_pixels(part), "filenames": []}
        sums.append([name, write_pickle(folder / name, content)])
    meta = {"fine_label_names": [f"class{i}" for i in range(100)], "coarse_label_names": ["all"]}
    monkeypatch.setattr(datasets.CIFAR100, "train_list", sums[:1])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", sums[1:])
    md5 = write_pickle(folder / "meta", meta)
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5})
    return tmp_path


def normalised(pixels: np.ndarray[Any, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(N, 3072) bytes, channel by channel and row by row, to normalised (N, 3, 32, 32)."""
    images = pixels.reshape(-1, 3, 32, 32).astype(np.float64) / 255
    images = (images - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    return torch.from_numpy(images).float()


def test_cifar10_is_read_from_its_files(cifar10: Path) -> None:
    splits = load_splits(CifarConfig(name="cifar10", root=str(cifar10), pad=0, flip=False), 10)
    assert (len(splits.train), len(splits.test), splits.classes) == (5 * PER_FILE, PER_FILE, 10)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    images, labels = stacked(splits.train)
    expected = normalised(np.concatenate([cifar_pixels(part) for part in range(5)]), mean, std)
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == [(part + i) % 10 for part in range(5) for i in range(PER_FILE)]
    torch.testing.assert_close(stacked(splits.test)[0], normalised(cifar_pixels(5), mean, std))


def test_cifar100_is_read_from_its_files_with_the_fine_labels(cifar100: Path) -> None:
    splits = load_splits(CifarConfig(name="cifar100", root=str(cifar100), pad=0, flip=False), 100)
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    images, labels = stacked(splits.train)
    torch.testing.assert_close(images, normalised(cifar_pixels(0), mean, std))
    assert labels.tolist() == [0, 1, 2, 3]
    assert stacked(splits.test)[1].tolist() == [10, 11, 12, 13]
    assert splits.classes == 100


def test_cifar_is_cropped_and_flipped_while_training_alone(cifar10: Path) -> None:
    splits = load_splits(CifarConfig(name="cifar10", root=str(cifar10)), 10)
    plain = load_splits(CifarConfig(name="cifar10", root=str(cifar10), pad=0, flip=False), 10)
    assert torch.equal(stacked(splits.test)[0], stacked(plain.test)[0])
    torch.manual_seed(0)
    assert len({splits.train[0][0].numpy().tobytes() for _ in range(20)}) > 10
    assert splits.train[0][0].shape == (3, 32, 32)


def test_cifar_flips_are_mirrored_images_and_can_be_off(cifar10: Path) -> None:
    flipped = load_splits(CifarConfig(name="cifar10", root=str(cifar10), pad=0, flip=True), 10).train
    plain = load_splits(CifarConfig(name="cifar10", root=str(cifar10), pad=0, flip=False), 10).train[0][0]
    torch.manual_seed(0)
    drawn = [flipped[0][0] for _ in range(20)]
    mirrored = [torch.equal(image, plain.flip(-1)) for image in drawn]
    assert all(m or torch.equal(image, plain) for m, image in zip(mirrored, drawn, strict=True))
    assert 0 < sum(mirrored) < 20


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_a_damaged_cifar_file_is_told_with_what_the_folder_should_hold(file: str, damage: str, cifar10: Path) -> None:
    place = cifar10 / "cifar-10-batches-py" / file
    content = place.read_bytes()
    place.unlink()
    if damage != "missing":
        place.write_bytes(content[:-1] + (b"" if damage == "truncated" else b"!"))
    with pytest.raises(DataError) as error:
        load_splits(CifarConfig(name="cifar10", root=str(cifar10)), 10)
    assert str(error.value).startswith(f"no intact cifar10 in {cifar10}: it should hold the folder cifar-10-batches-py")
    assert "data_batch_1 to data_batch_5, test_batch and batches.meta" in str(error.value)
    assert "\n" not in str(error.value)


# --- folders of pictures -------------------------------------------------------------------------


def save(file: Path, pixels: np.ndarray[Any, Any], mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(file)


GRADIENT = np.repeat(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], 30, 0).repeat(3, 2)  # dark on the left


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; JPEG and PNG, grey, palette and with transparency, smaller and larger than the crop."""
    for part in ("train", "val"):
        save(tmp_path / part / "dog" / "large.jpg", GRADIENT)
        save(tmp_path / part / "dog" / "small.JPEG", GRADIENT[:6, :5])
        save(tmp_path / part / "cat" / "grey.png", GRADIENT, "L")
        save(tmp_path / part / "cat" / "palette.png", GRADIENT, "P")
        save(tmp_path / part / "cat" / "clear.png", GRADIENT, "RGBA")
        (tmp_path / part / "cat" / "notes.txt").write_text("not a picture")
    return tmp_path


def test_a_folder_gives_its_pictures_in_the_order_of_the_classes(folder: Path) -> None:
    config = ImageFolderConfig(root=str(folder), crop=16)
    splits = load_splits(config, 2)
    images, labels = stacked(splits.test)
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 0, 1, 1]  # cat, dog
    assert (config.image_size, config.classes, splits.classes) == (16, None, 2)


def test_pictures_are_normalised_as_imagenet(tmp_path: Path) -> None:
    for part in ("train", "val"):
        save(tmp_path / part / "a" / "1.png", np.full((20, 30, 3), (10, 100, 200), np.uint8))
        save(tmp_path / part / "b" / "1.png", np.full((20, 30, 3), (10, 100, 200), np.uint8))
    splits = load_splits(ImageFolderConfig(root=str(tmp_path), crop=8), 2)
    expected = (torch.tensor([10, 100, 200]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    for data in (splits.train, splits.test):
        torch.testing.assert_close(data[0][0], expected[:, None, None].expand(3, 8, 8))


def test_the_shorter_side_is_resized_and_the_centre_taken(folder: Path) -> None:
    splits = load_splits(ImageFolderConfig(root=str(folder), crop=14), 2)  # resized to 16, as 256 is to 224
    with Image.open(folder / "val" / "dog" / "large.jpg") as picture:
        small = picture.resize((round(40 * 16 / 30), 16), Image.Resampling.BILINEAR)
        left, top = round((small.width - 14) / 2), 1
        pixels = np.asarray(small.crop((left, top, left + 14, top + 14)), np.float64) / 255
    red = torch.from_numpy((pixels[:, :, 0] - 0.485) / 0.229).float()
    assert float((splits.test[3][0][0] - red).abs().max()) < 0.03
    larger = load_splits(ImageFolderConfig(root=str(folder), crop=14, resize=28), 2)
    assert float(larger.test[3][0][0].std()) < 0.7 * float(red.std())  # a smaller part of the gradient


def test_pictures_are_cropped_and_flipped_at_random_while_training_alone(folder: Path) -> None:
    splits = load_splits(ImageFolderConfig(root=str(folder), crop=16), 2)
    torch.manual_seed(0)
    assert len({splits.train[3][0].numpy().tobytes() for _ in range(20)}) > 5
    assert len({splits.test[3][0].numpy().tobytes() for _ in range(5)}) == 1

    def rises(image: Tensor) -> bool:
        return bool(image[0, :, -1].mean() > image[0, :, 0].mean())

    assert {rises(splits.train[3][0]) for _ in range(20)} == {True, False}
    straight = load_splits(ImageFolderConfig(root=str(folder), crop=16, flip=False), 2)
    assert {rises(straight.train[3][0]) for _ in range(20)} == {True}


def test_a_folder_without_its_classes_or_pictures_is_told(folder: Path) -> None:
    with pytest.raises(DataError, match=r"the data set has 2 classes, model.num_classes is 3"):
        load_splits(ImageFolderConfig(root=str(folder)), 3)
    (folder / "val" / "emu").mkdir()
    with pytest.raises(DataError, match=rf"no images in {folder}/val: it should hold one folder a class.*emu"):
        load_splits(ImageFolderConfig(root=str(folder)), 2)
    save(folder / "val" / "emu" / "1.png", GRADIENT)
    with pytest.raises(DataError, match=r"train and val differ in their classes: emu"):
        load_splits(ImageFolderConfig(root=str(folder)), 2)


def test_a_data_set_without_a_loader_is_told() -> None:
    with pytest.raises(DataError, match="no loader for the data set 'mine'"):
        load_splits(DataConfig(name="mine"), 2)


# --- order ---------------------------------------------------------------------------------------


def order(seed: int, epoch: int, n: int = 50) -> list[int]:
    sampler = EpochSampler(range(n), seed)
    sampler.epoch = epoch
    assert len(sampler) == n
    return list(sampler)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = order(3, 7)
    torch.manual_seed(2)
    torch.rand(5)
    assert order(3, 7) == first
    assert sorted(first) == list(range(50))
    others = [order(3, 8), order(4, 7), order(7, 3), order(3, 6)]
    assert all(other != first for other in others)


def test_epoch_seeds_do_not_meet() -> None:
    assert len({epoch_seed(seed, epoch) for seed in range(30) for epoch in range(100)}) == 3000


@pytest.fixture
def shifted_digits() -> Splits:
    return load_splits(DigitsConfig(size=8, pad=2), 10)


def epoch_of(splits: Splits, epoch: int, workers: int) -> tuple[Tensor, Tensor]:
    loader, sampler = train_loader(splits, 200, 5, workers)
    sampler.epoch = epoch
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_comes_again_with_order_and_augmentation(shifted_digits: Splits, workers: int) -> None:
    images, labels = epoch_of(shifted_digits, 4, workers)
    again, same = epoch_of(shifted_digits, 4, workers)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert not torch.equal(labels, epoch_of(shifted_digits, 5, workers)[1])


def test_training_drops_the_last_small_batch_and_the_test_keeps_it(shifted_digits: Splits) -> None:
    loader, _ = train_loader(shifted_digits, 200, 0, 0)
    assert [len(labels) for _, labels in loader] == [200] * 6
    test = evaluation_loader(shifted_digits, 200, 0)
    assert [len(labels) for _, labels in test] == [200, 200, 50]
    assert torch.equal(torch.cat([labels for _, labels in test]), stacked(shifted_digits.test)[1])


CLUTTER = DigitsClutterConfig(size=16, train=200, test=100)


def test_digits_on_photographs_follow_from_their_seed_and_share_no_handwriting_between_the_parts() -> None:
    splits = load_splits(CLUTTER, 10)
    images, labels = stacked(splits.train)
    again, _ = stacked(load_splits(CLUTTER, 10).train)
    other, _ = stacked(load_splits(CLUTTER.model_copy(update={"seed": 1}), 10).train)
    longer, _ = stacked(load_splits(CLUTTER.model_copy(update={"train": 210}), 10).train)
    assert images.shape == (200, 3, 16, 16)
    assert images.dtype == torch.float32
    assert len(splits.test) == 100
    assert torch.equal(images, again)
    assert torch.equal(images, longer[:200])
    assert not torch.equal(images, other)
    assert set(labels.tolist()) == set(range(10))
    assert not torch.equal(images[:100], stacked(splits.test)[0])
    _, (train, test) = digits_and_photos(16)
    assert len(train.digits) + len(test.digits) == 1797
    assert not {d.tobytes() for d in train.digits} & {d.tobytes() for d in test.digits}


def test_a_digit_on_a_photograph_is_what_its_label_says() -> None:
    """Drawn large and with the photograph taken away, each is nearest to the handwritten digits of its class."""
    config = DigitsClutterConfig(size=32, train=10, test=200, scale=(1.0, 1.0))
    images, labels = stacked(load_splits(config, 10).test)
    _, (train, _) = digits_and_photos(32)
    known = torch.from_numpy(train.digits).flatten(1).float()
    # a pixel of ink has the digit's one colour: correlation with each known digit, either way round
    small = torch.nn.functional.interpolate(images.mean(1, keepdim=True), size=8, mode="area").flatten(1)
    found = torch.from_numpy(train.labels)[torch.corrcoef(torch.cat([small, known]))[:200, 200:].abs().argmax(1)]
    assert (found == labels).float().mean() > 0.4  # a tenth by chance; the photograph disturbs it


def test_the_scale_of_the_digits_must_be_in_order() -> None:
    with pytest.raises(ValueError, match=r"scale \[0.9, 0.5\]: the first is the smaller one"):
        DigitsClutterConfig(scale=(0.9, 0.5))
