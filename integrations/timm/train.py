"""A loop of one's own with timm's data sets, loaders, augmentation, optimizers and schedulers, and a ``Session`` in it.

    python integrations/timm/train.py integrations/timm/recipe.yaml --set data.root=/data/images --out out

timm's part is as in its train.py; the lines that are ours have a comment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader

from bonn_plugin import BonnError, Recipe, Session, load_packed, load_recipe, save_packed
from bonn_plugin.recipe import ImageFolderConfig, recipe_model


def make_loader(recipe: Recipe, model: nn.Module, split: str) -> DataLoader:
    """Return timm's loader of one split, with its augmentation for training.

    Raises:
        BonnError: the recipe's data is no image folder, or the folder holds no images.
    """
    data = recipe.data
    if not isinstance(data, ImageFolderConfig):
        raise BonnError(f"data {data.name!r} is no folder of images: this script reads 'imagefolder'")
    training = split == "train"
    folder = Path(data.root) / split
    if not folder.is_dir():
        raise BonnError(f"{folder}: no such folder; it should have a folder of images for each class")
    try:
        dataset = create_dataset("", root=str(folder), split=split, is_training=training)
    except RuntimeError as error:
        raise BonnError(f"{folder}: {error}") from error
    found = resolve_data_config({}, model=model)
    return create_loader(
        dataset,
        input_size=(3, data.crop, data.crop),
        batch_size=recipe.training.batch_size,
        is_training=training,
        hflip=0.5 if training and data.flip else 0.0,
        interpolation=found["interpolation"],
        mean=found["mean"],
        std=found["std"],
        crop_pct=0.875,
        num_workers=data.workers,
        persistent_workers=data.workers > 0,
        use_prefetcher=False,
    )


def train(recipe: Recipe, out: Path, device: torch.device) -> float:
    """Train as the recipe says, save the packed checkpoint in ``out``, return its top-1 on ``val/`` in percent."""
    settings = recipe.training
    torch.manual_seed(settings.seed)
    model = recipe_model(recipe).to(device)
    loader, held_out = (make_loader(recipe, model, split) for split in ("train", "val"))

    session = Session(recipe, steps_per_epoch=len(loader))  # ours
    session.prepare(model)  # ours: before the optimizer is made
    optimizer = create_optimizer_v2(
        session.param_groups(),  # ours: rates and weight decay by role
        opt=settings.optimizer.name,
        lr=settings.optimizer.lr,
        weight_decay=settings.optimizer.weight_decay,
        momentum=settings.optimizer.momentum,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=settings.schedule.name,
        num_epochs=settings.epochs,
        warmup_epochs=settings.schedule.warmup_epochs,
        warmup_lr=settings.optimizer.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    criterion = LabelSmoothingCrossEntropy(settings.label_smoothing)
    updates = 0
    for epoch in range(session.epochs):
        model.train()
        losses = AverageMeter()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss = criterion(logits, labels)
            loss = loss + session.loss(labels=labels, images=images, outputs=logits).total  # ours
            optimizer.zero_grad()
            loss.backward()
            session.before_step()  # ours
            optimizer.step()
            session.step()  # ours
            updates += 1
            scheduler.step_update(updates)
            losses.update(loss.item(), len(labels))
        print(f"epoch {epoch + 1}/{session.epochs}: loss {losses.avg:.4f}, top-1 {evaluate(model, held_out):.2f} %")

    save_packed(session.convert(), out, recipe)  # ours
    return evaluate(load_packed(out, device), held_out)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader) -> float:
    """Return top-1 in percent."""
    device = next(iter(model.state_dict().values())).device
    model.eval()
    top1 = AverageMeter()
    for images, labels in loader:
        (percent,) = accuracy(model(images.to(device)), labels.to(device))
        top1.update(float(percent), len(labels))
    return top1.avg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        top1 = train(load_recipe(args.recipe, args.set), args.out, torch.device(args.device))
    except BonnError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: packed, top-1 {top1:.2f} %")


if __name__ == "__main__":
    main()
