"""The loss between a network's logits and its teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch.

    With T = 1 its gradient is that of ReActNet's distributional loss (ECCV 2020), which leaves the
    teacher's entropy out; T^2 keeps the gradient's scale (Hinton et al. 2015, section 2).

    Args:
        student: logits (B, classes), of any floating dtype: the loss is computed in float32.
        teacher: logits (B, classes), without gradient.
        temperature: T > 0.

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"logits of shape {tuple(student.shape)}, the teacher's have {tuple(teacher.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    ours = F.log_softmax(student.float() / temperature, 1)
    theirs = F.log_softmax(teacher.detach().float() / temperature, 1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
