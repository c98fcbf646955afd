"""YAML to ``Recipe``: all mistakes of a file at once, each with its place and a remedy."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from bonn_plugin.modifiers import near_names, registered_modifiers
from bonn_plugin.modifiers.base import ModifierConfig
from bonn_plugin.recipe.data import DATA_CONFIGS, DataConfig
from bonn_plugin.recipe.model import MODEL_CONFIGS, NetworkConfig
from bonn_plugin.recipe.positions import (
    LONGEST_RECIPE,
    Path,
    Problem,
    RecipeError,
    SourceMap,
    parse_scalar,
    parse_yaml,
    plain_scalar,
)
from bonn_plugin.recipe.schema import Recipe, RecipeName, TrainingConfig

M = TypeVar("M", bound=BaseModel)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: the YAML file.
        overrides: ``"training.epochs=2"``-like changes, validated with the rest. List entries are named by
            number or, for modifiers, by type: ``"modifiers.kernel_loss.lambda=1e-3"``.

    Raises:
        RecipeError: the file can't be read or has mistakes; one line each with file:line:column.
    """
    source = os.fspath(path)
    try:
        with FilePath(path).open(encoding="utf-8") as file:
            text = file.read(LONGEST_RECIPE + 1)
    except UnicodeDecodeError:
        raise RecipeError([Problem(source, 0, 0, "not a text file in UTF-8")]) from None
    except OSError as error:
        raise RecipeError([Problem(source, 0, 0, f"can't read the recipe: {error.strerror}")]) from None
    return parse_recipe(text, source, overrides)


def parse_recipe(text: str, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Like ``load_recipe``, from text."""
    raw, places = parse_yaml(text, source)
    raw, places = _override(raw, places, overrides)
    return _Validator(places).recipe(raw)


def dump_recipe(recipe: Recipe) -> str:
    """Return YAML that ``parse_recipe`` reads back to an equal recipe."""
    plain = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    # what tells the kinds apart is a default in each of them
    plain = {"version": recipe.version, **plain, "data": {"name": recipe.data.name, **plain["data"]}}
    if recipe.modifiers:
        entries = zip(recipe.modifiers, plain["modifiers"], strict=True)
        plain["modifiers"] = [{"type": config.type, **entry} for config, entry in entries]
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Writes what the loader of recipes reads back: strings that look like numbers are quoted."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    text = text if "." in text else text.replace("e", ".0e")  # PyYAML tags 1e-05, which YAML 1.1 takes for a word
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _represent_str(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = None if isinstance(plain_scalar(value), str) and value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_str)


class _Validator:
    """Collects the problems of one recipe."""

    def __init__(self, places: SourceMap) -> None:
        self.places = places
        self.problems: list[Problem] = []
        self.meant: tuple[ModifierConfig, ...] = ()

    def recipe(self, raw: Any) -> Recipe:
        if not isinstance(raw, dict):
            self.add((), "a recipe is a mapping of version, name, model, data, training and modifiers")
            raise RecipeError(self.problems)
        known = list(Recipe.model_fields)
        unknown = [key for key in raw if key not in known]
        for key in unknown:
            self.add((key,), f"unknown key {key!r} in the recipe.{near_names(key, known)}", at_key=True)
        for key in ("version", "name", "model", "data", "training"):
            if key not in raw and not _meant(key, unknown, known):
                self.add((), f"missing key {key!r} in the recipe")
        if "version" in raw and (type(raw["version"]) is not int or raw["version"] != 1):
            self.add(("version",), f"recipe version {raw['version']!r} is not known: this is version 1")
        model = self.model(raw)
        training = self.section(TrainingConfig, raw, "training")
        data = self.data(raw)
        modifiers = self.modifiers(raw)
        if training:
            self.collect(("training",), training.problems())
            for i, config in modifiers.items():
                self.collect(("modifiers", i), config.problems(training.epochs, self.meant[:i]))
        for i, config in modifiers.items():
            self.collect(("modifiers", i), (((), message) for message in config.order_problems(self.meant[:i])))
        if model:
            self.collect(("model",), model.problems())
            for i, config in modifiers.items():
                reason = config.refusal(model.task)
                if reason is not None:
                    self.add(("modifiers", i), reason)
        if model and data and data.task != model.task:
            self.add(("data", "name"), f"{data.name!r} is a data set for {data.task}, the model's task is {model.task}")
        elif model and data and data.classes is not None and data.classes != model.num_classes:
            self.add(
                ("model", "num_classes"),
                f"num_classes is {model.num_classes}, the data set {data.name!r} has {data.classes} classes"
                + (", the background included" if data.task == "detection" else ""),
            )
        name = self.validate(RecipeName, {"name": raw["name"]}, ()) if "name" in raw else None
        recipe = None
        if model and data and training and name:
            values = {
                "name": name.name,
                "model": model,
                "data": data,
                "training": training,
                "modifiers": tuple(modifiers.values()),
            }
            recipe = self.validate(Recipe, values, ())
        if self.problems or recipe is None:
            raise RecipeError(self.problems)
        recipe._source = self.places
        return recipe

    def section(self, cls: type[M], raw: dict[str, Any], key: str) -> M | None:
        return self.validate(cls, raw[key], (key,)) if key in raw else None

    def model(self, raw: dict[str, Any]) -> NetworkConfig | None:
        """Validate the network as one of its task; without one it is a classifier."""
        if "model" not in raw:
            return None
        said = raw["model"].get("task", "classification") if isinstance(raw["model"], dict) else "classification"
        if not isinstance(said, str) or said not in MODEL_CONFIGS:
            near = near_names(str(said), list(MODEL_CONFIGS)) or f" One of {', '.join(MODEL_CONFIGS)}"
            self.add(("model", "task"), f"unknown task {said!r}.{near}")
            return None
        return self.validate(MODEL_CONFIGS[said], raw["model"], ("model",))

    def data(self, raw: dict[str, Any]) -> DataConfig | None:
        cls = self.chosen(raw.get("data"), ("data",), "name", DATA_CONFIGS, "data set") if "data" in raw else None
        return self.validate(cls, raw["data"], ("data",)) if cls else None

    def modifiers(self, raw: dict[str, Any]) -> dict[int, ModifierConfig]:
        """Return the valid entries; in ``meant`` are all, so that a broken one is not told again by the next."""
        entries = raw.get("modifiers", [])
        if not isinstance(entries, list):
            self.add(("modifiers",), "modifiers is a list of mappings, each with a type")
            return {}
        classes = {name: registration.config for name, registration in registered_modifiers().items()}
        configs = {}
        for i, entry in enumerate(entries):
            cls = self.chosen(entry, ("modifiers", i), "type", classes, "modifier")
            config = self.validate(cls, entry, ("modifiers", i), entry["type"]) if cls else None
            if config is not None:
                configs[i] = config
            else:
                said = str(entry.get("type")) if isinstance(entry, dict) else str(entry)
                near = difflib.get_close_matches(said, classes, n=1)
                config = ModifierConfig(type=near[0] if near else said)
            self.meant = (*self.meant, config)
        return configs

    def chosen(self, raw: Any, path: Path, key: str, classes: Mapping[str, type[M]], what: str) -> type[M] | None:
        """Return the class that ``raw[key]`` names, or report why there is none."""
        names = sorted(classes)
        if not isinstance(raw, dict):
            self.add(path, f"a {what} is a mapping with the key {key!r}")
        elif key not in raw:
            self.add(path, f"missing key {key!r} of a {what}: one of {', '.join(names)}")
        elif raw[key] not in names:
            hint = near_names(str(raw[key]), names) or f" One of {', '.join(names)}"
            self.add((*path, key), f"unknown {what} {raw[key]!r}.{hint}")
        else:
            return classes[raw[key]]
        return None

    def validate(self, cls: type[M], raw: Any, path: Path, called: str = "") -> M | None:
        if not isinstance(raw, (dict, BaseModel)):
            self.add(path, f"{called or path[-1]} is a mapping")
            return None
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            # pydantic names the branch of a union in the path: the recipe has no such level
            found = [
                (_existing(raw, detail["loc"]), detail)
                for detail in error.errors(include_url=False, include_context=True)
            ]
            for inner, detail in found:
                if detail["type"] == "too_short" and any(i[:-1] == inner for i, _ in found):
                    continue  # a list looks empty whose entries are wrong
                if detail["type"] == "missing":
                    unknown = [str(i[-1]) for i, d in found if d["type"] == "extra_forbidden" and i[:-1] == inner[:-1]]
                    if _meant(str(inner[-1]), unknown, _keys(cls, inner[:-1])):
                        continue
                self.detail(cls, path, inner, detail, called)
            return None

    def detail(self, cls: type[BaseModel], path: Path, inner: Path, detail: Any, called: str) -> None:
        full = (*path, *inner)
        where = called or ".".join(str(part) for part in full[:-1]) or "the recipe"
        if detail["type"] == "extra_forbidden":
            key = str(inner[-1])
            where = where if len(inner) == 1 else str(full[-2])
            self.add(full, f"unknown key {key!r} in {where}.{near_names(key, _keys(cls, inner[:-1]))}", at_key=True)
        elif detail["type"] == "missing":
            where = where if len(inner) == 1 else str(full[-2])
            self.add(full[:-1], f"missing key {str(inner[-1])!r} in {where}")
        else:
            message = detail["msg"].replace("Value error, ", "has a wrong entry: ")
            message = re.sub(r"^\w+ should ", "must ", message)
            near = ""
            if detail["type"] == "literal_error" and isinstance(detail["input"], str):
                options = [o.strip("' ") for o in str(detail["ctx"]["expected"]).replace(" or ", ", ").split(",")]
                near = "." + near_names(detail["input"], options) if near_names(detail["input"], options) else ""
            at_key = bool(inner) and inner[-1] == "[key]"
            what = ".".join(str(p) for p in inner if p != "[key]") or str(path[-1])
            got = "" if detail["type"] == "value_error" or ", not " in message else f", not {_short(detail['input'])}"
            self.add(full[:-1] if at_key else full, f"{what} {message}{got}{near}", at_key=at_key)

    def collect(self, path: Path, found: Iterator[tuple[Path, str]]) -> None:
        for inner, message in found:
            self.add((*path, *inner), message)

    def add(self, path: Path, message: str, *, at_key: bool = False) -> None:
        self.problems.append(self.places.problem(path, message, at_key=at_key))


def _existing(raw: Any, loc: tuple[str | int, ...]) -> Path:
    """Drop from pydantic's location the parts that name union branches."""
    path: list[str | int] = []
    here = raw
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if part == "[key]":
            pass
        elif isinstance(here, dict) and (part in here or (last and not path)):
            here = here.get(part)
        elif isinstance(here, dict) and last:
            here = None
        elif isinstance(here, list) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        else:
            continue
        path.append(part)
    return tuple(path)


def _keys(cls: type[BaseModel], path: Path) -> list[str]:
    """Return the keys that the settings at ``path`` below ``cls`` know."""
    for part in path:
        field = cls.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        cls = annotation
    return [field.alias or name for name, field in cls.model_fields.items()]


def _meant(missing: str, unknown: Sequence[str], known: Sequence[str]) -> bool:
    """Return whether one of the ``unknown`` keys is ``missing`` misspelt: that is one mistake, not two."""
    return any(repr(missing) in near_names(key, known) for key in unknown)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _override(raw: Any, places: SourceMap, overrides: Sequence[str]) -> tuple[Any, SourceMap]:
    if not isinstance(raw, dict):  # the validator says so
        return raw, places
    raw = copy.deepcopy(raw)
    overridden: dict[Path, str] = {}
    problems: list[Problem] = []
    for override in overrides:
        source = f"--set {override}"
        name, equals, text = override.partition("=")
        try:
            if not equals or not name.strip():
                raise RecipeError([Problem(source, 0, 0, "needs the form KEY=VALUE, such as training.epochs=2")])
            path = _set(raw, name.strip().split("."), parse_scalar(text), source)
            overridden = {old: s for old, s in overridden.items() if old[: len(path)] != path}
            overridden[path] = source
        except RecipeError as error:
            problems += [Problem(source, 0, 0, p.message) for p in error.problems]
    if problems:
        raise RecipeError(problems)
    return raw, SourceMap(places.source, places.values, places.keys, overridden)


def _set(raw: Any, parts: list[str], value: Any, source: str) -> Path:
    here = raw
    path: list[str | int] = []
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        key: str | int = part
        if isinstance(here, list):
            key = _list_index(here, part, source)
        elif not isinstance(here, dict):
            raise RecipeError([Problem(source, 0, 0, f"{'.'.join(parts[:depth])} has no keys")])
        path.append(key)
        if last:
            here[key] = value
        else:
            if isinstance(here, dict) and key not in here:
                here[str(key)] = {}
            here = here[key]
    return tuple(path)


def _list_index(entries: list[Any], part: str, source: str) -> int:
    if part.isdecimal():
        if int(part) >= len(entries):
            raise RecipeError([Problem(source, 0, 0, f"there is no entry {part}: the list has {len(entries)}")])
        return int(part)
    types = [entry.get("type") if isinstance(entry, dict) else None for entry in entries]
    found = [i for i, kind in enumerate(types) if kind == part]
    if len(found) != 1:
        names = [str(kind) for kind in types if kind is not None]
        message = f"{len(found)} modifiers have the type {part!r}"
        hint = ": name one by its number" if found else f".{near_names(part, names)}"
        raise RecipeError([Problem(source, 0, 0, message + hint)])
    return found[0]
