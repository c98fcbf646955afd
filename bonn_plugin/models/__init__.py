"""The networks of the papers, registered in timm when this package is imported, and detectors on timm's networks."""

from bonn_plugin.models.build import ModelBuildError, build_model, build_outline
from bonn_plugin.models.detection import Detector, DetectorSettings, build_detector
from bonn_plugin.models.resnet import BonnResNet
from bonn_plugin.models.wrn import BonnWideResNet

__all__ = [
    "BonnResNet",
    "BonnWideResNet",
    "Detector",
    "DetectorSettings",
    "ModelBuildError",
    "build_detector",
    "build_model",
    "build_outline",
]
