"""What measuring and tuning on a GPU share: settings, inputs made there, comparing with fp64, the race."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import liger
from benchmarks.cases import DTYPES, OBJECTIVES, Case, Inputs, LossFn, Verdict, failure, verdict
from kdkernels import bench
from kdkernels.bench import eager, roofline

SCHEMA = 1
PRELOAD = ("torch", "benchmarks.gpu")

# What a GradScaler puts on an fp16 loss, give or take: without it, the gradient of a mean over 8,192 rows is
# rounded to multiples of 6e-8, in a row whose largest entry is 1e-6. Half of its first 65,536, which is more
# than fp16 has.
LOSS_SCALE = 2.0**15

# Elements that the fp64 truth, and the making of inputs, have in one tensor: 64 MB in fp64, a dozen of them.
ELEMENTS = 2**23

# A contestant may take this long without a word, compiling included, before it counts as stuck.
PATIENCE = 120.0


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run, and travels to its processes.

    Attributes:
        device: What to measure.
        seconds: When they are over, nothing new is begun.
        min_rounds: Of every case.
        min_seconds: Of a case's rounds, where those are shorter.
        max_seconds: Of a case's rounds, after which fewer will do.
        copy_bytes: Of the copy.
    """

    device: str
    seconds: float
    min_rounds: int
    min_seconds: float
    max_seconds: float
    copy_bytes: int


class DeviceInputs(Inputs):
    """The same logits, made on the device some rows at a time: the large ones would take a host a minute.

    fp16 comes with a loss scale.
    """

    def __init__(self, rows: int, vocab: int, dtype: str, device: torch.device, sets: int) -> None:
        generator = torch.Generator(device).manual_seed(rows * vocab)
        self.labels = torch.randint(vocab, (rows,), generator=generator, device=device)
        student, teacher = (torch.zeros(rows, vocab, dtype=DTYPES[dtype], device=device) for _ in range(2))
        at_once = max(1, ELEMENTS // vocab)
        for z, v in zip(student.split(at_once), teacher.split(at_once), strict=True):
            wide = torch.randn(v.shape, generator=generator, device=device) * 2.5
            v.copy_(wide)
            z.copy_(wide * 0.7 + torch.randn(z.shape, generator=generator, device=device))
        pairs = [(student, teacher), *((student.clone(), teacher.clone()) for _ in range(sets - 1))]
        self.sets = [(z.requires_grad_(), v) for z, v in pairs]
        if dtype == "float16":
            self.upstream = torch.full((), LOSS_SCALE, device=device)


def compare(loss: LossFn, inputs: Inputs, case: Case) -> Verdict:
    """Runs a contestant once and compares loss and gradient with fp64, all on the inputs' device."""
    objective = OBJECTIVES[case.objective]
    try:
        value, gradient = inputs.step(loss)(0)
        z, v = inputs.sets[0]
        factor = 1.0 if inputs.upstream is None else inputs.upstream.item()
        total = torch.zeros((), dtype=torch.float64, device=z.device)
        worst = total.clone()
        parts = eager.truth_parts(
            objective.divergence,
            z,
            v,
            inputs.labels,
            objective.temperature,
            objective.hard_weight,
            max(1, ELEMENTS // case.vocab),
            z.device,
        )
        for part, part_loss, wanted in parts:
            off = (gradient[part].double() / factor - wanted).abs().amax(-1) / wanted.abs().amax(-1)
            # maximum and amax keep a NaN.
            worst = torch.maximum(worst, off.amax())
            total += part_loss
        loss_error = ((value.double() - total) / total).abs().item()
        return verdict(loss_error, worst.item(), case.dtype)
    except Exception as raised:
        return Verdict(None, None, failure(raised))


def release(device: torch.device) -> None:
    """Gives unused device memory back. Raises where an error has broken the device for this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class _Failed(Exception):
    """A contestant raised while it was timed."""


def _guarded(name: str, run: Callable[[int], object]) -> bench.Contestant:
    def guarded(number: int) -> object:
        try:
            return run(number)
        except Exception as error:
            raise _Failed(name) from error

    return bench.Contestant(name, guarded)


def race_those_that_can(
    contestants: Iterable[bench.Contestant], device: torch.device, **options: Any
) -> tuple[dict[str, bench.Timing], dict[str, str]]:
    """`bench.race`, again without whoever raises in it: memory may do for each and not for all.

    Returns:
        The timings, and what was wrong with the others.
    """
    left, problems = [_guarded(c.name, c.run) for c in contestants], dict[str, str]()
    while left:
        try:
            return bench.race(left, **options), problems
        except _Failed as failed:
            (name,) = failed.args
            assert failed.__cause__ is not None
            problems[name] = failure(failed.__cause__)
        left = [c for c in left if c.name != name]
        release(device)
    return {}, problems


def figures(timing: bench.Timing | None, moved: int, ceiling: float | None = None) -> dict[str, Any] | None:
    """The figures of one contestant, by its median time; `ceiling` is the bandwidth of the copy."""
    if timing is None:
        return None
    speed = bench.gigabytes_per_second(moved, timing.median)
    return {
        "median_ms": timing.median * 1e3,
        "best_ms": timing.best * 1e3,
        "spread": timing.spread,
        "rounds": len(timing.seconds),
        "gb_per_s": speed,
        "copy_share": None if ceiling is None else speed / ceiling,
    }


def make_inputs(case: Case, device: torch.device) -> DeviceInputs:
    """The inputs of a case, in so many sets that they exceed the cache."""
    sets = bench.input_sets(
        2 * case.tensor_bytes, roofline.last_level_cache_bytes(device), roofline.free_bytes(device)
    )
    return DeviceInputs(case.rows, case.vocab, case.dtype, device, sets)


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on, as a JSON object."""
    found = bench.environment(device, torch.get_num_threads())
    found["liger-kernel"] = liger.version()
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # ROCm's has another name; the module says it, and torch imports that anyway.
        found["triton"] = getattr(sys.modules.get("triton"), "__version__", None)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["second_level_cache_bytes"] = properties.L2_cache_size
        found["gcn_arch"] = getattr(properties, "gcnArchName", None)
    return found


def settings_for(options: argparse.Namespace, device: torch.device) -> Settings:
    """The settings of a run; the copy is 1 GiB, or a sixteenth of what is free."""
    copy_bytes = min(2**30, (roofline.free_bytes(device) or 2**34) // 16)
    if options.quick:
        return Settings(str(device), options.seconds, 5, 0.0, 5.0, copy_bytes)
    return Settings(str(device), options.seconds, 20, 0.5, 8.0, copy_bytes)
