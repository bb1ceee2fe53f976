"""What a student can be trained on: a loss, and what of the student and the teacher it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import Head, kd_loss
from .config import Mix
from .model import Transformer

# The loss from the student's source, the teacher's and the labels [N].
Loss = Callable[[Any, Any, Tensor], Tensor]

# The loss of one step from the model in training, the batch's ids [B, L] and the labels [N], N = B · L.
StepLoss = Callable[[Transformer, Tensor, Tensor], Tensor]


def hard(mix: Mix) -> Loss:
    """Cross-entropy with the labels; the teacher isn't looked at."""
    return lambda z, v, labels: F.cross_entropy(z, labels)


def eager(mix: Mix) -> Loss:
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


def fused(mix: Mix) -> Loss:
    """The same mix in one call of `kd_loss`, of logits or of heads."""
    return lambda z, v, labels: kd_loss(
        z, v, labels, temperature=mix.temperature, soft_weight=mix.soft_weight, hard_weight=mix.hard_weight
    )


def logits(model: Transformer, ids: Tensor) -> Tensor:
    """A model's logits [N, V]."""
    return model(ids).flatten(0, 1)


def head(model: Transformer, ids: Tensor) -> Head:
    """A model's hidden states [N, d] and the head that would make its logits."""
    return Head(model.hidden(ids).flatten(0, 1), model.embed.weight, model.bias)


@dataclass(frozen=True)
class Objective:
    """What a student is trained on.

    Attributes:
        loss: Makes the loss of a mix.
        source: What of a model the loss is given.
        distils: Whether the loss looks at the teacher.
        fused: Whether `kd_loss` computes it, so that its curve is compared with eager's.
    """

    loss: Callable[[Mix], Loss]
    source: Callable[[Transformer, Tensor], Tensor | Head] = logits
    distils: bool = True
    fused: bool = False

    def step_loss(self, mix: Mix, teacher: Transformer | None) -> StepLoss:
        """The loss of a training step; the teacher, None where there is none, runs without a graph."""
        loss = self.loss(mix)
        followed = teacher if self.distils else None

        def step(model: Transformer, ids: Tensor, labels: Tensor) -> Tensor:
            student = self.source(model, ids)
            # A head made here is detached, as logits are.
            with torch.no_grad():
                target = None if followed is None else self.source(followed, ids)
            return loss(student, target, labels)

        return step


# The students of the table, in its order.
STUDENTS = {
    "hard": Objective(hard, distils=False),
    "eager": Objective(eager),
    "kd_loss": Objective(fused, fused=True),
    "heads": Objective(fused, head, fused=True),
}
