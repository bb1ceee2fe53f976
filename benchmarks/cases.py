"""What the benchmarks of the losses share: cases, contestants, inputs, and whether a contestant is right."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import liger
from kdkernels.bench import eager, roofline

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """What is minimised: T² · D at temperature T, plus `hard_weight` times the cross-entropy at T = 1."""

    divergence: str
    temperature: float = 1.0
    hard_weight: float = 0.0


OBJECTIVES = {
    "forward_kl": Objective("forward_kl"),
    "reverse_kl": Objective("reverse_kl"),
    "soft_cross_entropy": Objective("soft_cross_entropy"),
    "jsd": Objective("jsd"),
    "forward_kl+hard": Objective("forward_kl", temperature=2.0, hard_weight=0.1),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How far a contestant may be from fp64 before it is called wrong: the loss relative to itself, the gradient
# relative to its row's largest entry. In fp32 eager measures up to 5e-6 (its sums over 128,256 entries) and
# 4e-6; a bf16 rounding is 2^-9 of an entry, an fp16 one 2^-12, and eager rounds twice. A forgotten T² or hard
# term gives 1e-2.
TOLERANCE = {"float32": (5e-5, 1e-4), "bfloat16": (5e-5, 2**-7), "float16": (5e-5, 2**-10)}


@dataclass(frozen=True)
class Case:
    """One shape, dtype and objective."""

    rows: int
    vocab: int
    dtype: str
    objective: str

    @property
    def tensor_bytes(self) -> int:
        return roofline.tensor_bytes(self.rows, self.vocab, DTYPES[self.dtype])

    @property
    def traffic_bytes(self) -> int:
        return roofline.traffic_bytes(self.rows, self.vocab, DTYPES[self.dtype])

    def __str__(self) -> str:
        return f"({self.rows}, {self.vocab}) {self.dtype} {self.objective}"


@dataclass(frozen=True)
class Method:
    """A contestant: a spelling of the eager loss, that compiled, one of Liger, or a backend of kdkernels."""

    family: str
    spelling: str

    @property
    def name(self) -> str:
        return f"{self.family} {self.spelling}"


def build(method: Method, objective: Objective) -> LossFn:
    """The loss as a function of student logits, teacher logits and labels."""
    temperature, hard_weight = objective.temperature, objective.hard_weight
    if method.family == "kdkernels":
        options: dict[str, Any] = {
            "divergence": objective.divergence,
            "temperature": temperature,
            "backend": method.spelling,
        }
        if hard_weight:
            return lambda z, v, labels: kd.kd_loss(z, v, labels, hard_weight=hard_weight, **options)
        return lambda z, v, labels: kd.kd_loss(z, v, **options)
    if method.family == "liger":
        spelled = liger.SPELLINGS[objective.divergence][method.spelling]
    else:
        spelled = eager.SPELLINGS[objective.divergence][method.spelling]
    if method.family == "torch.compile":
        import torch._inductor.config

        # A pool of compiler processes would outlive its work and sit beside the timing.
        torch._inductor.config.compile_threads = 1
        torch._dynamo.reset()
        spelled = torch.compile(spelled, dynamic=False)
    return lambda z, v, labels: spelled(z, v, labels, temperature, hard_weight)


def step(
    loss: LossFn, z: Tensor, v: Tensor, labels: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Forward and backward: the loss, and the gradient with respect to the student's logits.

    `upstream` is the factor that a loss scale puts on the gradient; none is 1.
    """
    value = loss(z, v, labels)
    (gradient,) = torch.autograd.grad(value, z, upstream)
    return value, gradient


def methods_for(
    objective: Objective, device: torch.device, compiled: bool
) -> tuple[list[Method], dict[str, str]]:
    """The contestants of an objective, and the backends that can't run it with their reasons."""
    methods = [Method("eager", name) for name in eager.SPELLINGS[objective.divergence]]
    if compiled:
        methods += [Method("torch.compile", name) for name in eager.COMPILED[objective.divergence]]
    logits = torch.zeros(1, 2, device=device)
    reasons = kd.explain(logits, logits, divergence=objective.divergence).reasons
    if device.type == "cpu" and reasons["triton"] is None:
        reasons["triton"] = "interpreted on a CPU, thousands of times slower, and not timed"
    methods += [Method("kdkernels", name) for name in reversed(reasons) if reasons[name] is None]
    return methods, {name: why for name, why in reasons.items() if why is not None}


def default_backend(objective: Objective, device: torch.device) -> str:
    """The name of the contestant that `kd_loss` would run by itself."""
    logits = torch.zeros(1, 2, device=device)
    return Method("kdkernels", kd.explain(logits, logits, divergence=objective.divergence).backend).name


class Inputs:
    """Logits of one shape and dtype in several places in memory, so that no call finds its own in a cache."""

    # The factor on every gradient: a loss scale, or None for 1.
    upstream: Tensor | None = None

    def __init__(self, rows: int, vocab: int, dtype: str, device: torch.device, sets: int) -> None:
        generator = torch.Generator().manual_seed(rows * vocab)
        teacher = torch.randn(rows, vocab, generator=generator) * 2.5
        # A student on its way: correlated with its teacher, KL about 0.8 nats.
        student = teacher * 0.7 + torch.randn(rows, vocab, generator=generator)
        self.labels = torch.randint(vocab, (rows,), generator=generator).to(device)
        teacher, student = (t.to(device, DTYPES[dtype]) for t in (teacher, student))
        self.sets = [(student.clone().requires_grad_(), teacher.clone()) for _ in range(sets)]

    def step(self, loss: LossFn) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Forward and backward of a loss on the set of a given number; after the last comes the first."""
        return lambda number: step(loss, *self.sets[number % len(self.sets)], self.labels, self.upstream)


@dataclass(frozen=True)
class Verdict:
    """How far a contestant is from fp64, and what is wrong with it, if anything."""

    loss_error: float | None
    gradient_error: float | None
    problem: str | None


def judge(loss: LossFn, inputs: Inputs, dtype: str, truth: tuple[float, Tensor]) -> Verdict:
    """Runs a contestant once and compares loss and gradient with the truth."""
    try:
        value, gradient = inputs.step(loss)(0)
    except Exception as raised:
        return Verdict(None, None, failure(raised))
    true_value, true_gradient = truth
    loss_error = abs(value.item() - true_value) / abs(true_value)
    gradient_error = 0.0
    for start in range(0, gradient.shape[0], 32):
        part = slice(start, start + 32)
        wanted = true_gradient[part]
        off = (gradient[part].cpu().double() - wanted).abs().amax(-1) / wanted.abs().amax(-1)
        # max() would drop a NaN.
        gradient_error = float("nan") if off.isnan().any() else max(gradient_error, off.max().item())
        if gradient_error != gradient_error:
            break
    return verdict(loss_error, gradient_error, dtype)


def verdict(loss_error: float, gradient_error: float, dtype: str) -> Verdict:
    """Whether errors are within what the dtype is allowed."""
    for what, error, allowed in zip(
        ("loss", "gradient"), (loss_error, gradient_error), TOLERANCE[dtype], strict=True
    ):
        if not error <= allowed:
            return Verdict(
                _finite(loss_error),
                _finite(gradient_error),
                f"wrong: {what} off by {error:.1e}, allowed {allowed:.1e}",
            )
    return Verdict(loss_error, gradient_error, None)


# The problem of a contestant that the device had no room for.
OUT_OF_MEMORY = "out of memory"


def failure(raised: BaseException) -> str:
    """What is wrong with a contestant that raised."""
    if isinstance(raised, torch.OutOfMemoryError) or "out of memory" in str(raised).lower():
        return OUT_OF_MEMORY
    return f"failed: {last_line(traceback.format_exception_only(raised)[-1])}"


def last_line(message: str) -> str:
    """The last line of an error's text, cut to a line of a report."""
    return message.strip().splitlines()[-1][:200]


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def shape(text: str) -> tuple[int, int]:
    """ROWSxVOCAB on the command line."""
    rows, _, vocab = text.lower().partition("x")
    try:
        parsed = int(rows), int(vocab)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is ROWSxVOCAB, such as 256x32000, got {text!r}") from None
    if min(parsed) < 1:
        raise argparse.ArgumentTypeError(f"rows and vocabulary must be >= 1, got {text!r}")
    return parsed
