"""What the loss head costs: logits -> loss -> gradient on the logits, alone, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import bench, explain
from . import objectives
from .config import Head, Mix

IMPLEMENTATIONS = ("eager", "torch.compile", "kd_loss")

Send = Callable[[Any], None]


def logits(head: Head, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits that require grad, teacher logits and labels: the same numbers in every process."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(head.rows, head.vocab, generator=generator).mul_(2)
    z = torch.randn(head.rows, head.vocab, generator=generator).add_(v, alpha=0.5)
    labels = torch.randint(head.vocab, (head.rows,), generator=generator)
    return z.to(device).requires_grad_(), v.to(device), labels.to(device)


def spelled(implementation: str, mix: Mix) -> objectives.Objective:
    """The distillation loss as an implementation computes it."""
    if implementation == "kd_loss":
        return objectives.fused(mix)
    if implementation == "eager":
        return objectives.eager(mix)
    import torch._inductor.config

    # A pool of compiler processes would outlive its work and sit beside the timing.
    torch._inductor.config.compile_threads = 1
    return torch.compile(objectives.eager(mix), dynamic=False, fullgraph=True)


def measure(
    send: Send, implementation: str, head: Head, mix: Mix, device_name: str, threads: int, repeats: int
) -> dict[str, Any]:
    """Time and peak memory of one implementation at one size; to be run in a fresh process.

    Returns:
        `seconds` (median of `repeats`), `best_seconds`, `first_seconds` (compilation included), `peak_bytes`
        beyond both logits, `method` of that measurement, `loss` and `gradient_norm` to compare by,
        `backend` of `kd_loss`, and `busy_neighbours`, the CPUs that other processes used meanwhile.
    """
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    z, v, labels = logits(head, device)
    loss = spelled(implementation, mix)
    value = torch.zeros(())

    def step() -> Tensor:
        nonlocal value
        value = loss(z, v, labels)
        (gradient,) = torch.autograd.grad(value, z)
        return gradient

    started = time.perf_counter()
    gradient = step()
    loss_value, norm = value.item(), gradient.double().norm().item()
    first = time.perf_counter() - started
    del gradient
    peak = bench.peak_growth(step, device)
    neighbours = bench.Neighbours()
    contestant = bench.Contestant(implementation, lambda _: step())
    clock = bench.clock_for(device)
    timing = bench.race([contestant], sets=1, clock=clock, min_rounds=repeats, max_rounds=repeats)[
        implementation
    ]
    return {
        "seconds": timing.median,
        "best_seconds": timing.best,
        "first_seconds": first,
        "peak_bytes": None if peak is None else peak.bytes,
        "method": None if peak is None else peak.method,
        "loss": loss_value,
        "gradient_norm": norm,
        "backend": explain(z, v, labels, hard_weight=mix.hard_weight).backend
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
