"""What a student can be trained on, as functions of student logits, teacher logits and labels."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .. import kd_loss
from .config import Mix

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def hard(mix: Mix) -> Objective:
    """Cross-entropy with the labels; the teacher isn't looked at."""
    return lambda z, v, labels: F.cross_entropy(z, labels)


def eager(mix: Mix) -> Objective:
    """The mix as PyTorch's own operators spell it."""
    T = mix.temperature

    def loss(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        lq, lp = F.log_softmax(z / T, dim=-1), F.log_softmax(v / T, dim=-1)
        soft = T**2 * F.kl_div(lq, lp, log_target=True, reduction="batchmean")
        return mix.soft_weight * soft + mix.hard_weight * F.cross_entropy(z, labels)

    def loss_at_one(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        # At T = 1 both terms share one log-softmax and nothing is divided: what a careful user would write.
        lq, lp = F.log_softmax(z, dim=-1), F.log_softmax(v, dim=-1)
        soft = F.kl_div(lq, lp, log_target=True, reduction="batchmean")
        return mix.soft_weight * soft + mix.hard_weight * F.nll_loss(lq, labels)

    return loss_at_one if T == 1 else loss


def fused(mix: Mix) -> Objective:
    """The same mix in one call of `kd_loss`."""
    return lambda z, v, labels: kd_loss(
        z, v, labels, temperature=mix.temperature, soft_weight=mix.soft_weight, hard_weight=mix.hard_weight
    )


# The students of the table, in its order.
STUDENTS: dict[str, Callable[[Mix], Objective]] = {"hard": hard, "eager": eager, "kd_loss": fused}
