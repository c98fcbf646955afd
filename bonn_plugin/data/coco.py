"""COCO from a folder in its own layout."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.datasets import CocoDetection

from bonn_plugin.data.targets import Annotation, Photos, Target, make_target
from bonn_plugin.errors import DataError, one_line
from bonn_plugin.recipe import CocoConfig


class Coco:
    """The training or the validation set, through torchvision and pycocotools.

    Crowds are ignored, as in the challenge. Images without objects stay: all of them is background.

    Args:
        config: see ``CocoConfig``.
        part: ``"train"`` or ``"val"``.
        photos: transforms.

    Attributes:
        names: the categories by id.
    """

    def __init__(self, config: CocoConfig, part: str, photos: Photos) -> None:
        root = Path(os.path.expanduser(config.root))
        folder = root / f"{part}{config.year}"
        self.file = root / "annotations" / f"instances_{part}{config.year}.json"
        if not root.is_dir():
            raise DataError(f"no COCO in {root}: no such folder")
        if not folder.is_dir():
            raise DataError(f"no COCO of {config.year} in {root}: the folder {folder.name} is missing")
        if not self.file.is_file():
            raise DataError(f"{self.file}: missing: the annotations of {folder.name}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints how long it takes
                self.data = CocoDetection(str(folder), str(self.file))
            self.names = {int(c["id"]): str(c["name"]) for c in self.data.coco.dataset["categories"]}
        except ImportError as error:
            raise DataError("COCO needs pycocotools: pip install 'bonn_plugin[detection]'") from error
        except Exception as error:
            raise DataError(
                f"{self.file}: not annotations of COCO: {type(error).__name__}: {one_line(error)}"
            ) from error
        if not len(self.data):
            raise DataError(f"{self.file}: names no image")
        for entry in self.data.coco.anns.values():
            if entry.get("category_id") not in self.names:
                raise DataError(
                    f"{self.file}: annotation {entry.get('id')} has the category {entry.get('category_id')}, "
                    "which is not among 'categories'"
                )
        self.photos = photos

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image_id = self.data.ids[index]
        try:
            image, entries = self.data[index]
        except Exception as error:
            name = self.data.coco.imgs[image_id].get("file_name")
            raise DataError(f"{Path(self.data.root) / str(name)}: missing or damaged: {one_line(error)}") from error
        return self.photos(image, make_target([self._object(entry) for entry in entries], image_id))

    def _object(self, entry: Any) -> Annotation:
        try:
            x, y, width, height = (float(value) for value in entry["bbox"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.file}: annotation {entry.get('id')} has no box: {one_line(error)}") from error
        return Annotation((x, y, x + width, y + height), int(entry["category_id"]), bool(entry.get("iscrowd", 0)))


__all__ = ["Coco"]
