"""The report of a run as one page of HTML that needs nothing else: no script, no request, no font."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from bonn_plugin.errors import BonnError
from bonn_plugin.files import write_file
from bonn_plugin.nn import Role
from bonn_plugin.report.bars import layer_bars
from bonn_plugin.report.distributions import DISTRIBUTIONS, read_distributions
from bonn_plugin.report.figures import Run, Section
from bonn_plugin.report.history import EpochRecord, read_history
from bonn_plugin.report.model import Accuracy, Precision, Report
from bonn_plugin.report.source import read_report
from bonn_plugin.report.tables import summary, tables
from bonn_plugin.report.training_figures import merging_section, training_section
from bonn_plugin.report.weight_figures import Weights, weights_section

PAGE = "report.html"
"""The file's name in a run's folder."""


@dataclass(frozen=True)
class RunFiles:
    """Where a run's files are.

    Attributes:
        folder: of the checkpoint.
        metrics: what was noted after each epoch; it may be missing.
    """

    folder: Path
    metrics: Path

    @property
    def distributions(self) -> Path:
        """What was recorded of the latent weights; it may be missing."""
        return self.folder / DISTRIBUTIONS


@dataclass(frozen=True)
class Fact:
    """A number at the head of the page."""

    value: str
    what: str


def write_page(files: RunFiles, against: RunFiles | None = None) -> Path:
    """Write the page of a run into its folder.

    Args:
        files: the run's.
        against: those of a run to compare with: its measurements and its latent weights, which both have to have.

    Returns:
        The page's path.

    Raises:
        BonnError: a file is missing that is needed, or damaged; the runs can't be compared; the folder is not writable.
    """
    report = read_report(files.folder)
    other = None
    names = (report.name, "")
    if against is not None:
        names = _names(report, files.folder, read_report(against.folder), against.folder)
        other = Run(names[1], _history(against))
    run = Run(names[0], _history(files))
    if other and run.history and other.history:
        _check_comparable(run, other)
    own_weights, other_weights = _weights(files, names[0], against), _weights(against, names[1], against)
    sections = [
        training_section(run, other),
        weights_section(own_weights, other_weights, binarised=_binarised(report)),
        merging_section(run.history),
    ]
    page = to_html(report, [section for section in sections if section], names[1])
    target = files.folder / PAGE
    write_file(target, page.encode())
    return target


def to_html(report: Report, sections: list[Section], against: str = "") -> str:
    """Return the page of a report with its figures.

    Args:
        report: the tables and the bars come from it.
        sections: the figures.
        against: the name of a run that is compared; empty for none.
    """
    environment = Environment(
        loader=PackageLoader("bonn_plugin.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = tables(report)
    ids: Iterator[int] = count(1)
    return environment.get_template("report.html").render(
        report=report,
        summary=summary(report),
        facts=_facts(report),
        tables=[table for table in found if not table.detail],
        details=[table for table in found if table.detail],
        bars=layer_bars(report),
        sections=sections,
        against=against,
        new_id=lambda: f"i{next(ids)}",
    )


def _binarised(report: Report) -> bool:
    return any(row.role is Role.BINARY_WEIGHT for row in report.roles)


def _facts(report: Report) -> list[Fact]:
    facts = [
        Fact(f"{report.rates[0].rate:.2f} ×", f"smaller by {report.rates[0].rule}"),
        Fact(f"{report.files.rate:.2f} ×", "smaller on disk"),
        Fact(f"{report.operations.original / report.operations.ops:.2f} ×", "fewer OPs = BOPs/64 + FLOPs"),
    ]
    if isinstance(report.accuracy, Accuracy):
        facts.append(Fact(f"{report.accuracy.packed_top1:.2f} %", "top-1, reloaded from the files"))
    elif isinstance(report.accuracy, Precision):
        facts.append(Fact(f"{report.accuracy.packed_map:.3f}", "mAP, reloaded from the files"))
    return facts


def _history(files: RunFiles) -> tuple[EpochRecord, ...]:
    return read_history(files.metrics) if files.metrics.exists() else ()


def _weights(files: RunFiles | None, name: str, against: RunFiles | None) -> Weights | None:
    """Read what a run recorded of its weights; it has to be there where two runs are compared."""
    if files is None or (against is None and not files.distributions.exists()):
        return None
    return Weights(name, read_distributions(files.distributions))


def _names(one: Report, folder: Path, other: Report, other_folder: Path) -> tuple[str, str]:
    """Return what two runs are called on the page: what is different of recipes, folders or paths."""
    choices = ((one.name, other.name), (folder.name, other_folder.name), (str(folder), str(other_folder)))
    return next((pair for pair in choices if pair[0] != pair[1]), choices[0])


def _check_comparable(run: Run, other: Run) -> None:
    own, theirs = ({n for r in one.history for n in r.scores if not n.endswith("_loss")} for one in (run, other))
    if own and theirs and not own & theirs:
        raise BonnError(
            f"{other.name} measures {', '.join(sorted(theirs))}, {run.name} measures {', '.join(sorted(own))}: "
            "they can't be compared"
        )
