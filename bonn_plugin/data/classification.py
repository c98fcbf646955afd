"""Data sets for classification: scikit-learn's digits, plain and on photographs, CIFAR, and ImageNet's layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from bonn_plugin.data.clutter import digits_clutter
from bonn_plugin.data.splits import Splits
from bonn_plugin.errors import DataError, one_line
from bonn_plugin.recipe import CifarConfig, DataConfig, DigitsClutterConfig, DigitsConfig, ImageFolderConfig

DIGITS_SHARE_TEST = 0.25
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def load_splits(config: DataConfig, num_classes: int) -> Splits:
    """Open the data set of a recipe.

    Raises:
        DataError: it is not where the recipe says, or has another number of classes than the model.
    """
    if isinstance(config, DigitsConfig):
        splits = _digits(config)
    elif isinstance(config, DigitsClutterConfig):
        train, test = digits_clutter(config)
        splits = Splits(_Transformed(*train, None), _Transformed(*test, None), 10)
    elif isinstance(config, CifarConfig):
        splits = _cifar(config)
    elif isinstance(config, ImageFolderConfig):
        splits = _image_folder(config)
    else:
        raise DataError(f"no loader for the data set {config.name!r}")
    if splits.classes != num_classes:
        raise DataError(f"the data set has {splits.classes} classes, model.num_classes is {num_classes}")
    return splits


class _Transformed(Dataset[tuple[Tensor, int]]):
    """Tensors in memory, each passed through a transform when taken."""

    def __init__(self, images: Tensor, labels: Tensor, transform: v2.Transform | None) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), int(self.labels[index])


def _digits(config: DigitsConfig) -> Splits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    images = torch.nn.functional.interpolate(
        images, size=(config.size, config.size), mode="bilinear", align_corners=False
    )
    mean, std = 0.3053, 0.3760  # of the 8x8 pixels, from 0 to 1
    images = ((images - mean) / std).expand(-1, 3, -1, -1).contiguous()
    train, test = train_test_split(np.arange(len(labels)), test_size=DIGITS_SHARE_TEST, stratify=labels, random_state=0)
    if config.per_class is not None:
        train = _some_of_each_class(train, labels[train], config.per_class, config.subset_seed)
    y = torch.from_numpy(labels).long()
    shift = v2.RandomCrop(config.size, padding=config.pad, fill=-mean / std) if config.pad else None
    return Splits(_Transformed(images[train], y[train], shift), _Transformed(images[test], y[test], None), 10)


def _some_of_each_class(
    places: NDArray[np.int64], labels: NDArray[np.int64], count: int, seed: int
) -> NDArray[np.int64]:
    """Return ``count`` of ``places`` for each of their ``labels``, in their old order."""
    generator = np.random.Generator(np.random.PCG64(seed))
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise DataError(f"per_class is {count}, the training set has {len(members)} images of class {label}")
        chosen.append(generator.permutation(members)[:count])
    some: NDArray[np.int64] = places[np.sort(np.concatenate(chosen))]
    return some


def _cifar(config: CifarConfig) -> Splits:
    hundred = config.name == "cifar100"
    cls = datasets.CIFAR100 if hundred else datasets.CIFAR10
    inner = "cifar-100-python" if hundred else "cifar-10-batches-py"
    root = Path(os.path.expanduser(config.root))
    mean, std = _CIFAR100 if hundred else _CIFAR10
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    augment: list[v2.Transform] = [v2.RandomCrop(32, padding=config.pad)] if config.pad else []
    if config.flip:
        augment.append(v2.RandomHorizontalFlip())
    try:
        train = cls(str(root), train=True, transform=v2.Compose([*augment, *to_tensor]))
        test = cls(str(root), train=False, transform=v2.Compose(to_tensor))
    except (RuntimeError, OSError, EOFError) as error:
        raise DataError(
            f"no intact {config.name} in {root}: it should hold the folder {inner} of the python version, with "
            f"{'train, test and meta' if hundred else 'data_batch_1 to data_batch_5, test_batch and batches.meta'}"
            f" ({one_line(error)})"
        ) from error
    return Splits(train, test, 100 if hundred else 10)


def _open_picture(path: str) -> Any:
    try:
        return default_loader(path)
    except Exception as error:
        raise DataError(f"{path}: not a picture, or damaged: {one_line(error)}") from error


def _image_folder(config: ImageFolderConfig) -> Splits:
    root = Path(os.path.expanduser(config.root))
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*_IMAGENET)]
    resize = v2.Resize(config.resize or round(config.crop * 256 / 224), antialias=True)
    flip: list[v2.Transform] = [v2.RandomHorizontalFlip()] if config.flip else []
    # the paper crops at a random place of the resized image, without a change of scale (section 3.4)
    training = v2.Compose([resize, v2.RandomCrop(config.crop, pad_if_needed=True), *flip, *to_tensor])
    testing = v2.Compose([resize, v2.CenterCrop(config.crop), *to_tensor])
    opened = []
    for part, transform in (("train", training), ("val", testing)):
        folder = root / part
        try:
            opened.append(datasets.ImageFolder(str(folder), transform=transform, loader=_open_picture))
        except OSError as error:
            raise DataError(
                f"no images in {folder}: it should hold one folder a class with its pictures, as ImageNet does "
                f"({one_line(error)})"
            ) from error
    train, test = opened
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"{root}: train and val differ in their classes: {', '.join(odd[:5])}")
    return Splits(train, test, len(train.classes))
