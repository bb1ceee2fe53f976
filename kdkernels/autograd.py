"""The autograd Functions of the fused backends, and nothing else.

Forward writes the gradient in the same pass as the loss and saves only that: both logits can die.
float16 is the exception: the loss scale arrives with the upstream gradient, after the rounding would have
been made, so there forward computes the loss alone, and backward the gradient with the upstream factor
applied first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import linear
from .chunks import Job, Wanted
from .sources import Projection
from .spec import Call


def _graph_is_kept() -> bool:
    # Private, and so guarded: without it every backward scales out of place, which is right and one tensor
    # dearer.
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else query()


def what_to_keep(dtype: torch.dtype) -> str:
    """What forward keeps for backward: `gradient`, or for float16 the rows' `state`."""
    return "state" if dtype is torch.float16 else "gradient"


def what_to_keep_of_heads(call: Call) -> str:
    """The same of a call with heads, whose gradients are sums over rows: of weighted ones not made before."""
    weighted = call.spec.reduction == "none" and isinstance(call.student, Projection)
    return "state" if weighted else what_to_keep(call.student.dtype)


def save(ctx: Any, inputs: tuple[Any, ...], keep: str, kept: Any, backend: Any) -> None:
    """Saves what backward needs: the gradients, or where there are none yet, the inputs and their state.

    Apart from `forward`, since a custom op wants it so. torch takes it apart too where it is called
    `setup_context`, and then inspects the signature at every call, which costs 100 µs.
    """
    ctx.set_materialize_grads(False)
    ctx.backend = backend
    ctx.recompute = keep != "gradient"
    if not ctx.recompute:
        ctx.save_for_backward(*(kept if isinstance(kept, tuple) else (kept,)))
        return
    arguments, ctx.structure = pytree.tree_flatten((inputs, kept))
    # A tensor is saved as one, so that a later write to it is noticed. Autograd refuses those made under
    # inference_mode; they are kept as they are, like a number of items.
    saved = [x if isinstance(x, Tensor) and not x.is_inference() else None for x in arguments]
    ctx.kept = [x if y is None else None for x, y in zip(arguments, saved, strict=True)]
    ctx.save_for_backward(*saved)


def backward(ctx: Any, upstream: Tensor, recompute: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    """The saved gradients times the upstream one, or those of `recompute(upstream, inputs, state)`."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"backend={ctx.backend.name!r} computes first-order gradients only, and create_graph=True "
            f"asks for higher ones: {_to_differentiate(ctx.backend)}"
        )
    if not ctx.recompute:
        in_place = not _graph_is_kept()
        return tuple(
            None if saved is None else ctx.backend.scale(saved, upstream, in_place=in_place)
            for saved in ctx.saved_tensors
        )
    arguments = [x if y is None else y for x, y in zip(ctx.kept, ctx.saved_tensors, strict=True)]
    gradients = recompute(upstream, *pytree.tree_unflatten(arguments, ctx.structure))
    return gradients if isinstance(gradients, tuple) else (gradients,)


def _to_differentiate(backend: Any) -> str:
    return getattr(
        backend,
        "to_differentiate",
        'pass backend="reference" to kd_loss, which is differentiable any number of times',
    )


def _no_tangents(ctx: Any, *_: Any) -> Any:
    """Refused: nothing here carries tangents."""
    raise RuntimeError(
        f"backend={ctx.backend.name!r} has no forward-mode derivative: {_to_differentiate(ctx.backend)}"
    )


class KDFunction(torch.autograd.Function):
    """The loss of a fused backend, differentiable once with respect to the student's raw logits.

    `forward` is given the student again, as the input that gets a gradient, apart from `call`, the arguments
    of a backend's `forward`: torch looks at each input of every call, which adds up to more than a small loss
    has to spare. It returns the loss and the stats (or None).
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Call, backend: Any) -> tuple[Tensor, Tensor | None]:
        """One pass over the rows."""
        keep = what_to_keep(student.dtype)
        loss, stats, kept = backend.forward(call, keep)
        save(ctx, call, keep, kept, backend)
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The saved gradient times the upstream one, in place where the graph is not kept."""
        if upstream is None:
            return None, None, None
        return *backward(ctx, upstream, ctx.backend.gradient), None, None

    jvp = staticmethod(_no_tangents)


class HeadFunction(torch.autograd.Function):
    """The same of a call with heads, with respect to what its student is made of.

    `forward` is given those parts again, after the job that has them: logits, or hidden states, weight and
    bias.
    """

    @staticmethod
    def forward(
        ctx: Any, job: Job, backend: Any, want: Wanted, *_: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One pass over chunks of the rows."""
        keep = what_to_keep_of_heads(job.call)
        loss, stats, gradients, state = linear.forward(job, backend, keep, want)
        ctx.want = want
        save(ctx, job, keep, gradients if keep == "gradient" else state, backend)
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The saved gradients times the upstream one, or all of it once more."""
        if upstream is None:
            return (None,) * (3 + len(ctx.needs_input_grad[3:]))

        def recompute(upstream: Tensor, job: Job, state: linear.State) -> linear.Gradients:
            return linear.backward(upstream, job, ctx.backend, state, ctx.want)

        return None, None, None, *backward(ctx, upstream, recompute)

    jvp = staticmethod(_no_tangents)


def _forward_ad_level() -> int:
    # Private, and so guarded: without it a tangent is dropped, as by any function that has none.
    return getattr(forward_ad, "_current_level", -1)


def run_fused(backend: Any, call: Call) -> tuple[Tensor, Tensor | None]:
    """The loss and stats of a fused backend, with a gradient only where one can be asked for."""
    # Where tangents are carried forward, too: `jvp` refuses what would be lost without a word.
    if (call.student.requires_grad and torch.is_grad_enabled()) or _forward_ad_level() >= 0:
        return KDFunction.apply(call.student, call, backend)
    loss, stats, _ = backend.forward(call, "nothing")
    return loss, stats


def run_linear(backend: Any, job: Job) -> tuple[Tensor, Tensor | None]:
    """The same of a call with heads."""
    student: Any = job.call.student
    want = linear.wanted(student)
    if any(want) or _forward_ad_level() >= 0:
        parts = student[:3] if isinstance(student, Projection) else (student,)
        return HeadFunction.apply(job, backend, want, *parts)
    loss, stats, *_ = linear.forward(job, backend, "nothing", want)
    return loss, stats
