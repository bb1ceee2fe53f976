"""How the phases of a call on shards launch their kernels, and what of them is a few numbers a row.

Those are tensors on the rows' device, that nobody here looks at: nothing waits for it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import tuning
from ..arguments import numbers, uses_labels
from ..expressions import g_binary_kl, phi_binary_kl
from ..layout import common_rows
from ..reference import compute_dtype
from ..spec import SHARD_NUMBERS, Call
from . import triton_launch as of_rows
from .triton_shards import shard_sums_kernel, shard_terms_kernel

# Of the constants of `row_kernel`, those that these have.
_OF_BOTH = ("LABELS", "MASK", "Z_CAPPED", "V_CAPPED")
_OF_SUMS = (*_OF_BOTH, "CLOSED", "TEACHER_WEIGHS", "A", "B", "TARGET", "HARD")
_OF_TERMS = (*_OF_BOTH, "PHI", "G", "PARAMS", "GUARD")


def sums(call: Call) -> Tensor:
    """Phase 1: the sums of each row over the classes that are here, float64 `[N, SHARD_NUMBERS]`."""
    rows, device = call.student.shape[:-1].numel(), call.student.device
    found = torch.zeros(rows, len(SHARD_NUMBERS), dtype=torch.float64, device=device)
    if found.numel() and call.classes:
        spec = call.spec
        tensors, layout, options = _arguments(call, heavy=False)
        z, v = _sides(call)
        with of_rows.launching(call.student):
            shard_sums_kernel[(rows,)](
                *tensors, found, *_rows_that_count(call), *layout,
                z.by / spec.temperature, v.by / spec.temperature, z.by, spec.temperature,
                z.cap, z.slope, v.cap, v.slope,
                **_chosen(call, _OF_SUMS), **options,
            )  # fmt: skip
    return found


def terms(call: Call, found: Tensor) -> Tensor:
    """Phase 2: the numbers with phi and the sum of g, of all classes in closed form, else of those here."""
    if call.spec.row.closed is not None:
        s = _by_name(found)
        s["phi"], s["sum_g"], _ = _closed(call, s)
        return torch.stack([*s.values()], -1)
    if found.numel() and call.classes:
        spec, rows = call.spec, len(found)
        tensors, layout, options = _arguments(call, of_rows.is_heavy(call))
        z, v = _sides(call)
        state = torch.stack(_normalisers(call, _by_name(found)))
        with of_rows.launching(call.student):
            shard_terms_kernel[(rows,)](
                *tensors, found, state, *_rows_that_count(call), rows, *layout,
                z.by / spec.temperature, v.by / spec.temperature, z.cap, z.slope, v.cap, v.slope,
                *(*spec.params, 0.0, 0.0, 0.0, 0.0)[:4],
                **_chosen(call, _OF_TERMS), **options,
            )  # fmt: skip
    return found


def gradient(upstream: Tensor, call: Call, found: Tensor, out: Tensor) -> Tensor:
    """Phase 3, by the kernel of whole rows: the gradient of the classes that are here, from all numbers."""
    if not call.classes:
        return out
    return of_rows.gradient(
        upstream, call, _state(call, _by_name(found)), out, partial(of_rows.launch, sharded=True)
    )


def _arguments(call: Call, heavy: bool) -> tuple[list[Tensor], list[int], dict[str, Any]]:
    """What both kernels are launched with: the sides, how they lie, and how much of them is taken at once."""
    student, classes = call.student, call.classes
    sides, shape, strides = common_rows([student, call.teachers[0]], 3)
    itemsize = max(side.element_size() for side in sides)
    align = math.gcd(of_rows.ALIGNMENT, classes, *(step for side in strides for step in side))
    units = [side.stride(-1) == 1 for side in sides]
    config = tuning.triton(
        classes, itemsize, align if all(units) else 1, heavy, of_rows.lanes(student.device)
    )
    layout = [*[1, 1, 1, *shape][-2:], classes // align, call.spec.ignore_index]
    for side, steps in zip(sides, strides, strict=True):
        layout += [*[0] * (3 - len(shape)), *(step // align for step in steps), side.stride(-1)]
    return sides, layout, {
        "Z_UNIT": units[0], "V_UNIT": units[1], "R": of_rows.TYPES[compute_dtype(student, call.teachers)],
        "BLOCK": config.block, "GROUP": config.group, "AXIS": 0 if config.strided else 1, "ALIGN": align,
        "num_warps": config.warps,
        "enable_fp_fusion": False,  # as in the kernel of whole rows
    }  # fmt: skip


def _rows_that_count(call: Call) -> tuple[Tensor | None, Tensor | None]:
    labels, mask = call.labels, call.mask
    return (
        None if labels is None else labels.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
    )


def _sides(call: Call) -> tuple[Any, Any]:
    spec = call.spec
    return numbers(spec.student_scale, spec.student_softcap, None), numbers(*spec.teachers[0], None)


def _chosen(call: Call, names: tuple[str, ...]) -> dict[str, Any]:
    every = of_rows.constants(call)
    return {name: every[name] for name in names}


# What follows from the numbers of a row


def _by_name(found: Tensor) -> dict[str, Tensor]:
    return dict(zip(SHARD_NUMBERS, found.unbind(-1), strict=True))


def _normalisers(call: Call, s: dict[str, Tensor]) -> list[Tensor]:
    """What is taken off z and v over T, in two steps each: as `row_kernel` has it."""
    R = compute_dtype(call.student, call.teachers)
    log_z, log_v = s["z_sum"].log(), s["v_sum"].log()
    if call.spec.row.target:
        # As there: nobody else on the student's side leaves −inf, and on the teacher's +inf says so.
        log_z = torch.where(s["z_sum"] == 0, 0.0, log_z)
        log_v = torch.where(s["v_sum"] == 0, math.inf, log_v)
    return [x.to(R) for x in (s["z_ref"], log_z, s["v_ref"], log_v)]


def _exponent(call: Call, side: Any, x: Tensor, T: float) -> Tensor:
    """A side's logits over T, rounded as kernels round them."""
    return (x.to(compute_dtype(call.student, call.teachers)) * (side.by / T)).double()


def _closed(call: Call, s: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """D of each row, the sum of g and the target's g, from sums over all classes."""
    spec, closed = call.spec, call.spec.row.closed
    assert closed is not None
    log_z, log_v = s["z_sum"].log(), s["v_sum"].log()
    own, other = (log_v, log_z) if closed.teacher_weighs else (log_z, log_v)
    mass = s["v_sum"] if closed.teacher_weighs else s["z_sum"]
    times = 1.0 if closed.times is None else spec.params[closed.times]
    if spec.row.target:
        # What the student gives none of the others is infinitely far by the cross sum.
        other = torch.where(s["z_sum"] == 0, 0.0, other)
    # A term of weight 0 is absent, also where it is infinite.
    D = torch.zeros_like(mass)
    if times != 0:
        D = times * (s["cross"] / mass - closed.a * own - closed.b * other)
    sum_g = torch.full_like(mass, times * closed.sum_g)
    if closed.sum_g_per_d != 0:
        sum_g = sum_g + closed.sum_g_per_d * D
    gamma = torch.zeros_like(mass)
    if spec.row.target:
        # Where the teacher is sure of the target, the others share nothing.
        nobody = s["v_sum"] == 0
        D, sum_g = (torch.where(nobody, 0.0, x) for x in (D, sum_g))
        if (alpha := spec.params[0]) != 0:
            (z, v), T = _sides(call), spec.temperature
            margins = (
                _exponent(call, z, s["z_target"], T) - s["z_ref"] - log_z,
                _exponent(call, v, s["v_target"], T) - s["v_ref"] - log_v,
            )
            gamma = alpha * g_binary_kl(*margins)
            D, sum_g = D + alpha * phi_binary_kl(*margins), sum_g + gamma
    return D, sum_g, gamma


def _at_one(call: Call, s: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What is taken off z at T = 1, in two steps, for the softmax of the hard term."""
    spec = call.spec
    ref, mass = (s["z_ref"], s["z_sum"]) if spec.temperature == 1 else (s["one_ref"], s["one_sum"])
    # As it is where the kernel takes it off.
    top = ref.to(compute_dtype(call.student, call.teachers)).double()
    if spec.row.target:
        # The sums are of the others, this softmax is of all.
        x = _exponent(call, _sides(call)[0], s["z_target"], 1.0)
        top = torch.where(mass == 0, x, torch.maximum(top, x))
        top = torch.where(torch.isneginf(top), 0.0, top)
        others = torch.where(mass == 0, 0.0, mass * (ref - top).exp())
        return top, (others + (x - top).exp()).log()
    return top, mass.log() + (ref - top)


def _state(call: Call, s: dict[str, Tensor]) -> Tensor:
    """The rows' state as `row_kernel` has it, `[STATE_ROWS, N]`."""
    zero = torch.zeros_like(s["z_ref"])
    at_one = _at_one(call, s) if uses_labels(call) else (zero, zero)
    _, *more = (zero, s["sum_g"], zero) if call.spec.row.closed is None else _closed(call, s)
    R = compute_dtype(call.student, call.teachers)
    return torch.stack([x.to(R) for x in (*_normalisers(call, s), *at_one, *more)])
