"""YAML that knows where each value stood.

Scalars follow YAML 1.2's core schema: ``1e-4`` is a float and ``no`` a string. Duplicate keys, aliases,
tags and a second document are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from bonn_plugin.errors import BonnError

Path = tuple[str | int, ...]
LONGEST_RECIPE = 100_000
DEEPEST_RECIPE = 16

_INT = re.compile(r"[-+]?[0-9]{1,18}|0x[0-9a-fA-F]{1,15}|0o[0-7]{1,20}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_SPECIAL = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake in a recipe; ``line`` and ``column`` count from 1 and are 0 where there is none."""

    source: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}:{self.column}" if self.line else self.source
        return f"{place}: {self.message}"


class RecipeError(BonnError):
    """All the mistakes of a recipe, one line each."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(set(problems))
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True)
class SourceMap:
    """Where keys and values of a recipe stood. A path leads from the top, such as ``("modifiers", 0, "nu")``."""

    source: str = "recipe"
    values: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    keys: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    overridden: Mapping[Path, str] = field(default_factory=dict)

    def problem(self, path: Path, message: str, *, at_key: bool = False) -> Problem:
        """Place ``message`` at ``path``, or at the nearest enclosing value that has a place."""
        for length in range(len(path), -1, -1):
            head = path[:length]
            if head in self.overridden:
                return Problem(self.overridden[head], 0, 0, message)
            places = self.keys if at_key and length == len(path) else self.values
            if head in places:
                return Problem(self.source, *places[head], message)
            made = next((by for at, by in self.overridden.items() if head and at[:length] == head), None)
            if made is not None:  # an override of something deeper made it
                return Problem(made, 0, 0, message)
        return Problem(self.source, 0, 0, message)


class _Places:
    """Turns nodes into plain values and notes the place of each."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values: dict[Path, tuple[int, int]] = {}
        self.keys: dict[Path, tuple[int, int]] = {}
        self.problems: list[Problem] = []

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.values[path] = _place(node)
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
                if key is None:
                    self._report(key_node, "a key must be a word")
                elif _CONTROL.search(key):
                    self._report(key_node, f"{key!r} holds a control character")
                elif key in result:
                    self._report(key_node, f"duplicate key {key!r}")
                else:
                    self.keys[(*path, key)] = _place(key_node)
                    result[key] = self.build(value_node, (*path, key))
            return result
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        if _CONTROL.search(node.value):  # no file, network or setting is named so, and no terminal should print it
            self._report(node, f"{node.value!r} holds a control character")
        return node.value if node.style else plain_scalar(node.value)

    def _report(self, node: yaml.Node, message: str) -> None:
        self.problems.append(Problem(self.source, *_place(node), message))


class _Loader(yaml.SafeLoader):
    """Resolves no plain scalar by itself: ``plain_scalar`` does."""


_Loader.yaml_implicit_resolvers = {}


def parse_yaml(text: str, source: str) -> tuple[Any, SourceMap]:
    """Parse ``text``; return its value and the places of everything in it.

    Raises:
        RecipeError: it is no YAML, or uses what recipes do without.
    """
    if len(text) > LONGEST_RECIPE:
        raise RecipeError([Problem(source, 0, 0, f"longer than {LONGEST_RECIPE:,} characters: not a recipe")])
    try:
        _check_events(_Loader(text), source)
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        message = " ".join(str(error.problem or error.context or "not YAML").split())
        raise RecipeError([Problem(source, line, column, f"not YAML: {message}")]) from None
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
        message = f"not YAML: {chr(error.character)!r} is not a character of a text"
        raise RecipeError([Problem(source, line, column, message)]) from None
    if node is None:
        raise RecipeError([Problem(source, 0, 0, "the file is empty")])
    places = _Places(source)
    value = places.build(node, ())
    if places.problems:
        raise RecipeError(places.problems)
    return value, SourceMap(source, places.values, places.keys)


def parse_scalar(text: str) -> Any:
    """Read the right side of ``--set key=value`` as a recipe would read it.

    Raises:
        RecipeError: it is no YAML.
    """
    if not text.strip():
        return ""
    return parse_yaml(text, "value")[0]


def _check_events(loader: _Loader, source: str) -> None:
    depth = documents = 0
    while True:
        try:
            if not loader.check_event():
                return
            event: yaml.Event = loader.get_event()  # type: ignore[no-untyped-call]
        except (ValueError, OverflowError):  # "\UFFFFFFFF" is no character: PyYAML lets chr() say so
            here = loader.get_mark()
            message = "not YAML: an escape that is no character of Unicode"
            raise RecipeError([Problem(source, here.line + 1, here.column + 1, message)]) from None
        mark = event.start_mark
        place: tuple[int, int] = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError([Problem(source, *place, "anchors and aliases are not supported: write it out")])
        if getattr(event, "tag", None):
            raise RecipeError([Problem(source, *place, "tags are not supported: write the plain value")])
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise RecipeError([Problem(source, *place, "a second document: a recipe is one")])
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST_RECIPE:
                raise RecipeError([Problem(source, *place, f"nested deeper than {DEEPEST_RECIPE} levels")])
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def plain_scalar(text: str) -> Any:
    """Return what an unquoted scalar stands for."""
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return _SPECIAL.get(text.lower(), text)
