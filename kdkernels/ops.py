"""The fused losses as operators of torch: one node in the graphs of torch.compile and torch.export.

Schemas are functional and carry a version. No number that may vary is in one, since it would be compiled in:
temperature, weights and parameters travel in one float64 tensor on the CPU, where reading them waits for
nothing. Which fused backend runs is decided when the node runs, by the tensors that it is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import autograd, linear, parallel, registry
from .autograd import what_to_keep, what_to_keep_of_heads
from .chunks import Job, Wanted
from .noise import Noise
from .reference import check_labels, compute_dtype
from .sources import Projection
from .sparse import Sparse
from .spec import STATS, Call, LossSpec, state_rows

# Of both kinds of calls, after their sides.
_OPTIONS = (
    "Tensor? mixture, Tensor? labels, Tensor? mask, "
    "Tensor? token_weights, Tensor? num_items, Tensor? student_seed, Tensor? teacher_seed, "
    "Tensor? ids, Tensor? log_p, Tensor? rest, Tensor? extra, Tensor options, "
    "str divergence, str noise, int ignore_index, str reduction, bool stats, SymInt classes, str keep, "
    "str? backend"
)
_ARGUMENTS = f"Tensor student, Tensor[] teachers, {_OPTIONS}"
# A CUDA graph would hold on to the numbers of the step that it was captured in.
_TAGS = tuple(getattr(torch.Tag, tag) for tag in ("cudagraph_unsafe",) if hasattr(torch.Tag, tag))
# kept: the gradient, the rows' state or nothing, as `keep` says; figures: those of KDStats, or nothing.
_LOSS = f"({_ARGUMENTS}) -> (Tensor loss, Tensor figures, Tensor kept)"
_GRADIENT = f"(Tensor upstream, {_ARGUMENTS}, Tensor state) -> Tensor"
torch.library.define("kdkernels::kd_loss_v1", _LOSS, tags=_TAGS)
torch.library.define("kdkernels::kd_gradient_v1", _GRADIENT, tags=_TAGS)
_INPUTS = _ARGUMENTS.count(",") + 1


def kd_loss(call: Call, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """The loss and stats of a fused backend as a node of the graph that is being made."""
    student = call.student
    trained = student.requires_grad and torch.is_grad_enabled()
    keep = what_to_keep(student.dtype) if trained else "nothing"
    loss, figures, _ = torch.ops.kdkernels.kd_loss_v1(
        student, list(call.teachers), *_options(call, keep, backend)
    )
    return loss, figures if call.spec.stats else None


def _options(call: Call, keep: str, backend: str | None) -> tuple[Any, ...]:
    _, _, mixture, labels, mask, token_weights, num_items, z_seed, v_seed, spec, classes, stored = call
    tensor, number = (num_items, None) if isinstance(num_items, Tensor) else (None, num_items)
    return (
        mixture, labels, mask, token_weights, tensor, z_seed, v_seed, *(stored or (None,) * 4),
        pack(spec, number), spec.divergence, kind_of(spec.student_noise) + kind_of(spec.teacher_noise),
        spec.ignore_index, spec.reduction, spec.stats, classes, keep, backend,
    )  # fmt: skip


_KINDS = {None: "-", (False, False): "a", (True, False): "m", (False, True): "A", (True, True): "M"}
_FLAGS = {kind: flags for flags, kind in _KINDS.items()}


def kind_of(noise: Noise | None) -> str:
    """What is compiled in of a side's noise, as one letter."""
    return _KINDS[None if noise is None else (noise.multiplicative, noise.per_row)]


def pack(spec: LossSpec, num_items: float | None) -> Tensor:
    """The numbers of a call as one tensor; a number of items that is not given is negative."""
    # Products, since those are what the compiler keeps variable of a Python number.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    numbers = (
        spec.temperature, spec.t_factor, spec.soft_weight, spec.hard_weight,
        -1.0 if num_items is None else num_items,
        *_of_noise(spec.student_noise), *_of_noise(spec.teacher_noise),
        spec.student_scale, spec.student_softcap, *itertools.chain(*spec.teachers), *spec.params,
    )  # fmt: skip
    return torch.stack([one * number for number in numbers])


def _of_noise(noise: Noise | None) -> tuple[float, ...]:
    return (0.0, 0.0, 0.0) if noise is None else (noise.sigma, noise.probability, noise.row_offset)


def _noise(kind: str, numbers: list[float]) -> Noise | None:
    flags = _FLAGS[kind]
    return None if flags is None else Noise(numbers[0], *flags, numbers[1], int(numbers[2]))


def _unpack(student: Any, teachers: Sequence[Any], options: tuple[Any, ...]) -> tuple[Call, Any]:
    """The call of a node, and the backend that runs it."""
    mixture, labels, mask, token_weights, num_items, z_seed, v_seed, *stored = options[:11]
    packed, *fixed = options[11:]
    divergence, noise, ignore_index, reduction, stats, classes, _, backend = fixed
    numbers = packed.tolist()
    weights, given, sides, params = numbers[:4], numbers[4], numbers[11:], numbers[13 + 2 * len(teachers) :]
    spec = _spec(
        divergence, tuple(params), *weights, ignore_index, reduction, *sides[:2],
        tuple((sides[2 + 2 * m], sides[3 + 2 * m]) for m in range(len(teachers))),
        _noise(noise[0], numbers[5:8]), _noise(noise[1], numbers[8:11]), stats,
    )  # fmt: skip
    if num_items is None and given >= 0:
        num_items = given
    call = Call(
        student, tuple(teachers), mixture, labels, mask, token_weights, num_items, z_seed, v_seed, spec,
        classes, None if stored[0] is None else Sparse(*stored),
    )  # fmt: skip
    chosen = parallel.backend(backend) or registry.choose(backend, call)
    if chosen.name == "reference":
        raise RuntimeError(
            "this compiled loss was made for a fused backend and none can run it here: "
            f"{registry.why_unfused(call)}; compile it with backend='reference'"
        )
    return call, chosen


# The same record for the same options: backends look up what they prepared for it.
_spec = lru_cache(maxsize=256)(LossSpec)


@torch.library.impl("kdkernels::kd_loss_v1", "CompositeExplicitAutograd")
def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, backend = _unpack(inputs[0], inputs[1], inputs[2:])
    student, keep = call.student, inputs[-2]
    loss, figures, kept = backend.forward(call, keep)
    if kept is None:
        # Of a backend that computes everything again; the graph was promised a shape.
        rows = student.shape[:-1].numel()
        kept = loss.new_zeros(
            (state_rows(len(call.teachers), call.mixture), rows) if keep == "state" else (0,)
        )
    return loss, loss.new_empty(0) if figures is None else figures, kept


@torch.library.register_fake("kdkernels::kd_loss_v1")
def _forward_shapes(
    student: Tensor, teachers: list[Tensor], mixture: Any, labels: Any, mask: Any, token_weights: Any,
    num_items: Any, student_seed: Any, teacher_seed: Any, ids: Any, log_p: Any, rest: Any, extra: Any,
    options: Tensor, divergence: str, noise: str,
    ignore_index: int, reduction: str, stats: bool, classes: int, keep: str, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    R, leading = compute_dtype(student, teachers), student.shape[:-1]
    loss = student.new_empty(leading if reduction == "none" else (), dtype=R)
    if keep == "gradient":
        kept = student.new_empty(student.shape)
    else:
        numbers = state_rows(len(teachers), mixture)
        kept = loss.new_empty((numbers, math.prod(leading)) if keep == "state" else (0,))
    return loss, loss.new_empty(STATS if stats else 0), kept


@torch.library.impl("kdkernels::kd_gradient_v1", "CompositeExplicitAutograd")
def _gradient(upstream: Tensor, *inputs: Any) -> Tensor:
    call, backend = _unpack(inputs[0], inputs[1], inputs[2:-1])
    return backend.gradient(upstream, call, inputs[-1])


@torch.library.register_fake("kdkernels::kd_gradient_v1")
def _gradient_shape(upstream: Tensor, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


torch.library.define("kdkernels::check_labels_v1", "(Tensor labels, SymInt classes) -> Tensor")


@torch.library.impl("kdkernels::check_labels_v1", "CompositeExplicitAutograd")
def _check_labels(labels: Tensor, classes: int) -> Tensor:
    return check_labels(labels, classes).clone()  # what a node returns is not what it was given


@torch.library.register_fake("kdkernels::check_labels_v1")
def _labels_shape(labels: Tensor, classes: int) -> Tensor:
    return torch.empty_like(labels)


class _Nodes:
    """What backward asks of a backend, as nodes of a graph."""

    name = "compiled"

    @staticmethod
    def gradient(upstream: Tensor, inputs: tuple[Any, ...], state: Tensor) -> Tensor:
        return torch.ops.kdkernels.kd_gradient_v1(upstream, *inputs, state)

    @staticmethod
    def scale(gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
        # Never in place: the compiler decides what may share memory. Rows that don't count stay 0.
        factor = upstream.unsqueeze(-1) if upstream.dim() else upstream
        scaled = gradient.to(upstream.dtype) * factor
        return torch.where(gradient == 0, 0.0, scaled).to(gradient.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, figures, kept = output
    ctx.mark_non_differentiable(figures, kept)
    ctx.teachers = len(inputs[1])
    autograd.save(ctx, inputs, inputs[-2], kept, _Nodes)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        gradients: tuple[Tensor | None, ...] = (None,)
    else:
        gradients = autograd.backward(ctx, upstream, _Nodes.gradient)
    return *gradients, [None] * ctx.teachers, *[None] * (_INPUTS - 2)


torch.library.register_autograd("kdkernels::kd_loss_v1", _backward, setup_context=_save)


# student: hidden states where there is a weight, else logits; likewise each teacher, where what is not there
# is empty: autograd wants lists of tensors, all of them. lowered: the dtype that
# autocast multiplies in, if it does. wanted: of which of the student's parts there are to be gradients.
_HEAD_SIDES = (
    "Tensor student, Tensor? weight, Tensor? bias, Tensor[] teachers, Tensor[] weights, Tensor[] biases, "
    "ScalarType? lowered, bool[] wanted, SymInt? memory_budget, bool drop_masked, "
)
_HEAD_ARGUMENTS = _HEAD_SIDES + _OPTIONS
_HEAD_OWN = _HEAD_SIDES.count(",")
_PARTS = "Tensor hidden_kept, Tensor weight_kept, Tensor bias_kept"
torch.library.define(
    "kdkernels::kd_heads_v1", f"({_HEAD_ARGUMENTS}) -> (Tensor loss, Tensor figures, Tensor state, {_PARTS})",
    tags=_TAGS,
)  # fmt: skip
torch.library.define(
    "kdkernels::kd_heads_gradient_v1", f"(Tensor upstream, {_HEAD_ARGUMENTS}, Tensor state) -> ({_PARTS})",
    tags=_TAGS,
)  # fmt: skip


def kd_heads(job: Job, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """The same of a call with heads."""
    call, memory_budget, drop_masked, _ = job
    want = linear.wanted(call.student)
    keep = what_to_keep_of_heads(call) if any(want) else "nothing"
    (student, weight, bias), *teachers = (_taken_apart(side) for side in (call.student, *call.teachers))
    device = call.student.device.type
    lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    loss, figures, *_ = torch.ops.kdkernels.kd_heads_v1(
        student, weight, bias, *([_or_empty(v, part) for v in teachers] for part in range(3)),
        lowered, list(want), memory_budget, drop_masked, *_options(call, keep, backend),
    )  # fmt: skip
    return loss, figures if call.spec.stats else None


def _taken_apart(side: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return side[:3] if isinstance(side, Projection) else (side, None, None)


def _or_empty(parts: Sequence[Tensor | None], number: int) -> Tensor:
    part, first = parts[number], parts[0]
    assert first is not None
    return first.new_zeros(0) if part is None else part


def _job(inputs: tuple[Any, ...]) -> tuple[Job, Any, Wanted]:
    student, weight, bias, teachers, weights, biases, lowered, want, budget, drop = inputs[:_HEAD_OWN]

    def side(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
        if weight is None or weight.dim() != 2:
            return x
        bias = None if bias is None or bias.numel() == 0 else bias
        wide = torch.float64 in (x.dtype, weight.dtype)
        return Projection(x, weight, bias, x.dtype if lowered is None or wide else lowered)

    sides = [side(*parts) for parts in zip(teachers, weights, biases, strict=True)]
    call, backend = _unpack(side(student, weight, bias), sides, inputs[_HEAD_OWN:])
    return Job(call, budget, drop, getattr(backend, "widest", None)), backend, tuple(want)


def _or_nothing(like: Tensor, gradients: linear.Gradients) -> tuple[Tensor, ...]:
    three = (*gradients, None, None)[:3]
    return tuple(like.new_empty(0) if x is None else x for x in three)


@torch.library.impl("kdkernels::kd_heads_v1", "CompositeExplicitAutograd")
def _heads_forward(*inputs: Any) -> tuple[Tensor, ...]:
    job, backend, want = _job(inputs)
    keep = inputs[-2]
    loss, figures, gradients, kept = linear.forward(job, backend, keep, want)
    state = _no_state(loss, inputs) if kept.rows is None else kept.rows
    figures = loss.new_empty(0) if figures is None else figures
    return loss, figures, state, *_or_nothing(loss, gradients)


def _no_state(loss: Tensor, inputs: Sequence[Any]) -> Tensor:
    """What the graph was promised of a backend that keeps none."""
    student, teachers, mixture, keep = inputs[0], inputs[3], inputs[_HEAD_OWN], inputs[-2]
    rows = math.prod(student.shape[:-1])
    return loss.new_zeros((state_rows(len(teachers), mixture), rows) if keep == "state" else (0,))


@torch.library.register_fake("kdkernels::kd_heads_v1")
def _heads_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    student, weight, _, teachers, weights, _, lowered, _ = inputs[:8]
    reduction, stats, keep = inputs[-5], inputs[-4], inputs[-2]
    dtypes = [
        lowered if lowered and w is not None and w.dim() == 2 and x.dtype is not torch.float64 else x.dtype
        for x, w in zip((student, *teachers), (weight, *weights), strict=True)
    ]
    R = torch.float64 if torch.float64 in dtypes else torch.float32
    leading = student.shape[:-1]
    loss = student.new_empty(leading if reduction == "none" else (), dtype=R)
    figures = loss.new_empty(STATS if stats else 0)
    return loss, figures, _no_state(loss, inputs), *_part_shapes(inputs, keep == "gradient")


def _part_shapes(inputs: Sequence[Any], kept: bool) -> tuple[Tensor, ...]:
    parts, want = inputs[:3], inputs[7]
    return tuple(
        part.new_empty(part.shape) if kept and part is not None and wanted else inputs[0].new_empty(0)
        for part, wanted in zip(parts, want, strict=True)
    )


@torch.library.impl("kdkernels::kd_heads_gradient_v1", "CompositeExplicitAutograd")
def _heads_gradient(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    job, backend, want = _job(inputs[:-1])
    state = linear.State(inputs[-1], None)
    return _or_nothing(upstream, linear.backward(upstream, job, backend, state, want))


@torch.library.register_fake("kdkernels::kd_heads_gradient_v1")
def _heads_gradient_shapes(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _part_shapes(inputs, True)


def _heads_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, figures, state, *parts = output
    ctx.mark_non_differentiable(figures, state, *parts)
    ctx.teachers, ctx.want, keep = len(inputs[3]), inputs[7], inputs[-2]
    kept = tuple(x if wanted else None for x, wanted in zip(parts, ctx.want, strict=True))
    autograd.save(ctx, inputs, keep, kept if keep == "gradient" else state, _Nodes)


def _heads_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    def recompute(upstream: Tensor, inputs: tuple[Any, ...], state: Tensor) -> tuple[Tensor | None, ...]:
        parts = torch.ops.kdkernels.kd_heads_gradient_v1(upstream, *inputs, state)
        return tuple(x if wanted else None for x, wanted in zip(parts, ctx.want, strict=True))

    gradients: tuple[Tensor | None, ...] = (None,) * 3
    if upstream is not None:
        gradients = autograd.backward(ctx, upstream, recompute)
    nothing = [None] * ctx.teachers
    return *gradients, nothing, nothing, nothing, *[None] * (_HEAD_INPUTS - 6)


_HEAD_INPUTS = _HEAD_ARGUMENTS.count(",") + 1
torch.library.register_autograd("kdkernels::kd_heads_v1", _heads_backward, setup_context=_heads_save)
