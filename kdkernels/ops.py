"""The fused losses as operators of torch: one node in the graphs of torch.compile and torch.export.

Schemas are functional and carry a version. No number that may vary is in one, since it would be compiled in:
temperature, weights and parameters travel in one float64 tensor on the CPU, where reading them waits for
nothing. Which fused backend runs is decided when the node runs, by the tensors that it is given.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import registry
from .autograd import KDFunction, what_to_keep
from .noise import Noise
from .reference import check_labels, compute_dtype
from .spec import STATS, Call, LossSpec, state_rows

_ARGUMENTS = (
    "Tensor student, Tensor[] teachers, Tensor? mixture, Tensor? labels, Tensor? mask, "
    "Tensor? token_weights, Tensor? num_items, Tensor? student_seed, Tensor? teacher_seed, Tensor options, "
    "str divergence, str noise, int ignore_index, str reduction, bool stats, SymInt classes, str keep, "
    "str? backend"
)
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
    student, teachers, mixture, labels, mask, token_weights, num_items, z_seed, v_seed, spec, classes = call
    trained = student.requires_grad and torch.is_grad_enabled()
    tensor, number = (num_items, None) if isinstance(num_items, Tensor) else (None, num_items)
    loss, figures, _ = torch.ops.kdkernels.kd_loss_v1(
        student, list(teachers), mixture, labels, mask, token_weights, tensor, z_seed, v_seed,
        pack(spec, number), spec.divergence, kind_of(spec.student_noise) + kind_of(spec.teacher_noise),
        spec.ignore_index, spec.reduction, spec.stats, classes,
        what_to_keep(student.dtype) if trained else "nothing", backend,
    )  # fmt: skip
    return loss, figures if spec.stats else None


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


def _unpack(inputs: tuple[Any, ...]) -> tuple[Call, Any]:
    """The call of a node, and the backend that runs it."""
    student, teachers, mixture, labels, mask, token_weights, num_items, z_seed, v_seed, options, *fixed = (
        inputs
    )
    divergence, noise, ignore_index, reduction, stats, classes, _, backend = fixed
    numbers = options.tolist()
    weights, given, sides, params = numbers[:4], numbers[4], numbers[11:], numbers[13 + 2 * len(teachers) :]
    spec = _spec(
        divergence, tuple(params), *weights, ignore_index, reduction, *sides[:2],
        tuple((sides[2 + 2 * m], sides[3 + 2 * m]) for m in range(len(teachers))),
        _noise(noise[0], numbers[5:8]), _noise(noise[1], numbers[8:11]), stats,
    )  # fmt: skip
    if num_items is None and given >= 0:
        num_items = given
    call = Call(
        student,
        tuple(teachers),
        mixture,
        labels,
        mask,
        token_weights,
        num_items,
        z_seed,
        v_seed,
        spec,
        classes,
    )
    chosen = registry.choose(backend, call)
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
    call, backend = _unpack(inputs)
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
    num_items: Any, student_seed: Any, teacher_seed: Any, options: Tensor, divergence: str, noise: str,
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
    call, backend = _unpack(inputs[:-1])
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
    KDFunction.save(ctx, inputs, inputs[-2], kept, _Nodes)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return KDFunction.backward(ctx, upstream)[0], [None] * ctx.teachers, *[None] * (_INPUTS - 2)


torch.library.register_autograd("kdkernels::kd_loss_v1", _backward, setup_context=_save)
