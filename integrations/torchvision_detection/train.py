"""A detection loop of one's own, after torchvision's reference scripts, and a ``Session`` in it.

    python integrations/torchvision_detection/train.py integrations/torchvision_detection/recipe.yaml --out out

The detector is trained in full precision, as it always was, and goes on from there with 1-bit convolutions in its
backbone. The lines that are ours have a comment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from bonn_plugin import BonnError, Recipe, Session, load_packed, load_recipe, save_packed, verify_packed
from bonn_plugin.data import Target, load_detection_splits
from bonn_plugin.recipe import recipe_model
from bonn_plugin.train import mean_average_precision


def collate_fn(batch: list[tuple[Tensor, Target]]) -> tuple[tuple[Tensor, ...], tuple[Target, ...]]:
    """Leave images and targets as they are: images differ in size."""
    images, targets = zip(*batch, strict=True)
    return images, targets


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: OneCycleLR,
    loader: DataLoader,
    device: torch.device,
    session: Session | None = None,
) -> dict[str, float]:
    """Train for an epoch; return the mean of each loss."""
    model.train()
    sums: dict[str, float] = {}
    for images, targets in loader:
        images = [image.to(device) for image in images]
        targets = [{key: target[key].to(device) for key in ("boxes", "labels")} for target in targets]
        loss_dict = model(images, targets)
        if session is not None:
            loss_dict.update(session.loss().terms)  # ours
        losses = sum(loss for loss in loss_dict.values())
        optimizer.zero_grad()
        losses.backward()
        if session is not None:
            session.before_step()  # ours
        optimizer.step()
        if session is not None:
            session.step()  # ours
        schedule.step()
        for name, loss in loss_dict.items():
            sums[name] = sums.get(name, 0.0) + loss.item()
    return {name: value / len(loader) for name, value in sums.items()}


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, device: torch.device) -> dict[str, float]:
    """Return COCO's mean average precision, from 0 to 1, by its names."""
    model.eval()
    found, there = [], []
    for images, targets in loader:
        outputs = model([image.to(device) for image in images])
        found += [{key: value.cpu() for key, value in output.items()} for output in outputs]
        there += targets
    return mean_average_precision(found, there)


def train(recipe: Recipe, out: Path, device: torch.device, real_epochs: int) -> dict[str, float]:
    """Train in full precision and then in 1 bit, save the packed checkpoint in ``out``; return its measurements."""
    settings = recipe.training
    torch.manual_seed(settings.seed)
    data = load_detection_splits(recipe.data, recipe.model.num_classes)  # or a data set of your own
    loader = DataLoader(data.train, settings.batch_size, shuffle=True, drop_last=True, collate_fn=collate_fn)
    held_out = DataLoader(data.test, settings.batch_size, collate_fn=collate_fn)
    model = recipe_model(recipe).to(device)  # ours: torchvision's detector on a backbone of timm

    def epochs(count: int, optimizer: torch.optim.Optimizer, session: Session | None) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        schedule = OneCycleLR(optimizer, rates, total_steps=max(1, count * len(loader)))
        for epoch in range(count):
            losses = train_one_epoch(model, optimizer, schedule, loader, device, session)
            measured = evaluate(model, held_out, device)
            words = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
            bits = "float32" if session is None else "1 bit"
            print(f"{bits}, epoch {epoch + 1}/{count}: {words}  mAP {measured['test_map']:.3f}")

    # Or load the weights of a detector that you have trained: model.load_state_dict(...)
    epochs(real_epochs, torch.optim.AdamW(model.parameters(), lr=settings.optimizer.lr), None)

    session = Session(recipe, steps_per_epoch=len(loader))  # ours
    session.prepare(model)  # ours: before the optimizer is made
    optimizer = torch.optim.AdamW(session.param_groups(), lr=settings.optimizer.lr)  # ours: rates and decay by role
    epochs(session.epochs, optimizer, session)

    save_packed(session.convert(), out, recipe)  # ours
    verify_packed(out)
    return evaluate(load_packed(out, device), held_out, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--real-epochs", type=int, default=4, help="epochs in full precision before")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        recipe = load_recipe(args.recipe, args.set)
        if recipe.model.task != "detection":
            raise BonnError(f"{args.recipe}: its task is {recipe.model.task}, this script trains detectors")
        measured = train(recipe, args.out, torch.device(args.device), args.real_epochs)
    except BonnError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: packed, " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))


if __name__ == "__main__":
    main()
