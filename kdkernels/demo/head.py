"""What the loss head costs: inputs -> loss -> gradients of the student's inputs, in a process of its own.

Inputs are logits, or the hidden states and weights that logits are made from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import bench, explain, sources
from . import objectives
from .config import Head, Mix

IMPLEMENTATIONS = ("eager", "torch.compile", "kd_loss")

Send = Callable[[Any], None]

# A side's inputs: (logits [N, V],), or (hidden states [N, d], weight [V, d]).
Side = tuple[Tensor, ...]


def inputs(head: Head, device: torch.device) -> tuple[Side, Side, Tensor]:
    """Student inputs that require grad, teacher inputs and labels: the same numbers in every process."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def linear(width: int) -> Side:
        # Logits of standard deviation 2 from two factors of one scale, so that neither's gradient is lost
        # beside the other's.
        scale = (2 / width**0.5) ** 0.5
        return normal(head.rows, width).mul_(scale), normal(head.vocab, width).mul_(scale)

    student: Side
    teacher: Side
    if head.student_width:
        student, teacher = linear(head.student_width), linear(head.teacher_width)
    else:
        v = normal(head.rows, head.vocab).mul_(2)
        student, teacher = (normal(head.rows, head.vocab).add_(v, alpha=0.5),), (v,)
    labels = torch.randint(head.vocab, (head.rows,), generator=generator)
    return (
        tuple(x.to(device).requires_grad_() for x in student),
        tuple(x.to(device) for x in teacher),
        labels.to(device),
    )


def logits_of(side: Side) -> Tensor:
    """A side's logits: given, or made."""
    return side[0] if len(side) == 1 else F.linear(*side)


def source_of(side: Side) -> Tensor | sources.Head:
    """A side as `kd_loss` takes it."""
    if len(side) == 1:
        return side[0]
    hidden, weight = side
    return sources.Head(hidden, weight)


def spelled(implementation: str, mix: Mix) -> Callable[[Side, Side, Tensor], Tensor]:
    """The distillation loss of both sides and the labels as an implementation computes it."""
    fused, eager = objectives.fused(mix), objectives.eager(mix)

    def eager_of(student: Side, teacher: Side, labels: Tensor) -> Tensor:
        return eager(logits_of(student), logits_of(teacher), labels)

    if implementation == "kd_loss":
        return lambda student, teacher, labels: fused(source_of(student), source_of(teacher), labels)
    if implementation == "eager":
        return eager_of
    import torch._inductor.config

    # A pool of compiler processes would outlive its work and sit beside the timing.
    torch._inductor.config.compile_threads = 1
    return torch.compile(eager_of, dynamic=False, fullgraph=True)


def norm(gradients: Side) -> float:
    """The norm over all gradients, in double."""
    return torch.stack([g.double().norm() for g in gradients]).norm().item()


def measure(
    send: Send, implementation: str, head: Head, mix: Mix, device_name: str, threads: int
) -> dict[str, Any]:
    """Time and peak memory of one implementation at one size; to be run in a fresh process.

    Returns:
        `seconds` (median), `best_seconds`, `first_seconds` (compilation included), `peak_bytes` beyond the
        inputs, `method` of that measurement, `loss` and `gradient_norm` to compare by, `backend` of
        `kd_loss`, and `busy_neighbours`, the CPUs that other processes used meanwhile.
    """
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    student, teacher, labels = inputs(head, device)
    loss = spelled(implementation, mix)
    value = torch.zeros(())

    def step() -> Side:
        nonlocal value
        value = loss(student, teacher, labels)
        return torch.autograd.grad(value, student)

    started = time.perf_counter()
    gradients = step()
    loss_value, gradient_norm = value.item(), norm(gradients)
    first = time.perf_counter() - started
    del gradients
    peak = bench.peak_growth(step, device)
    neighbours = bench.Neighbours()
    contestant = bench.Contestant(implementation, lambda _: step())
    clock = bench.clock_for(device)
    timing = bench.race([contestant], sets=1, clock=clock, min_rounds=head.repeats, max_rounds=head.repeats)[
        implementation
    ]
    return {
        "seconds": timing.median,
        "best_seconds": timing.best,
        "first_seconds": first,
        "peak_bytes": None if peak is None else peak.bytes,
        "method": None if peak is None else peak.method,
        "loss": loss_value,
        "gradient_norm": gradient_norm,
        "backend": explain(
            source_of(student), source_of(teacher), labels, hard_weight=mix.hard_weight
        ).backend
        if implementation == "kd_loss"
        else None,
        "busy_neighbours": neighbours.cpus(),
    }


def reason(error: bench.ProcessDied) -> str:
    """Why a measurement has no result, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch.compile wraps what went wrong and closes with advice: the first "SomeError: text" is the cause.
    named = [
        line
        for line in lines
        if line.split(":")[0].replace(".", "").isidentifier() and "Error" in line.split(":")[0]
    ]
    return (named[0] if named else lines[-1] if lines else "no reason given")[:200]
