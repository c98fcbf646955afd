"""Pascal VOC from a folder in its own layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.datasets import VOCDetection

from bonn_plugin.data.targets import Annotation, Photos, Target, make_target
from bonn_plugin.errors import DataError, one_line
from bonn_plugin.recipe import VocConfig


class Voc:
    """One image set, through torchvision.

    "Difficult" objects are ignored, as in the challenge. Pixels are counted from 1 in the files, and both of a box's
    borders belong to it.

    Args:
        config: see ``VocConfig``.
        part: the image set.
        photos: transforms.
    """

    def __init__(self, config: VocConfig, part: str, photos: Photos) -> None:
        root = Path(os.path.expanduser(config.root))
        year = str(config.year)
        base = root / ("TrainVal/VOCdevkit" if year == "2011" else "VOCdevkit") / f"VOC{year}"  # as it was packed
        listed = base / "ImageSets" / "Main" / f"{part}.txt"
        if not base.is_dir():
            years = sorted(place.name for place in base.parent.glob("VOC*")) if base.parent.is_dir() else []
            there = f"; there is {', '.join(years)}" if years else ""
            raise DataError(f"no Pascal VOC of {year} in {root}: the folder {base} is missing{there}")
        if not listed.is_file():
            sets = sorted(place.stem for place in listed.parent.glob("*.txt") if "_" not in place.stem)
            there = f"; there is {', '.join(sets)}" if sets else ""
            raise DataError(f"{listed}: no image set {part!r}{there}")
        if part == "test" and year != "2007":
            raise DataError(f"Pascal VOC of {year} has no annotations of 'test': take 'val'")
        self.data = VOCDetection(str(root), year=year, image_set=part)
        for file in (*self.data.images, *self.data.annotations):
            if not os.path.isfile(file):
                raise DataError(f"{file}: missing; {listed} names it")
        if not len(self.data):
            raise DataError(f"{listed}: names no image")
        self.labels = {name: i + 1 for i, name in enumerate(config.names)}
        self.photos = photos

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        try:
            image, tree = self.data[index]
        except IndexError:
            raise
        except Exception as error:
            place = f"{self.data.images[index]} or {self.data.annotations[index]}"
            raise DataError(f"{place}: damaged: {one_line(error)}") from error
        return self.photos(image, make_target(self._objects(tree, self.data.annotations[index]), index))

    def _objects(self, tree: Any, file: str) -> list[Annotation]:
        found = []
        try:
            for entry in tree["annotation"].get("object", []):
                name = entry["name"]
                if name not in self.labels:
                    raise DataError(f"{file}: unknown class {name!r}: name the folder's classes in data.names")
                corners = [float(entry["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")]
                box = (corners[0] - 1, corners[1] - 1, corners[2], corners[3])
                found.append(Annotation(box, self.labels[name], entry.get("difficult", "0") == "1"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{file}: not an annotation of Pascal VOC: {one_line(error)}") from error
        return found


__all__ = ["Voc"]
