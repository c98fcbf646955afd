"""What follows from several runs: the best of each figure, the Pareto fronts, spreads over seeds, what does not fit."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev

from pydantic import BaseModel, ConfigDict

from bonn_plugin.compare.columns import columns
from bonn_plugin.compare.method import settings_of
from bonn_plugin.compare.pareto import pareto_front
from bonn_plugin.compare.runs import Run, read_runs
from bonn_plugin.errors import BonnError
from bonn_plugin.recipe import Recipe

TRAINING_ONLY = frozenset({"workers", "flip", "pad", "per_class", "subset_seed", "max_corrupt", "train"})
"""Settings of data sets that leave the test set as it is."""
OF_THE_SIZE = frozenset({"size", "crop"})
"""Settings of data sets that the network's input shows."""
COSTS = ("bits", "ops")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Spread(_Part):
    """Mean and standard deviation (of a sample: n - 1) of one figure."""

    mean: float
    deviation: float


class SeedGroup(_Part):
    """Runs whose recipes differ in ``training.seed`` alone; figures by the fields of ``Run``, those that all have."""

    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    spreads: dict[str, Spread]


class Setting(_Part):
    """A setting in which the recipes differ: its values in the order of the runs, None where there is no such key."""

    key: str
    values: tuple[str | None, ...]


class Comparison(_Part):
    """Everything that ``bonn compare`` shows.

    Attributes:
        task: of all runs.
        runs: in the order in which they were given; differences are to the first.
        best: labels of the best runs by field of ``Run``; none where all are equal or only one has a figure.
        fronts: labels of the runs on the Pareto front of accuracy over ``bits`` and over ``ops``.
        groups: runs that differ by seed alone.
        settings: in which the recipes differ, without the seed where nothing else differs.
        warnings: why figures may not be comparable.
        notes: what is missing, and how to get it.
    """

    task: str
    runs: tuple[Run, ...]
    best: dict[str, tuple[str, ...]]
    fronts: dict[str, tuple[str, ...]]
    groups: tuple[SeedGroup, ...]
    settings: tuple[Setting, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read runs from their folders and compare them.

    Raises:
        BonnError: as ``read_runs``; or the runs are of different tasks.
    """
    pairs = read_runs(folders)
    runs = [run for run, _ in pairs]
    tasks = _by((run.label, run.task) for run in runs)
    if len(tasks) > 1:
        found = "; ".join(f"{task}: {', '.join(labels)}" for task, labels in tasks.items())
        raise BonnError(f"runs of different tasks can't be compared: {found}")
    return Comparison(
        task=runs[0].task,
        runs=tuple(runs),
        best=_best(runs),
        fronts={cost: _front(runs, cost) for cost in COSTS},
        groups=tuple(_groups(pairs)),
        settings=tuple(_settings([recipe for _, recipe in pairs])),
        warnings=tuple(_warnings(pairs)),
        notes=tuple(_notes(runs)),
    )


def _best(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    best = {}
    for column in columns(runs[0].task):
        values = {run.label: value for run in runs if (value := column.of(run)) is not None}
        if len(set(values.values())) > 1:
            top = max(values.values()) if column.more_is_better else min(values.values())
            best[column.field] = tuple(label for label, value in values.items() if value == top)
    return best


def _front(runs: Sequence[Run], cost: str) -> tuple[str, ...]:
    measured = [(run.label, float(getattr(run, cost)), run.headline) for run in runs]
    points = [(label, x, y) for label, x, y in measured if y is not None]
    on_front = pareto_front([(x, y) for _, x, y in points])
    return tuple(label for (label, _, _), on in zip(points, on_front, strict=True) if on)


def _groups(pairs: Sequence[tuple[Run, Recipe | None]]) -> Iterator[SeedGroup]:
    alike: dict[str, list[tuple[Run, int]]] = {}
    for run, recipe in pairs:
        if recipe is not None:
            unseeded = recipe.training.model_copy(update={"seed": 0})
            key = recipe.model_copy(update={"training": unseeded, "name": "any"}).fingerprint
            alike.setdefault(key, []).append((run, recipe.training.seed))
    for members in alike.values():
        seeds = tuple(seed for _, seed in members)
        if len(set(seeds)) > 1:
            spreads = {}
            for column in columns(members[0][0].task):
                values = [value for run, _ in members if (value := column.of(run)) is not None]
                if len(values) == len(members):
                    spreads[column.field] = Spread(mean=fmean(values), deviation=stdev(values))
            yield SeedGroup(labels=tuple(run.label for run, _ in members), seeds=seeds, spreads=spreads)


def _settings(recipes: Sequence[Recipe | None]) -> Iterator[Setting]:
    known = [None if recipe is None else settings_of(recipe) for recipe in recipes]
    for key in dict.fromkeys(key for settings in known if settings is not None for key in settings):
        values = tuple(None if settings is None else settings.get(key) for settings in known)
        told = [value for settings, value in zip(known, values, strict=True) if settings is not None]
        # a modifier that some recipes lack is told by its type, not by each of its settings
        if len(set(told)) > 1 and (key.endswith(".type") or len(set(told) - {None}) > 1):
            yield Setting(key=key.removesuffix(".type"), values=values)


def _warnings(pairs: Sequence[tuple[Run, Recipe | None]]) -> Iterator[str]:
    runs = [run for run, _ in pairs]
    known = [(run.label, recipe) for run, recipe in pairs if recipe is not None]
    unknown = [run.label for run, recipe in pairs if recipe is None]
    if unknown:
        yield f"no recipe.yaml, so the data set is not known: {', '.join(unknown)}"
    yield from _differences("data sets", ((label, recipe.data.name) for label, recipe in known))
    if len({recipe.data.name for _, recipe in known}) == 1:
        tests = {label: _test_settings(recipe) for label, recipe in known}
        for key in dict.fromkeys(key for settings in tests.values() for key in settings):
            values = [(label, settings[key]) for label, settings in tests.items()]
            yield from _differences(f"test sets, data.{key}", values)
    samples = [(run.label, f"{run.samples:,}") for run in runs if run.samples is not None]
    yield from _differences("sizes of the test set", samples)
    yield from _differences("input sizes", ((run.label, _shape(run.input_shape)) for run in runs))
    benched = [run for run in runs if run.latency_ms is not None]
    yield from _differences("CPUs, so latencies do not compare", ((run.label, str(run.cpu)) for run in benched))
    for labels in _by((label, recipe.fingerprint) for label, recipe in known).values():
        if len(labels) > 1:
            yield f"one recipe and one seed, so not independent: {', '.join(labels)}"


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    unmeasured = [run.label for run in runs if run.headline is None]
    if unmeasured:
        yield f"accuracy not measured, so on no front: {', '.join(unmeasured)}"
    slow = [run for run in runs if run.latency_ms is None]
    if slow:
        yield f"speed not measured: {', '.join(run.label for run in slow)}; {_command('bench', slow)}"
    for run in runs:
        if run.task == "classification" and run.bench_shape not in (None, run.input_shape):
            yield f"{run.label}: latency is for {_shape(run.bench_shape or ())}, OPs are for {_shape(run.input_shape)}"
    if any(run.task == "detection" and run.latency_ms is not None for run in runs):
        yield "the latency is that of backbone and pyramid: a detector's scaling and heads run in torch"
    inside = [run for run in runs if run.exported is None]
    if inside:
        yield f"no export: {', '.join(run.label for run in inside)}; {_command('export', inside)}"


def _command(name: str, runs: Sequence[Run]) -> str:
    """Return the line for a shell that does this for each of the runs."""
    folders = [shlex.quote(run.folder) for run in runs]
    if len(folders) == 1:
        return f"bonn {name} {folders[0]}"
    return f'for run in {" ".join(folders)}; do bonn {name} "$run"; done'


def _test_settings(recipe: Recipe) -> dict[str, str]:
    """Return the settings of the data that say which test set it is."""
    settings = recipe.data.model_dump(mode="json")
    left_out = TRAINING_ONLY | OF_THE_SIZE | {"name"}
    if recipe.data.name != "imagefolder":  # elsewhere the folder is a place, not what lies in it
        left_out |= {"root"}
    return {key: str(value) for key, value in settings.items() if key not in left_out}


def _by(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group labels by what is said of them, in the order in which that comes."""
    groups: dict[str, list[str]] = {}
    for label, value in pairs:
        groups.setdefault(value, []).append(label)
    return groups


def _differences(what: str, pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    groups = _by(pairs)
    if len(groups) > 1:
        parts = (f"{value} ({', '.join(labels)})" for value, labels in groups.items())
        yield f"different {what}: {'; '.join(parts)}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


__all__ = ["Comparison", "SeedGroup", "Setting", "Spread", "compare_runs"]
