"""The part of the end-to-end benchmark in processes of its own: times of steps, a step within a limit."""

from __future__ import annotations

import importlib
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .e2e_methods import Method
from .e2e_models import Pair, models_of, tokens_of, watched
from .memory import (
    held_data,
    map_large_blocks,
    peak_growth,
    raise_malloc_thresholds,
    return_free_memory,
)
from .timing import Contestant, Neighbours, clock_for, race

try:
    resource: ModuleType | None = importlib.import_module("resource")
except ImportError:  # Windows
    resource = None

# How far the loss may be from the truth, relative to itself, and a gradient, relative to its norm, before a
# contestant is called wrong. In float32 all that are right are within 1e-5; in bfloat16 logits are rounded to
# 2^-9 of themselves, and what comes of that to the loss and, once more, to gradients of the layers.
ALLOWED = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 6e-2), "float16": (5e-3, 2e-2)}
# What is said where there is no memory: by torch's allocators, C++, Python, the system, a compiler's code.
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|MemoryError"
    r"|failed to allocate|ENOMEM",
    re.IGNORECASE,
)

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Case:
    """A pair, and where and how its steps run.

    Attributes:
        pair: Student and teacher.
        device: `cpu` or `cuda`.
        dtype: Of weights and logits.
        threads: Of torch.
        length: Tokens of a sequence.
    """

    pair: Pair
    device: str
    dtype: str
    threads: int
    length: int

    def ready(self) -> tuple[Any, Any]:
        """Student and teacher, once the process is set."""
        torch.set_num_threads(self.threads)
        warnings.simplefilter("ignore")
        return models_of(self.pair, torch.device(self.device), getattr(torch, self.dtype))

    def tokens(self, count: int) -> Tensor:
        """So many of them."""
        return tokens_of(self.pair, count, self.length, torch.device(self.device))


def step(method: Method, student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """Forward passes of both models, the loss, and the backward pass, after gradients are freed."""
    student.zero_grad(set_to_none=True)
    loss = method.loss(student, teacher, tokens)
    loss.backward()
    return loss.detach()


def is_no_memory(text: str) -> bool:
    """Whether an error's text says that there was no memory."""
    return _NO_MEMORY.search(text) is not None


def truth(
    student: Any, teacher: Any, tokens: Tensor, rows: int | None = None
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and gradients of what is `watched`: layers in the models' dtype, heads and loss in float64.

    Logits are made a few rows at a time, `rows` or so many that they take 64 MiB, and the gradient q - p in
    closed form, so that it takes little memory.
    """
    student.zero_grad(set_to_none=True)
    with torch.no_grad():
        t_x = teacher.base_model(input_ids=tokens).last_hidden_state.flatten(0, 1)
    x = student.base_model(input_ids=tokens).last_hidden_state.flatten(0, 1)
    head = student.get_output_embeddings().weight
    weight = head.detach().double()
    t_weight = teacher.get_output_embeddings().weight.double()
    dx, dw = torch.empty_like(x, dtype=torch.float64), torch.zeros_like(weight)
    total, rows = 0.0, rows or max(1, 2**23 // len(weight))
    for begin in range(0, len(x), rows):
        part = slice(begin, begin + rows)
        h = x[part].detach().double()
        lq = (h @ weight.T).log_softmax(-1)
        lp = (t_x[part].double() @ t_weight.T).log_softmax(-1)
        p = lp.exp()
        total += float((p * (lp - lq)).sum()) / len(x)
        dz = (lq.exp() - p) / len(x)
        dx[part] = dz @ weight
        dw.addmm_(dz.T, h)
    x.backward(dx.to(x.dtype))
    gradients = {name: p.grad.double() for name, p in watched(student).items() if p.grad is not None}
    # What a matrix that is the embedding, too, got by way of the layers is there already.
    gradients["head"] = gradients["head"] + dw if "head" in gradients else dw
    student.zero_grad(set_to_none=True)
    return total, gradients


def errors(loss: float, student: Any, exact: tuple[float, dict[str, Tensor]]) -> dict[str, float]:
    """Of a loss, relative to itself, and of gradients, relative to their norms; 1 where there is none."""
    found = {"loss": abs(loss - exact[0]) / abs(exact[0])}
    for name, parameter in watched(student).items():
        wanted, got = exact[1][name], parameter.grad
        # In parts: the difference in float64 of a large weight is larger than all else.
        off = (
            float(wanted.norm()) ** 2
            if got is None
            else sum(
                float((a.double() - b).pow(2).sum())
                for a, b in zip(got.split(4096), wanted.split(4096), strict=True)
            )
        )
        found[name] = off**0.5 / float(wanted.norm())
    return found


def verdict(found: dict[str, float], dtype: str) -> str | None:
    """What is wrong, if anything is."""
    allowed_loss, allowed = ALLOWED[dtype]
    for name, off in found.items():
        limit = allowed_loss if name == "loss" else allowed
        if not off <= limit:  # a NaN isn't
            what = "loss" if name == "loss" else f"gradient of the {name}"
            return f"WRONG: {what} off by {off:.1e}, allowed {limit:.0e}"
    return None


def short(error: BaseException) -> str:
    """An error in a line of a report."""
    if isinstance(error, torch.OutOfMemoryError) or is_no_memory(f"{type(error).__name__}: {error}"):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines() or [""]
    return f"error: {type(error).__name__}: {lines[0][:160]}"


def _timed(method: Method, student: Any, teacher: Any, tokens: Tensor, _: int) -> Tensor:
    return step(method, student, teacher, tokens)


def time_process(
    send: Any, case: Case, methods: Sequence[Method], count: int, rounds: int, first: bool = True
) -> dict[str, Any]:
    """A pass: times of the contestants, in turn; the first has errors, too, and times only who is right.

    Sends `("trying", name)` before a contestant is run for the first time, and `("round", n)` after each.
    """
    if case.device == "cpu":
        raise_malloc_thresholds()
    student, teacher = case.ready()
    tokens = case.tokens(count)
    exact = truth(student, teacher, tokens) if first else None
    found: dict[str, Any] = {"errors": {}, "problems": {}}
    if exact is not None:
        found["loss"] = exact[0]
    runs: dict[str, Callable[[int], object]] = {}
    for method in methods:
        send(("trying", method.name))
        try:
            loss = float(step(method, student, teacher, tokens))
            off = None if exact is None else errors(loss, student, exact)
        except Exception as error:
            found["problems"][method.name] = short(error)
            continue
        if off is not None:
            # JSON has no NaN.
            found["errors"][method.name] = {name: x if x < float("inf") else None for name, x in off.items()}
            if (problem := verdict(off, case.dtype)) is not None:
                found["problems"][method.name] = problem
                continue
        runs[method.name] = partial(_timed, method, student, teacher, tokens)
    del exact
    send(("trying", None))
    student.zero_grad(set_to_none=True)
    neighbours = Neighbours()
    timings = race(
        [Contestant(name, run) for name, run in runs.items()],
        sets=1,
        clock=clock_for(torch.device(case.device)),
        min_rounds=rounds,
        max_rounds=rounds,
        warmup=0,  # the check has run everyone once
        on_round=lambda number: send(("round", number + 1)),
    )
    found["seconds"] = {name: timing.seconds for name, timing in timings.items()}
    found["other_cpus"] = neighbours.cpus()
    found["parameters"] = {
        side: sum(p.numel() for p in model.parameters())
        for side, model in (("student", student), ("teacher", teacher))
    }
    return found


def probe_process(
    send: Any, case: Case, method: Method, count: int, memory: int | None, said: str
) -> dict[str, Any]:
    """A step on so many tokens within a limit: whether there was room, and the peak beyond models.

    Steps on a sequence or two come before it, so that threads, compiled code and what libraries keep are
    there; then what is held is limited to that and `memory` bytes. On a GPU None is all of the device.

    Args:
        send: Unused.
        case: The pair.
        method: The contestant.
        count: Tokens.
        memory: Bytes.
        said: A file for what is written to the standard error, which is the last word of a process that C++
            ends.
    """
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 2)
    os.close(handle)
    # Else what a warm-up has freed would be room beyond the limit.
    map_large_blocks()
    student, teacher = case.ready()
    tokens, device = case.tokens(count), torch.device(case.device)

    def warm_up() -> None:
        for sequences in method.warm_up:
            step(method, student, teacher, case.tokens(sequences * case.length))
        student.zero_grad(set_to_none=True)
        limit(memory, device)

    found: dict[str, Any] = {"fits": True, "peak": None, "says": None}
    try:
        peak = peak_growth(lambda: step(method, student, teacher, tokens), device, warm_up)
    except Exception as error:
        if short(error) != OUT_OF_MEMORY:
            raise
        found |= {"fits": False, "says": (str(error).strip().splitlines() or [""])[0][:160]}
    else:
        found |= {"peak": None if peak is None else peak.bytes}
    return {**found, "cpu_seconds": time.process_time()}


def limit(memory: int | None, device: torch.device) -> None:
    """Allows this process `memory` bytes more than it holds, on the device that it computes on.

    Raises:
        OSError: The system can't.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if memory is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            held = torch.cuda.memory_reserved(device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, (held + memory) / total), device)
        return
    if memory is None or resource is None:
        raise OSError("a limit of memory on a CPU needs Linux and a number of bytes")
    return_free_memory()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held_data() + memory, hard))
