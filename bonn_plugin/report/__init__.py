"""Reports: the ledger of stored bits, and its tables."""

from bonn_plugin.report.html import PAGE, RunFiles, write_page
from bonn_plugin.report.ledger import Entry, Ledger, Rule, float32_file_bytes, ledger
from bonn_plugin.report.merging import Unmerged, unmerged
from bonn_plugin.report.model import Accuracy, Precision, Report, make_report
from bonn_plugin.report.plots import write_plots
from bonn_plugin.report.render import to_markdown, to_terminal
from bonn_plugin.report.source import read_report

__all__ = [
    "PAGE",
    "Accuracy",
    "Entry",
    "Ledger",
    "Precision",
    "Report",
    "Rule",
    "RunFiles",
    "Unmerged",
    "float32_file_bytes",
    "ledger",
    "make_report",
    "read_report",
    "to_markdown",
    "to_terminal",
    "unmerged",
    "write_page",
    "write_plots",
]
