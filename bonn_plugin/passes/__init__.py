"""neural-compressor's own passes, run on single layers; what they find is returned as plain tensors.

The framework is imported here alone (besides ``bonn_plugin.inc``), and only when a pass runs.
"""

from bonn_plugin.passes.host import INSTALL, require_host
from bonn_plugin.passes.look import Seen, look
from bonn_plugin.passes.mixed import to_half
from bonn_plugin.passes.pt2e import IntegerLayer, StaticCalibration, quantize_dynamic
from bonn_plugin.passes.rtn import WeightOnly, round_to_nearest

__all__ = [
    "INSTALL",
    "IntegerLayer",
    "Seen",
    "StaticCalibration",
    "WeightOnly",
    "look",
    "quantize_dynamic",
    "require_host",
    "round_to_nearest",
    "to_half",
]
