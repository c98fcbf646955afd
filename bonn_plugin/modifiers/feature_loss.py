"""``feature_loss``: the Bayesian feature loss on the classifier's input, while fine-tuning (BONN, Eq. 8 and 9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bonn_plugin.errors import ModelError, SessionError
from bonn_plugin.modifiers.base import Batch, Modifier, PrepareContext, Real, Stage, WindowConfig, register_modifier
from bonn_plugin.nn.features import FeatureClusters, FeatureTap


class FeatureLossConfig(WindowConfig):
    """Settings of ``feature_loss``.

    The first epoch of the window gathers the class means and spreads; the loss acts from the second.

    Attributes:
        theta: weight of the loss.
        center_rate: learning rate of the centres under the centre-loss rule.
    """

    type: Literal["feature_loss"] = "feature_loss"
    theta: Annotated[Real, Field(gt=0)]
    center_rate: Annotated[float, Field(gt=0, le=1)] = 0.5

    stage: ClassVar[Stage | None] = Stage.TRAIN
    shortest_window: ClassVar[int] = 2

    def refusal(self, task: str) -> str | None:
        """See ``ModifierConfig``: it needs one feature vector and one class an image."""
        if task == "classification":
            return None
        return f"feature_loss pulls the features of an image to those of its class; in {task} an image has no one class"


@register_modifier("feature_loss", FeatureLossConfig)
class FeatureLoss(Modifier[FeatureLossConfig]):
    """Taps the classifier's input and adds theta times the loss; moves the centres after each step."""

    clusters: FeatureClusters
    _classifier: nn.Linear
    _tap: FeatureTap
    _moved: tuple[tuple[Tensor, Tensor], ...] = ()

    def prepare(self, model: nn.Module, context: PrepareContext) -> None:
        """Find the classifier; see ``Modifier.prepare``."""
        self._classifier = find_classifier(model)
        self.clusters = FeatureClusters(self._classifier.out_features, self._classifier.in_features)
        self.clusters.to(self._classifier.weight.device)

    def attach(self) -> None:
        """Watch the classifier's input."""
        self._tap = FeatureTap(self._classifier)

    def detach(self) -> None:
        """Stop watching it."""
        self._tap.remove()

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the centres and spreads."""
        return {"clusters": self.clusters}

    @property
    def gathering(self) -> bool:
        """Whether this is the window's first epoch, which gathers and adds no loss."""
        return self.clock.epoch == self.config.start

    def on_epoch_begin(self) -> None:
        """Start from what the first epoch gathered."""
        if self.clock.epoch == self.config.start + 1:
            self.clusters.start()

    def on_step_begin(self) -> None:
        """Forget the features of a step that was skipped."""
        self._moved = ()

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return ``{"feature": theta * loss}``; nothing while gathering. The only place where theta is applied."""
        features = self._tap.take()
        if features is None:
            raise SessionError("feature_loss: no forward pass of the model in training mode before session.loss()")
        if batch.labels is None:
            raise SessionError("feature_loss needs the labels: call session.loss(labels=y)")
        if features.dim() != 2:
            raise SessionError(f"feature_loss: the classifier's input is {tuple(features.shape)}, not (B, D)")
        if self.gathering:
            self.clusters.gather(features, batch.labels)
            return {}
        self._moved = (*self._moved, (features.detach(), batch.labels))
        return {"feature": self.config.theta * self.clusters.loss(features, batch.labels)}

    def on_after_optimizer_step(self) -> None:
        """Move the centres by their own rule, once with the features of all micro-batches."""
        if self._moved:
            features, labels = (torch.cat(parts) for parts in zip(*self._moved, strict=True))
            self.clusters.move_centers(features, labels, self.config.center_rate)
            self._moved = ()


def find_classifier(model: nn.Module) -> nn.Linear:
    """Return the linear classifier of a timm model.

    Raises:
        ModelError: the model has none.
    """
    getter: Any = getattr(model, "get_classifier", None)
    classifier = getter() if callable(getter) else getattr(model, "fc", None)
    if not isinstance(classifier, nn.Linear):
        raise ModelError(
            f"feature_loss needs a classifier that is one linear layer; {type(model).__name__} has "
            f"{type(classifier).__name__ if classifier is not None else 'none'}"
        )
    return classifier
