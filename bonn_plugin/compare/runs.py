"""One run's figures, read from the files of its folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bonn_plugin.checkpoint import RECIPE
from bonn_plugin.compare.method import method_of
from bonn_plugin.errors import BonnError
from bonn_plugin.export.bench import BITS, EAGER, Bench
from bonn_plugin.export.openvino import has_export, read_info
from bonn_plugin.recipe import Recipe, RecipeError, parse_recipe
from bonn_plugin.report import Accuracy, Precision, Report, Rule
from bonn_plugin.train import METRICS, STATE

Parsed = TypeVar("Parsed", Report, Bench)


class Run(BaseModel):
    """What a run reached and what it costs; None where its folder does not tell.

    Attributes:
        label: the folder's name, or its path where two have one name.
        folder: as it was given.
        name: the recipe's.
        network: the network's name.
        method: how it was made small, in short.
        task: ``classification`` or ``detection``.
        samples: of the test set.
        top1: in percent, of the network reloaded from the files; so are the other measurements.
        top5: in percent.
        map: COCO's mean average precision, from 0 to 1; ``map50`` and ``map75`` at one IoU.
        bits: that all stored tensors need.
        rate: float32 bits over bits now, counting the network's parameters.
        file_rate: bytes of the float32 file over bytes of model.safetensors.
        ops: BOPs / 64 + FLOPs for one image of ``input_shape``.
        input_shape: (C, H, W).
        latency_ms: of one image in 1 bit by OpenVINO, one thread.
        speedup: latency of the float32 network in torch eager over it, one thread.
        cpu: that was measured on.
        bench_shape: (C, H, W) that was measured with.
        exported: how many binarised layers the export computes with bits, of how many.
        seconds: of training, measurements included.
        seed: of training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    folder: str
    name: str
    network: str
    method: str | None
    task: str
    samples: int | None
    top1: float | None = None
    top5: float | None = None
    map: float | None = None
    map50: float | None = None
    map75: float | None = None
    bits: int
    rate: float
    file_rate: float
    ops: float
    input_shape: tuple[int, ...]
    latency_ms: float | None = None
    speedup: float | None = None
    cpu: str | None = None
    bench_shape: tuple[int, ...] | None = None
    exported: tuple[int, int] | None = None
    seconds: float | None = None
    seed: int | None = None

    @property
    def headline(self) -> float | None:
        """Top-1 in percent, or a detector's mAP."""
        return self.map if self.task == "detection" else self.top1


def read_runs(folders: Sequence[Path]) -> list[tuple[Run, Recipe | None]]:
    """Read each folder, and the recipe that it carries.

    Raises:
        BonnError: fewer than two folders, one folder twice, one that holds no finished run, or a file is damaged.
    """
    if len(folders) < 2:
        raise BonnError("bonn compare needs two runs or more: bonn compare RUN RUN ...")
    seen: dict[Path, Path] = {}
    for folder in folders:
        place = folder.resolve()
        if place in seen:
            same = f"{folder} is there twice" if folder == seen[place] else f"{seen[place]} and {folder} are one folder"
            raise BonnError(f"{same}: a run can't be compared with itself")
        seen[place] = folder
    names = Counter(place.name for place in seen)
    return [_read(folder, place.name if names[place.name] == 1 else str(folder)) for place, folder in seen.items()]


def _read(folder: Path, label: str) -> tuple[Run, Recipe | None]:
    report, recipe, bench = _report(folder), _recipe(folder), _bench(folder)
    measured = report.accuracy
    scores: dict[str, float] = {}
    if isinstance(measured, Accuracy):
        scores = {"top1": measured.packed_top1, "top5": measured.packed_top5}
    elif isinstance(measured, Precision):
        scores = {"map": measured.packed_map, "map50": measured.packed_map50, "map75": measured.packed_map75}
    task = "detection" if isinstance(measured, Precision) else "classification"
    if measured is None and recipe is not None:
        task = recipe.model.task
    own = eager = None
    if bench is not None:
        own, eager = bench.speed(BITS, 1), bench.speed(EAGER, 1)
    run = Run(
        label=label,
        folder=str(folder),
        name=report.name,
        network=report.network,
        method=None if recipe is None else method_of(recipe),
        task=task,
        samples=None if measured is None else measured.samples,
        **scores,
        bits=sum(row.needed_bits for row in report.roles),
        rate=next(row.rate for row in report.rates if row.rule == Rule.PARAMETERS),
        file_rate=report.files.rate,
        ops=report.operations.ops,
        input_shape=report.operations.input_shape,
        latency_ms=None if own is None else own.latency_ms,
        speedup=None if own is None or eager is None else eager.latency_ms / own.latency_ms,
        cpu=None if bench is None else bench.cpu,
        bench_shape=None if bench is None else bench.input_shape[1:],
        exported=_exported(folder),
        seconds=_seconds(folder),
        seed=None if recipe is None else recipe.training.seed,
    )
    return run, recipe


def _report(folder: Path) -> Report:
    place = folder / "report.json"
    if not folder.is_dir():
        raise BonnError(f"{folder}: no such folder; bonn compare takes folders that bonn compress has filled")
    if not place.exists():
        remedy = "it is not finished: bonn compress RECIPE --resume" if (folder / STATE).exists() else "not a run"
        raise BonnError(f"{folder}: no report.json, {remedy}")
    report = _parsed(Report, place, "bonn compress writes it")
    if not any(row.rule == Rule.PARAMETERS for row in report.rates):
        raise BonnError(f"{place}: damaged: it has no rate by {Rule.PARAMETERS}; bonn compress writes it")
    return report


def _bench(folder: Path) -> Bench | None:
    place = folder / "bench.json"
    return _parsed(Bench, place, f"bonn bench {folder} writes it") if place.exists() else None


def _parsed(kind: type[Parsed], place: Path, remedy: str) -> Parsed:
    try:
        return kind.model_validate_json(place.read_bytes())
    except OSError as error:
        raise BonnError(f"{place}: can't be read: {error.strerror}; {remedy}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BonnError(f"{place}: damaged{f', at {where}' if where else ''}: {first['msg']}; {remedy}") from None


def _recipe(folder: Path) -> Recipe | None:
    place = folder / RECIPE
    try:
        return parse_recipe(place.read_text(encoding="utf-8"), str(place))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BonnError(f"{place}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BonnError(f"{place}: damaged: not UTF-8") from None
    except RecipeError as error:
        raise BonnError(str(error.problems[0])) from None


def _exported(folder: Path) -> tuple[int, int] | None:
    if not has_export(folder):
        return None
    layers = read_info(folder).binary_layers
    return sum(path == "bits" for path in layers.values()), len(layers)


def _seconds(folder: Path) -> float | None:
    place = folder / METRICS
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
        return sum(float(json.loads(line)["seconds"]) for line in lines)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BonnError(f"{place}: can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise BonnError(f"{place}: not the metrics of a run, or damaged") from None


__all__ = ["Run", "read_runs"]
