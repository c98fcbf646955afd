"""Selectors: which convolutions of a model a modifier works on."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bonn_plugin.errors import ModelError
from bonn_plugin.modifiers.reach import WEIGHT_ELSEWHERE, misused
from bonn_plugin.nn import BINARISED, ConvGeometry
from bonn_plugin.nn.inputs import IMAGE_CHANNELS


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
    model: nn.Module, targets: Sequence[str] | None, expect: int | None = None, example: Tensor | None = None
) -> dict[str, nn.Conv2d]:
    """Return the convolutions that ``targets`` select, by name, in the model's order.

    Args:
        model: the model; nothing is changed.
        targets: selectors: an exact name, ``re:`` and a pattern that matches the full name, or ``class:`` and
            a class name. None takes every plain convolution with a kernel larger than 1x1 that is neither
            the network's first nor depthwise; grouped ones count in. A network that names the part of it that is
            to be compressed, by an attribute ``compressible``, keeps None to that part.
        expect: how many must match.
        example: (B, C, H, W); with it the model is run once, and a convolution whose weight is used besides is
            refused where it is named and left alone where not, as is one that is not called.

    Raises:
        ModelError: a selector matches nothing, or something that can't be binarised; the count is off; the model
            does not take the example.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if targets is None:
        alone = _reasons_by_default(model, modules)
        chosen = [name for name in modules if name not in alone]
        plain = {name: m for name in chosen if isinstance(m := modules[name], nn.Conv2d)}
        if plain and example is not None:
            found = misused(model, plain, example)
            alone |= found
            chosen = [name for name in chosen if name not in found]
        if not chosen:
            raise ModelError(
                "no convolution is taken by default: none has a kernel larger than 1x1 and is neither the first "
                f"nor depthwise ({_count(modules, alone)}). Name some in 'targets'",
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
        if isinstance(module, BINARISED):
            raise ModelError(f"{name} is binarised already: binarising a module twice is an error", ("targets",))
        reason = unfit_reason(module)
        if reason is not None:
            raise ModelError(f"{name} can't be binarised: {reason}", ("targets",))
        assert isinstance(module, nn.Conv2d)
        convolutions[name] = module
    if targets is not None and example is not None:
        for name, reason in misused(model, convolutions, example).items():
            if reason == WEIGHT_ELSEWHERE:
                raise ModelError(f"{name} can't be binarised: {reason}", ("targets",))
    return convolutions


def match_convolutions(model: nn.Module, selector: str) -> list[str]:
    """Return the names of the convolutions, binarised or not, that one selector matches, in the model's order.

    Raises:
        ModelError: it matches none.
    """
    return _match({name: module for name, module in model.named_modules() if name}, selector)


def left_alone(model: nn.Module, example: Tensor | None = None) -> list[LeftAlone]:
    """Return every convolution that stays in full precision in ``model``, with the reason by default rules.

    One-dimensional and transposed ones, and those of other classes than torch's, are among them.

    Args:
        model: the model, binarised.
        example: (B, C, H, W); with it the model is run once, to find those that it does not use as convolutions.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    reasons = _reasons_by_default(model, modules)
    rest = {name: m for name, m in modules.items() if isinstance(m, nn.Conv2d) and name not in reasons}
    if rest and example is not None:
        reasons |= misused(model, rest, example)
    return [LeftAlone(name, reasons.get(name, "not selected")) for name, m in modules.items() if _convolves(m)]


def unfit_reason(module: nn.Module) -> str | None:
    """Return why a module can't be binarised, or None if it can."""
    if not isinstance(module, nn.Conv2d):
        return f"it is a {type(module).__name__}, not a two-dimensional convolution"
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__name__}, whose forward pass is its own"
    if module._parameters.get("weight") is None:
        return "its weight is computed from other tensors"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which would be lost"
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
    convolutions = [name for name, m in modules.items() if isinstance(m, (nn.Conv2d, *BINARISED))]

    def refusal(name: str) -> str:
        return f"{name} can't be binarised: {unfit_reason(modules[name])}"

    return match_names(modules, selector, convolutions, "convolution", refusal)


def _reasons_by_default(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return by name why the default leaves a module alone; those that it takes are left out."""
    kinds = (nn.Conv2d, *BINARISED)
    first = next(((name, m) for name, m in modules.items() if isinstance(m, kinds)), None)
    users = Counter(id(p) for m in modules.values() for p in m.parameters(recurse=False))
    part: str = getattr(model, "compressible", "")
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        if isinstance(module, BINARISED):
            continue
        if not isinstance(module, nn.Conv2d):
            reasons[name] = unfit_reason(module) or ""
            continue
        assert first is not None
        reason = _default_reason(module, first[1], users)
        if name == first[0]:
            reason = "the network's first convolution"
        elif part and not name.startswith(f"{part}."):
            reason = f"outside of {part}"
        if reason is not None:
            reasons[name] = reason
    return reasons


def _default_reason(module: nn.Conv2d, first: nn.Module, users: Mapping[int, int]) -> str | None:
    """Why the default leaves a convolution alone that is not the first; None if it takes it."""
    if max(module.kernel_size) == 1:
        return "1x1"
    if module.groups > 1 and module.groups == module.in_channels:
        return "depthwise"
    if module.in_channels <= IMAGE_CHANNELS and module.in_channels == getattr(first, "in_channels", None):
        return "it sees the image, as the first does"
    reason = unfit_reason(module)
    if reason is None and users[id(module.weight)] > 1:
        return "another module has the same weight"
    return reason


def _convolves(module: nn.Module) -> bool:
    """Whether a module is a convolution in full precision, of torch's kinds or another with a kernel and weights."""
    if isinstance(module, BINARISED):
        return False
    return isinstance(module, _ConvNd) or (
        hasattr(module, "kernel_size") and bool(list(module.parameters(recurse=False)))
    )


def _count(modules: Mapping[str, nn.Module], reasons: Mapping[str, str]) -> str:
    """Say how many convolutions are left alone for which reason."""
    counts = Counter(reasons[name] for name, m in modules.items() if _convolves(m) and name in reasons)
    return "; ".join(f"{reason}: {n}" for reason, n in counts.most_common()) or "it has none"
