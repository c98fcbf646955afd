"""A Lightning callback that makes a network 1-bit while it trains; the LightningModule stays as it is.

trainer = Trainer(max_epochs=30, callbacks=[BonnCallback(load_recipe("recipe.yaml"), "out")])
trainer.fit(module)     # out/ holds the packed checkpoint afterwards
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from bonn_plugin import BonnError, Recipe, Session, save_packed, verify_packed


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Take a batch apart: a pair of images (B, C, H, W) and class indices (B,).

    Raises:
        BonnError: it is no pair.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise BonnError(f"a batch is a {type(batch).__name__}, no pair (images, labels): pass BonnCallback(unpack=...)")


class BonnCallback(Callback):
    """Runs a ``Session`` within ``Trainer.fit``.

    The network is changed in ``setup``, before the optimizer is made. The modifiers' losses are added to what
    ``training_step`` returns, so that mixed precision and the accumulation of gradients treat them as the rest of the
    loss. The session's state goes into Lightning's checkpoints.

    Args:
        recipe: what to do; its ``training.epochs`` must be the trainer's, its optimizer and schedule are not used
            unless ``configure_optimizers`` asks for them, see ``session``.
        out: where the packed checkpoint is written when ``fit`` ends.
        network: the LightningModule's attribute that is the network of the recipe.
        unpack: takes a batch apart into images and labels.
        steps_per_epoch: optimizer steps an epoch; None to ask the trainer.

    Raises:
        BonnError: from ``Trainer.fit``: something does not fit; nothing is skipped in silence.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        *,
        network: str = "model",
        unpack: Callable[[Any], tuple[Tensor, Tensor]] = images_and_labels,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.out = Path(out)
        self.network = network
        self.unpack = unpack
        self.steps_per_epoch = steps_per_epoch
        self._session: Session | None = None
        self._steps = 0
        self._outputs: Tensor | None = None
        self._hook: Any = None

    @property
    def session(self) -> Session:
        """The session, from ``setup`` on: ``configure_optimizers`` may use ``callback.session.param_groups()``.

        Raises:
            BonnError: ``fit`` has not begun.
        """
        if self._session is None:
            raise BonnError("BonnCallback has a session only from Trainer.fit on")
        return self._session

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Binarise the network and add the losses to ``training_step``."""
        if stage != "fit":
            return
        network = self._network(pl_module)
        if not pl_module.automatic_optimization:
            raise BonnError(
                "BonnCallback needs automatic optimization; with a manual one use bonn_plugin.Session itself"
            )
        if trainer.world_size > 1:
            raise BonnError(f"BonnCallback trains in one process, the trainer has {trainer.world_size}")
        if trainer.max_epochs != self.recipe.training.epochs:
            raise BonnError(
                f"the recipe has {self.recipe.training.epochs} epochs, the trainer {trainer.max_epochs}: pass "
                f"Trainer(max_epochs={self.recipe.training.epochs}) or change training.epochs"
            )
        self._session = Session(self.recipe, self.steps_per_epoch or _steps_per_epoch(trainer))
        self._session.prepare(network)
        self._steps = trainer.global_step
        self._hook = network.register_forward_hook(self._keep)
        self._add_losses(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimizer has what the modifiers learn."""
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        for group in self.session.param_groups():
            if group["role"] != "rest" and any(id(p) not in held for p in group["params"]):
                raise BonnError(
                    f"parameters of the role {group['role']!r} are not in the optimizer: make it from "
                    "callback.session.param_groups() in configure_optimizers"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the trainer's count of steps, after a resume too."""
        self._steps = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let modifiers work on the gradients."""
        self.session.before_step()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count the optimizer's steps, of which there is not one a batch where gradients accumulate."""
        while self._steps < trainer.global_step:
            self._steps += 1
            self.session.step()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the packed checkpoint and verify it."""
        self._hook.remove()
        packed = self.session.convert(lambda: self._calibration(trainer))
        save_packed(packed, self.out, self.recipe)
        verify_packed(self.out)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the LightningModule its own ``training_step`` back."""
        if stage == "fit":
            pl_module.__dict__.pop("training_step", None)

    def state_dict(self) -> dict[str, Any]:
        """Return the session's state, for Lightning's checkpoints."""
        return {} if self._session is None else self._session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was taken."""
        if state_dict and self._session is not None:
            self._session.load_state_dict(state_dict)

    def _network(self, pl_module: LightningModule) -> nn.Module:
        try:
            network = pl_module.get_submodule(self.network)
        except AttributeError:
            network = pl_module
        if network is pl_module:
            names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise BonnError(
                f"{type(pl_module).__name__} has no network {self.network!r}; its modules are: {names}. "
                "Make it in __init__ and pass BonnCallback(network=...)"
            )
        return network

    def _keep(self, module: nn.Module, _: Any, outputs: Tensor) -> None:
        if module.training:
            self._outputs = outputs

    def _add_losses(self, pl_module: LightningModule) -> None:
        own = pl_module.training_step

        @wraps(own)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            result = own(batch, *args, **kwargs)
            loss = result.get("loss") if isinstance(result, Mapping) else result
            if not isinstance(loss, Tensor):
                raise BonnError(
                    f"training_step returned {type(result).__name__}: no loss to add the modifiers' losses to"
                )
            outputs, self._outputs = self._outputs, None
            images, labels = self.unpack(batch)
            terms = self.session.loss(labels=labels, images=images, outputs=outputs)
            for name, term in terms.terms.items():
                pl_module.log(f"bonn/{name}", term.detach())
            loss = loss + terms.total
            return {**result, "loss": loss} if isinstance(result, Mapping) else loss

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def _calibration(self, trainer: Trainer) -> Iterator[Tensor]:
        """Yield training images, in the order of the data set: the same at each call."""
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise BonnError(f"calibration needs a DataLoader to train from, not a {type(loader).__name__}")
        device = next(self.session.model.parameters()).device
        for batch in DataLoader(loader.dataset, batch_size=loader.batch_size or 32, collate_fn=loader.collate_fn):
            yield self.unpack(batch)[0].to(device)


def _steps_per_epoch(trainer: Trainer) -> int:
    """Return the optimizer steps of an epoch; asking for their number has the trainer make its loaders."""
    if math.isinf(trainer.estimated_stepping_batches):
        raise BonnError("the training data has no length: pass BonnCallback(steps_per_epoch=...)")
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
