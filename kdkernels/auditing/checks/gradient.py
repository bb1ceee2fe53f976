"""Whether the gradient is that of the loss, and what is done with the one that comes from above."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..adapter import Refused
from ..report import CONVENTION, NOT_APPLICABLE, RIGHT, WRONG, Line
from ..subject import Subject, off

CHECK = "gradient"
# Of slopes by central differences, relative to the largest: in fp64, and where fp32 is inside.
CLOSE, CLOSE_FP32 = 1e-5, 1e-2


def check(subject: Subject) -> Iterator[Line]:
    """Lines on the gradient, at T = 1 and where there is one at T = 3, and on upstream gradients."""
    yield _own(subject, "derivative of its own loss", {})
    if subject.adapter.takes("temperature"):
        yield _own(subject, "derivative of its own loss at T = 3", {"temperature": 3.0})
    yield _scaled(subject)
    yield from _each_row(subject)
    yield _teacher(subject)


def _slope(
    subject: Subject, z: Tensor, v: Tensor, labels: Tensor, way: Tensor, step: float, given: Any
) -> float:
    """Along a direction, by central differences of the fourth order."""

    def at(x: float) -> float:
        with torch.no_grad():
            return float(subject.call(z + x * way, v, labels, **given).double().sum())

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


def _exact(subject: Subject, z: Tensor, v: Tensor, labels: Tensor) -> bool:
    """Whether the loss has more digits than fp32 has."""
    way = torch.ones_like(z)
    way[:, ::2] = -1

    def at(x: float) -> float:
        with torch.no_grad():
            return float(subject.call(z + x * way, v, labels).double().sum())

    # In fp32 steps as small are lost, or round to jumps.
    steps = [at(n * 1e-8) - at(0.0) for n in range(1, 6)]
    return steps[0] != 0 and all(abs(s / steps[0] - n) < 0.05 for n, s in enumerate(steps, 1))


def _own(subject: Subject, about: str, given: dict[str, Any]) -> Line:
    z, v, labels = subject.sample(3, 7, 61)
    try:
        grad = subject.outcome(z, v, labels, **given).grad.double()
    except Refused as error:
        return Line(CHECK, about, str(error), WRONG)
    exact = _exact(subject, z, v, labels)
    step, close = (1e-3, CLOSE) if exact else (3e-2, CLOSE_FP32)
    generator = torch.Generator().manual_seed(67)
    worst, size = 0.0, 0.0
    slopes = []
    for i in range(8):
        way = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
        if i >= 5:  # of one class of one row
            way = torch.zeros_like(way)
            way[i - 5, i - 3] = 1.0
        slope = _slope(subject, z, v, labels, way, step, given)
        mine = float((grad * way).sum())
        slopes.append((slope, mine))
        size = max(size, abs(slope), abs(mine))
    worst = max(abs(a - b) if a == a and b == b else float("inf") for a, b in slopes) / max(size, 1e-30)
    words = f"within {worst:.1g} of central differences in {'fp64' if exact else 'fp32'}"
    if worst <= close:
        return Line(CHECK, about, words, RIGHT)
    return Line(CHECK, about, f"{100 * worst:.3g} % off central differences of the loss", WRONG)


def _scaled(subject: Subject) -> Line:
    about = "a loss × 3"
    z, v, labels = subject.sample(4, 7, 71)
    once = subject.outcome(z, v, labels).grad
    thrice = subject.outcome(z, v, labels, lambda loss: torch.full_like(loss, 3.0)).grad
    ratio = float((thrice.double() * once.double()).sum() / once.double().square().sum().clamp_min(1e-300))
    right = off(thrice, 3 * once) < 1e-5
    words = f"multiplies the gradient by {ratio:.4g}"
    return Line(CHECK, about, words, RIGHT if right else WRONG)


def _each_row(subject: Subject) -> Iterator[Line]:
    about = "a weight for each row, after reduction='none'"
    z, v, labels = subject.sample(4, 7, 73)
    given: dict[str, Any] = {}
    if subject.reduction not in ("none", "classes"):
        if not subject.adapter.takes("reduction"):
            yield Line(CHECK, about, "no argument asks for one value a row", NOT_APPLICABLE)
            return
        given["reduction"] = "none"
    weights = torch.tensor([2.0, -1.0, 0.0, 5.0], dtype=torch.float64, device=z.device)

    def spread(loss: Tensor) -> Tensor:
        return weights.to(loss.dtype).view(-1, *[1] * (loss.dim() - 1)).expand_as(loss)

    try:
        loss = subject.call(z, v, labels, **given)
        if loss.dim() == 0 or len(loss) != len(z):
            words = f"reduction='none' gave {'one value' if loss.dim() == 0 else list(loss.shape)} for 4 rows"
            yield Line(CHECK, about, words, CONVENTION)
            return
        weighted = subject.outcome(z, v, labels, spread, **given).grad.double()
        even = subject.outcome(z, v, labels, **given).grad.double()
    except Refused as error:
        yield Line(CHECK, about, f"refused: {error}", CONVENTION)
        return
    far = off(weighted, even * weights[:, None])
    yield Line(
        CHECK, about, f"each row's gradient is {far:.1g} off its weight's", RIGHT if far < 1e-5 else WRONG
    )


def _teacher_slope(subject: Subject, z: Tensor, v: Tensor, labels: Tensor | None, step: Tensor) -> float:
    """Half the difference of the loss between the two ends of a step of the teacher's logits."""
    ends = [float(subject.call(z, v + x, labels).double().sum()) for x in (step, -step)]
    return (ends[0] - ends[1]) / 2


def _teacher(subject: Subject) -> Line:
    about = "a teacher that requires grad"
    z, v, labels = subject.sample(3, 7, 79)
    v = v.requires_grad_()
    wanted = subject.claims.teacher_gradient
    try:
        loss = subject.call(z.requires_grad_(), v, labels, exposed=True)
    except Refused as error:
        return Line(CHECK, about, f"refused: {error}", RIGHT)
    try:
        (grad,) = torch.autograd.grad(loss.sum(), v, allow_unused=True) if loss.requires_grad else (None,)
    except Exception as error:  # its own backward may raise anything
        return Line(CHECK, about, f"{type(error).__name__} in backward", CONVENTION)
    if grad is None or not grad.any():
        return Line(CHECK, about, "gets no gradient", WRONG if wanted else RIGHT)
    if wanted is False:
        return Line(CHECK, about, f"gets one, of norm {float(grad.norm()):.3g}; it says it gets none", WRONG)
    way = torch.zeros_like(grad)
    way[0, :2] = torch.tensor([1.0, -1.0])
    step = 1e-3 if _exact(subject, z, v, labels) else 3e-2
    with torch.no_grad():
        slope, half = (_teacher_slope(subject, z, v, labels, way * x) / x for x in (step, step / 2))
    mine = float((grad * way).sum())
    # Where the two slopes differ the loss has a kink between, as total variation has where p = q.
    allowed = 2e-2 * max(abs(slope), abs(mine), float(grad.abs().max())) + 2 * abs(slope - half)
    if abs(slope - mine) > allowed:
        words = f"gets a gradient that is not the loss's: {mine:.3g} along a direction of slope {slope:.3g}"
        return Line(CHECK, about, words, WRONG)
    return Line(CHECK, about, "gets the loss's gradient, unless the caller detaches it", CONVENTION)
