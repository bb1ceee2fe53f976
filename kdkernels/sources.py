"""What a student or a teacher hands in: the sources of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# (scale, softcap).
PostProcessing = tuple[float, float | None]

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits with the post-processing that some models apply to them.

    Formula: with a scale s and a cap c, the logits used are c·tanh(s·z/c), or s·z without a cap. The gradient
    goes through both, to `z`.

    Args:
        z: Raw logits, `[..., V]`, float32, float64, bfloat16 or float16, of any strides.
        scale: What the raw logits are multiplied by, > 0 (Cohere's `logit_scale`; the inverse of Granite's
            `logits_scaling`).
        softcap: The cap c > 0 (Gemma's `final_logit_softcapping`), or None for none.

    Raises:
        TypeError: An option is not a number.
        ValueError: An option is not positive and finite.
    """

    z: Tensor
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        # `z` is checked when it is used: a pytree may rebuild the source around something that is not a
        # tensor.
        _check_positive("scale", self.scale)
        if self.softcap is not None:
            _check_positive("softcap", self.softcap)

    def to(self, *args: Any, **kwargs: Any) -> Logits:
        """The same source with its tensor moved or cast as `Tensor.to` does."""
        return replace(self, z=self.z.to(*args, **kwargs))

    def pin_memory(self) -> Logits:
        """The same source in pinned memory."""
        return replace(self, z=self.z.pin_memory())

    def __getitem__(self, rows: Any) -> Logits:
        """A selection of rows; the vocabulary dimension stays whole."""
        return replace(self, z=_rows(self.z, rows))


@dataclass(frozen=True, eq=False)
class Head:
    """Logits that are never made: the hidden states and the head that would make them.

    Formula: z = hidden @ weightᵀ + bias, then scale and softcap as in `kd.Logits`. `kd_loss` goes through the
    rows in chunks: the logits of a chunk, their loss and gradient in place, and from that the gradients of
    hidden states, weight and bias, so that no more than a chunk's logits exist at a time.

    Gradient: as a student, to whichever of hidden, weight and bias require grad; what is frozen costs no
    product. As a teacher, none: made under `torch.no_grad()` the parts are detached, as logits would be.

    Args:
        hidden: Hidden states, `[..., d]`, float32, float64, bfloat16 or float16, of any strides: what the
            head is applied to, final norm included.
        weight: The head's weight, `[V, d]`, in the hidden states' dtype (under `torch.autocast` in any);
            tied embeddings are passed as they are.
        bias: `[V]`, or None.
        scale: What the logits are multiplied by, > 0, after the bias.
        softcap: The cap c > 0, applied after the scale, or None for none.

    Raises:
        TypeError: An option is not a number.
        ValueError: An option is not positive and finite.

    Example:
        >>> hidden, weight = torch.randn(4, 16, requires_grad=True), torch.randn(32000, 16)
        >>> teacher = Head(torch.randn(4, 24), torch.randn(32000, 24))
        >>> kd_loss(Head(hidden, weight), teacher).backward()
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        # Tensors are checked when they are used, as in `Logits`.
        _check_positive("scale", self.scale)
        if self.softcap is not None:
            _check_positive("softcap", self.softcap)
        if not torch.is_grad_enabled():
            for name in ("hidden", "weight", "bias"):
                part = getattr(self, name)
                if isinstance(part, Tensor) and part.requires_grad:
                    object.__setattr__(self, name, part.detach())

    def logits(self) -> Tensor:
        """The logits that it stands for, `[..., V]`, scaled and capped; differentiable, all made at once."""
        z = _projection("this", self).logits() * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def to(self, *args: Any, **kwargs: Any) -> Head:
        """The same source with its tensors moved or cast as `Tensor.to` does."""
        return self._each(lambda x: x.to(*args, **kwargs))

    def pin_memory(self) -> Head:
        """The same source with what is on the CPU in pinned memory."""
        return self._each(lambda x: x.pin_memory() if x.device.type == "cpu" else x)

    def __getitem__(self, rows: Any) -> Head:
        """A selection of rows of the hidden states; the head stays whole."""
        return replace(self, hidden=_rows(self.hidden, rows))

    def _each(self, change: Any) -> Head:
        bias = None if self.bias is None else change(self.bias)
        return replace(self, hidden=change(self.hidden), weight=change(self.weight), bias=bias)


class Projection(NamedTuple):
    """The tensors of a checked `Head`, which answers what is asked of its logits.

    `dtype` is that of the logits: of the parts, or the one that autocast multiplies in.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        """Where they would be."""
        return self.hidden.device

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All that is there."""
        return (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)

    @property
    def requires_grad(self) -> bool:
        """Whether any part does."""
        return any(x.requires_grad for x in self.parts)

    def detach(self) -> Projection:
        """The same, detached."""
        bias = None if self.bias is None else self.bias.detach()
        return Projection(self.hidden.detach(), self.weight.detach(), bias, self.dtype)

    def logits(self) -> Tensor:
        """All of the raw logits, differentiable."""
        x, weight, bias = self.hidden, self.weight, self.bias
        bias = None if bias is None else bias.to(self.dtype)
        return torch.nn.functional.linear(x.to(self.dtype), weight.to(self.dtype), bias)


@dataclass(frozen=True, eq=False)
class Mixture:
    """An ensemble of teachers, averaged as probabilities.

    Formula: p = Σ w_m softmax(v_m / T), weights normalised to sum to 1. The gradient of a mean of KLs,
    Σ w_m KL(p_m‖q), is that of KL(p‖q); averaging logits instead would be another ensemble. For `BinaryKL`
    the sigmoids are averaged.

    Args:
        teachers: Logits `[..., V]`, tensors, `kd.Logits` or `kd.Head`, all of one shape; dtypes, strides,
            widths and post-processing may differ.
        weights: None for equal ones, numbers, or a float tensor: `[M]`, or `[..., M]` for weights of each
            row. At least 0, not all of them 0; a teacher of weight 0 in a row is not looked at there. A
            tensor that breaks this is an error on a CPU; elsewhere looking would wait for the device, and the
            row is NaN.

    Raises:
        TypeError: Teachers or weights of the wrong type.
        ValueError: No teacher, or weights that don't fit.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 5 (arithmetic mean of
        the ensemble's predictions).
    """

    teachers: Sequence[Tensor | Logits | Head]
    weights: Tensor | Sequence[float] | None = None

    def __post_init__(self) -> None:
        # Tensors are checked when they are used, as in `Logits`.
        if not isinstance(self.teachers, (list, tuple)):
            raise TypeError(
                f"teachers of Mixture must be a list of logits, got {type(self.teachers).__name__}; a "
                "stacked tensor is taken apart by .unbind()"
            )
        object.__setattr__(self, "teachers", tuple(self.teachers))
        if not self.teachers:
            raise ValueError("teachers of Mixture must be at least one, got none")
        # Of what a pytree put in the place of a tensor, nothing is asked.
        if isinstance(self.weights, (list, tuple)):
            object.__setattr__(self, "weights", _numbers(self.weights, len(self.teachers)))

    def to(self, *args: Any, **kwargs: Any) -> Mixture:
        """The same with its tensors, weights too, moved or cast as `Tensor.to` does."""
        return self._each(lambda t: t.to(*args, **kwargs))

    def pin_memory(self) -> Mixture:
        """The same teachers in pinned memory."""
        return self._each(lambda t: t.pin_memory())

    def __getitem__(self, rows: Any) -> Mixture:
        """A selection of rows, with their weights; the vocabulary dimension stays whole."""
        weights = self.weights
        if isinstance(weights, Tensor) and weights.dim() > 1:
            weights = _rows(weights, rows)
        return Mixture([_rows(t, rows) if isinstance(t, Tensor) else t[rows] for t in self.teachers], weights)

    def _each(self, change: Any) -> Mixture:
        weights = change(self.weights) if isinstance(self.weights, Tensor) else self.weights
        return Mixture([change(t) for t in self.teachers], weights)


def _numbers(weights: Sequence[float], teachers: int) -> tuple[float, ...]:
    for w in weights:
        if isinstance(w, bool) or not isinstance(w, (int, float)):
            raise TypeError(f"weights of Mixture must be numbers or a tensor, got {type(w).__name__}")
    if len(weights) != teachers:
        raise ValueError(
            f"weights of Mixture must be one for each of {teachers} teachers, got {len(weights)}"
        )
    if not all(0 <= w < math.inf for w in weights) or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"weights of Mixture must be >= 0, finite, also in sum, and not all 0, got {list(weights)}"
        )
    return tuple(weights)


def _rows(x: Tensor, rows: Any) -> Tensor:
    selected = x[(*rows, ...) if isinstance(rows, tuple) and Ellipsis not in rows else rows]
    if selected.dim() == 0 or selected.shape[-1] != x.shape[-1]:
        raise IndexError(
            f"a source is indexed by rows only: {rows!r} on shape {tuple(x.shape)} gives "
            f"{tuple(selected.shape)}, which does not keep the last dimension"
        )
    return selected


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number > 0, got {type(value).__name__}")
    # Not math.isfinite, which the compiler of torch 2.10 can't ask of a number that changes; NaN fails, too.
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")


pytree.register_pytree_node(
    Logits,
    lambda s: ([s.z], (s.scale, s.softcap)),
    lambda z, options: Logits(*z, *options),
    serialized_type_name="kdkernels.Logits",
)

pytree.register_pytree_node(
    Head,
    lambda s: ([s.hidden, s.weight, s.bias], (s.scale, s.softcap)),
    lambda parts, options: Head(*parts, *options),
    serialized_type_name="kdkernels.Head",
)

pytree.register_pytree_node(
    Mixture,
    lambda s: (
        [*s.teachers, s.weights] if isinstance(s.weights, Tensor) else list(s.teachers),
        None if isinstance(s.weights, Tensor) else (s.weights,),
    ),
    lambda leaves, weights: (
        Mixture([*leaves][:-1], [*leaves][-1]) if weights is None else Mixture([*leaves], *weights)
    ),
    serialized_type_name="kdkernels.Mixture",
)


def unwrap(name: str, source: Any, whole: bool = True) -> tuple[Tensor, PostProcessing]:
    """The raw logits of a `student` or `teacher` argument, checked, and their (scale, softcap).

    Of a `Head` a `Projection`, in the place of the tensor that it stands for. Where they are not whole, but
    shards, there may be no class.
    """
    options: PostProcessing = (1.0, None)
    z: Any = source
    if isinstance(source, Head):
        return cast(Tensor, _projection(name, source, whole)), (source.scale, source.softcap)
    if isinstance(source, Logits):
        z, options = source.z, (source.scale, source.softcap)
    if not isinstance(z, Tensor):
        got = type(z).__name__ if z is source else f"kd.Logits around {type(z).__name__}"
        or_mixture = ", or kd.Mixture of those" if name == "teacher" else ""
        raise TypeError(
            f"{name} must be a torch.Tensor of logits, kd.Logits(z, scale, softcap) or "
            f"kd.Head(hidden, weight, bias){or_mixture}, got {got}"
        )
    if z.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} must hold float32, float64, bfloat16 or float16 logits, got {z.dtype}: "
            "if these are token ids, pass them as labels; else cast them"
        )
    if z.dim() == 0 or (z.shape[-1] == 0 and whole):
        raise ValueError(f"{name} must have shape [..., V] with V >= 1, got {tuple(z.shape)}")
    return z, options


def _projection(name: str, head: Head, whole: bool = True) -> Projection:
    """The parts of a `Head`, checked."""
    parts = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    for part, x in parts.items():
        if x is None and part == "bias":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{part} of {name}'s kd.Head must be a torch.Tensor, got {type(x).__name__}")
        _check_whole(f"{part} of {name}'s kd.Head", x)
        if x.dtype not in LOGIT_DTYPES:
            raise TypeError(
                f"{part} of {name}'s kd.Head must be float32, float64, bfloat16 or float16, got {x.dtype}: "
                "a quantised head is multiplied by its own code, so pass its logits; else cast it"
            )
    hidden, weight, bias = head.hidden, head.weight, head.bias
    fits = hidden.dim() != 0 and weight.dim() == 2 and hidden.shape[-1] == weight.shape[1]
    if not fits or 0 in (weight.shape if whole else weight.shape[1:]):
        raise ValueError(
            f"{name}'s kd.Head must have hidden [..., d] and weight [V, d], as nn.Linear(d, V) has, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}; a weight whose rows are sharded goes with "
            "vocab_parallel=kd.VocabParallel(group)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias of {name}'s kd.Head must have shape [V] = ({weight.shape[0]},), got {tuple(bias.shape)}"
        )
    for part, x in parts.items():
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{part} of {name}'s kd.Head must be on the hidden states' device {hidden.device}, got "
                f"{x.device}; move it with .to"
            )
    device = hidden.device.type
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        return Projection(hidden, weight, bias, torch.get_autocast_dtype(device))
    if len(dtypes) > 1:
        listed = ", ".join(f"{part} {x.dtype}" for part, x in parts.items() if x is not None)
        raise TypeError(
            f"the parts of {name}'s kd.Head must have one dtype, got {listed}: cast one of them with .to, or "
            "call kd_loss under torch.autocast, which the hidden states seem to come from"
        )
    return Projection(hidden, weight, bias, hidden.dtype)


def _check_whole(what: str, x: Tensor) -> None:
    """Raises on a tensor of which this process holds a part."""
    if hasattr(x, "full_tensor"):  # DTensor, whose class would first have to be imported
        raise ValueError(
            f"{what} is a DTensor, of which this process holds a shard: pass {what.split()[0]}"
            ".full_tensor(), or call kd_loss inside the forward of the module that FSDP unshards"
        )
    if x.numel() == 0 and hasattr(x, "ds_id"):
        raise ValueError(
            f"{what} is partitioned by DeepSpeed ZeRO-3, and this process holds nothing of it: call kd_loss "
            "inside deepspeed.zero.GatheredParameters, or inside the module's forward"
        )


def unwrap_teachers(
    source: Any, student: torch.dtype, whole: bool = True
) -> tuple[list[Tensor], list[PostProcessing], Tensor | None]:
    """The raw logits of a `teacher` argument, their (scale, softcap), and the weights of a mixture.

    Weights are `[M]` or `[..., M]`, of float64 where the student, a teacher or they themselves are, else of
    float32, and sum to 1.
    """
    if not isinstance(source, Mixture):
        v, options = unwrap("teacher", source, whole)
        return [v], [options], None
    sides = [unwrap(f"teachers[{m}] of Mixture", teacher, whole) for m, teacher in enumerate(source.teachers)]
    logits, options_of_each = [v for v, _ in sides], [options for _, options in sides]
    for m, v in enumerate(logits):
        if v.shape != logits[0].shape or v.device != logits[0].device:
            raise ValueError(
                f"teachers of Mixture must have one shape and device, got {tuple(logits[0].shape)} on "
                f"{logits[0].device} and, at {m}, {tuple(v.shape)} on {v.device}"
            )
    if len(logits) == 1 and not isinstance(source.weights, Tensor):
        return logits, options_of_each, None
    wide = torch.float64 in (student, *(v.dtype for v in logits))
    return logits, options_of_each, _mixture_weights(source, logits, wide)


def _mixture_weights(source: Mixture, logits: list[Tensor], wide: bool) -> Tensor:
    weights, first = source.weights, logits[0]
    dtype = torch.float64 if wide else torch.float32
    if weights is None:
        weights = [1.0] * len(logits)
    if isinstance(weights, (list, tuple)):
        # Made on the device, number by number: a copy from the host would wait for it. As products, since
        # those are what the compiler keeps variable of a Python number.
        total, one = sum(weights), torch.ones((), dtype=dtype, device=first.device)
        return torch.stack([one * (w / total) for w in weights])
    if not isinstance(weights, Tensor) or not weights.dtype.is_floating_point:
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights of Mixture must be numbers or a float tensor, got {got}")
    shapes = [(len(logits),), (*first.shape[:-1], len(logits))]
    if tuple(weights.shape) not in shapes:
        raise ValueError(
            f"weights of Mixture must have shape {shapes[0]}, or {shapes[1]} for weights of each row, got "
            f"{tuple(weights.shape)}"
        )
    if weights.device != first.device:
        raise ValueError(
            f"weights of Mixture must be on the teachers' device {first.device}, got {weights.device}; "
            "move them with .to"
        )
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weights of Mixture require grad, and kd_loss gives them none; pass weights.detach()"
        )
    weights = weights.detach().to(torch.float64 if weights.dtype == torch.float64 else dtype)
    # Negative ones make their row NaN where nobody may look. Relative to the largest no sum overflows.
    weights = torch.where(weights < 0, math.nan, weights / weights.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)
