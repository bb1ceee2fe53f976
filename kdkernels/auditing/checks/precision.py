"""The error of gradients in narrow dtypes beside that of a careful eager loss: fp32 inside, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..adapter import Refused
from ..report import CONVENTION, NOT_APPLICABLE, NOT_EXAMINED, RIGHT, WRONG, Line
from ..subject import Subject

CHECK = "precision"
# More than so many times the careful one's error, and more than so much of the gradient, is wrong.
TIMES = 3.0
BEYOND = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 1e-4}
COSTS = 1.5
ROWS, CLASSES = 16, 251
# Half has no room for the gradients of a mean: scaled, as its users scale a loss.
SCALE = {torch.float16: 1024.0}


def check(subject: Subject) -> Iterator[Line]:
    """A line for each dtype, at T = 3 where there is a temperature."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        about = f"gradient in {str(dtype).removeprefix('torch.')}"
        yield _compare(subject, about, dtype)


def _compare(subject: Subject, about: str, dtype: torch.dtype) -> Line:
    if subject.model is None:
        return Line(CHECK, about, "which divergence it is, is not known", NOT_EXAMINED)
    if subject.reduction is None:
        return Line(CHECK, about, "its reduction is not known", NOT_EXAMINED)
    _, v, labels = subject.sample(ROWS, CLASSES, 97, spread=3.0)
    noise, _, _ = subject.sample(ROWS, CLASSES, 98, spread=0.3)
    v, z = v.to(dtype), (v + noise).to(dtype)
    T = 3.0 if subject.tempered is not None else 1.0
    given = {"temperature": T} if subject.adapter.takes("temperature") else {}
    scale = SCALE.get(dtype, 1.0)
    try:
        got = subject.outcome(z, v, labels, lambda loss: torch.full_like(loss, scale), **given).grad
    except Refused as refusal:
        return Line(CHECK, about, f"refused: {refusal}", NOT_APPLICABLE)
    exact = subject.truth(z, v, labels, T, scale=scale).grad
    careful = subject.truth(z, v, labels, T, torch.float32, scale).grad
    size = exact.norm()
    error, least = (float((x.double() - exact).norm() / size) for x in (got, careful))
    ratio = error / least if least else float("inf")
    at = f" at T = {T:g}" if given else ""
    words = f"{error:.2g} of its norm off fp64{at}, {ratio:.3g} × a careful loss's {least:.2g}"
    if not error == error:
        return Line(CHECK, about, "NaN", WRONG)
    if ratio > TIMES and error > BEYOND[dtype]:
        return Line(CHECK, about, words, WRONG)
    return Line(CHECK, about, words, CONVENTION if ratio > COSTS and error > BEYOND[dtype] / 20 else RIGHT)
