"""What the checks examine: a loss that can be called, and what it has been found to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, Refused, quiet, told
from .identify import Model, logits


@dataclass(frozen=True)
class Claims:
    """What the loss's documentation says, where it was given.

    Attributes:
        divergence: Name and parameters of the divergence, or None.
        denominator: What a mean divides by: counted, rows, batch, elements or one; or None.
        shift: Who shifts labels, caller or inside; or None.
        teacher_gradient: Whether a teacher gets one; or None.
    """

    divergence: tuple[str, tuple[float, ...]] | None = None
    denominator: str | None = None
    shift: str | None = None
    teacher_gradient: bool | None = None


@dataclass(frozen=True)
class Outcome:
    """A loss and its gradient with respect to the student's logits."""

    loss: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Subject:
    """A loss under examination.

    Attributes:
        adapter: How it is called.
        model: What it has been found to be, or None.
        tempered: The model with what T does, or None where it takes no temperature or that wasn't found.
        claims: What it says of itself.
        reduction: mean, sum, none, classes (one value for each class), or None where that wasn't found.
        max_vocab: The largest vocabulary that it is called with.
        device: Where.
    """

    adapter: Adapter
    model: Model | None
    tempered: Model | None
    claims: Claims
    reduction: str | None
    max_vocab: int
    device: torch.device

    def call(self, z: Tensor, v: Tensor, labels: Tensor | None = None, **given: Any) -> Tensor:
        """The loss of rows, at T = 1 unless told otherwise, with labels where it takes them."""
        if self.adapter.takes("temperature"):
            given.setdefault("temperature", 1.0)
        return self.adapter(z, v, labels if self.adapter.takes("labels") else None, **given)

    def outcome(
        self,
        z: Tensor,
        v: Tensor,
        labels: Tensor | None = None,
        upstream: Callable[[Tensor], Tensor] = torch.ones_like,
        **given: Any,
    ) -> Outcome:
        """The loss and its gradient, of a copy of the student's logits."""
        leaf = z.detach().clone().requires_grad_()
        return self.outcome_of(leaf, leaf, v, labels, upstream, **given)

    def outcome_of(
        self,
        leaf: Tensor,
        student: Tensor,
        v: Tensor,
        labels: Tensor | None = None,
        upstream: Callable[[Tensor], Tensor] = torch.ones_like,
        **given: Any,
    ) -> Outcome:
        """The loss of `student`, and its gradient with respect to the leaf that it was made of."""
        loss = self.call(student, v, labels, **given)
        if not loss.requires_grad:
            raise Refused("gave back a loss without a gradient")
        try:
            with quiet():
                (grad,) = torch.autograd.grad(loss, leaf, upstream(loss), allow_unused=True)
        except Exception as error:  # its own backward may raise anything
            raise Refused(f"in backward {told(error)}") from error
        return Outcome(loss.detach(), torch.zeros_like(leaf) if grad is None else grad)

    def weight(self, rows: int) -> float:
        """By what a row's loss is multiplied in that of several."""
        return 1.0 / rows if self.reduction == "mean" else 1.0

    def truth(
        self,
        z: Tensor,
        v: Tensor,
        labels: Tensor | None = None,
        T: float = 1.0,
        dtype: torch.dtype = torch.float64,
        scale: float = 1.0,
    ) -> Outcome:
        """What the model says: in fp64, or as a careful user computes it in another dtype, rounded once."""
        model = self.tempered if T != 1.0 else self.model
        assert model is not None
        leaf = z.detach().clone().requires_grad_()
        if dtype == torch.float64:
            leaf = leaf.detach().double().requires_grad_()
        labels = labels if self.adapter.takes("labels") else None
        each = model.rows(leaf.to(dtype), v.detach().to(dtype), labels, T)
        loss = each.sum() * self.weight(len(z))
        (grad,) = torch.autograd.grad(loss * scale, leaf)
        return Outcome(loss.detach(), grad)

    def sample(
        self, n: int, classes: int, seed: int, dtype: torch.dtype = torch.float64, spread: float = 2.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Student, teacher and labels of some rows."""
        z, v, labels = logits(n, classes, seed, spread)
        return z.to(self.device, dtype), v.to(self.device, dtype), labels.to(self.device)


def off(got: Tensor, exact: Tensor) -> float:
    """How far, relative to the norm: infinite for another number of values, NaN where one is."""
    got, exact = got.double().flatten(), exact.double().flatten()
    if got.shape != exact.shape:
        return float("inf")
    return float((got - exact).norm() / exact.norm().clamp_min(1e-30))
