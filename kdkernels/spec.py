"""What a call computes: its options as one frozen, hashable record, checked once, and its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .divergences import TABLE, Divergence, Parametrised, resolve
from .noise import Noise
from .sources import PostProcessing
from .sparse import Sparse

REDUCTIONS = ("mean", "sum", "none")
STATS = 7  # figures of `KDStats`
# Numbers a row that a backend may keep for backward instead of a gradient: what is taken off z and v over T,
# in two steps each, and off z at T = 1; the sum of g, and the g of a target.
STATE_ROWS = 8


# What processes tell each other of a row whose classes they share: of z and v over T, and of z at T = 1, what
# exponents are relative to and their sum; the cross sum, the sum of g, both logits of the target, D.
SHARD_NUMBERS = (
    "z_ref", "z_sum", "v_ref", "v_sum", "one_ref", "one_sum", "cross", "sum_g", "z_target", "v_target", "phi"
)  # fmt: skip


def state_rows(teachers: int, mixture: Tensor | None) -> int:
    """The same of a call: two more for each teacher of a mixture, its log-sum-exp in two parts."""
    return STATE_ROWS + (0 if mixture is None else 2 * teachers)


# Compared by identity, which is cheap as a key: `make_spec` gives the same record for the same options.
@dataclass(frozen=True, eq=False)
class LossSpec:
    """Every option of the loss that is not a tensor.

    `t_factor` is T², or 1 without `t_squared`. A softcap of 0 means none.
    """

    divergence: str
    params: tuple[float, ...]
    temperature: float
    t_factor: float
    soft_weight: float
    hard_weight: float
    ignore_index: int
    reduction: str
    student_scale: float
    student_softcap: float
    teachers: tuple[tuple[float, float], ...]  # scale and softcap of each
    student_noise: Noise | None
    teacher_noise: Noise | None
    stats: bool

    @property
    def row(self) -> Divergence:
        """The divergence's row of the table."""
        return TABLE[self.divergence]


class Call(NamedTuple):
    """A checked call, as every backend takes it.

    Before `linear` has taken it apart, the logits of a `Head` are a `Projection`, which answers for them.

    Attributes:
        student: Raw logits, `[..., V]`.
        teachers: Raw logits of the same leading shape, of any dtypes and strides; detached. None where there
            is `sparse`.
        mixture: The teachers' weights, float32 or float64, `[M]` or `[..., M]`, which sum to 1; or None,
            where there is one teacher.
        labels: int64, `[...]`; floats `[..., V]` for a binary divergence; or None.
        mask: bool, `[...]`, or None.
        token_weights: Any float, `[...]`, or None.
        num_items: The denominator of a mean, or None for the number of counted rows.
        student_seed: Of the student's noise, int64, 0-d, or None where there is none.
        teacher_seed: Of the teachers', likewise.
        spec: All other options.
        classes: How many leading classes both softmaxes span.
        sparse: What is known of a stored teacher, in the place of logits; or None.
    """

    student: Tensor
    teachers: tuple[Tensor, ...]
    mixture: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    token_weights: Tensor | None
    num_items: Tensor | float | None
    student_seed: Tensor | None
    teacher_seed: Tensor | None
    spec: LossSpec
    classes: int
    sparse: Sparse | None = None


def without_phases(call: Call) -> str | None:
    """Why no kernels have phases for such a call on shards of a vocabulary; None where they may."""
    spec = call.spec
    if spec.row.normaliser != "softmax" or call.sparse is not None or spec.soft_weight == 0:
        return "its phases are of two softmaxes"
    if call.mixture is not None or spec.student_noise or spec.teacher_noise or spec.stats:
        return "its phases have no mixtures, noise and stats"
    return None


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def new_spec(
    divergence: str | Parametrised,
    temperature: float,
    t_squared: bool,
    soft_weight: float,
    hard_weight: float | None,
    ignore_index: int,
    reduction: str,
    student: PostProcessing,
    teachers: tuple[PostProcessing, ...],
    student_noise: Noise | None,
    teacher_noise: Noise | None,
    stats: bool,
) -> LossSpec:
    """The record of a call's options; raises on a bad one, by name."""
    name, params = resolve(divergence)
    T = _finite("temperature", temperature)
    if T <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if not 1e-150 < T < 1e150:
        raise ValueError(f"temperature must have a square that is a float, got {temperature}")
    soft = _finite("soft_weight", soft_weight)
    hard = 0.0 if hard_weight is None else _finite("hard_weight", hard_weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    return LossSpec(
        divergence=name,
        params=params,
        temperature=T,
        t_factor=T * T if t_squared else 1.0,
        soft_weight=soft,
        hard_weight=hard,
        ignore_index=ignore_index,
        reduction=reduction,
        student_scale=float(student[0]),
        student_softcap=float(student[1] or 0.0),
        teachers=tuple((float(scale), float(cap or 0.0)) for scale, cap in teachers),
        student_noise=student_noise,
        teacher_noise=teacher_noise,
        stats=stats,
    )


# A training loop asks for the same record at every step; a schedule of temperatures asks for many, once each.
make_spec = lru_cache(maxsize=256, typed=True)(new_spec)
