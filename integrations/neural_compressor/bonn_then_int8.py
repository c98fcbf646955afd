"""neural-compressor as its users write it: 1-bit training by BonnConfig, then the framework's own INT8 on the rest.

    python integrations/neural_compressor/bonn_then_int8.py [--epochs 10] [--out runs/bonn_then_int8]

Data: scikit-learn's digits. Needs: pip install "bonn_plugin[inc]"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from bonn_plugin import ModelConfig, ledger, save_packed
from bonn_plugin.inc import BonnConfig, kernel_loss

NETWORK = {"depths": [2, 2, 2, 2], "widths": [16, 32, 64, 64]}
BATCH = 64


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, convert twice, and return the accuracies in percent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/bonn_then_int8"))
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    train, test = digits()
    example = next(iter(train))[0]
    model = timm.create_model("bonn_resnet18", num_classes=10, **NETWORK)

    # 1 bit: prepare, train, convert.
    model = prepare(model, BonnConfig(lambda_=1e-4), example_inputs=example)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train))
    for _ in range(args.epochs):
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels) + kernel_loss(model)
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    trained = accuracy(model, test)
    packed = convert(model)
    folder = save_packed(packed, args.out, ModelConfig(name="bonn_resnet18", num_classes=10, args=NETWORK))
    print(f"1 bit: {trained:.2f} %, packed {accuracy(packed, test):.2f} %, {folder}, rate {ledger(packed).rate():.1f}")

    # INT8: the framework's static PT2E on what stayed real. The 1-bit convolutions are operators of their own.
    exported = export(packed, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    prepared = prepare(exported, StaticQuantConfig())
    with torch.no_grad():
        for images, _ in train:
            prepared(images)
    int8 = convert(prepared)
    found = {"trained": trained, "packed": accuracy(packed, test), "int8": accuracy(int8, test)}
    print(f"1 bit and INT8: {found['int8']:.2f} %")
    return found


def digits() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Return loaders of 32x32 images with three channels, for training and testing."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = nn.functional.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    both = TensorDataset(images.contiguous(), torch.from_numpy(data.target))
    train, test = random_split(both, [len(both) - 300, 300], torch.Generator().manual_seed(0))
    return DataLoader(train, BATCH, shuffle=True, drop_last=True), DataLoader(test, 100)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """Return top-1 in percent."""
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    return 100 * right / 300


if __name__ == "__main__":
    main()
