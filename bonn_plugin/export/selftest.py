"""The proof that an export computes what the torch model computes: logits, or features by name.

Float sums in another order differ in their last bits, and a 1-bit network amplifies that: where a value
lies so near to its threshold that rounding decides its sign, the logits move by far more than rounding.
So they do where a value lies so near to the middle of two integers that rounding decides which of them an
8-bit layer takes. Such an image is not waved through. The engine's signs and integers are read out, each that
differs from torch's must be such a tie, and torch with these must give the engine's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bonn_plugin.errors import ExportError
from bonn_plugin.export.engine import compile_for_cpu
from bonn_plugin.export.integer import QUANTISED, integers_of
from bonn_plugin.export.lowering import OUTPUT
from bonn_plugin.functional import quantize_affine
from bonn_plugin.nn import IntegerConv2d, IntegerLinear, PackedConv2d

TOLERANCE = 1e-4
"""Largest difference of a number of an output, in units of the output's largest (at least 1)."""
TIE = 1e-5
"""Distance from the threshold, in units of the layer's largest input, within which rounding decides a sign."""

Outputs = Mapping[str, Tensor]
"""What a network gives of a batch, by name, (B, ...) float32."""


@dataclass(frozen=True)
class SelfTest:
    """Engine against torch.

    Attributes:
        source: what the samples were.
        samples: how many.
        difference: largest difference of a number of the outputs, but for the images with a tie.
        scale: largest of these numbers, at least 1.
        agreement: share of equal top-1, in percent, ties included; None where the outputs are no logits.
        tied_samples: images in which rounding decided a sign, proven to be that and no more.
        tied_signs: signs in them that differ.
        tied_difference: largest difference of a number of theirs.
        outputs: the outputs' names.
        tied_integers: integers in them that differ, by 1.
    """

    source: str
    samples: int
    difference: float
    scale: float
    agreement: float | None
    tied_samples: int = 0
    tied_signs: int = 0
    tied_difference: float = 0.0
    outputs: tuple[str, ...] = (OUTPUT,)
    tied_integers: int = 0

    def __str__(self) -> str:
        """Return one line."""
        if self.agreement is None:
            what, of = "features", f" of {len(self.outputs)} levels" if len(self.outputs) > 1 else ""
            line = (
                f"features{of} within {self.difference:.2g} of torch's, the largest being {self.scale:.3g}, "
                f"on {self.samples:,} samples ({self.source})"
            )
        else:
            what = "logits"
            line = (
                f"logits within {self.difference:.2g} of torch's, top-1 equal on {self.agreement:.6g} % "
                f"of {self.samples:,} samples ({self.source})"
            )
        if self.tied_samples:
            signs = f"{self.tied_signs:,} signs whose value is their threshold within rounding"
            integers = f"{self.tied_integers:,} integers whose value is the middle of two within rounding"
            causes = " and ".join([signs] * bool(self.tied_signs) + [integers] * bool(self.tied_integers))
            line += (
                f"; in {self.tied_samples:,} more than rounding: {causes}, with which torch gives the same {what} "
                f"(else {self.tied_difference:.2g})"
            )
        return line


@torch.no_grad()
def self_test(
    model: nn.Module, graph: Any, shape: tuple[int, int, int, int], samples: Iterable[Tensor], source: str
) -> SelfTest:
    """Compare an engine's graph with a torch model.

    Args:
        model: the reference, in eval mode; it gives logits, or features by name.
        graph: an ``openvino.Model`` for inputs of ``shape``.
        shape: (B, C, H, W); what is left of the samples after whole batches is filled up with zeros.
        samples: batches of images, (any number, C, H, W).
        source: what they are.

    Raises:
        ExportError: a number differs by more than rounding explains, or there are no samples.
    """
    names = [output.any_name for output in graph.outputs]
    request = compile_for_cpu(graph).create_infer_request()
    count, worst, equal = 0, 0.0, 0
    scales = dict.fromkeys(names, 1.0)
    doubtful: list[tuple[Tensor, Outputs, int]] = []
    for batch, filled in _batches(samples, shape):
        got, want = _of_engine(request, names, batch, filled), _of_torch(model, batch, filled)
        _check_shapes(got, want)
        scales = {name: max(scale, float(want[name].abs().max())) for name, scale in scales.items()}
        count += filled
        same = torch.ones(filled, dtype=torch.bool)
        if OUTPUT in got:
            equal += int((got[OUTPUT].flatten(1).argmax(1) == want[OUTPUT].flatten(1).argmax(1)).sum())
            same = _same_top(got[OUTPUT], want[OUTPUT])
        if _largest(got, want, scales) <= TOLERANCE and bool(same.all()):
            worst = max(worst, _largest(got, want))
        else:
            doubtful.append((batch, got, filled))
    if not count:
        raise ExportError("no samples to compare the export with")
    tied_samples = tied_signs = tied_integers = 0
    tied_difference = 0.0
    if doubtful:
        replay = _Replay(model, graph, names, scales)
        for batch, got, filled in doubtful:
            found = replay.explain(batch, got, filled)
            tied_samples += found.samples
            tied_signs += found.signs
            tied_integers += found.integers
            worst = max(worst, found.difference)
            tied_difference = max(tied_difference, found.moved)
    return SelfTest(
        source,
        count,
        worst,
        max(scales.values()),
        100 * equal / count if OUTPUT in names else None,
        tied_samples,
        tied_signs,
        tied_difference,
        tuple(names),
        tied_integers,
    )


def _of_torch(model: nn.Module, batch: Tensor, filled: int) -> Outputs:
    made = model(batch)
    named = made if isinstance(made, Mapping) else {OUTPUT: made}
    return {name: value.float()[:filled] for name, value in named.items()}


def _of_engine(request: Any, names: list[str], batch: Tensor, filled: int) -> Outputs:
    request.infer({0: batch.numpy()})
    return {name: torch.from_numpy(request.get_output_tensor(i).data.copy())[:filled] for i, name in enumerate(names)}


def _check_shapes(got: Outputs, want: Outputs) -> None:
    engine, reference = ({name: tuple(value.shape) for name, value in outputs.items()} for outputs in (got, want))
    if engine != reference:
        engine_text, torch_text = (
            ", ".join(f"{name} {shape}" for name, shape in shapes.items()) for shapes in (engine, reference)
        )
        raise ExportError(f"the export gives {engine_text}, torch {torch_text}")


def _largest(one: Outputs, other: Outputs, scales: Mapping[str, float] | None = None) -> float:
    """Return the largest difference of a number, in units of its output's scale if there are such; NaN stays NaN."""
    units = {} if scales is None else scales
    return float(torch.stack([(one[n] - other[n]).abs().max() / units.get(n, 1.0) for n in one]).max())


def _same_top(got: Tensor, want: Tensor) -> Tensor:
    """Whether the top-1 is equal, or torch's two candidates lie within the rounding of each other."""
    got, want = got.flatten(1), want.flatten(1)
    differences = (got - want).abs().amax(1)
    chosen = want.gather(1, got.argmax(1, keepdim=True))[:, 0]
    return want.amax(1) - chosen <= 2 * differences.clamp(max=TOLERANCE)


def _batches(samples: Iterable[Tensor], shape: tuple[int, int, int, int]) -> Iterable[tuple[Tensor, int]]:
    for images in samples:
        if tuple(images.shape[1:]) != shape[1:]:
            raise ExportError(f"a sample has shape {tuple(images.shape[1:])}, the export takes {shape[1:]}")
        for part in torch.split(images.float(), shape[0]):
            missing = shape[0] - len(part)
            yield torch.cat([part, part.new_zeros(missing, *shape[1:])]).contiguous(), len(part)


SIGN = ".sign"
"""Suffix of the name of the node that takes a sign."""


def _positive(op: Any) -> Callable[[Any], Tensor]:
    """What a sign's node decides: a function of its input's values to bool."""
    if op.get_type_name() == "Select":
        at = op.input_value(0).get_node().input_value(1).get_node().data
        return lambda x: torch.from_numpy(x >= at)
    above, high = (op.input_value(i).get_node().data for i in (1, 4))
    return lambda x: torch.from_numpy((x > above) == (high > 0))


def _integers(op: Any) -> Callable[[Any], Tensor]:
    """What a node decides that makes integers: a function of its input's values to 0 ... 255."""
    low, high = (op.input_value(i).get_node().data for i in (1, 2))
    return lambda x: integers_of(x, low, high)


@dataclass(frozen=True)
class _Explained:
    samples: int
    signs: int
    integers: int
    difference: float
    moved: float


@dataclass(frozen=True)
class _Watched:
    """A decision of the engine: the output that it is read off, and what it decides there."""

    output: int
    decide: Callable[[Any], Tensor]


class _Replay:
    """Runs torch with the signs and integers that the engine chose."""

    def __init__(self, model: nn.Module, graph: Any, names: list[str], scales: Mapping[str, float]) -> None:
        self.model = model
        self.names = names
        self.scales = scales
        self.what = "logits" if OUTPUT in names else "features"
        watched = graph.clone()
        self._watched: dict[str, _Watched] = {}
        places: dict[tuple[str, int], int] = {}
        outputs: list[Any] = []
        for op in watched.get_ordered_ops():
            kind, name = op.get_type_name(), op.get_friendly_name()
            suffix = next((s for s in (SIGN, QUANTISED) if name.endswith(s)), None)
            if suffix is None or kind not in ("FakeQuantize", "Select"):
                continue
            source = op.input_value(0) if kind == "FakeQuantize" else op.input_value(0).get_node().input_value(0)
            key = (source.get_node().get_friendly_name(), source.get_index())
            if key not in places:
                places[key] = len(names) + len(outputs)
                outputs.append(source)
            decide = _positive(op) if suffix == SIGN else _integers(op)
            self._watched[name.removesuffix(suffix)] = _Watched(places[key], decide)
        if not outputs:
            raise ExportError(f"its {self.what} are not torch's, and it has no sign on which rounding could decide")
        # What goes into the signs is read, not the signs: the engine breaks down on those as outputs.
        watched.add_outputs(outputs)
        self._request = compile_for_cpu(watched).create_infer_request()

    def explain(self, batch: Tensor, got: Outputs, filled: int) -> _Explained:
        """Return how many signs and integers explain the difference; ExportError if they don't."""
        again = _of_engine(self._request, self.names, batch, filled)
        if not _largest(again, got, self.scales) <= TOLERANCE:
            raise ExportError(
                f"its {self.what} differ from torch's, and from its own when its signs are read "
                f"(by {_largest(again, got):.3g})"
            )
        decided = {name: w.decide(self._request.get_output_tensor(w.output).data) for name, w in self._watched.items()}
        seen = _Seen(filled)
        replayed = self._run(batch, decided, seen)
        moved = _largest(_of_torch(self.model, batch, filled), got)
        if not seen.farthest <= TIE:
            raise ExportError(
                f"its {self.what} differ from torch's by {moved:.3g}: signs or integers differ whose "
                f"value is {seen.farthest:.2g} of the layer's largest away from where they change"
            )
        difference = _largest(replayed, got)
        if not _largest(replayed, got, self.scales) <= TOLERANCE:
            raise ExportError(
                f"its {self.what} differ from torch's by {moved:.3g}, "
                f"and by {difference:.3g} when torch takes the same signs and integers"
            )
        samples = int(((seen.signs > 0) | (seen.integers > 0)).sum())
        return _Explained(samples, int(seen.signs.sum()), int(seen.integers.sum()), difference, moved)

    def _run(self, batch: Tensor, decided: dict[str, Tensor], seen: _Seen) -> Outputs:
        calls: dict[str, int] = {}

        def hook_for(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                calls[name] = calls.get(name, 0) + 1
                number = f"_{calls[name]}" if calls[name] > 1 else ""
                theirs = decided[f"{name}{number}"]
                if isinstance(module, PackedConv2d):
                    return (seen.sign(module, args[0], theirs),)
                assert isinstance(module, (IntegerConv2d, IntegerLinear))
                return (seen.integer(module, args[0], theirs),)

            return hook

        handles = [
            module.register_forward_pre_hook(hook_for(name))
            for name, module in self.model.named_modules()
            if isinstance(module, (PackedConv2d, IntegerConv2d, IntegerLinear))
        ]
        try:
            return _of_torch(self.model, batch, seen.filled)
        finally:
            for handle in handles:
                handle.remove()


class _Seen:
    """What of the engine's decisions was otherwise than torch's, by image, and how far from the tie at most."""

    def __init__(self, filled: int) -> None:
        self.filled = filled
        self.signs = torch.zeros(filled, dtype=torch.long)
        self.integers = torch.zeros(filled, dtype=torch.long)
        self.farthest = 0.0

    def sign(self, module: PackedConv2d, x: Tensor, theirs: Tensor) -> Tensor:
        """Return an input that has the engine's signs."""
        t = 0.0 if module.threshold is None else module.threshold[:, None, None]
        theirs = theirs[:, : x.shape[1]]
        differ = ((x - t) >= 0) != theirs
        self._note(self.signs, differ, (x - t).abs(), x)
        if not module.input_scale:
            return torch.where(theirs, 1.0, -1.0) + t
        # |x - t| counts too: it stays as it is but at a tie, which the next smaller float breaks
        made = torch.where(theirs, (x - t).abs(), -(x - t).abs()) + t
        return torch.where(((made - t) >= 0) != theirs, torch.nextafter(made, torch.full_like(made, -torch.inf)), made)

    def integer(self, module: IntegerConv2d | IntegerLinear, x: Tensor, theirs: Tensor) -> Tensor:
        """Return an input that has the engine's integers."""
        assert module.input_scale is not None
        assert module.input_zero_point is not None
        zero_point = module.input_zero_point.float()
        theirs = theirs.reshape(x.shape) - zero_point
        own = quantize_affine(x, module.input_scale, module.input_zero_point)
        middle = (torch.minimum(own, theirs) + 0.5) * module.input_scale
        # more than one apart is no tie: such a value is as far away as can be
        distance = torch.where((own - theirs).abs() <= 1, (x - middle).abs(), torch.inf)
        self._note(self.integers, own != theirs, distance, x)
        return theirs * module.input_scale

    def _note(self, counts: Tensor, differ: Tensor, distance: Tensor, x: Tensor) -> None:
        differ = differ[: self.filled]
        if bool(differ.any()):
            counts.add_(differ.flatten(1).sum(1))
            farthest = distance[: self.filled][differ].max() / x.abs().max().clamp(min=1e-30)
            self.farthest = max(self.farthest, float(farthest))


__all__ = ["TIE", "TOLERANCE", "SelfTest", "self_test"]
