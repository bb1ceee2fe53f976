"""``python -m benchmarks logits``: what a loss on logits costs, forward + backward, beside what people use.

Each case (shape, dtype, objective) is timed in one process, its contestants interleaved round by round with
the triad that is their ceiling; once with the allocator as it comes, once, in another process, with glibc's
thresholds raised. A contestant that is wrong against fp64 is shown as wrong and never timed. Peak memory is
taken in a process of its own for each contestant.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kdkernels as kd
from benchmarks.cases import DTYPES as KNOWN
from benchmarks.cases import (
    OBJECTIVES,
    Case,
    Inputs,
    LossFn,
    Method,
    Verdict,
    build,
    default_backend,
    judge,
    last_line,
    methods_for,
    shape,
)
from benchmarks.logits_report import BUSY, SHOWN, SMALL, SMALLEST_FOR_MEMORY, markdown, notes, tables, targets
from kdkernels import bench
from kdkernels.bench import eager, roofline
from kdkernels.bench.report import command_line

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1

Send = Callable[[Any], None]

DTYPES = {name: KNOWN[name] for name in ("float32", "bfloat16")}
# What a run without options measures. The other objectives tell nothing new at 128,256 entries, and the whole
# takes minutes as it is.
DEFAULTS = {(256, 32000): tuple(OBJECTIVES), (64, 128256): ("forward_kl", "jsd"), SMALL: tuple(OBJECTIVES)}

# The default backend on the fp32 logits of a 16-bit case, timed beside it: runs minutes apart tell little.
WIDE = "on fp32 logits"

ALLOCATORS = ("default", "raised")


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run, and travels to its processes."""

    device: str
    threads: int
    min_rounds: int
    min_seconds: float


def time_case(
    case: Case,
    losses: dict[str, LossFn],
    inputs: Inputs,
    settings: Settings,
    *,
    wide: tuple[str, Inputs] | None = None,
    check: bool = True,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Checks the contestants of one case, and times those that are right against the triad and each other.

    Args:
        case: The case.
        losses: The contestants' losses by name.
        inputs: What they are given.
        settings: Of the run.
        wide: A contestant that is also timed on the same logits in fp32, and those.
        check: Whether to compare with fp64 first.
        on_round: Called with the number of each finished round.

    Returns:
        `verdicts` by contestant, empty without `check`; `times` by contestant, `wide` and `triad`, the best
        of its spellings; `other_cpus`, what the rest of the machine was doing meanwhile.
    """
    objective = OBJECTIVES[case.objective]
    verdicts: dict[str, Verdict] = {}
    if check:
        z, v = inputs.sets[0]
        truth = eager.truth(
            objective.divergence, z, v, inputs.labels, objective.temperature, objective.hard_weight
        )
        verdicts = {name: judge(loss, inputs, case.dtype, truth) for name, loss in losses.items()}
        losses = {name: loss for name, loss in losses.items() if verdicts[name].problem is None}
    contestants = [bench.Contestant(name, inputs.step(loss)) for name, loss in losses.items()]
    if wide is not None and wide[0] in losses:
        contestants.append(bench.Contestant(WIDE, wide[1].step(losses[wide[0]])))
    triads = bench.triad(inputs.sets)
    neighbours = bench.Neighbours()
    timings = bench.race(
        contestants + triads,
        sets=len(inputs.sets),
        clock=bench.clock_for(torch.device(settings.device)),
        min_rounds=settings.min_rounds,
        min_seconds=settings.min_seconds,
        on_round=on_round,
    )
    best = min((c.name for c in triads), key=lambda name: timings[name].best)
    ceiling = bench.gigabytes_per_second(case.traffic_bytes, timings[best].best)
    return {
        "verdicts": {name: asdict(verdict) for name, verdict in verdicts.items()},
        "times": {name: figures(case, timings[name], ceiling) for name in losses},
        "wide": figures(case, timings[WIDE], ceiling) if WIDE in timings else None,
        "triad": {"spelling": best, **figures(case, timings[best], ceiling)},
        "other_cpus": neighbours.cpus(),
    }


def figures(case: Case, timing: bench.Timing, ceiling: float) -> dict[str, Any]:
    """The figures of one contestant, for the report."""
    speed = bench.gigabytes_per_second(case.traffic_bytes, timing.best)
    return {
        "best_ms": timing.best * 1e3,
        "median_ms": timing.median * 1e3,
        "spread": timing.spread,
        "rounds": len(timing.seconds),
        "gb_per_s": speed,
        "triad_share": speed / ceiling,
        "page_faults": timing.median_faults,
    }


def _prepare(settings: Settings) -> torch.device:
    torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore", UserWarning)
    return torch.device(settings.device)


def times_process(
    send: Send, plan: list[tuple[Case, list[Method]]], settings: Settings, allocator: str, check: bool
) -> None:
    """Times the cases of a plan and sends each as it is done. Runs in a process of its own."""
    if allocator == "raised" and not bench.raise_malloc_thresholds():
        raise OSError("mallopt refused the thresholds")
    device = _prepare(settings)
    inputs, wide_inputs, built_for = None, None, None
    for case, methods in plan:
        send(("now", str(case)))
        if built_for != (case.rows, case.vocab, case.dtype):
            built_for = (case.rows, case.vocab, case.dtype)
            inputs = wide_inputs = None  # frees the last ones first
            sets = bench.input_sets(
                2 * case.tensor_bytes, roofline.last_level_cache_bytes(device), roofline.free_bytes(device)
            )
            inputs = Inputs(*built_for, device, sets)
            wide_inputs = None
            if case.dtype != "float32":
                wide_inputs = Inputs(case.rows, case.vocab, "float32", device, sets=(sets + 1) // 2)
        assert inputs is not None
        losses = {method.name: build(method, OBJECTIVES[case.objective]) for method in methods}
        ours = default_backend(OBJECTIVES[case.objective], device)
        result = time_case(
            case,
            losses,
            inputs,
            settings,
            wide=None if wide_inputs is None else (ours, wide_inputs),
            check=check,
            on_round=lambda number: send(("round", number)),
        )
        result["sets"] = len(inputs.sets)
        send(("case", case, result))


def memory_process(
    send: Send, case: Case, method: Method, settings: Settings, measure: bool
) -> bench.Peak | None:
    """Peak memory of one step, or just the compiler's cache filled. Runs in a process of its own."""
    device = _prepare(settings)
    inputs = Inputs(case.rows, case.vocab, case.dtype, device, sets=1)
    run = inputs.step(build(method, OBJECTIVES[case.objective]))
    if not measure:
        run(0)
        return None
    return bench.peak_growth(lambda: run(0), device)


def measure_memory(
    plan: list[tuple[Case, list[Method]]], settings: Settings, progress: bench.Progress
) -> dict[tuple[Case, str], bench.Peak | str | None]:
    """Peak memory of the contestants of the cases that are large enough; a string says what went wrong.

    In units of a gradient, the peers' peak is the same for every large shape: they are measured on the first
    one of each dtype, kdkernels on all.

    As many processes at once as there are CPUs: nothing is timed here, and compiled contestants leave their
    code in the compiler's cache for those who are timed.
    """
    first: dict[str, tuple[int, int]] = {}
    jobs: list[tuple[Case, Method, bool]] = []
    for case, methods in plan:
        large = case.tensor_bytes >= SMALLEST_FOR_MEMORY
        peers = large and first.setdefault(case.dtype, (case.rows, case.vocab)) == (case.rows, case.vocab)
        for method in methods:
            measure = large if method.family == "kdkernels" else peers
            if measure or method.family == "torch.compile":
                jobs.append((case, method, measure))
    peaks: dict[tuple[Case, str], bench.Peak | str | None] = {}

    def run(job: tuple[Case, Method, bool]) -> bench.Peak | str | None:
        case, method, measure = job
        try:
            return bench.run_isolated(memory_process, case, method, settings, measure, preload=PRELOAD)
        except bench.ProcessDied as error:
            return f"failed: {last_line(str(error))}"

    workers = 1 if settings.device != "cpu" else max(1, os.cpu_count() or 1)
    with progress.phase("peak memory, compiling", len(jobs)), ThreadPoolExecutor(workers) as pool:
        try:
            for (case, method, measured), peak in zip(jobs, pool.map(run, jobs), strict=True):
                progress.step(f"{case} {method.name}")
                if measured:
                    peaks[case, method.name] = peak
        except BaseException:
            # Interrupted: leaving the pool would otherwise wait for every job that is still in line.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return peaks


PRELOAD = ("torch", "benchmarks.logits")


def measure_times(
    plan: list[tuple[Case, list[Method]]],
    settings: Settings,
    allocator: str,
    progress: bench.Progress,
    *,
    check: bool,
    stopped: list[str],
) -> dict[Case, dict[str, Any]]:
    """Runs `times_process` and collects what it sends; if it dies, `stopped` says so, the rest is kept."""
    results: dict[Case, dict[str, Any]] = {}
    label = "timing, allocator as it comes" if allocator == "default" else "timing, thresholds raised"
    with progress.phase(label, len(plan) * settings.min_rounds):
        current = ""

        def receive(message: tuple[Any, ...]) -> None:
            nonlocal current
            if message[0] == "now":
                current = message[1]
                progress.step(current, 0)
            elif message[0] == "round" and message[1] < settings.min_rounds:
                progress.step(current)
            elif message[0] == "case":
                results[message[1]] = message[2]
                progress.say(summary(message[1], message[2]))

        try:
            bench.run_isolated(
                times_process, plan, settings, allocator, check, on_message=receive, preload=PRELOAD
            )
        except bench.ProcessDied as error:
            stopped.append(f"{label}: stopped at {current or 'the start'}: {last_line(str(error))}")
            progress.say(stopped[-1])
    return results


def summary(case: Case, result: dict[str, Any]) -> str:
    """One line about a case that is done."""
    parts = [f"triad {result['triad']['gb_per_s']:.1f} GB/s"]
    for family in ("eager", "torch.compile", "kdkernels"):
        of_family = {n: t for n, t in result["times"].items() if n.startswith(family + " ")}
        if of_family:
            name = min(of_family, key=lambda n: of_family[n]["best_ms"])
            parts.append(f"{name} {of_family[name]['best_ms']:.3g} ms")
    wrong = [n for n, v in result["verdicts"].items() if v["problem"]]
    if (result["other_cpus"] or 0.0) > BUSY:
        parts.append(f"machine busy: others used {result['other_cpus']:.1f} CPUs")
    return f"  {case}: " + ", ".join(parts) + (f"; not timed: {', '.join(wrong)}" if wrong else "")


def case_document(
    case: Case,
    methods: list[Method],
    ours: str,
    threads: int,
    timed: dict[str, dict[str, Any] | None],
    peaks: dict[tuple[Case, str], bench.Peak | str | None],
) -> dict[str, Any]:
    """All figures of one case as a JSON object; `timed` holds its result for each allocator, or None."""
    objective = OBJECTIVES[case.objective]
    first = timed["default"] or {"verdicts": {}, "times": {}, "triad": None, "sets": 0}
    entries = []
    for method in methods:
        peak = peaks.get((case, method.name))
        entries.append(
            {
                "name": method.name,
                "family": method.family,
                "spelling": method.spelling,
                **first["verdicts"].get(
                    method.name, {"loss_error": None, "gradient_error": None, "problem": "not measured"}
                ),
                "times": {
                    allocator: result["times"].get(method.name) if result else None
                    for allocator, result in timed.items()
                },
                "peak_tensors": peak.bytes / case.tensor_bytes if isinstance(peak, bench.Peak) else None,
                "peak_method": peak.method if isinstance(peak, bench.Peak) else peak,
            }
        )
    return {
        "shape": [case.rows, case.vocab],
        "dtype": case.dtype,
        "objective": case.objective,
        "divergence": objective.divergence,
        "temperature": objective.temperature,
        "hard_weight": objective.hard_weight,
        "tensor_bytes": case.tensor_bytes,
        "traffic_bytes": case.traffic_bytes,
        "input_sets": first["sets"],
        "input_bytes": first["sets"] * 2 * case.tensor_bytes,
        "other_cpus": {
            allocator: result["other_cpus"] if result else None for allocator, result in timed.items()
        },
        "triad": {allocator: result["triad"] if result else None for allocator, result in timed.items()},
        "wide": {allocator: result["wide"] if result else None for allocator, result in timed.items()},
        "threads": threads,
        "ours": ours,
        "methods": entries,
    }


def _threads(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number >= 1, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks logits", description=__doc__)
    p.add_argument(
        "--shapes", nargs="+", type=shape, metavar="ROWSxVOCAB", help="default: 256x32000 64x128256 16x1000"
    )
    p.add_argument(
        "--divergences", nargs="+", choices=OBJECTIVES, help="default: all, KL and JSD at 64x128256"
    )
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all of them")
    p.add_argument(
        "--threads", type=_threads, default=min(2, os.cpu_count() or 1), help="of torch; default %(default)s"
    )
    p.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: CUDA if there is one"
    )
    p.add_argument(
        "--json", type=Path, metavar="PATH", help="where to write the figures; a .md is written beside it"
    )
    p.add_argument(
        "--quick", action="store_true", help="seconds: the small shape, fp32, KL and JSD, nothing compiled"
    )
    p.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    command = parser()
    options = command.parse_args(arguments)
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        command.error("--device cuda: torch.cuda.is_available() is False here")
    device = torch.device(options.device if options.device != "auto" else ("cuda" if has_cuda else "cpu"))
    settings = Settings(
        str(device), options.threads, 5 if options.quick else 20, 0.0 if options.quick else 0.5
    )
    shapes = options.shapes or ([SMALL] if options.quick else list(DEFAULTS))
    dtypes = options.dtypes or (["float32"] if options.quick else list(DTYPES))
    chosen: Sequence[str] | None = options.divergences or (("forward_kl", "jsd") if options.quick else None)
    environment = bench.environment(device, settings.threads)

    plan: list[tuple[Case, list[Method]]] = []
    unavailable: dict[str, str] = {}
    for rows, vocab in dict.fromkeys(shapes):
        for dtype in dict.fromkeys(dtypes):
            for objective in dict.fromkeys(chosen or DEFAULTS.get((rows, vocab), tuple(OBJECTIVES))):
                methods, reasons = methods_for(OBJECTIVES[objective], device, compiled=not options.quick)
                unavailable.update(reasons)
                plan.append((Case(rows, vocab, dtype, objective), methods))

    progress = bench.Progress()
    peaks = measure_memory(plan, settings, progress)
    timed: dict[str, dict[Case, dict[str, Any]]] = {}
    stopped: list[str] = []
    timed["default"] = measure_times(plan, settings, "default", progress, check=True, stopped=stopped)
    if device.type == "cpu":
        rested = Method("kdkernels", "reference")
        fit = [
            (case, [m for m in methods if m.name in timed["default"][case]["times"] and m != rested])
            for case, methods in plan
            if case in timed["default"] and case.dtype == "float32"
        ]
        timed["raised"] = measure_times(fit, settings, "raised", progress, check=False, stopped=stopped)

    cases = [
        case_document(
            case,
            methods,
            default_backend(OBJECTIVES[case.objective], device),
            settings.threads,
            {allocator: timed.get(allocator, {}).get(case) for allocator in ALLOCATORS},
            peaks,
        )
        for case, methods in plan
    ]
    found = targets(cases)
    document = {
        "schema": SCHEMA,
        "command": command_line("benchmarks", ["logits", *(arguments or [])]),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kdkernels": kd.__version__,
        "environment": environment,
        "settings": {
            **asdict(settings),
            "quick": options.quick,
            "cache_bytes": roofline.last_level_cache_bytes(device),
            "unavailable": unavailable,
            "stopped": stopped,
        },
        "phases_s": progress.seconds,
        "cases": cases,
        "targets": [asdict(t) for t in found],
    }
    for line in notes(document):
        print(line)
    for title, head, rows_, left in tables(document):
        bench.print_table(title, head, rows_, left)
    # A run of a selection doesn't overwrite the committed figures of a whole one.
    whole = not (options.quick or options.shapes or options.dtypes or options.divergences)
    path = options.json or (RESULTS / f"logits-{device.type}.json" if whole else None)
    if path is not None:
        bench.write_json(path, document)
        path.with_suffix(".md").write_text(markdown(document))
        print(f"written: {path} and {path.with_suffix('.md')}")
    missed = [t for t in found if t.met is False]
    undecided = [t for t in found if t.met is None and t.asked != SHOWN]
    if missed:
        print(f"{len(missed)} of {len(found)} targets missed: {'; '.join(t.name for t in missed)}")
    if undecided:
        print(f"{len(undecided)} of {len(found)} targets undecided, the machine was busy")
    return 1 if options.check and (missed or undecided) else 0
