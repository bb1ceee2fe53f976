"""Teachers of which a part is known: the classes that a cache or a server keeps of each row.

A stored row becomes a distribution over its classes and one bucket, the tail. Of any divergence D = Σ phi
over those, with G = Σ g over the same, the gradient is (g_j − q_j G) / T for a stored class j, and for all
others q_j (g_tail / q_tail − G) / T: one pass over the student's row, and k numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

Tail = Literal["ghost", "zero", "renormalize"]
TAILS = ("ghost", "zero", "renormalize")
PADDING = -1


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher of which the log-probabilities of k classes a row are known.

    Which ones is the caller's choice: the teacher's most probable, the student's, or sampled ones. With
    S the stored classes, P and Q the mass of S under teacher and student, what becomes of the rest is `tail`:

    - `"ghost"`: one bucket of mass 1 − P against the student's 1 − Q. Of KL(p‖q) that adds
      (1 − P) log((1 − P)/(1 − Q)); the loss is never negative, never above that of the whole distribution,
      and has its minimum where the masses of S are right. 1 − Q comes from the sum of its own classes, and so
      has all its digits.
    - `"zero"`: a bucket of mass 0. Of KL(p‖q) that is Σ_S p log(p/q), which can be negative and makes the
      student over-confident: its optimum is p/P on S. Refused where the divergence is infinite.
    - `"renormalize"`: both distributions over S alone. Classes outside S get no gradient.

    Args:
        ids: Class ids, `[..., k]`, integers in [0, V); −1 is padding. Of an id that stands twice in a row the
            first counts.
        log_probs: Log-probabilities of those, `[..., k]`, float; or anything that differs from them by a
            constant of the row, such as logits, given `lse`.
        tail: `"ghost"`, `"zero"` or `"renormalize"`.
        lse: For each temperature T, log Σ exp(x / T) over all V classes, `[...]`, x being what `log_probs`
            holds of the stored ones: so the teacher's log-probability at T is x/T − lse[T]. A tensor is that
            of T = 1. At T = 1 it defaults to 0, that of log-probabilities. What is stored at one temperature
            doesn't say how much is in the tail at another, so that `"ghost"` and `"zero"` refuse a
            temperature that isn't given here.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An unknown tail, or shapes that don't fit.

    Gradient: none; as a student, refused.

    Example:
        >>> lp = teacher_logits.log_softmax(-1)
        >>> log_probs, ids = lp.topk(64)
        >>> half = {2.0: (lp / 2).logsumexp(-1)}
        >>> kd_loss(student_logits, TopK(ids, log_probs, lse=half), temperature=2.0)
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tail = "ghost"
    lse: Mapping[float, Tensor] | None = None
    # Whether ids rise in each row, padding first, and none is there twice: said by who made them so.
    _ordered: bool = field(default=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}, got {self.tail!r}")
        lse: Any = self.lse
        if isinstance(lse, Tensor):
            lse = {1.0: lse}
            object.__setattr__(self, "lse", lse)
        if lse is not None and not isinstance(lse, Mapping):
            raise TypeError(
                "lse of TopK must map temperatures to tensors, such as {1.0: ..., 2.0: ...}, got "
                f"{type(lse).__name__}"
            )
        for T in lse or ():
            if isinstance(T, bool) or not isinstance(T, (int, float)) or not 0 < T < math.inf:
                raise ValueError(f"lse of TopK must have temperatures > 0 as keys, got {T!r}")

    def to(self, *args: Any, **kwargs: Any) -> TopK:
        """The same on another device; a dtype is that of the log-probabilities."""
        return self._each(_mover(args, kwargs))

    def pin_memory(self) -> TopK:
        """The same in pinned memory."""
        return self._each(lambda x: x.pin_memory())

    def __getitem__(self, rows: Any) -> TopK:
        """A selection of rows."""
        k = self.ids.shape[-1]
        lse = None if self.lse is None else {T: _of_row(x, rows) for T, x in self.lse.items()}
        return replace(self, ids=_rows(self.ids, rows, k), log_probs=_rows(self.log_probs, rows, k), lse=lse)

    def _each(self, change: Any) -> TopK:
        lse = None if self.lse is None else {T: change(x) for T, x in self.lse.items()}
        return replace(self, ids=change(self.ids), log_probs=change(self.log_probs), lse=lse)


@dataclass(frozen=True, eq=False)
class Sampled:
    """A teacher of which a sample is known: drawn classes and their weights, whose expectation is p.

    Formula: with n ids drawn from r, weights p̂ = (count/n)(p/r), so E[p̂] = p; drawn from the teacher itself,
    count/n. The loss is Σ p̂ (a − log q) with a = log p where `log_probs` are given, else log p̂, for forward
    KL; a = 0 for soft cross-entropy. The gradient, (Σ p̂) q − p̂ over T and times T², has the expectation of
    the whole teacher's. No other divergence is linear in p, and so all others are refused.

    The value of the soft cross-entropy is unbiased, that of forward KL with `log_probs`, too. Without them it
    is the sample's own divergence, which is larger by about (number of likely classes)/2n.

    Args:
        ids: Drawn classes, `[..., k]`, integers in [0, V); −1 is padding. Weights of an id that stands twice
            in a row add up.
        weights: Their weights, `[..., k]`, float, >= 0. Not normalised: that would bias them.
        log_probs: Log-probabilities of the drawn classes at `temperature`, `[..., k]`, or None.
        temperature: The temperature at which the weights are the teacher's; a loss at another is refused.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A temperature that is not > 0, or shapes that don't fit.

    Gradient: none; as a student, refused.

    Example:
        >>> p = (teacher_logits / 2).softmax(-1)
        >>> ids = torch.multinomial(p, 64, replacement=True)
        >>> teacher = Sampled(ids, torch.full(ids.shape, 1 / 64), temperature=2.0)
        >>> kd_loss(student_logits, teacher, temperature=2.0)
    """

    ids: Tensor
    weights: Tensor
    log_probs: Tensor | None = None
    temperature: float = 1.0
    _ordered: bool = field(default=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        T = self.temperature
        if isinstance(T, bool) or not isinstance(T, (int, float)):
            raise TypeError(f"temperature of Sampled must be a number, got {type(T).__name__}")
        if not 0 < T < math.inf:
            raise ValueError(f"temperature of Sampled must be > 0 and finite, got {T}")

    def to(self, *args: Any, **kwargs: Any) -> Sampled:
        """The same on another device; a dtype is that of weights and log-probabilities."""
        return self._each(_mover(args, kwargs))

    def pin_memory(self) -> Sampled:
        """The same in pinned memory."""
        return self._each(lambda x: x.pin_memory())

    def __getitem__(self, rows: Any) -> Sampled:
        """A selection of rows."""
        return self._each(lambda x: _rows(x, rows, self.ids.shape[-1]))

    def _each(self, change: Any) -> Sampled:
        log_probs = None if self.log_probs is None else change(self.log_probs)
        return replace(self, ids=change(self.ids), weights=change(self.weights), log_probs=log_probs)


StoredSource = TopK | Sampled


class Sparse(NamedTuple):
    """What backends get of a stored teacher, at the temperature of the call.

    Attributes:
        ids: int64, `[..., k]`, contiguous; rising in each row but for entries of −1, which are none; each
            once.
        log_p: Their log-probabilities, `[..., k]`, contiguous, float32, or float64 with a student of that.
            A NaN makes its row NaN.
        rest: The log-probability of all other classes together, `[...]`, −inf for none; or None where both
            distributions are over the stored classes alone.
        extra: What is added to D, `[...]`, or None.
    """

    ids: Tensor
    log_p: Tensor
    rest: Tensor | None
    extra: Tensor | None


def _mover(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`Tensor.to` with these, which leaves integers integers."""

    def move(x: Tensor) -> Tensor:
        moved = x.to(*args, **kwargs)
        return moved if x.dtype.is_floating_point or moved.dtype == x.dtype else moved.to(x.dtype)

    return move


def _rows(x: Tensor, rows: Any, k: int) -> Tensor:
    selected = x[(*rows, slice(None)) if isinstance(rows, tuple) and Ellipsis in rows else rows]
    if selected.dim() == 0 or selected.shape[-1] != k:
        raise IndexError(
            f"a source is indexed by rows only: {rows!r} on shape {tuple(x.shape)} gives "
            f"{tuple(selected.shape)}, which does not keep the last dimension"
        )
    return selected


def _of_row(x: Tensor, rows: Any) -> Tensor:
    return _rows(x.unsqueeze(-1), rows, 1).squeeze(-1)


def _flatten(source: TopK) -> tuple[list[Any], Any]:
    lse = source.lse or {}
    temperatures = None if source.lse is None else tuple(lse)
    return [source.ids, source.log_probs, *lse.values()], (source.tail, temperatures, source._ordered)


def _unflatten(leaves: Any, context: Any) -> TopK:
    (ids, log_probs, *each), (tail, temperatures, ordered) = leaves, context
    lse = None if temperatures is None else dict(zip(temperatures, each, strict=True))
    return TopK(ids, log_probs, tail, lse, _ordered=ordered)


def _sampled(ids: Any, weights: Any, log_probs: Any, temperature: float, ordered: bool) -> Sampled:
    return Sampled(ids, weights, log_probs, temperature, _ordered=ordered)


pytree.register_pytree_node(TopK, _flatten, _unflatten, serialized_type_name="kdkernels.TopK")
pytree.register_pytree_node(
    Sampled,
    lambda s: ([s.ids, s.weights, s.log_probs], (s.temperature, s._ordered)),
    lambda parts, options: _sampled(*parts, *options),
    serialized_type_name="kdkernels.Sampled",
)
