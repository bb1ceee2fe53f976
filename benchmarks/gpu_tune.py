"""``python -m benchmarks gpu --tune``: the row kernel over block sizes and warps.

What it prints is for `kdkernels.tuning.triton`: the median times of forward and backward with the block and
the warps that this chooses, and with every other pair worth trying.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import kdkernels as kd
from benchmarks import gpu_harness
from benchmarks.cases import OBJECTIVES, Case, Inputs, LossFn, Method, build, last_line
from benchmarks.logits_report import number
from kdkernels import bench, tuning
from kdkernels.bench.report import command_line
from kdkernels.bench.timing import Clock

SHAPES = ((8192, 128256), (8192, 32000), (8192, 4096))
DTYPES = ("bfloat16", "float32")
DIVERGENCES = ("forward_kl", "jsd")
BLOCKS = tuple(1 << power for power in range(10, 16))
WARPS = (4, 8, 16, 32)
# Elements that a thread holds of a block: fewer leave 16-byte loads half empty, more don't fit its registers.
FEWEST, MOST = 4, 64
METHOD = Method("kdkernels", "triton")


@dataclass(frozen=True)
class Pair:
    """A block and its warps, or, with neither, what `kdkernels.tuning.triton` chooses itself."""

    block: int | None = None
    warps: int | None = None

    def __str__(self) -> str:
        return "as tuned" if self.block is None else f"{self.block} / {self.warps}"


def pairs(classes: int) -> list[Pair]:
    """What to try: blocks up to the first that holds a whole row."""
    whole = 1 << (classes - 1).bit_length()
    tried = [
        Pair(block, warps)
        for block in BLOCKS
        for warps in WARPS
        if block <= max(whole, BLOCKS[0]) and FEWEST <= block // (32 * warps) <= MOST
    ]
    return [Pair(), *tried]


@contextmanager
def tuned(pair: Pair) -> Iterator[list[int]]:
    """Puts a pair in place of what `kdkernels.tuning.triton` says; yields how often that was asked."""
    original: Callable[..., Any] = tuning.triton
    asked = [0]

    def chosen(width: int, itemsize: int, *args: Any, **kwargs: Any) -> Any:
        asked[0] += 1
        config = original(width, itemsize, *args, **kwargs)
        if pair.block is None:
            return config
        whole = pair.block >= width
        group = pair.block if whole else 16 // itemsize
        return replace(config, block=pair.block, group=group, strided=False, warps=pair.warps, whole=whole)

    tuning.triton = chosen
    try:
        yield asked
    finally:
        tuning.triton = original


def with_pair(pair: Pair, run: Callable[[int], object]) -> Callable[[int], object]:
    """A step that is launched with a pair."""

    def launched(number: int) -> object:
        with tuned(pair):
            return run(number)

    return launched


def tune_case(
    case: Case,
    inputs: Inputs,
    ceiling: bench.Contestant,
    clock: Clock,
    settings: gpu_harness.Settings,
    now: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """The times of all pairs on one case, those that fail or are wrong among them, as a JSON object.

    `now` is told what is at work.
    """
    device = torch.device(settings.device)
    loss: LossFn = build(METHOD, OBJECTIVES[case.objective])
    problems: dict[str, str] = {}
    runs = []
    for pair in pairs(case.vocab):
        now(str(pair))
        with tuned(pair) as asked:
            found = gpu_harness.compare(loss, inputs, case)
        if found.problem is None and not asked[0]:
            problems[str(pair)] = "failed: kdkernels.tuning.triton was not asked, so that nothing was changed"
        elif found.problem is not None:
            problems[str(pair)] = found.problem
            gpu_harness.release(device)
        else:
            runs.append(bench.Contestant(str(pair), with_pair(pair, inputs.step(loss))))
    timings, failed = gpu_harness.race_those_that_can(
        [*runs, ceiling],
        device,
        sets=len(inputs.sets),
        clock=clock,
        min_rounds=settings.min_rounds,
        min_seconds=settings.min_seconds,
        max_seconds=settings.max_seconds,
        max_rounds=200,
        on_round=lambda number: now("timing"),
    )
    copy = gpu_harness.figures(timings.get(ceiling.name), 2 * settings.copy_bytes)
    bandwidth = None if copy is None else copy["gb_per_s"]
    problems |= failed
    entries = [
        {
            "block": pair.block,
            "warps": pair.warps,
            "problem": problems.get(str(pair)),
            "times": gpu_harness.figures(timings.get(str(pair)), case.traffic_bytes, bandwidth),
        }
        for pair in pairs(case.vocab)
    ]
    return {
        "shape": [case.rows, case.vocab],
        "dtype": case.dtype,
        "objective": case.objective,
        "copy": copy,
        "pairs": entries,
    }


def tune_process(send: Callable[[Any], None], plan: list[Case], settings: gpu_harness.Settings) -> None:
    """Times the cases of a plan, as long as there is time, and sends each as it is done."""
    deadline = time.perf_counter() + settings.seconds
    warnings.simplefilter("ignore", UserWarning)
    device = torch.device(settings.device)
    clock, ceiling = bench.clock_for(device), bench.copy(settings.copy_bytes, device)
    inputs, made_for = None, None
    for case in plan:
        if time.perf_counter() >= deadline:
            return
        if made_for != (case.rows, case.vocab, case.dtype):
            made_for, inputs = (case.rows, case.vocab, case.dtype), None
            gpu_harness.release(device)
            inputs = gpu_harness.make_inputs(case, device)
        assert inputs is not None
        result = tune_case(
            case, inputs, ceiling, clock, settings, now=lambda what, case=case: send(("now", case, what))
        )
        send(("case", case, result))


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """A row for each block, a column for each number of warps, the fastest marked; then what is tuned now."""
    timed = [p for p in result["pairs"] if p["times"]]
    best = min((p["times"]["median_ms"] for p in timed), default=None)

    def cell(pair: dict[str, Any] | None) -> str:
        if pair is None:
            return ""
        if pair["times"] is None:
            return str(pair["problem"]).partition(":")[0].upper()
        return number(pair["times"]["median_ms"]) + (" *" if pair["times"]["median_ms"] == best else "")

    found = {(p["block"], p["warps"]): p for p in result["pairs"]}
    blocks = dict.fromkeys(p["block"] for p in result["pairs"] if p["block"] is not None)
    rows = [[str(block), *(cell(found.get((block, warps))) for warps in WARPS)] for block in blocks]
    return [*rows, ["as tuned", cell(found[None, None]), *[""] * (len(WARPS) - 1)]]


HEAD = ("block", *(f"{warps} warps, ms" for warps in WARPS))


def main(options: argparse.Namespace, device: torch.device, command: Sequence[str]) -> int:
    """Tunes what the options ask for, prints the tables and returns the exit status."""
    settings = gpu_harness.settings_for(options, device)
    plan = [
        Case(*shape, dtype, objective)
        for shape in options.shapes or SHAPES
        for dtype in options.dtypes or DTYPES
        for objective in options.divergences or DIVERGENCES
    ]
    results: dict[Case, dict[str, Any]] = {}
    progress = bench.Progress()

    def receive(message: tuple[str, Case, Any]) -> None:
        kind, case, what = message
        if kind == "now":
            progress.step(f"{case} {what}", 0)
        else:
            results[case] = what
            progress.step(str(case))

    stopped = None
    with progress.phase("tuning", len(plan)):
        try:
            bench.run_isolated(
                tune_process,
                plan,
                settings,
                on_message=receive,
                preload=gpu_harness.PRELOAD,
                patience=gpu_harness.PATIENCE,
            )
        except bench.ProcessDied as error:
            stopped = last_line(str(error))
    for case, result in results.items():
        share = "" if result["copy"] is None else f", copy {number(result['copy']['gb_per_s'])} GB/s"
        bench.print_table(f"{case}{share}", HEAD, rows_of(result))
        for pair in result["pairs"]:
            if pair["problem"]:
                print(f"{Pair(pair['block'], pair['warps'])}: {pair['problem']}")
    for case in plan:
        if case not in results:
            print(f"Left out: {case}: {stopped or 'the time was up'}")
    if options.json is not None:
        bench.write_json(
            options.json,
            {
                "schema": gpu_harness.SCHEMA,
                "command": command_line("benchmarks", command),
                "kdkernels": kd.__version__,
                "environment": gpu_harness.environment(device),
                "settings": asdict(settings),
                "cases": list(results.values()),
            },
        )
        print(f"written: {options.json}")
    return 1 if stopped is not None or not results else 0
