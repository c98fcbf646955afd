"""The networks of the papers, registered in timm when this package is imported."""

from bonn_plugin.models.build import ModelBuildError, build_model
from bonn_plugin.models.resnet import BonnResNet
from bonn_plugin.models.wrn import BonnWideResNet

__all__ = ["BonnResNet", "BonnWideResNet", "ModelBuildError", "build_model"]
