"""The data sets that a recipe may name, by task."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from bonn_plugin.modifiers.base import FrozenModel

Few = Annotated[int, Field(ge=0, le=20)]
Share = Annotated[float, Field(gt=0, le=1)]

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The classes of Pascal VOC since 2007."""


class DataConfig(FrozenModel):
    """What all data sets have in common; ``name`` tells which one.

    Attributes:
        task: what they are for.
        workers: loader processes.
    """

    task: ClassVar[str] = "classification"

    name: str
    workers: Annotated[int, Field(ge=0, le=64)] = 0

    @property
    def image_size(self) -> int:
        """Height and width of the network's input, in pixels."""
        raise NotImplementedError

    @property
    def classes(self) -> int | None:
        """What ``num_classes`` must be, None where only the folder tells."""
        return None

    @property
    def corrupt_allowed(self) -> int:
        """How many training samples that can't be read are skipped."""
        return 0


class DigitsConfig(DataConfig):
    """scikit-learn's 1,797 handwritten digits, enlarged, three equal channels; a fixed stratified split.

    Attributes:
        size: height and width, in pixels.
        pad: random shifts by up to this many pixels while training.
        per_class: training images of each class; None takes all, about 135. The test set stays the same.
        subset_seed: which ones are taken.
    """

    name: Literal["digits"] = "digits"
    size: Annotated[int, Field(ge=8, le=512)] = 32
    pad: Annotated[int, Field(ge=0, le=64)] = 0
    per_class: Annotated[int, Field(ge=1)] | None = None
    subset_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def image_size(self) -> int:
        """See ``DataConfig``."""
        return self.size

    @property
    def classes(self) -> int | None:
        """See ``DataConfig``."""
        return 10


class DigitsClutterConfig(DataConfig):
    """One handwritten digit at a random place, size and colour on a crop of a photograph; both of scikit-learn's.

    Training and test images have different handwritten digits: three quarters and one quarter of them.

    Attributes:
        size: height and width, in pixels.
        train: training images.
        test: test images.
        scale: smallest and largest side of the digit, as a share of the image's.
        seed: from which the images are made.
    """

    name: Literal["digits_clutter"] = "digits_clutter"
    size: Annotated[int, Field(ge=8, le=256)] = 32
    train: Annotated[int, Field(ge=10, le=1_000_000)] = 4000
    test: Annotated[int, Field(ge=10, le=1_000_000)] = 1000
    scale: Annotated[tuple[Share, Share], Field(strict=False)] = (0.5, 1.0)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale [{self.scale[0]}, {self.scale[1]}]: the first is the smaller one")
        return self

    @property
    def image_size(self) -> int:
        """See ``DataConfig``."""
        return self.size

    @property
    def classes(self) -> int | None:
        """See ``DataConfig``."""
        return 10


class CifarConfig(DataConfig):
    """CIFAR from a folder in torchvision's layout.

    Attributes:
        root: the folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        pad: zero padding before the random 32x32 crop.
        flip: random horizontal flips.
    """

    name: Literal["cifar10", "cifar100"]
    root: Annotated[str, Field(min_length=1)]
    pad: Annotated[int, Field(ge=0, le=16)] = 4
    flip: bool = True

    @property
    def image_size(self) -> int:
        """See ``DataConfig``."""
        return 32

    @property
    def classes(self) -> int | None:
        """See ``DataConfig``."""
        return 10 if self.name == "cifar10" else 100


class ImageFolderConfig(DataConfig):
    """A folder in ImageNet's layout: ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``.

    Attributes:
        root: the folder that holds ``train`` and ``val``.
        resize: shorter side before cropping, in pixels; None is ``crop`` * 256 / 224.
        crop: height and width of the random crop in training and of the centre crop in evaluation.
        flip: random horizontal flips.
        max_corrupt: how many training pictures that can't be read are skipped; one more is an error.
    """

    name: Literal["imagefolder"] = "imagefolder"
    root: Annotated[str, Field(min_length=1)]
    resize: Annotated[int, Field(ge=8, le=4096)] | None = None
    crop: Annotated[int, Field(ge=8, le=4096)] = 224
    flip: bool = True
    max_corrupt: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0

    @property
    def image_size(self) -> int:
        """See ``DataConfig``."""
        return self.crop

    @property
    def corrupt_allowed(self) -> int:
        """See ``DataConfig``."""
        return self.max_corrupt


class DigitScenesConfig(DataConfig):
    """scikit-learn's handwritten digits at random places and scales on crops of its two photographs.

    Training and test scenes have different handwritten digits. Every scene follows from ``seed`` and its number.

    Attributes:
        size: height and width of a scene, in pixels.
        train: number of training scenes.
        test: number of test scenes.
        digits: fewest and most digits in a scene.
        scale: smallest and largest side of a digit, as a share of the scene's.
        one_class: boxes alone: every digit is of the one class ``digit``.
        seed: of the scenes.
    """

    task: ClassVar[str] = "detection"
    name: Literal["digit_scenes"] = "digit_scenes"
    size: Annotated[int, Field(ge=32, le=1024)] = 96
    train: Annotated[int, Field(ge=1, le=1_000_000)] = 1500
    test: Annotated[int, Field(ge=1, le=1_000_000)] = 300
    digits: Annotated[
        tuple[Annotated[int, Field(ge=0, le=20)], Annotated[int, Field(ge=1, le=20)]], Field(strict=False)
    ] = (1, 3)
    scale: Annotated[tuple[Share, Share], Field(strict=False)] = (0.25, 0.6)
    one_class: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def image_size(self) -> int:
        """See ``DataConfig``."""
        return self.size

    @property
    def classes(self) -> int | None:
        """See ``DataConfig``."""
        return 2 if self.one_class else 11

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for key in ("digits", "scale"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} [{low}, {high}]: the first is the smaller one")
        return self


class PhotosConfig(DataConfig):
    """What the data sets of photographs have in common: the detector scales each to its own size.

    Attributes:
        root: the folder that holds the data set.
        flip: random horizontal flips while training.
    """

    task: ClassVar[str] = "detection"
    root: Annotated[str, Field(min_length=1)]
    flip: bool = True

    @property
    def image_size(self) -> int:
        """Side of the square images that operations are counted for, before the detector scales them."""
        return 256


class VocConfig(PhotosConfig):
    """Pascal VOC from a folder in its own layout, ``VOCdevkit/VOC<year>``.

    Attributes:
        root: the folder that holds ``VOCdevkit``.
        year: of the challenge.
        train: the image set to train on, a file in ``ImageSets/Main``.
        test: the image set to measure on.
        names: the classes, in the order of their labels from 1; VOC's twenty where there are none.
    """

    name: Literal["voc"] = "voc"
    year: Literal[2007, 2008, 2009, 2010, 2011, 2012] = 2012
    train: Literal["train", "trainval"] = "train"
    test: Literal["val", "test"] = "val"
    names: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = VOC_CLASSES

    @property
    def classes(self) -> int | None:
        """See ``DataConfig``."""
        return len(self.names) + 1


class CocoConfig(PhotosConfig):
    """COCO from a folder in its own layout.

    ``num_classes`` must be larger than the largest category id: 91 for COCO's 80 categories, whose ids reach 90.

    Attributes:
        root: the folder that holds ``train<year>``, ``val<year>`` and ``annotations``, where
            ``instances_train<year>.json`` and ``instances_val<year>.json`` are.
        year: in these names.
    """

    name: Literal["coco"] = "coco"
    year: Annotated[int, Field(ge=1000, le=9999)] = 2017


DATA_CONFIGS: dict[str, type[DataConfig]] = {
    "digits": DigitsConfig,
    "digits_clutter": DigitsClutterConfig,
    "cifar10": CifarConfig,
    "cifar100": CifarConfig,
    "imagefolder": ImageFolderConfig,
    "digit_scenes": DigitScenesConfig,
    "voc": VocConfig,
    "coco": CocoConfig,
}
