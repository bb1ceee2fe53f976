"""How a call with a stored teacher launches its kernel; the rest of the call is as in `triton_launch.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import tuning
from ..arguments import QUIET, Items, numbers, uses_labels
from ..layout import common_rows
from ..reference import compute_dtype
from ..spec import Call
from . import triton_launch as of_rows
from .triton_blocks import on_device
from .triton_kernels import GRADIENT, NO_HARD, OWN_HARD, SCALED_GRADIENT, SHARED_HARD
from .triton_sparse import sparse_kernel


def forward(call: Call, keep: str, out: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, the stats where the spec asks for them, and what is kept for backward."""
    return of_rows.forward(call, keep, out, launch)


def gradient(upstream: Tensor, call: Call, state: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient alone, from the rows and their state, with the upstream factor before the one rounding."""
    return of_rows.gradient(upstream, call, state, out, launch)


def constants(call: Call) -> dict[str, Any]:
    """What the kernel is compiled for, but for modes, types and layout."""
    spec, divergence = call.spec, call.spec.row
    hard = uses_labels(call)
    noise = of_rows.noise_constants("Z", spec.student_noise)
    return {
        "PHI": on_device(divergence.phi),
        "G": on_device(divergence.g),
        "PARAMS": len(spec.params),
        "GUARD": of_rows.needs_guard(divergence, spec.params),
        "SOFT": spec.soft_weight != 0 or spec.stats,
        "WEIGHED": spec.soft_weight != 0,
        "HARD": (NO_HARD if not hard else SHARED_HARD if spec.temperature == 1 else OWN_HARD).value,
        "STATS": spec.stats,
        "LABELS": call.labels is not None,
        "MASK": call.mask is not None,
        "WEIGHTS": call.token_weights is not None,
        "CAPPED": spec.student_softcap != 0,
        "NOISE": noise["Z_NOISE"],
        "PER_ROW": noise["Z_PER_ROW"],
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
) -> None:
    """One program a row: reads or fills whatever of these the mode is about."""
    student, stored, spec, classes = call.student, call.sparse, call.spec, call.classes
    assert stored is not None
    rows, k = student.shape[:-1].numel(), stored.ids.shape[-1]
    if rows == 0:
        return
    of_rows.check_labels_here(call)
    sides, shape, strides = common_rows([student], 3)
    R, T = compute_dtype(student, call.teachers), spec.temperature
    itemsize, unit = student.element_size(), sides[0].stride(-1) == 1
    align = math.gcd(of_rows.ALIGNMENT, classes, *strides[0])
    noisy = spec.student_noise is not None and not spec.student_noise.per_row
    lanes = of_rows.lanes(student.device)
    # With noise, as in the dense kernel: a thread that has the four classes of one call of Philox hands no
    # normals to others. What phi and g need of registers is that of k classes and not of the row's.
    size = max(itemsize, 4) if noisy else itemsize
    aligned = align if unit else 1
    config = tuning.triton(classes, size, aligned, spec.stats or noisy, lanes)
    at_once = tuning.triton_stored(config, size, aligned, lanes)
    held = k <= at_once.stored
    writes = mode in (GRADIENT.value, SCALED_GRADIENT.value)
    changes = None
    if writes and not held and spec.soft_weight != 0:
        changes = torch.empty(stored.ids.shape, dtype=student.dtype, device=student.device)
    z, z_noise = numbers(spec.student_scale, spec.student_softcap, spec.student_noise), spec.student_noise
    z_noise = z_noise or QUIET
    labels, mask, token_weights = call.labels, call.mask, call.token_weights
    counted, given, number = of_rows.item_arguments(items)
    none = [0] * (3 - len(shape))
    sparse_kernel[(rows,)](
        sides[0], stored.ids, stored.log_p, stored.rest, stored.extra,
        gradient, changes, figures, state,
        None if labels is None else labels.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        None if token_weights is None else token_weights.detach().contiguous(),
        counted, given,
        None if upstream is None else upstream.contiguous(),
        call.student_seed,
        rows, *[1, 1, 1, *shape][-2:], classes // align, k, spec.ignore_index,
        *none, *(step // align for step in strides[0]), sides[0].stride(-1),
        0 if upstream is None or upstream.dim() == 0 else 1, z_noise.row_offset,
        z.by / T, z.by, T, z.cap, z.slope, spec.student_scale, z_noise.sigma, z_noise.probability,
        spec.t_factor, spec.soft_weight, spec.hard_weight,
        spec.soft_weight * spec.t_factor * z.gain / T, spec.hard_weight * z.gain,
        *(*spec.params, 0.0, 0.0, 0.0, 0.0)[:4], number,
        **constants(call), MODE=mode, MEAN=spec.reduction == "mean", **of_rows.item_constants(items),
        UNIT=unit, WHOLE=config.whole, R=of_rows.TYPES[R], BLOCK=config.block, GROUP=config.group,
        AXIS=0 if config.strided else 1, ALIGN=align, K=at_once.stored, HELD=held,
        MEMBERS=at_once.members, MEMBER_AXIS=0 if at_once.strided else 1, num_warps=config.warps,
        enable_fp_fusion=False,  # as in the dense kernel
    )  # fmt: skip
