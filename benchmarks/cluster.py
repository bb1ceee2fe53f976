"""``python -m benchmarks cluster``: the CUDA kernel beside Triton's, forward + backward, on large logits.

Needs a GPU whose blocks form clusters, of compute capability 9.0 or later. Both backends of a case are
compared with fp64 on the device, then timed by device events, interleaved round by round with a large copy,
whose bandwidth is their ceiling. Kernels are compiled beforehand, several at a time. All runs in a process of
its own: a kernel that crashes or hangs there is named and left out, and the others go on in a new one.
Figures are written after every case.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks import gpu
from benchmarks.cases import DTYPES, OUT_OF_MEMORY, Case, Inputs, Verdict, failure, last_line, shape, verdict
from benchmarks.cluster_report import BACKENDS, markdown, notes, summary, tables, targets
from benchmarks.divergences import OBJECTIVES
from benchmarks.gpu_harness import (
    ELEMENTS,
    SCHEMA,
    DeviceInputs,
    environment,
    figures,
    make_inputs,
    race_those_that_can,
    release,
)
from benchmarks.logits_report import SHOWN
from kdkernels import bench, tuning
from kdkernels.backends import cuda_ahead, cuda_build
from kdkernels.bench import roofline
from kdkernels.bench.report import command_line
from kdkernels.bench.timing import Clock

Send = Callable[[Any], None]
Run = Callable[[int], tuple[Tensor, Tensor]]

# Llama's vocabulary, Gemma's, which takes a larger cluster, and one whose rows a single block holds.
SHAPES = ((8192, 128256), (4096, 262144), (16384, 32000))
DIVERGENCES = ("forward_kl", "tvd", "jsd(0.5)", "skew_kl(0.1)")
UNLABELLED = [name for name in OBJECTIVES if name not in ("dkd(1, 8)", "binary_kl + hard")]
QUICK = ((512, 32000),)
# A step so small that launching it is all that it costs.
HOST = Case(16, 1000, "bfloat16", "forward_kl")
HOST_ROUNDS = 300

# Seconds without a word after which a kernel counts as stuck; what is compiled meanwhile says that it is.
PATIENCE = 25.0
COMPILING = 90.0  # in all
# What a kernel is tried on: as divisible as the shapes that are measured, so that Triton builds no other.
FEW_ROWS = 16
# Where both sides are this close, in nats, rounding decides the sign of what TVD has in its gradient.
TIED = 2e-5


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run, and travels to its process.

    Attributes:
        device: What to measure.
        seconds: When they are over, no further case is begun.
        min_rounds: Of every case.
        max_seconds: Of a case's rounds, after which fewer will do.
        copy_bytes: Of the copy.
        ahead: Whether kernels are compiled before the first case.
        backends: What `kd_loss` is given for each contestant.
    """

    device: str
    seconds: float
    min_rounds: int
    max_seconds: float
    copy_bytes: int
    ahead: bool = True
    backends: dict[str, str] = field(default_factory=lambda: {name: name for name in BACKENDS})


# What is measured


def loss_of(case: Case, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`kd_loss` of a case by a backend."""
    options = OBJECTIVES[case.objective].options
    return lambda z, v, labels: kd.kd_loss(z, v, backend=backend, **options)


def compare(
    found: dict[str, tuple[Tensor, Tensor]], inputs: Inputs, case: Case, elements: int = ELEMENTS
) -> dict[str, Verdict]:
    """Losses and gradients of every row beside fp64, whose autograd takes some rows at a time."""
    z, v = inputs.sets[0]
    factor = 1.0 if inputs.upstream is None else inputs.upstream.item()
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    worst = {name: total.clone() for name in found}
    at_once = max(1, elements // case.vocab)
    for start in range(0, case.rows, at_once):
        part = slice(start, start + at_once)
        student, teacher = z[part].detach().double().requires_grad_(), v[part].double()
        loss = OBJECTIVES[case.objective].eager(student, teacher, inputs.labels[part], teacher)
        loss = loss * (len(student) / case.rows)
        (wanted,) = torch.autograd.grad(loss, student)
        total += loss.detach()
        tied = None
        if case.objective == "tvd":
            lq, lp = (F.log_softmax(x.detach(), -1) for x in (student, teacher))
            tied = (lq - lp).abs() < TIED
        for name, (_, gradient) in found.items():
            off = (gradient[part].double() / factor - wanted).abs()
            if tied is not None:
                off.masked_fill_(tied, 0.0)
            # maximum and amax keep a NaN.
            worst[name] = torch.maximum(worst[name], (off.amax(-1) / wanted.abs().amax(-1)).amax())
    return {
        name: verdict(((value.double() - total) / total).abs().item(), worst[name].item(), case.dtype)
        for name, (value, _) in found.items()
    }


@contextlib.contextmanager
def configs() -> Iterator[list[tuple[int, tuning.CudaConfig]]]:
    """How many arguments each call of `tuning.cuda` had, and what it said, while this lasts."""
    original, said = tuning.cuda, []  # type: Any, list[tuple[int, tuning.CudaConfig]]

    @functools.wraps(original)
    def remembered(*args: Any, **options: Any) -> Any:
        config = original(*args, **options)
        if config is not None:
            said.append((len(args) + len(options), config))
        return config

    # The backend asks once for calls that are alike.
    from kdkernels.backends.cuda import BACKEND

    getattr(BACKEND, "_ready", {}).clear()
    tuning.cuda = remembered  # type: ignore[assignment]
    try:
        yield said
    finally:
        tuning.cuda = original


def right_ones(
    case: Case,
    inputs: Inputs,
    settings: Settings,
    banned: dict[str, str],
    now: Callable[[str | None], None],
) -> tuple[dict[str, Run], dict[str, Verdict], dict[str, Any] | None]:
    """The contestants that agree with fp64, what is said of all, and how the CUDA kernel shares out a row."""
    device = torch.device(settings.device)
    verdicts, runs, found = {}, {}, {}  # type: dict[str, Verdict], dict[str, Run], dict[str, Any]
    said: list[tuple[int, tuning.CudaConfig]] = []
    for name, backend in settings.backends.items():
        if name in banned:
            verdicts[name] = Verdict(None, None, banned[name])
            continue
        now(name)
        runs[name] = inputs.step(loss_of(case, backend))
        try:
            with configs() as asked:
                found[name] = runs[name](0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            said = asked if name == "cuda" else said
        except Exception as raised:
            found.pop(name, None)
            verdicts[name] = Verdict(None, None, failure(raised))
            # Raises where the device is broken for this process.
            release(device)
    try:
        now("fp64")
        verdicts |= compare(found, inputs, case) if found else {}
    except Exception as raised:
        verdicts |= {name: Verdict(None, None, f"fp64: {failure(raised)}") for name in found}
    found.clear()
    release(device)
    # Whether rows fit at all is asked with fewer arguments than how a build shares them out.
    most = max((count for count, _ in said), default=0)
    config = next((asdict(config) for count, config in reversed(said) if count == most), None)
    return {n: run for n, run in runs.items() if verdicts[n].problem is None}, verdicts, config


def measure_case(
    case: Case,
    inputs: Inputs,
    ceiling: bench.Contestant,
    clock: Clock,
    settings: Settings,
    *,
    banned: dict[str, str] | None = None,
    now: Callable[[str | None], None] = lambda name: None,
) -> dict[str, Any]:
    """Errors and times of both backends in one case, and the copy beside them, as a JSON object."""
    runs, verdicts, config = right_ones(case, inputs, settings, banned or {}, now)
    now(None)
    timings, problems = race_those_that_can(
        [*(bench.Contestant(name, run) for name, run in runs.items()), ceiling],
        torch.device(settings.device),
        sets=len(inputs.sets),
        clock=clock,
        min_rounds=settings.min_rounds,
        max_seconds=settings.max_seconds,
        warmup=2,
        on_round=lambda number: now(None),
    )
    copy = figures(timings.get(ceiling.name), 2 * settings.copy_bytes)
    bandwidth = None if copy is None else copy["gb_per_s"]
    methods = {
        name: {
            "loss_error": verdicts[name].loss_error,
            "gradient_error": verdicts[name].gradient_error,
            "problem": verdicts[name].problem or problems.get(name),
            "times": figures(timings.get(name), case.traffic_bytes, bandwidth),
        }
        for name in settings.backends
    }
    return describe(case) | {
        "traffic_bytes": case.traffic_bytes,
        "input_sets": len(inputs.sets),
        "copy": copy,
        "config": config,
        "methods": methods,
    }


def measure_host(
    case: Case,
    inputs: Inputs,
    settings: Settings,
    *,
    banned: dict[str, str] | None = None,
    now: Callable[[str | None], None] = lambda name: None,
    rounds: int = HOST_ROUNDS,
) -> dict[str, Any]:
    """Microseconds that the host is busy with a forward that has a gradient, and with a whole step."""
    runs, verdicts, config = right_ones(case, inputs, settings, banned or {}, now)
    device, problems = torch.device(settings.device), dict[str, str]()
    losses = {name: loss_of(case, settings.backends[name]) for name in runs}
    z, v = inputs.sets[0]
    calls: list[tuple[str, str, Callable[[], Any]]] = []
    for name in runs:
        calls.append((name, "forward_us", functools.partial(losses[name], z, v, inputs.labels)))
        calls.append((name, "step_us", functools.partial(runs[name], 0)))
    taken: dict[tuple[str, str], list[float]] = {(name, what): [] for name, what, _ in calls}
    order = random.Random(0)
    for number in range(-10, rounds):
        order.shuffle(calls)
        for name, what, call in calls:
            if name in problems:
                continue
            if number % 50 == 0:
                now(name)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            try:
                call()
            except Exception as raised:
                problems[name] = failure(raised)
                now(name)
                release(device)
                continue
            if number >= 0:
                taken[name, what].append(1e6 * (time.perf_counter() - begin))
    methods: dict[str, Any] = {}
    for name in settings.backends:
        methods[name] = asdict(verdicts[name]) | {"forward_us": None, "step_us": None}
        methods[name]["problem"] = verdicts[name].problem or problems.get(name)
        if methods[name]["problem"] is None:
            for what in ("forward_us", "step_us"):
                methods[name][what] = statistics.median(taken[name, what])
    return describe(case) | {"config": config, "methods": methods}


def describe(case: Case) -> dict[str, Any]:
    """A case in the document."""
    return {"shape": [case.rows, case.vocab], "dtype": case.dtype, "objective": case.objective}


# What is compiled


def jobs(plan: Sequence[Case], settings: Settings) -> dict[str, Callable[[], object]]:
    """What to compile, each for a thread of its own: code of the CUDA kernels, and a try of Triton's.

    Triton builds one kernel for many vocabularies, and so tries those of one divergence one after another.
    """
    found: dict[str, Callable[[], object]] = {}
    arch = cuda_ahead.architecture_here()
    tried: dict[str, list[Case]] = {}
    for case in plan:
        of = ", (16, 1000)" if case == HOST else ""
        tried.setdefault(f"triton {case.objective} {case.dtype}{of}", []).append(case)
    for name, cases in tried.items():
        few = list(dict.fromkeys(replace(case, rows=FEW_ROWS) for case in cases))
        found[name] = functools.partial(_try, few, settings)
    if arch is None:
        return found
    for case in plan:
        divergence = OBJECTIVES[case.objective].options["divergence"]
        name = divergence if isinstance(divergence, str) else divergence.name
        try:
            builds = cuda_ahead.builds(arch, case.vocab, DTYPES[case.dtype], name)
        except ValueError:
            continue  # which the case will say
        for build in builds:
            if not isinstance(build, cuda_build.Build) or _runs(build, case):
                found.setdefault(f"cuda {build}", functools.partial(_compile, build, arch))
    return found


def _runs(build: cuda_build.Build, case: Case) -> bool:
    """Whether a case launches a build: there are no labels, and of float16 the loss is computed first."""
    return build.hard == "kNoHard" and (build.mode != "kLoss" or case.dtype == "float16")


def _compile(build: cuda_build.AnyBuild, arch: str) -> object:
    return cuda_build.cubin(build.unit(), arch)


def _try(cases: Sequence[Case], settings: Settings) -> None:
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # gives a new thread its context
    for case in cases:
        inputs = DeviceInputs(case.rows, case.vocab, case.dtype, device, 1)
        inputs.step(loss_of(case, settings.backends["triton"]))(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_all(plan: Sequence[Case], settings: Settings, send: Send) -> None:
    """Compiles what a plan needs; what can't be is said, and tried again by its case."""
    begin, seconds = time.perf_counter(), dict[str, float]()

    def timed(job: Callable[[], object]) -> float:
        started = time.perf_counter()
        job()
        return time.perf_counter() - started

    if settings.device.startswith("cuda"):
        # What threads would else make each for itself.
        with contextlib.suppress(Exception):
            importlib.import_module("kdkernels.backends.triton_launch")
            importlib.import_module("triton").runtime.driver.active.get_current_target()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        running = {pool.submit(timed, job): name for name, job in jobs(plan, settings).items()}
        while running and time.perf_counter() - begin < COMPILING:
            done, _ = wait(running, timeout=2.0, return_when=FIRST_COMPLETED)
            for future in done:
                name = running.pop(future)
                error = future.exception()
                if error is None:
                    seconds[name] = future.result()
                else:
                    send(("said", f"{name}: not built beforehand: {failure(error)}", None))
            send(("building", len(running), None))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    send(("built", seconds, time.perf_counter() - begin))


def measure_process(
    send: Send, plan: list[Case], settings: Settings, banned: dict[tuple[Case, str], str]
) -> None:
    """Compiles, and measures the cases of a plan as long as there is time, and sends each as it is done."""
    deadline = time.perf_counter() + settings.seconds
    warnings.simplefilter("ignore", UserWarning)
    device = torch.device(settings.device)
    send(("building", None, None))
    clock, ceiling = bench.clock_for(device), bench.copy(settings.copy_bytes, device)
    if settings.ahead:
        build_all(plan, settings, send)
        release(device)
    inputs, made_for = None, None
    for case in plan:
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
        options: dict[str, Any] = {
            "banned": {name: why for (of, name), why in banned.items() if of == case},
            "now": lambda name, case=case: send(("now", case, name)),
        }
        try:
            if case == HOST:
                result = measure_host(case, inputs, settings, **options)
            else:
                result = measure_case(case, inputs, ceiling, clock, settings, **options)
        except Exception as raised:
            release(device)  # raises where the device is broken, and so names who was at work
            send(("left out", case, failure(raised)))
        else:
            send(("case", case, result | {"seconds": time.perf_counter() - started}))


# The parent's side


class Cluster:
    """Starts the processes, collects what they send, and writes it down."""

    def __init__(
        self, plan: list[Case], settings: Settings, document: dict[str, Any], path: Path | None
    ) -> None:
        self.plan, self.settings, self.document, self.path = plan, settings, document, path
        self.results: dict[Case, dict[str, Any]] = {}
        self.left_out: dict[Case, str] = {}
        self.stopped: list[str] = []
        self.builds: dict[str, float] = {}
        self.built_seconds: float | None = None
        self.at: tuple[Any, str | None] | None = None
        self.progress = bench.Progress()
        self.started = time.perf_counter()

    def receive(self, message: tuple[Any, Any, Any]) -> None:
        """One message of the process."""
        kind, first, second = message
        if kind in ("now", "building"):
            self.at = (first, second) if kind == "now" else ("building", None)
        elif kind in ("case", "left out"):
            self.at = None
        if kind == "now":
            self.progress.step(f"{first} {second or ''}", 0)
        elif kind == "building":
            self.progress.step("compiling" if first is None else f"{first} kernels to compile", 0)
        elif kind == "built":
            self.builds, self.built_seconds = {**self.builds, **first}, second
            self.progress.say(f"  compiled in {second:.1f} s, one by one {sum(first.values()):.1f} s")
        elif kind == "said":
            self.stopped.append(first)
            self.progress.say(f"  {first}")
        elif kind == "left out":
            self.left_out[first] = second
            self.progress.step(str(first))
            self.progress.say(f"  {first}: {second}")
            self.save()
        else:
            self.results[first] = second
            self.progress.step(str(first))
            self.progress.say(summary(second))
            self.save()

    def measure(self) -> None:
        """All the cases there is time for; a process that dies is followed by one without the culprit."""
        banned: dict[tuple[Case, str], str] = {}
        settings = self.settings
        with self.progress.phase("measuring", len(self.plan)):
            while True:
                todo = [c for c in self.plan if c not in self.results and c not in self.left_out]
                seconds = self.settings.seconds - (time.perf_counter() - self.started)
                if not todo or seconds <= 0:
                    break
                self.at = None
                settings = replace(settings, seconds=seconds)
                try:
                    bench.run_isolated(
                        measure_process,
                        todo,
                        settings,
                        banned,
                        on_message=self.receive,
                        preload=("torch", "benchmarks.cluster"),
                        patience=PATIENCE,
                    )
                except bench.ProcessDied as error:
                    why = f"failed: {last_line(str(error))}"
                    if self.at is None:
                        self._stop(f"At the start: {why}")
                        break
                    case, name = self.at
                    if case == "building":
                        self._stop(f"Compiling: {why}")
                        if not settings.ahead:
                            break
                        settings = replace(settings, ahead=False)
                        continue
                    self._stop(f"{case}{f', {name}' if name else ''}: {why}")
                    # Nobody in particular: without the newer kernel first.
                    open_ = [n for n in self.settings.backends if (case, n) not in banned]
                    culprit = name if name in open_ else None if name == "fp64" else next(iter(open_), None)
                    if culprit is None:
                        self.left_out[case] = why
                    else:
                        banned[case, culprit] = why
                    # What was compiled is kept on the disk.
                    settings = replace(settings, ahead=False)
                else:
                    break
        for case in self.plan:
            if case not in self.results:
                self.left_out.setdefault(case, "the time was up")

    def _stop(self, line: str) -> None:
        self.stopped.append(line)
        self.progress.say(f"  {line}")

    def save(self, finished: bool = False) -> None:
        """Completes the document with what there is, and writes it."""
        results = [(case, self.results[case]) for case in self.plan if case in self.results]
        self.document |= {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if finished else None,
            "seconds": time.perf_counter() - self.started,
            "built_seconds": self.built_seconds,
            "builds_s": self.builds,
            "stopped": self.stopped,
            "cases": [result for case, result in results if case != HOST],
            "host": self.results.get(HOST),
            "left_out": [describe(c) | {"why": self.left_out[c]} for c in self.plan if c in self.left_out],
        }
        self.document["targets"] = [asdict(t) for t in targets(self.document)]
        if self.path is not None:
            bench.write_json(self.path, self.document)
            self.path.with_suffix(".md").write_text(markdown(self.document), encoding="utf-8")


def cases_for(options: argparse.Namespace) -> list[Case]:
    """What to measure, in the order in which it is: launches first, then shape by shape."""
    shapes = options.shapes or (QUICK if options.quick else SHAPES)
    names = options.divergences or (DIVERGENCES[:1] if options.quick else DIVERGENCES)
    chosen = [
        Case(*of, dtype, name) for of in shapes for dtype in options.dtypes or ("bfloat16",) for name in names
    ]
    return list(dict.fromkeys([HOST, *chosen]))


def settings_for(options: argparse.Namespace, device: torch.device) -> Settings:
    """The settings of a run; the copy is 1 GiB, or a sixteenth of what is free."""
    copy_bytes = min(2**30, (roofline.free_bytes(device) or 2**34) // 16)
    rounds = 10 if options.quick else 40
    return Settings(str(device), options.seconds, rounds, 2.0, copy_bytes)


def why_not() -> str | None:
    """Why there is nothing to measure here, and what to do; None where there is."""
    why = gpu.why_not()
    if why is not None:
        return why
    logits = torch.zeros(1, 2, device="cuda")
    reason = kd.explain(logits, logits).reasons["cuda"]
    if reason is not None:
        return f"backend='cuda' {reason}. 'python -m benchmarks gpu' measures the Triton kernels"
    return None


def result_path(device_name: str) -> Path:
    """Where a whole run on a device is written."""
    return gpu.RESULTS / f"cluster-{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks cluster", description=__doc__)
    listed = " ".join(f"{n}x{v}" for n, v in SHAPES)
    p.add_argument("--shapes", nargs="+", type=shape, metavar="ROWSxVOCAB", help=f"default: {listed}")
    p.add_argument("--divergences", nargs="+", choices=UNLABELLED, help=f"default: {' '.join(DIVERGENCES)}")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: bfloat16")
    p.add_argument(
        "--seconds",
        type=gpu._seconds,
        default=60.0,
        help="no case is begun after that; what was left out is listed; default %(default).0f",
    )
    p.add_argument(
        "--json", type=Path, metavar="PATH", help="where to write the figures; a .md is written beside it"
    )
    p.add_argument("--quick", action="store_true", help="seconds: 512x32000, forward KL")
    p.add_argument("--check", action="store_true", help="exit with 1 if a target is missed or not measured")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 2 where the CUDA kernel can't run, 1 where it is wrong or nothing was measured."""
    options = parser().parse_args(arguments)
    why = why_not()
    if why is not None:
        print(f"python -m benchmarks cluster: {why}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", flush=True)
    return measure(
        options, settings_for(options, device), environment(device), ["cluster", *(arguments or [])]
    )


def measure(
    options: argparse.Namespace, settings: Settings, found: dict[str, Any], command: Sequence[str]
) -> int:
    """Measures what the options ask for, says and writes it, and returns the exit status."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command_line("benchmarks", command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kdkernels": kd.__version__,
        "environment": found
        | {name: cuda_build.version_of(name) for name in ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")},
        "settings": {**asdict(settings), "quick": options.quick},
    }
    # A run of a selection doesn't overwrite the figures of a whole one.
    whole = not (options.quick or options.shapes or options.dtypes or options.divergences)
    path = options.json or (result_path(found["device"]) if whole else None)
    run = Cluster(cases_for(options), settings, document, path)
    run.measure()
    run.save(finished=True)

    for line in notes(document):
        print(line)
    for title, head, rows, left in tables(document):
        bench.print_table(title, head, rows, left)
    if path is not None:
        print(f"written: {path} and {path.with_suffix('.md')}")
    decided = targets(document)
    missed = [t for t in decided if t.met is False]
    undecided = [t for t in decided if t.met is None and t.asked != SHOWN]
    if missed:
        names = "; ".join(f"{t.name}, {t.where}" for t in missed)
        print(f"{len(missed)} of {len(decided)} targets missed: {names}")
    if undecided:
        print(f"{len(undecided)} of {len(decided)} targets not measured")
    results = [*document["cases"], *([document["host"]] if document["host"] else [])]
    broken = [r for r in results if r["methods"]["cuda"]["problem"] not in (None, OUT_OF_MEMORY)]
    if broken or not results:
        return 1
    return 1 if options.check and (missed or undecided) else 0
