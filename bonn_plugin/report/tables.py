"""The report's tables as text, which the terminal, Markdown and HTML show."""

from __future__ import annotations

from dataclasses import dataclass

from bonn_plugin.report.model import Accuracy, Merging, PartRates, Precision, RateRow, Report


@dataclass(frozen=True)
class Table:
    """A titled table; columns whose heading begins with ``<`` are flush left.

    Attributes:
        title: its heading.
        head: the columns' headings.
        rows: the cells, as many in each row as there are headings.
        detail: whether it has a row for each layer.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    detail: bool = False


def summary(report: Report) -> list[str]:
    """Return the lines that a report begins with."""
    return [
        f"{report.network}, {report.parameters:,} parameters ({report.machine}, {report.date})",
    ]


def _measured(measured: Accuracy | Precision) -> Table:
    samples = f"{measured.samples:,} test samples"
    if isinstance(measured, Precision):
        p = measured
        return Table(
            f"COCO's mean average precision on {samples}",
            ("<", "mAP", "mAP50", "mAP75"),
            (
                ("as trained", f"{p.trained_map:.3f}", f"{p.trained_map50:.3f}", f"{p.trained_map75:.3f}"),
                (_RELOADED, f"{p.packed_map:.3f}", f"{p.packed_map50:.3f}", f"{p.packed_map75:.3f}"),
                ("boxes, scores and labels equal bit for bit", "yes" if p.identical_detections else "no", "", ""),
                *_lost("a head's raw output", p.conversion_difference, 3),
            ),
        )
    a = measured
    return Table(
        f"Accuracy on {samples}, in %",
        ("<", "top-1", "top-5"),
        (
            ("as trained", f"{a.trained_top1:.2f}", f"{a.trained_top5:.2f}"),
            (_RELOADED, f"{a.packed_top1:.2f}", f"{a.packed_top5:.2f}"),
            ("logits equal bit for bit", "yes" if a.identical_logits else "no", ""),
            *_lost("a logit", a.conversion_difference, 2),
        ),
    )


_RELOADED = "packed, reloaded from the files"


def _lost(what: str, difference: float, columns: int) -> tuple[tuple[str, ...], ...]:
    if not difference:
        return ()
    change = f"largest change of {what} by the passes after training"
    return ((change, f"{difference:.3g}", *("" for _ in range(columns - 1))),)


def tables(report: Report) -> list[Table]:
    """Return all tables of a report, in their order."""
    found: list[Table] = []
    if report.accuracy:
        found.append(_measured(report.accuracy))
    found.append(
        Table(
            "Compression rate by what is counted",
            ("<counted", "float32", "now", "rate"),
            (
                *(_rate(str(r.rule), r) for r in report.rates),
                *_part_rates(report.part),
                (
                    "bytes on disk, model.safetensors",
                    f"{report.files.float32:,} B",
                    f"{report.files.weights:,} B",
                    f"{report.files.rate:.2f}",
                ),
                (
                    "bytes on disk, whole folder",
                    f"{report.files.float32:,} B",
                    f"{report.files.folder:,} B",
                    f"{report.files.float32 / report.files.folder:.2f}",
                ),
            ),
        )
    )
    ops = report.operations
    found.append(
        Table(
            f"Operations for one image of {' x '.join(map(str, ops.input_shape))}",
            ("<", "binary (BOPs)", "real (FLOPs)", "OPs = BOPs/64 + FLOPs"),
            (
                ("float32", "0", f"{ops.original:.3e}", f"{ops.original:.3e}"),
                ("now", f"{ops.binary:.3e}", f"{ops.real:.3e}", f"{ops.ops:.3e}"),
            ),
        )
    )
    if report.merging:
        found += _merging_tables(report, report.merging)
    if report.pruned:
        found.append(
            Table(
                "Channels",
                ("<layer", "before", "after pruning", "kept, %"),
                tuple((r.name, str(r.before), str(r.after), f"{100 * r.after / r.before:.1f}") for r in report.pruned),
                detail=True,
            )
        )
    total = sum(row.needed_bits for row in report.roles)
    found.append(
        Table(
            "Stored bits by role",
            ("<role", "tensors", "numbers", "bits needed", "bits written", "share"),
            (
                *(
                    (
                        str(row.role),
                        str(row.tensors),
                        f"{row.elements:,}",
                        f"{row.needed_bits:,}",
                        f"{row.written_bits:,}",
                        f"{100 * row.needed_bits / total:.1f} %",
                    )
                    for row in report.roles
                ),
                (
                    "all",
                    str(sum(row.tensors for row in report.roles)),
                    f"{sum(row.elements for row in report.roles):,}",
                    f"{total:,}",
                    f"{sum(row.written_bits for row in report.roles):,}",
                    "100.0 %",
                ),
            ),
        )
    )
    found.append(
        Table(
            "Layers",
            ("<module", "<kind", "float32 bits", "bits now", "BOPs", "FLOPs"),
            tuple(
                (
                    row.name,
                    row.kind,
                    f"{row.original_bits:,}",
                    f"{row.needed_bits:,}",
                    f"{row.binary_macs:,}",
                    f"{row.real_macs:,}",
                )
                for row in report.layers
            ),
            detail=True,
        )
    )
    return found


def _merging_tables(report: Report, merging: Merging) -> list[Table]:
    before, after = sum(r.filters for r in merging.layers), sum(r.stored for r in merging.layers)
    compared = Table(
        "With and without merging filters",
        ("<", "without", "with"),
        (
            ("filters", f"{before:,}", f"{after:,}"),
            *(
                (f"rate by {now.rule}", f"{then.rate:.2f}", f"{now.rate:.2f}")
                for then, now in zip(merging.rates, report.rates, strict=True)
            ),
            ("OPs = BOPs/64 + FLOPs", f"{merging.ops:.3e}", f"{report.operations.ops:.3e}"),
        ),
    )
    layers = Table(
        "Filters",
        ("<layer", "before", "after", "kept, %", "outputs zeroed"),
        tuple(
            (r.name, str(r.filters), str(r.stored), f"{100 * r.stored / r.filters:.1f}", str(r.zeroed))
            for r in merging.layers
        ),
        detail=True,
    )
    return [compared, layers]


def _rate(counted: str, row: RateRow) -> tuple[str, ...]:
    return counted, _bits(row.original_bits), _bits(row.needed_bits), f"{row.rate:.2f}"


def _part_rates(part: PartRates | None) -> tuple[tuple[str, ...], ...]:
    return () if part is None else tuple(_rate(f"{r.rule}, of {part.name} alone", r) for r in part.rates)


def _bits(bits: int) -> str:
    return f"{bits:,} bit"
