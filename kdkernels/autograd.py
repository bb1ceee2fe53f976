"""The autograd Functions of the fused backends, and nothing else.

Forward writes the gradient in the same pass as the loss and saves only that: both logits tensors can die.
float16 is the exception: the loss scale arrives with the upstream gradient, after the rounding would have
been made, so there forward saves the rows' statistics and backward computes the gradient with the upstream
factor applied first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .spec import LossSpec


def _graph_is_kept() -> bool:
    # Private, and so guarded: without it every backward scales out of place, which is right and one tensor
    # dearer.
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else query()


class KDFunction(torch.autograd.Function):
    """The loss of a fused backend, differentiable once with respect to the student's raw logits.

    `forward` returns the loss, the stats (or None), and what backward needs: the gradient at an upstream
    gradient of 1, or for float16 the rows' statistics.
    """

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        mask: Tensor | None,
        token_weights: Tensor | None,
        num_items: Tensor | float | None,
        spec: LossSpec,
        classes: int,
        backend: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One pass over the rows."""
        want = "state" if student.dtype == torch.float16 else "gradient"
        return backend.forward(student, teacher, labels, mask, token_weights, num_items, spec, classes, want)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Saves the gradient, or for float16 the inputs and the rows' statistics."""
        student, teacher, labels, mask, token_weights, num_items, ctx.spec, ctx.classes, ctx.backend = inputs
        _, stats, saved = output
        ctx.mark_non_differentiable(*(t for t in (stats, saved) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.recompute = student.dtype == torch.float16
        if ctx.recompute:
            ctx.num_items = None if isinstance(num_items, Tensor) else num_items
            items = num_items if isinstance(num_items, Tensor) else None
            ctx.save_for_backward(saved, student, teacher, labels, mask, token_weights, items)
        else:
            ctx.save_for_backward(saved)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The saved gradient times the upstream one, in place where the graph is not kept."""
        nothing = (None,) * 8
        if upstream is None:
            return None, *nothing
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"backend={ctx.backend.name!r} computes first-order gradients only, and create_graph=True asks for "
                'higher ones: pass backend="reference" to kd_loss, which is differentiable any number of times'
            )
        if ctx.recompute:
            state, student, teacher, labels, mask, token_weights, items = ctx.saved_tensors
            items = ctx.num_items if items is None else items
            gradient = ctx.backend.gradient(
                state, upstream, student, teacher, labels, mask, token_weights, items, ctx.spec, ctx.classes
            )
        else:
            (saved,) = ctx.saved_tensors
            gradient = ctx.backend.scale(saved, upstream, in_place=not _graph_is_kept())
        return gradient, *nothing


def run_fused(
    backend: Any,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
    num_items: Tensor | float | None,
    spec: LossSpec,
    classes: int,
) -> tuple[Tensor, Tensor | None]:
    """The loss and stats of a fused backend, with a gradient only where one can be asked for."""
    args = (student, teacher, labels, mask, token_weights, num_items, spec, classes)
    if student.requires_grad and torch.is_grad_enabled():
        loss, stats, _ = KDFunction.apply(*args, backend)
    else:
        loss, stats, _ = backend.forward(*args, "loss")
    return loss, stats
