"""Batch norms whose statistics are those of all processes' samples."""

from __future__ import annotations

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from bonn_plugin.collective import ranks, sum_over_ranks
from bonn_plugin.nn.storage import replace_module


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm for a CPU that takes mean and variance over all processes: torch's SyncBatchNorm needs a GPU.

    Each process must hold as many samples. In eval mode it is the norm that it was made from.

    Args:
        norm: its parameters become this one's; so does what timm's norms have after them.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        _share(norm, self)
        self.drop = getattr(norm, "drop", None)
        self.act = getattr(norm, "act", None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        y = self._synced(x) if self.training and ranks() > 1 else super().forward(x)
        for after in (self.drop, self.act):
            y = y if after is None else after(y)
        return y

    def _synced(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        mean = sum_over_ranks(wide.mean((0, 2, 3))) / ranks()
        centred = wide - mean[:, None, None]
        variance = sum_over_ranks(centred.square().mean((0, 2, 3))) / ranks()
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach(), ranks() * (x.numel() // x.shape[1]))
        y = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            y = torch.addcmul(self.bias[:, None, None], y, self.weight[:, None, None])
        return y.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, samples: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * (samples / max(1, samples - 1))).to(self.running_var.dtype), share)


def synchronise_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Put synchronised norms in the place of ``model``'s batch norms, with the same parameters.

    On a GPU they are torch's ``SyncBatchNorm``.

    Returns:
        The norms that stood there, by name; for ``restore_norms``.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        on_cpu = all(tensor.device.type == "cpu" for tensor in norm.state_dict().values())
        synced = SyncedBatchNorm2d(norm) if on_cpu else convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]
        replace_module(model, name, synced)
    return dict(norms)


def restore_norms(model: nn.Module, norms: dict[str, nn.Module]) -> None:
    """Put the plain norms back, with what the synchronised ones have learned."""
    for name, norm in norms.items():
        _share(model.get_submodule(name), norm)
        replace_module(model, name, norm)


def _share(source: nn.Module, target: nn.Module) -> None:
    for name, parameter in source.named_parameters(recurse=False):
        setattr(target, name, parameter)
    for name, buffer in source.named_buffers(recurse=False):
        setattr(target, name, buffer)


__all__ = ["SyncedBatchNorm2d", "restore_norms", "synchronise_norms"]
