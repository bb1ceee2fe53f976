"""What kernels of a GPU are given beside tensors: what a mean divides by, and the numbers of a side."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .noise import Noise
from .spec import Call

QUIET = Noise(0.0, False, False, 1.0, 0)  # what stands for no noise


class Items(NamedTuple):
    """What a mean divides by: a number, one value on the device, or where there is neither the count itself.

    Attributes:
        counted: How many rows count, one integer on the device, or None where all do.
        given: The caller's denominator where it is on the device.
        number: The caller's, or the number of rows, where no device has to be asked.
    """

    counted: Tensor | None
    given: Tensor | None
    number: float | None


def count_items(call: Call) -> Items:
    """What a mean divides by, found without waiting for the device."""
    spec, given = call.spec, call.num_items
    rows = call.student.shape[:-1].numel()
    if rows == 0 or (spec.reduction != "mean" and not spec.stats):
        return Items(None, None, 1.0)
    counted: Tensor | None = None
    if call.mask is not None:
        counted = call.mask.sum()
    elif call.labels is not None and not spec.row.binary:
        counted = (call.labels != spec.ignore_index).sum()
    if isinstance(given, Tensor):
        if given.device.type != "cpu":
            return Items(counted, given, None)
        given = float(given)
    if given is None and counted is None:
        given = rows
    return Items(counted, None, None if given is None else float(given))


class Numbers(NamedTuple):
    """Of a side, what its raw logits are multiplied by, and its softcap.

    Attributes:
        by: Of what the kernel has before it divides by T; the scale, unless that is applied by then.
        cap: The softcap, or 1 where there is none.
        slope: What goes into the cap, or to the noise.
        gain: What the gradient is multiplied by beside the derivative of the cap, which has the scale in it.
    """

    by: float
    cap: float
    slope: float
    gain: float


def numbers(scale: float, softcap: float, noise: Noise | None) -> Numbers:
    """The numbers of a side. A cap and noise are applied to scaled logits, so that the scale goes first."""
    first = softcap != 0 or noise is not None
    cap = softcap or 1.0
    return Numbers(1.0 if first else scale, cap, scale / cap, 1.0 if softcap else scale)


def uses_labels(call: Call) -> bool:
    """Whether there is a hard term, for the loss or the stats."""
    return call.labels is not None and (call.spec.hard_weight != 0 or call.spec.stats)
