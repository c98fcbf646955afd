"""The report as data: JSON is the source, Markdown and the terminal's tables come from it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from bonn_plugin.nn import Role
from bonn_plugin.nn.operations import Macs, count_macs, output_channels
from bonn_plugin.nn.resize import unpruned
from bonn_plugin.report.ledger import RULES, Entry, Ledger, Rule, float32_file_bytes, ledger
from bonn_plugin.report.merging import Unmerged, unmerged

SPEED_NOTE = (
    "In torch a packed convolution unpacks its signs at each call: it is exact, and no faster than a "
    "full-precision one. It serves evaluation and export."
)

REAL_NOTE = "Full precision: nothing is binarised in this network."
SIGNS_NOTE = "The activations are binarised, the weights are not: a first step, from which a second one starts."
ZEROED_NOTE = (
    "The outputs of all filters of a group but the first are zeroed, as in the paper: this is not exact; the "
    "accuracy is what fine-tuning made of it."
)


INTEGER_NOTE = "Multiply-accumulates of layers with integer weights count among the real ones, as one each."


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerRow(_Part):
    """One module that stores something or computes: its bits, and multiply-accumulates for one image."""

    name: str
    kind: str
    needed_bits: int
    original_bits: int
    binary_macs: int
    real_macs: int


class RoleRow(_Part):
    """All tensors of one role."""

    role: Role
    tensors: int
    elements: int
    needed_bits: int
    written_bits: int


class RateRow(_Part):
    """A compression rate and what it counts."""

    rule: Rule
    counts: tuple[Role, ...]
    original_bits: int
    needed_bits: int
    rate: float


class FileSizes(_Part):
    """Measured bytes: of this checkpoint's tensors and folder, and of the same network saved in float32."""

    weights: int
    folder: int
    float32: int
    rate: float


class Operations(_Part):
    """OPs = BOPs / 64 + FLOPs for one image, a multiply-accumulate counting as one."""

    input_shape: tuple[int, ...]
    binary: int
    real: int
    ops: float
    original: int


class MergedLayerRow(_Part):
    """The filters of one layer: outputs before merging, filters stored after it, outputs that are zeroed."""

    name: str
    filters: int
    stored: int
    zeroed: int


class Merging(_Part):
    """What merging filters saves: filters by layer, rates and operations as they would be without it."""

    layers: tuple[MergedLayerRow, ...]
    rates: tuple[RateRow, ...]
    ops: float


class Accuracy(_Part):
    """Top-1 (and top-5) in percent, as trained and reloaded from the files.

    ``conversion_difference`` is the largest change of a logit by passes that are not exact; 0 without such.
    """

    samples: int
    trained_top1: float
    packed_top1: float
    trained_top5: float
    packed_top5: float
    identical_logits: bool
    conversion_difference: float = 0.0


class PrunedRow(_Part):
    """A layer that lost channels: its outputs in the network of the recipe, and now."""

    name: str
    before: int
    after: int


class Precision(_Part):
    """COCO's mean average precision from 0 to 1, as trained and reloaded from the files: over IoU 0.50 to 0.95, at 0.50
    and at 0.75.

    ``conversion_difference`` is the largest change of a head's raw output by passes that are not exact; 0 without such.
    """

    samples: int
    trained_map: float
    packed_map: float
    trained_map50: float
    packed_map50: float
    trained_map75: float
    packed_map75: float
    identical_detections: bool
    conversion_difference: float = 0.0


class PartRates(_Part):
    """The compression rates of a part of the network that has a name of its own."""

    name: str
    parameters: int
    rates: tuple[RateRow, ...]


class Report(_Part):
    """Everything that ``bonn report`` shows; ``part`` is what was to be compressed, where that is not all."""

    name: str
    network: str
    parameters: int
    date: str
    machine: str
    rates: tuple[RateRow, ...]
    files: FileSizes
    operations: Operations
    accuracy: Accuracy | Precision | None
    roles: tuple[RoleRow, ...]
    layers: tuple[LayerRow, ...]
    tensors: tuple[Entry, ...]
    notes: tuple[str, ...]
    merging: Merging | None = None
    pruned: tuple[PrunedRow, ...] = ()
    part: PartRates | None = None


def make_report(
    name: str,
    network: str,
    packed: nn.Module,
    original: nn.Module,
    example: Tensor,
    weights_bytes: int,
    folder_bytes: int,
    accuracy: Accuracy | Precision | None = None,
) -> Report:
    """Measure a converted model against the full-precision network that it came from.

    Args:
        name: the recipe's name.
        network: the network's name.
        packed: the converted model.
        original: the same network, not binarised; only its shapes matter.
        example: (1, C, H, W), the input that operations are counted for.
        weights_bytes: size of the checkpoint's tensors' file.
        folder_bytes: size of all the checkpoint's files.
        accuracy: as measured, if it was.
    """
    book = ledger(packed)
    macs = count_macs(packed, example)
    without = unmerged(packed, example)
    whole = sum(macs.values(), Macs())
    before = sum(count_macs(original, example).values(), Macs())
    float32 = float32_file_bytes(original)
    kinds = {n: type(m).__name__ for n, m in packed.named_modules()}
    by_module: dict[str, list[Entry]] = {}
    for entry in book.entries:
        by_module.setdefault(entry.module, []).append(entry)
    return Report(
        name=name,
        network=network,
        parameters=sum(p.numel() for p in original.parameters()),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        rates=_rates(book),
        files=FileSizes(weights=weights_bytes, folder=folder_bytes, float32=float32, rate=float32 / weights_bytes),
        operations=Operations(
            input_shape=tuple(example.shape[1:]),
            binary=whole.binary,
            real=whole.real,
            ops=whole.ops,
            original=before.real,
        ),
        accuracy=accuracy,
        roles=tuple(
            RoleRow(
                role=role,
                tensors=len(book.select([role])),
                elements=sum(e.elements for e in book.select([role])),
                needed_bits=book.bits(role),
                written_bits=sum(e.written_bits for e in book.select([role])),
            )
            for role in Role
            if book.select([role])
        ),
        layers=tuple(
            LayerRow(
                name=module,
                kind=kinds[module],
                needed_bits=sum(e.needed_bits for e in entries),
                original_bits=sum(e.original_bits for e in entries),
                binary_macs=macs.get(module, Macs()).binary,
                real_macs=macs.get(module, Macs()).real,
            )
            for module, entries in by_module.items()
        ),
        tensors=book.entries,
        notes=(
            *_notes(
                whole,
                without,
                bits=bool(book.select([Role.BINARY_WEIGHT])),
                signs=any(getattr(m, "binarizes_input", False) for m in packed.modules()),
            ),
            *([INTEGER_NOTE] if book.select([Role.INTEGER_WEIGHT]) else []),
        ),
        merging=_merging(without) if without else None,
        pruned=_pruned(packed, original, example),
        part=_part(getattr(packed, "compressible", ""), book, original),
    )


def _pruned(packed: nn.Module, original: nn.Module, example: Tensor) -> tuple[PrunedRow, ...]:
    before, after = output_channels(original, example), output_channels(packed, example)
    names = [name for name, module in packed.named_modules() if unpruned(module) and name in before and name in after]
    rows = [PrunedRow(name=name, before=before[name], after=after[name]) for name in names]
    return tuple(row for row in rows if row.after < row.before)


def _notes(whole: Macs, without: Unmerged | None, *, bits: bool, signs: bool) -> tuple[str, ...]:
    if not whole.binary and not bits:
        return (SIGNS_NOTE,) if signs else (REAL_NOTE,)
    return (SPEED_NOTE, ZEROED_NOTE) if without and without.total.zeroed else (SPEED_NOTE,)


def _part(name: str, book: Ledger, original: nn.Module) -> PartRates | None:
    if not name:
        return None
    parameters = sum(p.numel() for p in original.get_submodule(name).parameters())
    return PartRates(name=name, parameters=parameters, rates=_rates(book.within(name)))


def _rates(book: Ledger) -> tuple[RateRow, ...]:
    return tuple(
        RateRow(
            rule=rule,
            counts=tuple(role for role in Role if role in RULES[rule]),
            original_bits=sum(e.original_bits for e in book.select(RULES[rule])),
            needed_bits=sum(e.needed_bits for e in book.select(RULES[rule])),
            rate=book.rate(rule),
        )
        for rule in Rule
    )


def _merging(without: Unmerged) -> Merging:
    return Merging(
        layers=tuple(
            MergedLayerRow(name=name, filters=f.outputs, stored=f.stored, zeroed=f.zeroed)
            for name, f in without.filters.items()
        ),
        rates=_rates(without.book),
        ops=without.macs.ops,
    )
