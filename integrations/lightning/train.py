"""Lightning's usual module and trainer, and one callback: 1-bit digits in less than a minute.

python integrations/lightning/train.py --out out
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import timm
import torch
from bonn_callback import BonnCallback
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bonn_plugin import BonnError, load_packed, load_recipe
from bonn_plugin.data import load_splits


class Classifier(LightningModule):
    """A module that knows nothing of 1-bit networks."""

    def __init__(self, name: str, lr: float, **args: object) -> None:
        super().__init__()
        self.model = timm.create_model(name, **args)
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        images, labels = batch
        self.log("top1", 100 * (self.model(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over all parameters, those of the 1-bit layers among them."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    torch.manual_seed(0)
    try:
        recipe = load_recipe(Path(__file__).with_name("recipe.yaml"), args.set)
        data = load_splits(recipe.data, recipe.model.num_classes)
        module = Classifier(
            recipe.model.name, recipe.training.optimizer.lr, num_classes=recipe.model.num_classes, **recipe.model.args
        )
        trainer = Trainer(
            max_epochs=recipe.training.epochs,
            accelerator="auto",
            devices=1,
            callbacks=[BonnCallback(recipe, args.out)],
            logger=False,
            enable_checkpointing=False,
        )
        size = recipe.training.batch_size
        trainer.fit(module, DataLoader(data.train, size, shuffle=True, drop_last=True), DataLoader(data.test, size))
        packed = load_packed(args.out)
    except BonnError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    with torch.no_grad():
        images, labels = next(iter(DataLoader(data.test, len(data.test))))
        print(f"{args.out}: packed, top-1 {100 * float((packed(images).argmax(1) == labels).float().mean()):.2f} %")


if __name__ == "__main__":
    main()
