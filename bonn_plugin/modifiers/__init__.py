"""Modifiers: one file each, its settings and its behaviour; importing this package registers them."""

from bonn_plugin.modifiers.base import (
    Batch,
    Clock,
    ConvertContext,
    LossTerms,
    Modifier,
    ModifierConfig,
    PrepareContext,
    RunOf,
    Stage,
    WindowConfig,
    make_modifier,
    register_modifier,
    registered_modifiers,
)
from bonn_plugin.modifiers.binarize import Binarize, BinarizeConfig, InputSigns, probe_input_signs
from bonn_plugin.modifiers.channel_prune import ChannelPrune, ChannelPruneConfig
from bonn_plugin.modifiers.distill import Distill, DistillConfig, FolderOf, TimmNetwork
from bonn_plugin.modifiers.feature_loss import FeatureLoss, FeatureLossConfig
from bonn_plugin.modifiers.filter_merge import FilterMergeConfig, FilterMergeModifier
from bonn_plugin.modifiers.inc_dynamic_int8 import IncDynamicInt8, IncDynamicInt8Config
from bonn_plugin.modifiers.inc_half import IncHalf, IncHalfConfig
from bonn_plugin.modifiers.inc_int8 import IncInt8, IncInt8Config
from bonn_plugin.modifiers.inc_weight_only import IncWeightOnly, IncWeightOnlyConfig
from bonn_plugin.modifiers.kernel_loss import KernelLoss, KernelLossConfig, model_kernel_loss
from bonn_plugin.modifiers.magnitude_prune import MagnitudePrune, MagnitudePruneConfig
from bonn_plugin.modifiers.projection_loss import ProjectionLoss, ProjectionLossConfig
from bonn_plugin.modifiers.rest import RestConfig, RestModifier
from bonn_plugin.modifiers.select import LeftAlone, left_alone, near_names, select_convolutions

__all__ = [
    "Batch",
    "Binarize",
    "BinarizeConfig",
    "ChannelPrune",
    "ChannelPruneConfig",
    "Clock",
    "ConvertContext",
    "Distill",
    "DistillConfig",
    "FeatureLoss",
    "FeatureLossConfig",
    "FilterMergeConfig",
    "FilterMergeModifier",
    "FolderOf",
    "IncDynamicInt8",
    "IncDynamicInt8Config",
    "IncHalf",
    "IncHalfConfig",
    "IncInt8",
    "IncInt8Config",
    "IncWeightOnly",
    "IncWeightOnlyConfig",
    "InputSigns",
    "KernelLoss",
    "KernelLossConfig",
    "LeftAlone",
    "LossTerms",
    "MagnitudePrune",
    "MagnitudePruneConfig",
    "Modifier",
    "ModifierConfig",
    "PrepareContext",
    "ProjectionLoss",
    "ProjectionLossConfig",
    "RestConfig",
    "RestModifier",
    "RunOf",
    "Stage",
    "TimmNetwork",
    "WindowConfig",
    "left_alone",
    "make_modifier",
    "model_kernel_loss",
    "near_names",
    "probe_input_signs",
    "register_modifier",
    "registered_modifiers",
    "select_convolutions",
]
