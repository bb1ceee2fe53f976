"""How a call launches the Triton kernels: what they are given, and what they are compiled for."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from .. import reference, tuning
from ..arguments import QUIET, Items, count_items, numbers, uses_labels
from ..divergences import BUILT_IN, Closed, Divergence
from ..layout import common_rows
from ..noise import Noise
from ..reference import compute_dtype, counted_rows
from ..spec import STATS, Call, LossSpec, state_rows
from .triton_kernels import (
    CENTRED,
    COUNT,
    FIGURES,
    GRADIENT,
    LOSS,
    NO_HARD,
    NUMBER,
    OWN_HARD,
    RAW,
    SCALED_GRADIENT,
    SHARED_HARD,
    SOFTMAX,
    STATE,
    TENSOR,
    on_device,
    row_kernel,
    scale_kernel,
    total_kernel,
)
from .triton_noise import ADDITIVE, MULTIPLICATIVE, NO_NOISE

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
NORMALISERS = {"softmax": SOFTMAX.value, "mean": CENTRED.value, "none": RAW.value}
MODES = {"nothing": LOSS.value, "gradient": GRADIENT.value, "state": STATE.value}
ALIGNMENT = 8  # numbers: 16 bytes of 16-bit ones
ROWS_AT_ONCE = 4096  # of the one program that adds up the losses
# Divergences of which a thread works on 16 classes of bfloat16 at once. With as many, on sm_90, `alpha_beta`
# spills in its loops and `binary_kl` takes 156 registers with labels; of one
# that a caller registers nobody knows.
LIGHT = BUILT_IN - {"alpha_beta", "binary_kl"}


def item_arguments(items: Items) -> tuple[Tensor | None, Tensor | None, float]:
    """What a kernel is given of them."""
    return items.counted, items.given, 1.0 if items.number is None else items.number


def item_constants(items: Items) -> dict[str, Any]:
    """What it is compiled for."""
    kind = TENSOR if items.given is not None else COUNT if items.number is None else NUMBER
    return {"ITEMS": kind.value, "COUNTED": items.counted is not None}


def forward(
    call: Call, keep: str, out: Tensor | None = None, of_rows: Callable[..., None] | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, the stats where the spec asks for them, and what is kept for backward.

    `of_rows` launches the rows where `launch` doesn't.
    """
    student, spec = call.student, call.spec
    leading, rows = student.shape[:-1], student.shape[:-1].numel()
    R, device = compute_dtype(student, call.teachers), student.device
    each = spec.reduction == "none"
    # Without stats the rows' losses are the only figures, and returned as they are, not as a view of more.
    shape = (FIGURES.value, rows) if spec.stats else leading if each else (rows,)
    figures = torch.empty(shape, dtype=R, device=device)
    kept = None
    if keep == "gradient":
        kept = torch.empty(student.shape, dtype=student.dtype, device=device) if out is None else out
    elif keep == "state":
        kept = torch.empty(state_rows(len(call.teachers), call.mixture), rows, dtype=R, device=device)
    loss = None if each else torch.empty((), dtype=R, device=device)
    stats = torch.empty(STATS, dtype=R, device=device) if spec.stats else None
    items = count_items(call)
    counted, given, number = item_arguments(items)
    with launching(student):
        (of_rows or launch)(
            MODES[keep], call, items, gradient=kept if keep == "gradient" else None, figures=figures,
            state=kept if keep == "state" else None,
        )  # fmt: skip
        if loss is not None or stats is not None:
            total_kernel[(STATS if spec.stats else 1,)](
                figures, loss, stats, counted, given, rows, number,
                LOSS_MEAN=spec.reduction == "mean", STATS_MEAN=spec.reduction != "sum",
                **item_constants(items), STATS=spec.stats, BLOCK=ROWS_AT_ONCE, num_warps=8,
            )  # fmt: skip
    if loss is None:
        loss = figures[0].reshape(leading).clone() if spec.stats else figures
    return loss, stats, kept


def gradient(
    upstream: Tensor,
    call: Call,
    state: Tensor,
    out: Tensor | None = None,
    of_rows: Callable[..., None] | None = None,
) -> Tensor:
    """The gradient alone, from the rows and their state, with the upstream factor before the one rounding."""
    student = call.student
    if out is None:
        out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    with launching(student):
        (of_rows or launch)(
            SCALED_GRADIENT.value, call, count_items(call), gradient=out, state=state, upstream=upstream
        )
    return out


def scale(gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
    """The gradient times the upstream one (0-d, or one per row); in place and times 1 it does nothing."""
    out = gradient if in_place else torch.empty_like(gradient)
    width = gradient.shape[-1]
    if gradient.numel():
        upstream, stride = (upstream, 0) if upstream.dim() == 0 else (upstream.contiguous(), 1)
        align = math.gcd(ALIGNMENT, width)
        config = tuning.triton(width, gradient.element_size(), align, lanes=lanes(gradient.device))
        with launching(gradient):
            scale_kernel[(gradient.numel() // width,)](
                gradient, out, upstream, stride, width // align,
                IN_PLACE=in_place, BLOCK=config.block, ALIGN=align, num_warps=config.warps,
            )  # fmt: skip
    return out


def launching(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; the interpreter is numpy, which warns of every -inf."""
    if tensor.device.type == "cpu":
        return np.errstate(all="ignore")
    return torch.get_device_module(tensor.device).device(tensor.device)


def lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on some of AMD's GPUs."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


@lru_cache(maxsize=256)
def needs_guard(divergence: Divergence, params: tuple[float, ...]) -> bool:
    """Whether an expression is other than 0 for a class that neither side can produce."""
    never = torch.full((), -math.inf, device="cpu")
    return any(expression(never, never, *params).item() != 0 for expression in (divergence.phi, divergence.g))


def closed_constants(divergence: Divergence) -> dict[str, bool | float]:
    """The kernel's constants for a divergence's closed form, or for none."""
    closed = divergence.closed or Closed(False, 0.0, 0.0, 0.0, 0.0)
    return {
        "CLOSED": divergence.closed is not None,
        "TEACHER_WEIGHS": closed.teacher_weighs,
        "A": closed.a,
        "B": closed.b,
        "SUM_G": closed.sum_g,
        "SUM_G_PER_D": closed.sum_g_per_d,
        "TIMES": -1 if closed.times is None else closed.times,
    }


def in_three(x: float) -> tuple[float, float, float]:
    """A float64 number as the sum of three of float32: in a tuple, that is what kernels get."""
    first = ctypes.c_float(x).value
    if not math.isfinite(first):
        return first, 0.0, 0.0
    second = ctypes.c_float(x - first).value
    return first, second, x - first - second


def is_heavy(call: Call) -> bool:
    """Whether classes take so many registers that a thread has half as many classes of a block."""
    return call.spec.stats or call.mixture is not None or call.spec.divergence not in LIGHT


def draws(spec: LossSpec) -> bool:
    """Whether there is noise on every logit."""
    return any(noise is not None and not noise.per_row for noise in (spec.student_noise, spec.teacher_noise))


def noise_constants(side: str, noise: Noise | None) -> dict[str, Any]:
    """What a kernel is compiled for of a side's noise."""
    kind = NO_NOISE if noise is None else MULTIPLICATIVE if noise.multiplicative else ADDITIVE
    return {f"{side}_NOISE": kind.value, f"{side}_PER_ROW": noise is not None and noise.per_row}


def bits(flags: list[bool]) -> int:
    """One bit for each teacher."""
    return sum(1 << m for m, flag in enumerate(flags) if flag)


def check_labels_here(call: Call) -> None:
    """Raises on a label out of range, where looking waits for nothing."""
    if call.labels is not None and call.student.device.type == "cpu":
        reference.targets(call, counted_rows(call))


def constants(call: Call) -> dict[str, Any]:
    """What a kernel is compiled for, but for modes, types and layout."""
    spec, divergence = call.spec, call.spec.row
    soft, hard = spec.soft_weight != 0 or spec.stats, uses_labels(call)
    return {
        "PHI": on_device(divergence.phi),
        "G": on_device(divergence.g),
        "PARAMS": len(spec.params),
        "GUARD": needs_guard(divergence, spec.params),
        "NORMALISER": NORMALISERS[divergence.normaliser],
        "TARGET": divergence.target and soft,
        "BINARY": divergence.binary,
        **closed_constants(divergence),
        "SOFT": soft,
        "WEIGHED": spec.soft_weight != 0,
        "HARD": (NO_HARD if not hard else SHARED_HARD if spec.temperature == 1 else OWN_HARD).value,
        "STATS": spec.stats,
        "Z_NORMS": not divergence.binary
        and (hard or spec.stats or (soft and divergence.normaliser == "softmax")),
        "V_NORMS": not divergence.binary and (spec.stats or (soft and divergence.normaliser == "softmax")),
        "LABELS": call.labels is not None and not divergence.binary,
        "MASK": call.mask is not None,
        "WEIGHTS": call.token_weights is not None,
        "Z_CAPPED": spec.student_softcap != 0,
        "V_CAPPED": bits([softcap != 0 for _, softcap in spec.teachers]),
        "M": len(call.teachers),
        "MIXED": call.mixture is not None,
        **noise_constants("Z", spec.student_noise),
        **noise_constants("V", spec.teacher_noise),
    }


def launch(
    mode: int,
    call: Call,
    items: Items,
    *,
    gradient: Tensor | None = None,
    figures: Tensor | None = None,
    state: Tensor | None = None,
    upstream: Tensor | None = None,
    sharded: bool = False,
) -> None:
    """One program a row: reads or fills whatever of these the mode is about.

    `sharded` says that labels beyond the last class are those of another process.
    """
    student, teachers, mixture, labels, mask, token_weights, _, z_seed, v_seed, spec, classes, _ = call
    rows, width = student.shape[:-1].numel(), student.shape[-1]
    if rows == 0:
        return
    if not sharded:
        check_labels_here(call)
    binary_labels = labels is not None and spec.row.binary and uses_labels(call)
    sides = [student, *teachers, labels] if labels is not None and binary_labels else [student, *teachers]
    sides, shape, strides = common_rows(sides, 3)
    R, M, T = compute_dtype(student, teachers), len(teachers), spec.temperature
    itemsize = max(side.element_size() for side in sides)
    align = math.gcd(ALIGNMENT, classes, width, *(step for side in strides for step in side))
    units = [side.stride(-1) == 1 for side in sides]
    heavy = is_heavy(call) or draws(spec)
    if draws(spec):
        # A thread that has the four classes of one call of Philox hands no normals to others.
        itemsize = max(itemsize, 4)
    config = tuning.triton(width, itemsize, align if all(units) else 1, heavy, lanes(student.device))
    # Three strides of rows, and that of columns.
    none = [0] * (3 - len(shape))
    steps = [
        [*none, *(step // align for step in side), x.stride(-1)]
        for x, side in zip(sides, strides, strict=True)
    ]
    if binary_labels:
        labels = sides[-1]
    elif labels is not None:
        labels = None if spec.row.binary else labels.contiguous()
    z = numbers(spec.student_scale, spec.student_softcap, spec.student_noise)
    first, *others = (numbers(*options, spec.teacher_noise) for options in spec.teachers)
    more_numbers = [in_three(x) for v in others for x in (v.by / T, v.cap, v.slope)]
    z_noise, v_noise = (noise or QUIET for noise in (spec.student_noise, spec.teacher_noise))
    counted, given, number = item_arguments(items)
    row_kernel[(rows,)](
        sides[0], sides[1], gradient, figures, state,
        labels,
        None if mask is None else mask.contiguous().view(torch.uint8),
        None if token_weights is None else token_weights.detach().contiguous(),
        counted, given,
        None if upstream is None else upstream.contiguous(),
        z_seed, v_seed, None if mixture is None else mixture.contiguous(), tuple(sides[2 : M + 1]),
        rows, *[1, 1, 1, *shape][-2:], classes // align, width // align, spec.ignore_index,
        *steps[0], *steps[1], *(steps[-1] if binary_labels else [0] * 4),
        0 if upstream is None or upstream.dim() == 0 else 1,
        0 if mixture is None or mixture.dim() == 1 else M,
        tuple(2 * step + 3 for side in steps[2 : M + 1] for step in side),
        tuple(part for parts in more_numbers for part in parts),
        z_noise.row_offset, v_noise.row_offset,
        z.by / T, first.by / T, z.by, T, z.cap, z.slope, first.cap, first.slope, spec.student_scale,
        z_noise.sigma, z_noise.probability, v_noise.sigma, v_noise.probability,
        spec.t_factor, spec.soft_weight, spec.hard_weight,
        spec.soft_weight * spec.t_factor * z.gain / T, spec.hard_weight * z.gain,
        *(*spec.params, 0.0, 0.0, 0.0, 0.0)[:4], number,
        **constants(call), MODE=mode, MEAN=spec.reduction == "mean", **item_constants(items),
        Z_UNIT=units[0], V_UNIT=bits(units[1 : M + 1]), Y_UNIT=units[-1], PADDED=classes != width,
        WHOLE=config.whole, SHARDED=sharded, R=TYPES[R], BLOCK=config.block, GROUP=config.group,
        AXIS=0 if config.strided else 1, ALIGN=align, num_warps=config.warps,
        # Fused, z / T − ref would leave the rounding error of ref at the maximum, which of a large one may be
        # any exponent. And so what the interpreter computes is what a GPU does.
        enable_fp_fusion=False,
    )  # fmt: skip
