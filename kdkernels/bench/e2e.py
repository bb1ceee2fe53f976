"""What distilling a language model costs from end to end, by several ways of making the loss.

For a pair of models shaped like Qwen's, Llama's and Gemma's, with random weights and the real vocabulary
(`e2e_models`), and every contestant (`e2e_methods`; other libraries' are added by who calls `run`), of a
training step's forward and backward: the teacher's forward pass without gradients, the student's, the loss,
gradients of all weights, freed before. The optimizer is left out, which is the same for all.

Whether it is right
    Loss and gradients of the head, of the last norm and of the first layer, beside the same layers with heads
    and loss in float64. A contestant that is wrong is shown as that, and not timed.
Tokens a second
    At a number of tokens that all have room for, once a round in changing order; on a CPU with glibc's
    thresholds raised, so that freed memory is kept and nobody pays for page faults, which vary from run to
    run. Rounds are spread over passes, each pair in turn in a new process. What is compared is the median,
    over a pass's rounds, of a contestant's time over ours of the same round, and what is typical of passes.
The largest number of tokens
    Before memory runs out, in steps of one sequence: the memory of the GPU, or a part of it; on a CPU
    RLIMIT_DATA, set to what the process holds after a warm-up, models included, and `memory` bytes. Each try
    is a process of its own. The first are the timed number and twice that, whose peaks say about where the
    limit is; `most`, beyond which nothing is tried, is next unless that is far below. Around the limit steps
    are doubled until one has room and one hasn't, then bisected until the two are less than a sixteenth, or
    one sequence, apart.
Peak memory
    Of each of those tries that had room, beyond the models: gradients, activations, the loss. How it grows
    with the tokens, between the fewest and the most, is given in logits: as many float32 tensors of
    tokens × vocabulary would take that.

What is expected of memory, with N tokens, V classes, d the student's width, s bytes of a weight or logit, W
weights of the student, a bytes of activations a token, and R rows at once::

    eager        W·s + N·(a + V·(2·s + 4·5))    both logits, and 5 tensors in float32 at the peak: of the KL's
                                                forward pass both log-softmaxes and 3 temporaries
    kd_loss      W·s + N·(a + 3·V·s)            of logits: both, and the gradient
    its heads    W·s + N·a + R·V·s·(1 + 1/4)    logits of R = 512 rows (4,096 on a GPU), which become their
                 + V·d·(4 + s)                  gradient, the teacher's of a quarter of them; the head's own
                                                gradient, which is then added to the embedding's

so that with float32 eager takes 7 tensors of N × V, and heads none that grows with N.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .e2e_methods import METHODS, Method
from .e2e_models import VOCABS, pair_of
from .e2e_process import ALLOWED, OUT_OF_MEMORY, Case, is_no_memory, probe_process, time_process
from .e2e_report import draw, markdown, show
from .isolated import ProcessDied, run_isolated
from .report import Progress, environment, write_json
from .timing import typical

__all__ = [
    "METHODS",
    "Method",
    "Settings",
    "draw",
    "largest",
    "markdown",
    "quick",
    "run",
    "settings_for",
    "show",
]

# Neighbouring tries at the end of a search differ by less than this part.
PRECISION = 16
PARTS = ("time", "memory")


@dataclass(frozen=True)
class Settings:
    """What is measured, on what.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: Of weights and logits: `float32`, `bfloat16` or `float16`.
        pairs: Families, of `qwen`, `llama`, `gemma`.
        tokens: At which steps are timed, and from which the search begins; whole sequences.
        length: Tokens of a sequence; the search goes by whole ones.
        rounds: Timed steps of each contestant, at least.
        passes: How many processes those are spread over.
        memory: Bytes that a step may take beyond the models; None, on a GPU only, for all of the device.
        most: Tokens beyond which nothing is tried.
        threads: Of torch on a CPU.
        only: `time` or `memory` for one part, or None for both.
        methods: Names of contestants, or None for all that are given.
        vocab: Classes in the place of the family's; for tests.
        patience: Seconds that a process may be silent before it counts as stuck.
    """

    device: str
    dtype: str
    pairs: tuple[str, ...]
    tokens: int
    length: int
    rounds: int
    memory: int | None
    most: int
    threads: int = 2
    only: str | None = None
    methods: tuple[str, ...] | None = None
    vocab: int | None = None
    patience: float = 300.0
    passes: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for what can't be measured."""
        for name, allowed in (
            ("device", ("cpu", "cuda")),
            ("dtype", tuple(ALLOWED)),
            ("only", (None, *PARTS)),
        ):
            if (got := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {got!r}")
        if unknown := [name for name in self.pairs if name not in VOCABS]:
            raise ValueError(f"pairs must be of {', '.join(VOCABS)}, got {', '.join(unknown)}")
        if self.length < 1 or self.tokens < self.length or self.tokens % self.length:
            raise ValueError(f"tokens must be whole sequences of {self.length}, got {self.tokens}")
        if self.most < self.tokens:
            raise ValueError(f"most must be >= tokens, {self.tokens}, got {self.most}")
        for name in ("rounds", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.memory is None and self.device == "cpu" and self.only != "time":
            raise ValueError("memory must be given on a CPU, whose memory is not this benchmark's to fill")


_DEFAULTS = {
    # Little memory and few tokens, so that tries are short and all of it takes minutes.
    "cpu": Settings("cpu", "float32", tuple(VOCABS), 128, 32, 12, 3 << 29, 2048, passes=4),
    "cuda": Settings("cuda", "bfloat16", tuple(VOCABS), 4096, 256, 12, None, 131_072),
}


def settings_for(device: str, **changes: Any) -> Settings:
    """The defaults of a device, with changes; one that is None is no change."""
    settings = replace(_DEFAULTS[device], threads=max(1, min(2, os.cpu_count() or 1)))
    return replace(settings, **{name: value for name, value in changes.items() if value is not None})


def quick(settings: Settings) -> Settings:
    """Less of everything: one pair, few rounds, little memory."""
    memory, tokens = 2**29 if settings.device == "cpu" else 2**33, settings.length
    return replace(
        settings, pairs=settings.pairs[:1], memory=memory, tokens=tokens, rounds=2, most=8 * tokens, passes=1
    )


def largest(
    fits: Callable[[int], bool],
    start: int,
    most: int,
    unit: int,
    guess: Callable[[], float | None] = lambda: None,
) -> int:
    """The largest multiple of `unit` up to `most` that fits, as near as a sixteenth of it; 0 if none does.

    Args:
        fits: Whether so many fit; if some do, fewer do, too.
        start: What to try first.
        most: What isn't gone beyond.
        unit: Of which all that is tried is a multiple.
        guess: Once `start` was tried, about how many fit; it costs more tries where it is wrong.
    """
    most -= most % unit
    low, high = 0, most + unit  # what fits, and what doesn't or isn't asked for

    def tried(count: int) -> bool:
        nonlocal low, high
        if fits(count):
            low = count
            return True
        high = count
        return False

    def near(count: int) -> int:
        return max(unit, int(count / PRECISION) // unit * unit)

    if tried(start):
        expected = guess() if low < most else None
        # Where that fails it does so early, at the first tensor that has no room.
        if low < most and (expected is None or 2 * expected > most) and tried(most):
            return most
        step = low if expected is None else near(low)
        if expected is not None:
            # A bit less than it says, which is where the answer will be.
            middle = int(expected * (1 - 1 / (2 * PRECISION))) // unit * unit
            if low < middle < high:
                step = near(middle)
                if not tried(middle):
                    while high - step > low and not tried(high - step):
                        step *= 2
                    step = 0
        while step and (further := min(low + step, most)) < high and further > low and tried(further):
            step *= 2
    else:
        while low == 0 and high > unit:
            tried(max(unit, high // 2 // unit * unit))
    while low and high - low > near(low):
        tried((low + high) // 2 // unit * unit)
    return low


def _of_time(
    case: Case,
    methods: Sequence[Method],
    settings: Settings,
    preload: Sequence[str],
    progress: Progress,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """What passes have found and one more; a contestant that ends the process is left out and named."""
    if before is not None:
        methods = [method for method in methods if method.name in before["seconds"]]
    died: dict[str, str] = {}
    family, why = case.pair.family, "against float64" if before is None else "once more"
    while True:
        trying: list[str | None] = [None]

        def hear(message: Any, trying: list[str | None] = trying) -> None:
            if message[0] == "trying":
                trying[0] = message[1]
                if message[1] is not None:
                    progress.step(f"{family}: {message[1]}, {why}")
            else:
                progress.step(f"{family}: round {message[1]}")

        left = [method for method in methods if method.name not in died]
        try:
            found: dict[str, Any] = run_isolated(
                time_process, case, left, settings.tokens, _rounds(settings), before is None,
                on_message=hear, preload=preload, patience=settings.patience,
            )  # fmt: skip
        except ProcessDied as error:
            if trying[0] is None:
                raise
            died[trying[0]] = f"error: {_last_line(str(error))}"
            continue
        found["problems"] |= died
        return found if before is None else _joined(before, found)


def _rounds(settings: Settings) -> int:
    """Of a pass."""
    return math.ceil(settings.rounds / settings.passes)


def _joined(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What passes have found and one more, of those that failed in none."""
    cpus = [each["other_cpus"] for each in (before, found)]
    return {
        **before,
        "problems": before["problems"] | found["problems"],
        "seconds": {name: [*before["seconds"][name], *more] for name, more in found["seconds"].items()},
        "other_cpus": None if None in cpus else max(cpus),
    }


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200]


def _of_memory(
    case: Case, method: Method, settings: Settings, preload: Sequence[str], say: Callable[[str, int], None]
) -> dict[str, Any]:
    """The largest number of tokens, and all that was tried: tokens, whether there was room, peak bytes."""
    tries: list[dict[str, Any]] = []

    def fits(count: int) -> bool:
        if count in (known := {each["tokens"]: each["fits"] for each in tries}):
            return bool(known[count])
        say(f"{method.name}, {count:,} tokens", 0)
        found = probe(case, method, count, settings, preload)
        tries.append({"tokens": count, **found})
        return bool(found["fits"])

    def guess() -> float | None:
        """Where a line through the peaks of few tokens and of twice as many meets the limit."""
        few, many = settings.tokens, 2 * settings.tokens
        if settings.memory is None or many >= settings.most or not fits(many):
            return None
        peaks = {each["tokens"]: each["peak"] for each in tries}
        if not peaks[few] or not peaks[many] or peaks[many] <= peaks[few]:
            return None
        return few + (settings.memory - peaks[few]) * (many - few) / float(peaks[many] - peaks[few])

    try:
        tokens = largest(fits, settings.tokens, settings.most, settings.length, guess)
    except ProcessDied as error:
        return {"tokens": None, "problem": f"error: {_last_line(str(error))}", "tries": tries}
    return {
        "tokens": tokens, "capped": tokens == settings.most - settings.most % settings.length, "tries": tries
    }  # fmt: skip


def _search(
    cases: Sequence[Case],
    pairs: Sequence[dict[str, Any]],
    methods: Sequence[Method],
    settings: Settings,
    preload: Sequence[str],
    progress: Progress,
) -> None:
    """Fills in `memory` of each pair for the contestants that its times don't say to be wrong."""
    jobs = []
    for case, found in zip(cases, pairs, strict=True):
        wrong = (found["time"] or {}).get("problems", {})
        right = [method for method in methods if wrong.get(method.name, OUT_OF_MEMORY) == OUT_OF_MEMORY]
        found["memory"] = {}
        jobs += [(case, method, found) for method in right]
    # Nothing is timed here: on a CPU, whose limit is of a process, several search at once.
    at_once = max(1, os.cpu_count() or 1) if settings.device == "cpu" else 1

    def search(job: tuple[Case, Method, Any]) -> dict[str, Any]:
        case, method, _ = job
        alone = case if at_once == 1 else replace(case, threads=1)

        def say(text: str, count: int) -> None:
            progress.step(f"{case.pair.family}: {text}", count)

        return _of_memory(alone, method, settings, preload, say)

    with progress.phase("memory", len(jobs)), ThreadPoolExecutor(at_once) as pool:
        for (case, method, found), of_it in zip(jobs, pool.map(search, jobs), strict=True):
            of_it["growth"] = _growth(of_it["tries"], case.pair.vocab)
            found["memory"][method.name] = of_it
            progress.step(f"{case.pair.family}: {method.name}")


def probe(
    case: Case, method: Method, count: int, settings: Settings, preload: Sequence[str] = ()
) -> dict[str, Any]:
    """A step on so many tokens in a process of its own: `fits`, `peak` in bytes, or `says`, why it doesn't.

    Raises:
        ProcessDied: For another reason than memory; also where a process was ended and nothing said why.
    """
    handle, said = tempfile.mkstemp(suffix=".txt")
    os.close(handle)
    try:
        found: dict[str, Any] = run_isolated(
            probe_process, case, method, count, settings.memory, said,
            preload=preload, patience=settings.patience,
        )  # fmt: skip
        return found
    except ProcessDied as error:
        text = Path(said).read_text(errors="replace")
        # One that raised has told of itself: what it wrote besides, a warning perhaps, isn't the reason.
        if "ended with exit code" in str(error) and is_no_memory(text):
            return {"fits": False, "peak": None, "says": _last_line(text)}
        raise
    finally:
        os.unlink(said)


def _growth(tries: Sequence[dict[str, Any]], vocab: int) -> float | None:
    """By how many float32 tensors of tokens × vocabulary the peak grows with the tokens."""
    peaks = {each["tokens"]: each["peak"] for each in tries if each["fits"] and each["peak"] is not None}
    if len(peaks) < 2:
        return None
    few, many = min(peaks), max(peaks)
    return (peaks[many] - peaks[few]) / (many - few) / (4 * vocab)


def run(
    settings: Settings,
    contestants: Sequence[Method] = METHODS,
    progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measures, and returns all of it as a JSON object that `markdown`, `draw` and `show` take.

    Args:
        settings: What to measure.
        contestants: One of them is `ours`; those that can't run here are listed with the reason.
        progress: Told how far it is.
        command: What to type to run this again, for the report.

    Returns:
        The document.

    Raises:
        ValueError: No GPU where one is asked for, an unknown contestant.
        ProcessDied: Times of a pair could not be measured, by no fault of a contestant that is known.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' needs a GPU, and torch sees none")
    names = [method.name for method in contestants]
    if settings.methods is not None and (unknown := set(settings.methods) - set(names)):
        raise ValueError(f"methods must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    wanted = [m for m in contestants if settings.methods is None or m.name in settings.methods]
    progress = progress or Progress()
    reasons = {method.name: method.why_not(settings.device) for method in wanted}
    methods = [method for method in wanted if reasons[method.name] is None]
    started = time.perf_counter()
    document: dict[str, Any] = {
        "schema": 1,
        "command": command,
        "finished": "",
        "kdkernels": __version__,
        "versions": _versions(methods),
        "environment": environment(torch.device(settings.device), settings.threads),
        "settings": asdict(settings),
        "contestants": {method.name: method.says for method in wanted},
        "ours": next((method.name for method in wanted if method.ours), None),
        "missing": {name: why for name, why in reasons.items() if why is not None},
        "pairs": [],
        "seconds": {},
    }
    if not methods:
        return document
    imported = preload(methods, settings)
    cases = [
        Case(pair_of(family, settings.device, settings.vocab), settings.device, settings.dtype,
             settings.threads, settings.length)
        for family in settings.pairs
    ]  # fmt: skip
    document["pairs"] = [{**asdict(case.pair), "time": None, "memory": None} for case in cases]
    if settings.only in (None, "time"):
        steps = len(cases) * settings.passes * (len(methods) + _rounds(settings))
        with progress.phase("times", steps):
            for _ in range(settings.passes):
                for case, found in zip(cases, document["pairs"], strict=True):
                    found["time"] = _of_time(case, methods, settings, imported, progress, found["time"])
        for found in document["pairs"]:
            of_passes = _ratios(found["time"]["seconds"], document["ours"], _rounds(settings))
            found["time"]["pass_ratios"] = of_passes
            found["time"]["ratios"] = {name: typical(each) for name, each in of_passes.items()}
    if settings.only in (None, "memory"):
        _search(cases, document["pairs"], methods, settings, imported, progress)
    document["seconds"] = {**progress.seconds, "all": time.perf_counter() - started}
    document["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return document


def write(document: dict[str, Any], folder: Path, name: str = "e2e") -> int:
    """Prints the tables and writes JSON, Markdown and the picture.

    Args:
        document: Of `run`.
        folder: Where to.
        name: Of the files, without their endings.

    Returns:
        An exit status: 1 where a contestant was wrong or failed for another reason than memory, or none ran.
    """
    show(document)
    path, text = folder / f"{name}.json", folder / f"{name}.md"
    write_json(path, document)
    text.write_text(markdown(document), encoding="utf-8")
    written = [path, text, *draw(document, folder, name)]
    print(f"written: {', '.join(map(str, written))}")
    return 1 if not document["pairs"] or any(failures(document)) else 0


def failures(document: dict[str, Any]) -> Iterator[str]:
    """What went wrong, other than that there was no memory."""
    for pair in document["pairs"]:
        problems = dict((pair["time"] or {}).get("problems", {}))
        problems |= {n: m["problem"] for n, m in (pair["memory"] or {}).items() if m["tokens"] is None}
        for name, problem in problems.items():
            if problem != OUT_OF_MEMORY:
                yield f"{pair['family']}, {name}: {problem}"


def _ratios(seconds: dict[str, Sequence[float]], ours: str | None, rounds: int) -> dict[str, list[float]]:
    """For each pass of so many rounds the median of a contestant's times over ours of the same rounds."""
    if ours is None or ours not in seconds:
        return {}
    found = {}
    for name, times in seconds.items():
        each = [a / b for a, b in zip(times, seconds[ours], strict=True)]
        found[name] = [statistics.median(each[i : i + rounds]) for i in range(0, len(each), rounds)]
    return found


def _versions(methods: Sequence[Method]) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in ("transformers", *(name for method in methods for name in method.packages)):
        found |= Method("", lambda *_: torch.empty(0), "", (package,)).versions()
    return found


_MODELING = {"qwen": "qwen3", "llama": "llama", "gemma": "gemma3"}


def preload(methods: Sequence[Method], settings: Settings) -> list[str]:
    """What the server of processes imports, so that none of them has to."""
    modeling = [
        f"transformers.models.{_MODELING[name]}.modeling_{_MODELING[name]}" for name in settings.pairs
    ]
    needed = [module for method in methods for module in (*method.modules, method.loss.__module__)]
    return list(
        dict.fromkeys(
            ["torch", *modeling, "kdkernels.bench.e2e_process", *needed, "kdkernels.bench.compiler"]
        )
    )
