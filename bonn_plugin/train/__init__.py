"""The runner: a recipe from the first batch to the verified checkpoint.

``runner`` drives the epochs, a ``Task`` says what a batch, a loss and a measurement are.
"""

from bonn_plugin.train.chain import EarlierRun, earlier_runs
from bonn_plugin.train.classification import Classification, check_images
from bonn_plugin.train.detection import Detection, equal_detections, mean_average_precision
from bonn_plugin.train.device import choose_device
from bonn_plugin.train.evaluate import Evaluation, evaluate, evaluate_export
from bonn_plugin.train.logs import DISTRIBUTIONS, EVENTS, METRICS, SUMMARY, LogOptions
from bonn_plugin.train.pictures import DETECTIONS_PLOT, draw_detections
from bonn_plugin.train.runner import BAD_STEP, STATE, Outcome, Progress, Quiet, Runner, check_free, write_report
from bonn_plugin.train.stop import Stopped, StopRequest
from bonn_plugin.train.task import Scores, Step, Task
from bonn_plugin.train.world import RANK_TIMEOUT, World, open_world

__all__ = [
    "BAD_STEP",
    "DETECTIONS_PLOT",
    "DISTRIBUTIONS",
    "EVENTS",
    "METRICS",
    "RANK_TIMEOUT",
    "STATE",
    "SUMMARY",
    "Classification",
    "Detection",
    "EarlierRun",
    "Evaluation",
    "LogOptions",
    "Outcome",
    "Progress",
    "Quiet",
    "Runner",
    "Scores",
    "Step",
    "StopRequest",
    "Stopped",
    "Task",
    "World",
    "check_free",
    "check_images",
    "choose_device",
    "draw_detections",
    "earlier_runs",
    "equal_detections",
    "evaluate",
    "evaluate_export",
    "mean_average_precision",
    "open_world",
    "write_report",
]
