"""``python -m benchmarks gpu``: what a loss on logits costs on a GPU, beside what people use there.

The contestants of a case (shape, dtype, objective) are compared with fp64 on the device, then timed by device
events, interleaved round by round with a large copy, whose bandwidth is their ceiling. All runs in a process
of its own: whoever crashes or hangs there is named and left out, and the others go on in a new one. Figures
are written after every case.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import gpu_tune, liger
from benchmarks.cases import (
    DTYPES,
    OBJECTIVES,
    OUT_OF_MEMORY,
    Case,
    Inputs,
    LossFn,
    Method,
    Verdict,
    build,
    default_backend,
    failure,
    last_line,
    methods_for,
    shape,
)
from benchmarks.gpu_harness import (
    PATIENCE,
    PRELOAD,
    SCHEMA,
    DeviceInputs,
    Settings,
    compare,
    environment,
    figures,
    make_inputs,
    race_those_that_can,
    release,
    settings_for,
)
from benchmarks.gpu_report import markdown, notes, summary, tables, targets
from benchmarks.logits_report import SHOWN
from kdkernels import bench
from kdkernels.bench.report import command_line
from kdkernels.bench.timing import Clock

RESULTS = Path(__file__).parent / "results"

Send = Callable[[Any], None]

# 128,256 and 32,000 are Llama's vocabularies, and 8,192 rows a batch of its tokens; 4,096 classes are a row
# that fits a multiprocessor many times over. (512, 1000) is a classifier's batch, too small for bandwidth to
# matter: there it is launches that cost.
SHAPES = ((8192, 128256), (8192, 32000), (8192, 4096), (512, 1000))
_FIRST, _OTHERS = ("forward_kl", "jsd"), ("reverse_kl", "soft_cross_entropy", "forward_kl+hard")
# What a run without options measures, the most telling first, since time may run out. 16-bit logits are what
# models put out; fp32 where a loss upcasts them before it is called. fp16 is computed twice (its loss scale
# has to come before the rounding), which forward KL shows as well as any.
PLAN: tuple[tuple[tuple[int, int], str, tuple[str, ...]], ...] = (
    *((of, "bfloat16", _FIRST) for of in SHAPES),
    *((of, "bfloat16", _OTHERS) for of in SHAPES[:2]),
    *((of, "float32", _FIRST) for of in SHAPES[:2]),
    ((8192, 32000), "float16", ("forward_kl",)),
    *((of, "bfloat16", _OTHERS) for of in SHAPES[2:]),
    *((of, "float32", _FIRST) for of in SHAPES[2:]),
    ((8192, 128256), "float16", ("forward_kl",)),
)


# What counting launches may take, beyond the seconds of the run.
LAUNCHES_SECONDS = 30.0

NO_TIME = "not measured: the time was up"


def host_ms(run: Callable[[int], object], device: torch.device, repeats: int = 5) -> float:
    """What the host is busy with a step, in milliseconds, while the device is idle: the median."""
    times = []
    for number in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run(number)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def beside_time(run: Callable[[int], object], device: torch.device, case: Case) -> dict[str, float | None]:
    """A contestant's host time and peak memory; None where it raised, having been timed all the same."""
    try:
        busy = host_ms(run, device)
        peak = bench.peak_growth(lambda: run(0), device)
    except Exception:
        busy, peak = None, None
    if peak is None:
        release(device)
    return {"host_ms": busy, "peak_tensors": None if peak is None else peak.bytes / case.tensor_bytes}


def measure_case(
    case: Case,
    methods: list[Method],
    inputs: Inputs,
    ceiling: bench.Contestant,
    clock: Clock,
    settings: Settings,
    *,
    banned: dict[str, str] | None = None,
    deadline: float = float("inf"),
    now: Callable[[str | None], None] = lambda name: None,
) -> dict[str, Any]:
    """Everything about one case but its launches.

    Args:
        case: The case.
        methods: The contestants.
        inputs: What they are given.
        ceiling: The copy.
        clock: Times a call.
        settings: Of the run.
        banned: Contestants that are not run, with the reason.
        deadline: The `time.perf_counter()` after which no other than our own contestants are begun.
        now: Is told which contestant is at work; None is all of them, or nobody.

    Returns:
        A JSON object.
    """
    device, objective = torch.device(settings.device), OBJECTIVES[case.objective]
    ours = default_backend(objective, device)
    verdicts: dict[str, Verdict] = {}
    runs: dict[str, Callable[[int], object]] = {}
    # All before the first is called: building a compiled one drops what others have compiled.
    banned = banned or {}
    losses = {m.name: build(m, objective) for m in methods if m.name not in banned}
    # Our own first, those to compile last, if time runs out meanwhile.
    order = {"kdkernels": 0, "torch.compile": 2}
    for method in sorted(methods, key=lambda m: order.get(m.family, 1)):
        name = method.name
        if name in banned:
            verdicts[name] = Verdict(None, None, banned[name])
            continue
        if method.family != "kdkernels" and time.perf_counter() >= deadline:
            verdicts[name] = Verdict(None, None, NO_TIME)
            continue
        now(name)
        verdicts[name] = compare(losses[name], inputs, case)
        if verdicts[name].problem is None:
            runs[name] = inputs.step(losses[name])
        else:
            release(device)
    release(device)

    now(None)
    contestants = [bench.Contestant(name, run) for name, run in runs.items()]
    alone = f"{ours}, forward alone"
    if ours in runs:
        contestants.append(bench.Contestant(alone, _forward(losses[ours], inputs)))
    timings, problems = race_those_that_can(
        [*contestants, ceiling],
        device,
        sets=len(inputs.sets),
        clock=clock,
        min_rounds=settings.min_rounds,
        min_seconds=settings.min_seconds,
        max_seconds=settings.max_seconds,
        max_rounds=200,
        on_round=lambda number: now(None),
    )
    copy = figures(timings.get(ceiling.name), 2 * settings.copy_bytes)
    bandwidth = None if copy is None else copy["gb_per_s"]
    entries = []
    for method in methods:
        found = verdicts[method.name]
        entry = {
            "name": method.name,
            "family": method.family,
            "spelling": method.spelling,
            "loss_error": found.loss_error,
            "gradient_error": found.gradient_error,
            "problem": found.problem or problems.get(method.name),
            "times": figures(timings.get(method.name), case.traffic_bytes, bandwidth),
            "host_ms": None,
            "peak_tensors": None,
            "launches": None,
        }
        if entry["times"] is not None:
            now(method.name)
            entry |= beside_time(runs[method.name], device, case)
        entries.append(entry)
    return {
        "shape": [case.rows, case.vocab],
        "dtype": case.dtype,
        "objective": case.objective,
        "divergence": objective.divergence,
        "temperature": objective.temperature,
        "hard_weight": objective.hard_weight,
        "loss_scale": None if inputs.upstream is None else inputs.upstream.item(),
        "tensor_bytes": case.tensor_bytes,
        "traffic_bytes": case.traffic_bytes,
        "input_sets": len(inputs.sets),
        "ours": ours,
        "copy": copy,
        "forward": figures(timings.get(alone), 2 * case.tensor_bytes, bandwidth),
        "methods": entries,
    }


def _forward(loss: LossFn, inputs: Inputs) -> Callable[[int], object]:
    def run(number: int) -> Tensor:
        with torch.no_grad():
            return loss(*inputs.sets[number % len(inputs.sets)], inputs.labels)

    return run


def measure_process(
    send: Send,
    plan: list[tuple[Case, list[Method]]],
    settings: Settings,
    banned: dict[tuple[Case, str], str],
) -> None:
    """Measures the cases of a plan, as long as there is time, and sends each as it is done."""
    deadline = time.perf_counter() + settings.seconds
    warnings.simplefilter("ignore", UserWarning)
    device = torch.device(settings.device)
    clock, ceiling = bench.clock_for(device), bench.copy(settings.copy_bytes, device)
    inputs, made_for = None, None
    for case, methods in plan:
        if time.perf_counter() >= deadline:
            return
        send(("now", case, None))
        started = time.perf_counter()
        try:
            if made_for != (case.rows, case.vocab, case.dtype):
                inputs = None  # frees the last ones first
                release(device)
                inputs = make_inputs(case, device)
                made_for = (case.rows, case.vocab, case.dtype)
        except Exception as raised:
            made_for, why = None, failure(raised)
        if inputs is None:
            send(("left out", case, f"{why}, for the inputs already"))
            continue
        result = measure_case(
            case,
            methods,
            inputs,
            ceiling,
            clock,
            settings,
            banned={name: why for (of, name), why in banned.items() if of == case},
            deadline=deadline,
            now=lambda name, case=case: send(("now", case, name)),
        )
        send(("case", case, result | {"seconds": time.perf_counter() - started}))


def count_launches(events: Iterable[Any]) -> int:
    """What the device was given to do, by a profile's events: kernels, copies and fills."""
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        for event in events
    )


def launches_process(send: Send, plan: list[tuple[Case, Method]], settings: Settings) -> None:
    """Counts the launches of a step. Not where times are taken: a profiler leaves its hooks behind."""
    deadline = time.perf_counter() + LAUNCHES_SECONDS
    warnings.simplefilter("ignore", UserWarning)
    device = torch.device(settings.device)
    for case, method in plan:
        if time.perf_counter() >= deadline:
            return
        run = DeviceInputs(case.rows, case.vocab, case.dtype, device, 1).step(
            build(method, OBJECTIVES[case.objective])
        )
        # The first profile of a process misses what the profiler needs to begin.
        for _ in range(2):
            run(0)
            release(device)
            with torch.profiler.profile() as profile:
                run(0)
                release(device)
        # None at all is a profiler that isn't allowed to look.
        send((case, method.name, count_launches(profile.events() or ()) or None))


class Run:
    """The parent's side: starts the processes, collects what they send, and writes it down."""

    def __init__(
        self,
        plan: list[tuple[Case, list[Method]]],
        settings: Settings,
        document: dict[str, Any],
        path: Path | None,
    ) -> None:
        self.plan, self.settings, self.document, self.path = plan, settings, document, path
        self.results: dict[Case, dict[str, Any]] = {}
        self.left_out: dict[Case, str] = {}
        self.stopped: list[str] = []
        self.progress = bench.Progress()
        self.started = time.perf_counter()

    def measure(self) -> None:
        """All the cases there is time for; a process that dies is followed by one without the culprit."""
        banned: dict[tuple[Case, str], str] = {}
        at: list[Any] = [None, None]

        def receive(message: tuple[Any, ...]) -> None:
            kind, case, what = message
            at[:] = [case, what] if kind == "now" else [None, None]
            if kind == "now":
                self.progress.step(f"{case} {what or 'timing'}", 0)
            elif kind == "left out":
                self.left_out[case] = what
                self.progress.step(str(case))
                self.progress.say(f"  {case}: {what}")
            else:
                self.results[case] = what
                self.progress.step(str(case))
                self.progress.say(summary(what))
                self.save()

        with self.progress.phase("measuring", len(self.plan)):
            while True:
                todo = [(c, m) for c, m in self.plan if c not in self.results and c not in self.left_out]
                seconds = self.settings.seconds - (time.perf_counter() - self.started)
                if not todo or seconds <= 0:
                    break
                at[:] = [None, None]
                settings = replace(self.settings, seconds=seconds)
                try:
                    bench.run_isolated(
                        measure_process,
                        todo,
                        settings,
                        banned,
                        on_message=receive,
                        preload=PRELOAD,
                        patience=PATIENCE,
                    )
                except bench.ProcessDied as error:
                    why = f"failed: {last_line(str(error))}"
                    case, name = at
                    self.stopped.append(f"{case or 'At the start'}{f', {name}' if name else ''}: {why}")
                    self.progress.say(self.stopped[-1])
                    if case is None:
                        break
                    methods = dict(self.plan)[case]
                    peers = [
                        m.name for m in methods if m.family != "kdkernels" and (case, m.name) not in banned
                    ]
                    if name is not None and (case, name) not in banned:
                        banned[case, name] = why
                    elif peers:
                        # Nobody in particular: once more, with ours alone.
                        banned |= {
                            (case, peer): f"not measured: {why}, while all were timed" for peer in peers
                        }
                    else:
                        self.left_out[case] = why
                else:
                    break
        for case, _ in self.plan:
            if case not in self.results:
                self.left_out.setdefault(case, NO_TIME.removeprefix("not measured: "))

    def count_launches(self) -> None:
        """The launches of our own contestant in each case."""
        plan = [
            (case, method)
            for case, methods in self.plan
            for method in methods
            if case in self.results and method.name == self.results[case]["ours"]
            and _entry(self.results[case], method.name)["times"] is not None
        ]  # fmt: skip

        def receive(message: tuple[Case, str, int | None]) -> None:
            case, name, count = message
            _entry(self.results[case], name)["launches"] = count
            self.progress.step(str(case))

        with self.progress.phase("counting launches", len(plan)):
            try:
                bench.run_isolated(
                    launches_process,
                    plan,
                    self.settings,
                    on_message=receive,
                    preload=PRELOAD,
                    patience=PATIENCE,
                )
            except bench.ProcessDied as error:
                self.stopped.append(f"Counting launches: failed: {last_line(str(error))}")
                self.progress.say(self.stopped[-1])

    def save(self, finished: bool = False) -> None:
        """Completes the document with what there is, and writes it."""
        cases = [self.results[case] for case, _ in self.plan if case in self.results]
        left_out = [
            {"shape": [c.rows, c.vocab], "dtype": c.dtype, "objective": c.objective, "why": self.left_out[c]}
            for c, _ in self.plan
            if c in self.left_out
        ]
        self.document |= {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if finished else None,
            "phases_s": self.progress.seconds,
            "stopped": self.stopped,
            "cases": cases,
            "left_out": left_out,
            "targets": [asdict(t) for t in targets(cases, left_out)],
        }
        if self.path is not None:
            bench.write_json(self.path, self.document)
            self.path.with_suffix(".md").write_text(markdown(self.document))


def _entry(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(m for m in result["methods"] if m["name"] == name)


def contestants_for(objective: str, device: torch.device, compiled: bool, with_liger: bool) -> list[Method]:
    """The contestants of an objective: the reference backend, which is there to be right, only if it must."""
    chosen = OBJECTIVES[objective]
    methods, _ = methods_for(chosen, device, compiled)
    ours = default_backend(chosen, device)
    peers = [m for m in methods if m.family != "kdkernels"]
    if with_liger:
        peers += [Method("liger", name) for name in liger.SPELLINGS[chosen.divergence]]
    return peers + [
        m for m in methods if m.family == "kdkernels" and (m.spelling != "reference" or m.name == ours)
    ]


def cases_for(
    shapes: Sequence[tuple[int, int]] | None,
    dtypes: Sequence[str] | None,
    objectives: Sequence[str] | None,
    quick: bool,
) -> list[Case]:
    """What to measure, in the order in which it is: `PLAN`, or what was selected."""
    if quick:
        shapes, dtypes, objectives = shapes or SHAPES[-1:], dtypes or ("bfloat16",), objectives or _FIRST
    if not (shapes or dtypes or objectives):
        chosen = [Case(*of, dtype, name) for of, dtype, names in PLAN for name in names]
    else:
        chosen = [
            Case(*of, dtype, name)
            for of in shapes or SHAPES
            for dtype in dtypes or ("bfloat16",)
            for name in objectives or OBJECTIVES
        ]
    return list(dict.fromkeys(chosen))


def why_not() -> str | None:
    """Why there is nothing to measure here, and what to do; None where there is."""
    if not torch.cuda.is_available():
        built = "CUDA" if torch.version.cuda else "ROCm" if torch.version.hip else "CPUs"
        return (
            f"there is no GPU here: torch.cuda.is_available() is False (torch {torch.__version__}, a build "
            f"for {built}). Run this on a machine with an NVIDIA or AMD GPU, with a torch built for it; "
            "'make bench' measures the CPU"
        )
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        return "TRITON_INTERPRET is set, so that Triton would interpret its kernels on the CPU; unset it"
    logits = torch.zeros(1, 2, device="cuda")
    explained = kd.explain(logits, logits)
    if explained.backend == "reference":
        return f"no fused backend of kdkernels runs on this GPU, so there is nothing to measure:\n{explained}"
    return None


def result_path(device_name: str) -> Path:
    """Where a whole run on a device is written."""
    return RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of seconds > 0, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    p.add_argument("--shapes", nargs="+", type=shape, metavar="ROWSxVOCAB", help="default: see the README")
    p.add_argument("--divergences", nargs="+", choices=OBJECTIVES, help="default: see the README")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, help="beside another selection bfloat16 by default")
    p.add_argument(
        "--seconds",
        type=_seconds,
        default=420.0,
        help="no case is begun after that; what was left out is listed; default %(default).0f",
    )
    p.add_argument(
        "--json", type=Path, metavar="PATH", help="where to write the figures; a .md is written beside it"
    )
    p.add_argument(
        "--quick", action="store_true", help="seconds: 512x1000 in bf16, KL and JSD, nothing compiled"
    )
    p.add_argument("--check", action="store_true", help="exit with 1 if a target is missed or not measured")
    p.add_argument("--tune", action="store_true", help="time block sizes and warps of the row kernel instead")
    p.add_argument(
        "--probe",
        action="store_true",
        help="say what would be measured on, and exit: with 2 where there is no GPU",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status: 2 where there is no GPU, 1 where our loss is wrong."""
    options = parser().parse_args(arguments)
    why = why_not()
    if why is not None:
        print(f"python -m benchmarks gpu: {why}", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", flush=True)
    if options.probe:
        return 0
    if options.tune:
        return gpu_tune.main(options, device, ["gpu", *(arguments or [])])
    return measure(options, device, ["gpu", *(arguments or [])])


def measure(options: argparse.Namespace, device: torch.device, command: Sequence[str]) -> int:
    """Measures what the options ask for, says and writes it, and returns the exit status."""
    no_liger = liger.missing()
    settings = settings_for(options, device)
    chosen = cases_for(options.shapes, options.dtypes, options.divergences, options.quick)
    methods = {
        name: contestants_for(name, device, compiled=not options.quick, with_liger=no_liger is None)
        for name in dict.fromkeys(case.objective for case in chosen)
    }
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command_line("benchmarks", command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kdkernels": kd.__version__,
        "environment": environment(device),
        "settings": {**asdict(settings), "quick": options.quick, "no_liger": no_liger},
    }
    # A run of a selection doesn't overwrite the figures of a whole one.
    whole = not (options.quick or options.shapes or options.dtypes or options.divergences)
    path = options.json or (result_path(document["environment"]["device"]) if whole else None)
    run = Run([(case, methods[case.objective]) for case in chosen], settings, document, path)
    run.measure()
    run.count_launches()
    run.save(finished=True)

    for line in notes(document):
        print(line)
    for title, head, rows, left in tables(document):
        bench.print_table(title, head, rows, left)
    if path is not None:
        print(f"written: {path} and {path.with_suffix('.md')}")
    found = targets(document["cases"], document["left_out"])
    missed = [t for t in found if t.met is False]
    undecided = [t for t in found if t.met is None and t.asked != SHOWN]
    if missed:
        print(f"{len(missed)} of {len(found)} targets missed: {'; '.join(t.name for t in missed)}")
    if undecided:
        print(f"{len(undecided)} of {len(found)} targets not measured")
    broken = [
        f"{case['dtype']} {case['objective']} {tuple(case['shape'])}: {method['problem']}"
        for case in document["cases"]
        for method in case["methods"]
        if method["family"] == "kdkernels" and method["problem"] not in (None, OUT_OF_MEMORY)
    ]
    for line in broken:
        print(f"kdkernels, {line}", file=sys.stderr)
    if broken or not document["cases"]:
        return 1
    return 1 if options.check and (missed or undecided) else 0
