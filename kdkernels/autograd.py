"""The autograd Functions of the fused backends, and nothing else.

Forward writes the gradient in the same pass as the loss and saves only that: both logits can die.
float16 is the exception: the loss scale arrives with the upstream gradient, after the rounding would have
been made, so there forward computes the loss alone, and backward the gradient with the upstream factor
applied first.
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

    `forward` returns the loss and the stats (or None).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """One pass over the rows. The inputs are those of `run_fused`, the backend last."""
        *arguments, backend = inputs
        output = backend.forward(*arguments, inputs[0].dtype != torch.float16)
        KDFunction.save(ctx, inputs, output)
        loss, stats, _ = output
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def save(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Saves what backward needs of the backend's output: the gradient, or for float16 the inputs.

        Apart from `forward`, since a custom op wants it so. torch takes it apart too where it is called
        `setup_context`, and then inspects the signature at every call, which costs 100 µs.
        """
        student, teacher, labels, mask, token_weights, num_items, ctx.spec, ctx.classes, ctx.backend = inputs
        gradient = output[2]
        ctx.set_materialize_grads(False)
        ctx.recompute = gradient is None
        if ctx.recompute:
            # A tensor among them is saved as one, so that a later write to it is noticed.
            is_tensor = isinstance(num_items, Tensor)
            ctx.num_items = None if is_tensor else num_items
            tensors = (student, teacher, labels, mask, token_weights, num_items if is_tensor else None)
            # Autograd refuses to save tensors made under inference_mode; they are kept as they are.
            ctx.kept = tuple(t if t is not None and t.is_inference() else None for t in tensors)
            ctx.save_for_backward(
                *(None if kept is not None else t for t, kept in zip(tensors, ctx.kept, strict=True))
            )
        else:
            ctx.save_for_backward(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The saved gradient times the upstream one, in place where the graph is not kept."""
        nothing = (None,) * 8
        if upstream is None:
            return None, *nothing
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"backend={ctx.backend.name!r} computes first-order gradients only, and create_graph=True "
                'asks for higher ones: pass backend="reference" to kd_loss, which is differentiable any '
                "number of times"
            )
        if ctx.recompute:
            student, teacher, labels, mask, token_weights, items = (
                saved if kept is None else kept
                for saved, kept in zip(ctx.saved_tensors, ctx.kept, strict=True)
            )
            items = ctx.num_items if items is None else items
            gradient = ctx.backend.gradient(
                upstream, student, teacher, labels, mask, token_weights, items, ctx.spec, ctx.classes
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
        return KDFunction.apply(*args, backend)
    loss, stats, _ = backend.forward(*args, False)
    return loss, stats
