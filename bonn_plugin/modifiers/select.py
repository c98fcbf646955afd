"""Selectors: which convolutions of a model a modifier works on."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bonn_plugin.errors import ModelError
from bonn_plugin.nn import ConvGeometry, PackedConv2d, SignInput, StoredSignConv2d


@dataclass(frozen=True)
class LeftAlone:
    """A convolution that was not taken, and why."""

    name: str
    reason: str


def selector_problem(selector: str) -> str | None:
    """Return what is wrong with a selector as text, or None."""
    kind, colon, rest = selector.partition(":")
    if not selector.strip():
        return "a selector is empty"
    if colon and kind == "re":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of a pattern that a later Python reads otherwise
                re.compile(rest)
        except (re.error, OverflowError, RecursionError, Warning) as error:
            return f"{rest!r} is not a regular expression: {error}"
    elif colon and kind != "class":
        return f"unknown selector kind {kind!r}: an exact name, 're:...' or 'class:...'"
    return None


def select_convolutions(
    model: nn.Module, targets: Sequence[str] | None, expect: int | None = None
) -> dict[str, nn.Conv2d]:
    """Return the convolutions that ``targets`` select, by name, in the model's order.

    Args:
        model: the model; nothing is changed.
        targets: selectors: an exact name, ``re:`` and a pattern that matches the full name, or ``class:`` and
            a class name. None takes every plain convolution with a kernel larger than 1x1 that is neither
            the network's first nor depthwise; grouped ones count in. A network that names the part of it that is
            to be compressed, by an attribute ``compressible``, keeps None to that part.
        expect: how many must match.

    Raises:
        ModelError: a selector matches nothing, or something that can't be binarised; the count is off.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if targets is None:
        chosen = [name for name in modules if _default_reason(model, modules, name) is None]
        if not chosen:
            raise ModelError(
                "no convolution is taken by default: none has a kernel larger than 1x1 and is neither the first "
                "nor depthwise. Name some in 'targets'",
                ("targets",),
            )
    else:
        taken: set[str] = set()
        for i, selector in enumerate(targets):
            try:
                taken.update(_match(modules, selector))
            except ModelError as error:
                raise ModelError(str(error), ("targets", i)) from None
        chosen = [name for name in modules if name in taken]
    if expect is not None and len(chosen) != expect:
        raise ModelError(
            f"expected {expect} convolutions, the selectors match {len(chosen)}: {', '.join(chosen[:4])}"
            + (", ..." if len(chosen) > 4 else ""),
            ("expect",),
        )
    convolutions: dict[str, nn.Conv2d] = {}
    for name in chosen:
        module = modules[name]
        if isinstance(module, (SignInput, PackedConv2d, StoredSignConv2d)):
            raise ModelError(f"{name} is binarised already: binarising a module twice is an error", ("targets",))
        reason = unfit_reason(module)
        if reason is not None:
            raise ModelError(f"{name} can't be binarised: {reason}", ("targets",))
        assert isinstance(module, nn.Conv2d)
        convolutions[name] = module
    return convolutions


def match_convolutions(model: nn.Module, selector: str) -> list[str]:
    """Return the names of the convolutions, binarised or not, that one selector matches, in the model's order.

    Raises:
        ModelError: it matches none.
    """
    return _match({name: module for name, module in model.named_modules() if name}, selector)


def left_alone(model: nn.Module) -> list[LeftAlone]:
    """Return every convolution that stays in full precision in ``model``, with the reason by default rules."""
    modules = {name: module for name, module in model.named_modules() if name}
    return [
        LeftAlone(name, _default_reason(model, modules, name) or "not selected")
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d)
    ]


def unfit_reason(module: nn.Module) -> str | None:
    """Return why a module can't be binarised, or None if it can."""
    if not isinstance(module, nn.Conv2d):
        return f"it is a {type(module).__name__}, not a two-dimensional convolution"
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__name__}, whose forward pass is its own"
    try:
        ConvGeometry.of(module)
    except ValueError as error:
        return str(error)
    return None


def near_names(name: str, names: Sequence[str]) -> str:
    """Return ' Did you mean ...?' with the nearest of ``names``, or an empty string."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def match_names(
    modules: Mapping[str, nn.Module],
    selector: str,
    candidates: Sequence[str],
    noun: str,
    refusal: Callable[[str], str],
) -> list[str]:
    """Return the names among ``candidates`` that one selector matches, in their order.

    Args:
        modules: all modules of the model by name.
        selector: see ``select_convolutions``.
        candidates: names that may be taken.
        noun: what they are, for messages.
        refusal: says why a module that is none of them, given its name, can't be taken.

    Raises:
        ModelError: it matches none.
    """
    kind, colon, rest = selector.partition(":")
    if colon and kind == "re":
        pattern = re.compile(rest)
        matched = [name for name in candidates if pattern.fullmatch(name)]
        others = [name for name in modules if pattern.fullmatch(name)]
        if not matched and others:
            raise ModelError(f"{selector!r} matches no {noun}, only {others[0]} ({type(modules[others[0]]).__name__})")
    elif colon and kind == "class":
        matched = [name for name in candidates if type(modules[name]).__name__ == rest]
    else:
        if selector in modules and selector not in candidates:
            raise ModelError(refusal(selector))
        matched = [selector] if selector in modules else []
    if not matched:
        if kind == "class" and colon:
            classes = sorted({type(modules[name]).__name__ for name in candidates})
            hint = f" The model's {noun}s are: {', '.join(classes) or 'none'}"
        else:
            # A pattern is no name, but without its escapes it is near enough to one.
            plain = re.sub(r"\\d|\[[^\]]*\]|\(\?:|[\\^$()]", lambda m: "0" if m[0][0] in "\\[" else "", rest)
            hint = near_names(plain if colon else selector, candidates)
        raise ModelError(f"{selector!r} matches no {noun} of the model.{hint}")
    return matched


def _match(modules: dict[str, nn.Module], selector: str) -> list[str]:
    convolutions = [
        name for name, m in modules.items() if isinstance(m, (nn.Conv2d, SignInput, PackedConv2d, StoredSignConv2d))
    ]

    def refusal(name: str) -> str:
        return f"{name} can't be binarised: {unfit_reason(modules[name])}"

    return match_names(modules, selector, convolutions, "convolution", refusal)


def _default_reason(model: nn.Module, modules: dict[str, nn.Module], name: str) -> str | None:
    """Why the default leaves a module alone; None if it takes it."""
    module = modules[name]
    if isinstance(module, (SignInput, PackedConv2d, StoredSignConv2d)):
        return None
    if not isinstance(module, nn.Conv2d):
        return "not a convolution"
    first = next(n for n, m in modules.items() if isinstance(m, (nn.Conv2d, SignInput, PackedConv2d, StoredSignConv2d)))
    if name == first:
        return "the network's first convolution"
    part = getattr(model, "compressible", "")
    if part and not name.startswith(f"{part}."):
        return f"outside of {part}"
    if max(module.kernel_size) == 1:
        return "1x1"
    if module.groups > 1 and module.groups == module.in_channels:
        return "depthwise"
    return unfit_reason(module)
