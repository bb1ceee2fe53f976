"""Measures points: peak memory, errors against fp64, times beside a ceiling, and the cost against V and N.

Of each point every contestant's peak memory is taken in a process of its own; then one process checks all of
them against fp64 and times those that are right, interleaved round by round, on input sets that rotate. A
contestant that is wrong, or slow beyond comparison, is shown as such and not timed.

Where tensors lie in memory is settled once a process, and moves a time by some 5 %, as do minutes in which a
machine is slower. So rounds can be spread over passes: all points in turn, each in a new process, then all of
them once more.
"""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from .. import __version__
from . import contestants, eager
from .contestants import OURS, Entry
from .isolated import ProcessDied, run_isolated
from .memory import Peak, peak_growth, raise_malloc_thresholds
from .report import Progress, environment
from .timing import Contestant, Neighbours, Timing, clock_for, joined, race, typical
from .workloads import Point, Workload, floor, workload

SCHEMA = 1
# Below this much a tensor, thread stacks and malloc's slack would drown a peak.
SMALLEST_FOR_MEMORY = 8_000_000
# How many processes may say nothing, in seconds: one of them compiles.
PATIENCE = 600.0
PRELOAD = ("torch", __name__)
# A point's rounds end when they have taken this many times what they take at least.
MOST = 6.0
# A contestant is not raced where a step takes it this many times what `kd_loss` takes, and this many seconds:
# of the few rounds that there is time for nothing would come that the next run agrees with.
SLOW, LONG = 10.0, 1.0
Send = Callable[[Any], None]


@dataclass(frozen=True)
class Settings:
    """What holds for all points.

    Attributes:
        threads: Of torch.
        rounds: Timed rounds of a point at least, unless three a pass take `MOST` times `seconds`.
        seconds: How long a point's rounds go on at least.
        passes: How many processes those are spread over.
        most_seconds: From the third on, a pass begins only where it would end before so much time has gone
            into all of it, if it took as long as the last; None for as many as `passes` says.
        compiled: Whether `torch.compile` takes part.
        memory: Whether peak memory is taken.
        raised: Whether glibc's thresholds are raised first, so that what is freed is kept.
        modules: Other contestants; see `contestants`.
    """

    threads: int
    rounds: int = 10
    seconds: float = 2.0
    passes: int = 1
    most_seconds: float | None = None
    compiled: bool = True
    memory: bool = True
    raised: bool = False
    modules: tuple[str, ...] = ()


def measure(points: Sequence[Point], settings: Settings, progress: Progress | None = None) -> dict[str, Any]:
    """Measures points one after another.

    Args:
        points: What to measure, each once.
        settings: How.
        progress: Where to say how far it is; a new one by default.

    Returns:
        A JSON object: `environment`, `versions`, `settings`, `points` with a list of `entries` each,
        `missing` with reasons, and `exponents`.
    """
    progress, started = progress or Progress(), time.perf_counter()
    points = list(dict.fromkeys(points))
    plan = [(point, *takes_part(point, settings)) for point in points]
    device = torch.device(points[0].device if points else "cpu")
    system = environment(device, settings.threads)
    peaks = _all_peaks([(p, who) for p, who, _ in plan], settings, progress) if settings.memory else {}
    found: list[list[dict[str, Any] | str]] = [[] for _ in plan]
    with progress.phase("times", len(plan) * settings.passes):
        ends = [started]
        while len(ends) <= settings.passes and _has_time(ends, settings):
            for (point, who, _), passes in zip(plan, found, strict=True):
                progress.step(str(point), 0)
                if _goes_on(passes, settings):
                    right = _right(passes[0], who) if passes else who
                    say = partial(progress.step, count=0)
                    passes.append(_timed(point, right, settings, not passes, say))
                progress.step(str(point))
                if len(ends) == 1:
                    progress.say(summary(_point_document(point, who, _joined(passes), peaks)))
            ends.append(time.perf_counter())
    measured = [
        _point_document(point, who, _joined(passes), peaks)
        for (point, who, _), passes in zip(plan, found, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kdkernels": __version__,
        "versions": contestants.versions(settings.modules),
        "environment": system,
        "settings": asdict(settings),
        "phases_s": progress.seconds,
        "missing": {name: why for _, _, missing in plan for name, why in missing.items()},
        "points": measured,
        "exponents": exponents(measured),
    }


def takes_part(point: Point, settings: Settings) -> tuple[list[Entry], dict[str, str]]:
    """The contestants of a point."""
    who, missing = contestants.everyone(point, settings.modules)
    if not settings.compiled:
        who = [each for each in who if each.family != contestants.COMPILED]
    return who, missing


# What runs in processes of its own.


def _prepare(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore")
    if settings.raised and not raise_malloc_thresholds():
        raise OSError("mallopt refused the thresholds")


def memory_process(send: Send, point: Point, entry: Entry, settings: Settings) -> Peak | None:
    """Peak memory of one step beyond its inputs, in a process that nothing else ran in."""
    _prepare(replace(settings, raised=False))
    run = workload(point, sets=1).step(contestants.build_any(entry, point))
    return peak_growth(lambda: run(0), torch.device(point.device))


def time_process(
    send: Send, point: Point, who: list[Entry], settings: Settings, first: bool = True
) -> dict[str, Any]:
    """A pass of a point: times of the contestants; the first leaves out whom fp64 says to be wrong."""
    _prepare(settings)
    made = workload(point)
    if first:
        running, verdicts = _checked(made, who, send)
    else:
        running, verdicts = [Contestant(e.name, made.step(contestants.build_any(e, point))) for e in who], {}
    ceilings = made.ceilings()
    neighbours = Neighbours()
    timings = race(
        running + ceilings,
        sets=len(made.sets),
        clock=clock_for(torch.device(point.device)),
        min_rounds=math.ceil(settings.rounds / settings.passes),
        min_seconds=settings.seconds / settings.passes,
        max_seconds=MOST * settings.seconds / settings.passes,
        least_rounds=3,
        warmup=0 if first else 1,  # the check has run everyone once
        on_round=lambda number: send(f"{point}: round {number + 1}"),
    )
    best = min((c.name for c in ceilings), key=lambda name: timings[name].best)
    return {
        "verdicts": verdicts,
        "timings": {c.name: timings[c.name] for c in running},
        "ceiling": {"name": best, "best": timings[best].best, "work": made.ceiling_work()},
        "sets": len(made.sets),
        "other_cpus": neighbours.cpus(),
    }


def _checked(
    made: Workload, who: list[Entry], send: Send
) -> tuple[list[Contestant], dict[str, dict[str, Any]]]:
    """Those that are right and not hopelessly slow, and the errors of all."""
    point, running = made.point, []
    verdicts: dict[str, dict[str, Any]] = {}
    first: dict[str, float] = {}
    send(f"{point}: fp64 truth")
    truth = made.truth()
    for entry in who:
        send(f"{point}: {entry.name} against fp64")
        try:
            run = made.step(contestants.build_any(entry, point))
            started = time.perf_counter()
            got = run(0)
            first[entry.name] = time.perf_counter() - started
            errors = made.errors(got, truth)
            del got
        except Exception as error:  # a contestant's own code
            verdicts[entry.name] = {"problem": _failure(error), "errors": None}
            continue
        problem = made.wrong(errors)
        verdicts[entry.name] = {"problem": problem, "errors": [_finite(x) for x in errors]}
        if problem is None:
            running.append(Contestant(entry.name, run))
    most = max(LONG, SLOW * first.get(contestants.default(point), math.inf))
    for one in [*running]:
        if first[one.name] <= most:
            continue
        send(f"{point}: {one.name} once more")
        # The first time it may have been compiled.
        seconds, _ = clock_for(torch.device(point.device)).measure(one.run, 1)
        if seconds > most:
            running.remove(one)
            verdicts[one.name]["problem"] = (
                f"slow: a step took {seconds:.1f} s, over {SLOW:.0f} times kd_loss's, and was not repeated"
            )
    return running, verdicts


def _failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[-1][:200]}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# What runs here.


def _all_peaks(
    plan: list[tuple[Point, list[Entry]]], settings: Settings, progress: Progress
) -> dict[tuple[Point, str], Peak | str | None]:
    """Peaks of contestants whose tensors are large enough, as many processes at once as there are CPUs.

    Nothing is timed here, and what is compiled is in the compiler's cache afterwards.
    """
    # In tensors of [N, V] a peak is the same for any N: of points that differ in it alone one will do.
    first: dict[Point, Point] = {}
    for point, _ in plan:
        if point.tensor_bytes >= SMALLEST_FOR_MEMORY:
            first.setdefault(replace(point, rows=0), point)
    jobs = [(p, e) for p, who in plan for e in who if first.get(replace(p, rows=0)) == p]

    def run(job: tuple[Point, Entry]) -> Peak | str | None:
        try:
            found: Peak | None = run_isolated(
                memory_process, *job, settings, preload=preload(settings), patience=PATIENCE
            )
        except ProcessDied as error:
            return str(error).strip().splitlines()[-1][:200]
        return found

    at_once = 1 if any(p.device != "cpu" for p, _ in jobs) else max(1, os.cpu_count() or 1)
    peaks: dict[tuple[Point, str], Peak | str | None] = {}
    with progress.phase("peak memory", len(jobs)), ThreadPoolExecutor(at_once) as pool:
        try:
            for (point, entry), peak in zip(jobs, pool.map(run, jobs), strict=True):
                progress.step(f"{point} {entry.name}")
                peaks[point, entry.name] = peak
        except BaseException:
            # Interrupted: leaving the pool would otherwise wait for every job that is still in line.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return peaks


def _timed(
    point: Point, who: list[Entry], settings: Settings, first: bool, say: Callable[[str], None]
) -> dict[str, Any] | str:
    try:
        found: dict[str, Any] = run_isolated(
            time_process, point, who, settings, first,
            on_message=say, preload=preload(settings), patience=PATIENCE,
        )  # fmt: skip
    except ProcessDied as error:
        return str(error).strip().splitlines()[-1][:200]
    return found


def preload(settings: Settings) -> tuple[str, ...]:
    """What the server of processes imports, so that none of them has to."""
    compiler = ("kdkernels.bench.compiler",) if settings.compiled else ()
    return (*PRELOAD, *compiler, *contestants.preload(settings.modules))


def _right(found: dict[str, Any] | str, who: list[Entry]) -> list[Entry]:
    return [] if isinstance(found, str) else [each for each in who if each.name in found["timings"]]


def _has_time(ends: Sequence[float], settings: Settings) -> bool:
    """Whether one more pass of all points ends in time; `ends` are those of all before, after the start."""
    if len(ends) < 3 or settings.most_seconds is None:
        return True
    return ends[-1] - ends[0] + (ends[-1] - ends[-2]) <= settings.most_seconds


def _goes_on(passes: Sequence[dict[str, Any] | str], settings: Settings) -> bool:
    """Whether a point needs one more pass: not if it failed, or took as long as all of them may."""
    taken = 0.0
    for each in passes:
        if isinstance(each, str):
            return False
        taken += sum(sum(timing.seconds) for timing in each["timings"].values())
    return taken < MOST * settings.seconds


def _joined(passes: Sequence[dict[str, Any] | str]) -> dict[str, Any] | str:
    """What the first pass says of errors, with the rounds of all, and how many each had."""
    good = [each for each in passes if not isinstance(each, str)]
    if len(good) < len(passes):
        return next(each for each in passes if isinstance(each, str))
    ceilings = [each["ceiling"] for each in good]
    best = min(ceilings, key=lambda each: float(each["best"]))
    others = [each["other_cpus"] for each in good]
    return {
        "verdicts": good[0]["verdicts"],
        "timings": {name: joined([g["timings"][name] for g in good]) for name in good[0]["timings"]},
        "rounds": [max((len(t.seconds) for t in g["timings"].values()), default=0) for g in good],
        "ceiling": {
            "name": best["name"],
            "best_ms": best["best"] * 1e3,
            "pass_best_ms": [each["best"] * 1e3 for each in ceilings],
            "bytes_per_s": None if best["work"].flops else best["work"].bytes / best["best"],
            "flops_per_s": best["work"].flops / best["best"] if best["work"].flops else None,
        },
        "sets": good[0]["sets"],
        "other_cpus": None if None in others else statistics.mean(others),
    }


def _point_document(
    point: Point,
    who: list[Entry],
    found: dict[str, Any] | str,
    peaks: dict[tuple[Point, str], Peak | str | None],
) -> dict[str, Any]:
    least = floor(point)
    failed = found if isinstance(found, str) else None
    result: dict[str, Any] = {} if isinstance(found, str) else found
    timings: dict[str, Timing] = result.get("timings", {})
    ceiling = result.get("ceiling")
    ours = contestants.default(point)
    documents = []
    for entry in who:
        verdict = result.get("verdicts", {}).get(entry.name, {"problem": failed, "errors": None})
        peak = peaks.get((point, entry.name))
        timing = timings.get(entry.name)
        documents.append(
            {
                "name": entry.name,
                "family": entry.family,
                "spelling": entry.spelling,
                "problem": verdict["problem"],
                "loss_error": verdict["errors"][0] if verdict["errors"] else None,
                "gradient_error": verdict["errors"][1] if verdict["errors"] else None,
                "time": timing
                and _time_document(timing, least, ceiling, timings.get(ours), result["rounds"]),
                "peak_bytes": peak.bytes if isinstance(peak, Peak) else None,
                "peak_method": peak.method if isinstance(peak, Peak) else peak,
            }
        )
    return {
        "point": asdict(point),
        "tensor_bytes": point.tensor_bytes,
        "floor": asdict(least),
        "ceiling": ceiling,
        "sets": result.get("sets"),
        "other_cpus": result.get("other_cpus"),
        "ours": ours,
        "entries": documents,
    }


def _time_document(
    timing: Timing, least: Any, ceiling: dict[str, Any] | None, ours: Timing | None, rounds: Sequence[int]
) -> dict[str, Any]:
    """The figures of one contestant.

    `pass_ratios` are, for each pass, the median over its rounds of its time over that of `kd_loss`; `ratio`
    is what is `typical` of them.
    """
    unit = "flops" if least.flops else "bytes"
    rate = getattr(least, unit) / timing.best
    most = ceiling[f"{unit}_per_s"] if ceiling else None
    ratios: list[float] = []
    if ours is not None:
        each = iter([a / b for a, b in zip(timing.seconds, ours.seconds, strict=True)])
        ratios = [statistics.median(islice(each, count)) for count in rounds]
    return {
        "best_ms": timing.best * 1e3,
        "median_ms": timing.median * 1e3,
        "spread": timing.spread,
        "rounds": len(timing.seconds),
        "ratio": typical(ratios) if ratios else None,
        "pass_ratios": ratios,
        f"{unit}_per_s": rate,
        "share": rate / most if most else None,
        "page_faults": timing.median_faults,
    }


def fastest(point: dict[str, Any], family: str) -> dict[str, Any] | None:
    """The entry of a family that has the least median time, of a measured point; of ours the default."""
    timed = [e for e in point["entries"] if e["family"] == family and e["time"]]
    if family == OURS:
        own = [e for e in timed if e["name"] == point["ours"]]
        timed = own or timed
    return min(timed, key=lambda e: float(e["time"]["median_ms"]), default=None)


def hopeless(point: dict[str, Any], family: str) -> bool:
    """Whether a family has nobody that was timed, and somebody that was too slow for it."""
    problems = [e["problem"] or "" for e in point["entries"] if e["family"] == family]
    return fastest(point, family) is None and any(each.startswith("slow:") for each in problems)


def families(points: Iterable[dict[str, Any]]) -> list[str]:
    """All families that take part, ours first."""
    found = dict.fromkeys(e["family"] for p in points for e in p["entries"])
    return [OURS, *(family for family in found if family != OURS)]


def described(point: dict[str, Any]) -> Point:
    """The point of its document."""
    return Point(**{**point["point"], "widths": tuple(point["point"]["widths"])})


def summary(point: dict[str, Any]) -> str:
    """One line about a point that is done."""
    own = fastest(point, OURS)
    parts = []
    if own is not None:
        parts.append(f"kd_loss {own['time']['median_ms']:.3g} ms")
        if (share := own["time"]["share"]) is not None:
            parts[0] += f" ({100 * share:.0f} % of {point['ceiling']['name']})"
    for family in families([point])[1:]:
        peer = fastest(point, family)
        if peer is not None and peer["time"]["ratio"]:
            parts.append(f"{family} × {peer['time']['ratio']:.2g}")
    wrong = [f"{e['name']} {e['problem']}" for e in point["entries"] if e["problem"]]
    return "; ".join([f"  {described(point)}: {', '.join(parts) or 'nothing was timed'}", *wrong])


# Cost against V and N.

AXES = ("vocab", "rows")


def exponents(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How time and memory grow: the slope of their logarithms against that of V, and of N.

    A fit needs three sizes at least that differ in nothing else. An exponent of 1 is a cost in proportion.
    """
    found = []
    for axis in AXES:
        groups: dict[Point, list[dict[str, Any]]] = {}
        for point in points:
            anywhere: dict[str, Any] = {axis: 0}
            groups.setdefault(replace(described(point), **anywhere), []).append(point)
        for key, members in groups.items():
            for family in families(members):
                for figure, value in (("time", _median_time), ("memory", _peak)):
                    sizes = [(p["point"][axis], value(p, family)) for p in members]
                    known = sorted((x, y) for x, y in sizes if y)
                    if len({x for x, _ in known}) >= 3:
                        found.append(
                            {
                                "axis": axis,
                                "figure": figure,
                                "family": family,
                                "fixed": {k: v for k, v in asdict(key).items() if k != axis},
                                "sizes": [x for x, _ in known],
                                "exponent": slope(known),
                            }
                        )
    return found


def _median_time(point: dict[str, Any], family: str) -> float | None:
    entry = fastest(point, family)
    return None if entry is None else float(entry["time"]["median_ms"])


def _peak(point: dict[str, Any], family: str) -> float | None:
    entry = fastest(point, family)
    return None if entry is None or not entry["peak_bytes"] else float(entry["peak_bytes"])


def slope(known: Sequence[tuple[float, float]]) -> float:
    """The least-squares slope of log y against log x."""
    x, y = ([math.log(pair[i]) for pair in known] for i in (0, 1))
    return statistics.linear_regression(x, y).slope


# What a run without a selection measures.

DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "logits": {"rows": 64, "vocab": 32_768},
        "linear": {"rows": 128, "vocab": 32_768, "widths": (256, 384)},
        "sparse": {"rows": 64, "vocab": 32_768},
    },
    "cuda": {
        "logits": {"rows": 4096, "vocab": 131_072, "dtype": "bfloat16"},
        "linear": {"rows": 4096, "vocab": 131_072, "dtype": "bfloat16", "widths": (2048, 4096)},
        "sparse": {"rows": 4096, "vocab": 131_072, "dtype": "bfloat16"},
    },
}
# Sizes around a centre, as factors of it.
SWEEP_VOCAB, SWEEP_ROWS = (0.25, 1.0, 4.0), (0.25, 1.0, 4.0)


def star(device: str, workloads: Sequence[str]) -> list[Point]:
    """A centre of each workload, and one axis at a time around it: V, N, divergence, T, dtype."""
    points = []
    for name in workloads:
        centre = Point(name, device=device, **DEFAULTS[device][name])
        points.append(centre)
        points += [replace(centre, vocab=int(f * centre.vocab)) for f in SWEEP_VOCAB]
        points += [replace(centre, rows=int(f * centre.rows)) for f in SWEEP_ROWS]
        points.append(replace(centre, divergence="jsd"))
        points.append(replace(centre, temperature=2.0, hard_weight=0.1))
        points.append(replace(centre, dtype="bfloat16" if centre.dtype == "float32" else "float32"))
        if name != "sparse":
            points.append(replace(centre, divergence=eager.LABELS))
    return list(dict.fromkeys(points))


def centres(device: str, workloads: Sequence[str]) -> list[Point]:
    """The middle of each workload alone."""
    return [Point(name, device=device, **DEFAULTS[device][name]) for name in workloads]
