"""A small CIFAR-10 in the files of the original."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

PER_FILE = 4


def cifar_pixels(part: int) -> np.ndarray[Any, Any]:
    """Return the (PER_FILE, 3072) bytes of the images of a file."""
    return np.random.default_rng(part).integers(0, 256, (PER_FILE, 3072), np.uint8)


def write_pickle(file: Path, content: object) -> str:
    """Write as the originals are, in protocol 2, and return the file's MD5 sum."""
    data = pickle.dumps(content, protocol=2)
    file.write_bytes(data)
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the six files and tell torchvision their MD5 sums; return root."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    sums = []
    for part, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = [(part + i) % 10 for i in range(PER_FILE)]
        content = {"batch_label": name, "labels": labels, "data": cifar_pixels(part), "filenames": ["x"] * PER_FILE}
        sums.append([name, write_pickle(folder / name, content)])
    meta = {"label_names": [f"class{i}" for i in range(10)], "num_cases_per_batch": PER_FILE, "num_vis": 3072}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    md5 = write_pickle(folder / "batches.meta", meta)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return root
