"""Runs side by side: what each reached, what it costs, and which are on the Pareto front."""

from bonn_plugin.compare.comparison import Comparison, SeedGroup, Setting, compare_runs
from bonn_plugin.compare.pareto import pareto_front
from bonn_plugin.compare.plot import check_plot, write_plot
from bonn_plugin.compare.render import to_markdown, to_terminal
from bonn_plugin.compare.runs import Run, read_runs

__all__ = [
    "Comparison",
    "Run",
    "SeedGroup",
    "Setting",
    "check_plot",
    "compare_runs",
    "pareto_front",
    "read_runs",
    "to_markdown",
    "to_terminal",
    "write_plot",
]
