"""Slow references: the equations written out in loops, in float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def sgn(value: float) -> float:
    return 1.0 if value >= 0 else -1.0


def eq12_and_15(weight: Tensor, modulation: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dX and dL/dw for an incoming dL/dX̂, element by element."""
    x, w, g = (t.double().numpy() for t in (weight, modulation, grad))
    grad_x, grad_w = np.zeros_like(x), np.zeros_like(w)
    for i in range(x.shape[0]):
        for k in np.ndindex(*w.shape):
            inside = -1 <= w[k] * x[i][k] <= 1
            if inside:
                grad_x[i][k] = g[i][k] * w[k]
                grad_w[k] += g[i][k] * x[i][k]
    return torch.from_numpy(grad_x), torch.from_numpy(grad_w)


def eq9_kernel(weight: Tensor, modulation: Tensor, mu: Tensor, sigma: Tensor, nu: float) -> float:
    """Half of the braces of Eq. 9, one layer."""
    x, w, m, s = (t.double().numpy() for t in (weight, modulation, mu, sigma))
    mean = w.mean()
    total = 0.0
    for i in range(x.shape[0]):
        for k in np.ndindex(*w.shape):
            total += (mean * sgn(x[i][k]) - w[k] * x[i][k]) ** 2
            total += nu * (x[i][k] - sgn(x[i][k]) * m[i]) ** 2 / s[i] ** 2
        total += nu * w.size * math.log(s[i] ** 2)
    return total / 2


def eq13_and_16_to_18(
    weight: Tensor, modulation: Tensor, mu: Tensor, sigma: Tensor, nu: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the kernel loss for X, w, mu and sigma, as printed (without lambda)."""
    x, w, m, s = (t.double().numpy() for t in (weight, modulation, mu, sigma))
    mean, n = w.mean(), w.size
    gx, gw, gm, gs = np.zeros_like(x), np.zeros_like(w), np.zeros_like(m), np.zeros_like(s)
    for i in range(x.shape[0]):
        for k in np.ndindex(*w.shape):
            value = x[i][k]
            binary = mean * sgn(value)
            shifted = value - m[i] if value >= 0 else value + m[i]
            gx[i][k] = w[k] * (w[k] * value - binary) + nu * s[i] ** -2 * shifted
            gw[k] += (w[k] * value - binary) * value
            gm[i] += nu / n * s[i] ** -2 * (m[i] - value if value >= 0 else m[i] + value)
            gs[i] += nu / n * (-(s[i] ** -3) * shifted**2 + 1 / s[i])
    return tuple(torch.from_numpy(t) for t in (gx, gw, gm, gs))  # type: ignore[return-value]


def eq8_feature(features: Tensor, labels: Tensor, centers: Tensor, sigma: Tensor) -> float:
    """Half of the braces of Eq. 8, batch mean."""
    f, c, s = (t.double().numpy() for t in (features, centers, sigma))
    total = 0.0
    for b in range(len(f)):
        y = int(labels[b])
        for k in range(f.shape[1]):
            square = (f[b, k] - c[y, k]) ** 2
            total += square + square / s[y, k] ** 2 + math.log(s[y, k] ** 2)
    return total / 2 / len(f)


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    """A convolution as nested loops; padded positions contribute nothing."""
    a, w = x.double().numpy(), weight.double().numpy()
    batch, _, height, width = a.shape
    filters, per_group, kh, kw = w.shape
    rows = (height + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
    columns = (width + 2 * padding - dilation * (kw - 1) - 1) // stride + 1
    out = np.zeros((batch, filters, rows, columns))
    for b, o, r, c in np.ndindex(*out.shape):
        first = o // (filters // groups) * per_group
        for i, u, v in np.ndindex(per_group, kh, kw):
            y, z = r * stride - padding + u * dilation, c * stride - padding + v * dilation
            if 0 <= y < height and 0 <= z < width:
                out[b, o, r, c] += a[b, first + i, y, z] * w[o, i, u, v]
    return torch.from_numpy(out)
