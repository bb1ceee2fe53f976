"""``python -m benchmarks divergences``: every divergence, noise and a mixture, forward + backward, on logits.

Each is timed beside the triad, the eager loss and `torch.compile` of it, interleaved in one process, once it
is right against fp64; `kd_loss` with noise beside the same call without, and beside an eager loss whose noise
was drawn before the clock ran. Peak memory is taken in a process of its own for each.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import DTYPES, shape
from benchmarks.logits_report import BUSY
from kdkernels import bench
from kdkernels.bench import roofline
from kdkernels.bench.report import command_line

RESULTS = Path(__file__).parent / "results"
SHAPES = {"cpu": (64, 128256), "cuda": (1024, 128256)}
SIGMA = 0.5
SHARE = 0.30  # of triad, for every divergence
NOISE = 2.5  # times the same call without it
MEMORY = 1.15  # gradient tensors, scratch of the threads included
# Errors of loss and gradient, relative to the loss and to the row's largest entry: in bfloat16 one rounding.
ALLOWED = {"float32": (5e-5, 2e-4), "bfloat16": (5e-5, 2**-8)}

# A loss as its user writes it: of student and teacher logits, class labels and targets in [0, 1].
Eager = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _logs(z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return F.log_softmax(z, -1), F.log_softmax(v, -1)


def _mean(terms: Tensor) -> Tensor:
    return terms.sum(-1).mean()


def _forward_kl(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    lq, lp = _logs(z, v)
    return F.kl_div(lq, lp, reduction="batchmean", log_target=True)


def _soft_cross_entropy(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return F.cross_entropy(z, F.softmax(v, -1))


def _reverse_kl(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    lq, lp = _logs(z, v)
    return F.kl_div(lp, lq, reduction="batchmean", log_target=True)


def _jsd(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    lq, lp = _logs(z, v)
    lm = torch.logaddexp(lq, lp) - math.log(2)
    return _mean(0.5 * (lp.exp() * (lp - lm) + lq.exp() * (lq - lm)))


def _skew_kl(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    lq, lp = _logs(z, v)
    lm = torch.logaddexp(lp + math.log(0.1), lq + math.log(0.9))
    return _mean(lp.exp() * (lp - lm))


def _skew_reverse_kl(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    lq, lp = _logs(z, v)
    lm = torch.logaddexp(lp + math.log(0.9), lq + math.log(0.1))
    return _mean(lq.exp() * (lq - lm))


def _tvd(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return _mean(0.5 * (F.softmax(z, -1) - F.softmax(v, -1)).abs())


def _squared_error(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return _mean(0.5 * (F.softmax(z, -1) - F.softmax(v, -1)) ** 2)


def _alpha_beta(a: float, b: float) -> Eager:
    def loss(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        lq, lp = _logs(z, v)
        sums = a / (a + b) * ((a + b) * lp).exp() + b / (a + b) * ((a + b) * lq).exp()
        return _mean((sums - (a * lp + b * lq).exp()) / (a * b))

    return loss


def _alpha_0(b: float) -> Eager:
    def loss(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        lq, lp = _logs(z, v)
        return _mean((b * lq).exp() * b * (lq - lp) - (b * lq).exp() + (b * lp).exp()) / (b * b)

    return loss


def _logit_mse(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(z, v, reduction="sum") / len(z)


def _centered_logit_mse(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return _logit_mse(z - z.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True))


def _dkd(z: Tensor, v: Tensor, labels: Tensor, _: Tensor) -> Tensor:
    column = labels[:, None]
    q, p = F.softmax(z, -1).gather(1, column), F.softmax(v, -1).gather(1, column)
    two = [torch.cat([x, 1 - x], -1) for x in (q, p)]
    tckd = (two[1] * (two[1].log() - two[0].log())).sum(-1)
    lq, lp = _logs(*(x.scatter(1, column, -1e9) for x in (z, v)))
    return (tckd + 8 * (lp.exp() * (lp - lq)).sum(-1)).mean()


def _binary_kl(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    p = v.sigmoid()
    return _mean(p * (F.logsigmoid(v) - F.logsigmoid(z)) + (1 - p) * (F.logsigmoid(-v) - F.logsigmoid(-z)))


def _binary_kl_hard(z: Tensor, v: Tensor, _: Tensor, targets: Tensor) -> Tensor:
    hard = F.binary_cross_entropy_with_logits(z, targets, reduction="sum") / len(z)
    return _binary_kl(z, v) + 0.1 * hard


@dataclass(frozen=True)
class Objective:
    """A divergence: as `kd_loss` and as eager PyTorch have it, and what a class costs the C++ library.

    `exps` and `logs` count exponentials and logarithms of a class, expm1 and log1p among them, forward and
    backward together; `tensors` what of the size of the logits is read and written, labels included.
    """

    options: dict[str, Any]
    eager: Eager
    exps: int
    logs: int
    tensors: int = 3


OBJECTIVES = {
    "forward_kl": Objective({"divergence": "forward_kl"}, _forward_kl, 2, 0),
    "soft_cross_entropy": Objective({"divergence": "soft_cross_entropy"}, _soft_cross_entropy, 2, 0),
    "reverse_kl": Objective({"divergence": "reverse_kl"}, _reverse_kl, 2, 0),
    "jsd(0.5)": Objective({"divergence": kd.JSD(0.5)}, _jsd, 3, 1),
    "skew_kl(0.1)": Objective({"divergence": kd.SkewKL(0.1)}, _skew_kl, 3, 1),
    "skew_reverse_kl(0.1)": Objective({"divergence": kd.SkewReverseKL(0.1)}, _skew_reverse_kl, 3, 1),
    "tvd": Objective({"divergence": "tvd"}, _tvd, 2, 0),
    "squared_error": Objective({"divergence": "squared_error"}, _squared_error, 2, 0),
    "alpha_beta(0.2, 0.7)": Objective({"divergence": kd.AlphaBeta(0.2, 0.7)}, _alpha_beta(0.2, 0.7), 5, 0),
    "alpha_beta(0, 0.5)": Objective({"divergence": kd.AlphaBeta(0, 0.5)}, _alpha_0(0.5), 4, 0),
    "alpha_beta(1.5, -0.5)": Objective({"divergence": kd.AlphaBeta(1.5, -0.5)}, _alpha_beta(1.5, -0.5), 6, 0),
    "logit_mse": Objective({"divergence": kd.LogitMSE()}, _logit_mse, 0, 0),
    "logit_mse, centred": Objective({"divergence": kd.LogitMSE(centered=True)}, _centered_logit_mse, 0, 0),
    "dkd(1, 8)": Objective({"divergence": kd.DKD(1, 8), "hard_weight": 0.0}, _dkd, 2, 0),
    "binary_kl": Objective({"divergence": kd.BinaryKL()}, _binary_kl, 2, 1),
    "binary_kl + hard": Objective(
        {"divergence": kd.BinaryKL(), "hard_weight": 0.1}, _binary_kl_hard, 3, 2, tensors=4
    ),
}


def _noise(**options: Any) -> kd.LogitNoise:
    return kd.LogitNoise(SIGMA, seed=7, **options)


# What is put on top of a divergence. Each is timed beside the same call without it.
EXTRAS: dict[str, tuple[str, dict[str, Any]]] = {
    "teacher noise": ("forward_kl", {"teacher_noise": _noise()}),
    "student noise": ("forward_kl", {"student_noise": _noise()}),
    "student noise, multiplicative": ("forward_kl", {"student_noise": _noise(kind="multiplicative")}),
    "teacher and student noise": ("forward_kl", {"teacher_noise": _noise(), "student_noise": _noise()}),
    "noise of one number a row": ("forward_kl", {"teacher_noise": _noise(per="row")}),
    "teacher noise, jsd": ("jsd(0.5)", {"teacher_noise": _noise()}),
    "teacher noise, binary_kl": ("binary_kl", {"teacher_noise": _noise()}),
}


class Inputs:
    """Logits in several places in memory, so that no call finds its own in a cache."""

    def __init__(self, settings: Settings, sets: int) -> None:
        rows, vocab, where = settings.rows, settings.vocab, {"device": settings.device}
        generator = torch.Generator(settings.device).manual_seed(rows * vocab)
        teacher = 2.5 * torch.randn(rows, vocab, generator=generator, **where)
        student = 0.7 * teacher + torch.randn(rows, vocab, generator=generator, **where)
        self.labels = torch.randint(vocab, (rows,), generator=generator, **where)
        self.targets = torch.rand(rows, vocab, generator=generator, **where)
        self.drawn = torch.randn(rows, vocab, generator=generator, **where)
        dtype = DTYPES[settings.dtype]
        student, teacher, self.drawn = (x.to(dtype) for x in (student, teacher, self.drawn))
        self.sets = [(student.clone().requires_grad_(), teacher.clone()) for _ in range(sets)]

    def ours(self, options: dict[str, Any], *, backend: str | None = None) -> Callable[[int], Any]:
        """Forward and backward of `kd_loss`."""
        divergence = options["divergence"]
        labels: Tensor | None = None
        if options.get("hard_weight") is not None:
            labels = self.targets if isinstance(divergence, kd.BinaryKL) else self.labels

        def run(number: int) -> tuple[Tensor, Tensor]:
            z, v = self.sets[number % len(self.sets)]
            loss = kd.kd_loss(z, v, labels, backend=backend, **options)  # type: ignore[arg-type]
            return loss, torch.autograd.grad(loss, z)[0]

        return run

    def eager(self, loss: Eager, *, noise: float = 0.0) -> Callable[[int], Any]:
        """Forward and backward of an eager loss, whose teacher noise is there already."""

        def run(number: int) -> tuple[Tensor, Tensor]:
            z, v = self.sets[number % len(self.sets)]
            value = loss(z, v + noise * self.drawn if noise else v, self.labels, self.targets)
            return value, torch.autograd.grad(value, z)[0]

        return run

    def truth(self, loss: Eager, rows: int = 16) -> tuple[float, Tensor]:
        """Loss and gradient in fp64, by autograd of the eager loss, a few rows at a time."""
        z, v = self.sets[0]
        total, gradient = 0.0, torch.empty(z.shape, dtype=torch.float64, device=z.device)
        for start in range(0, len(z), rows):
            part = slice(start, start + rows)
            wide = z[part].detach().double().requires_grad_()
            share = len(wide) / len(z)
            value = share * loss(wide, v[part].double(), self.labels[part], self.targets[part].double())
            (gradient[part],) = torch.autograd.grad(value, wide)
            total += value.item()
        return total, gradient


def errors(got: tuple[Tensor, Tensor], truth: tuple[float, Tensor]) -> tuple[float, float]:
    """Of the loss, relative to itself, and of the gradient, relative to the row's largest entry."""
    off = (got[1].double() - truth[1]).abs().amax(-1) / truth[1].abs().amax(-1)
    return abs(got[0].item() - truth[0]) / abs(truth[0]), off.max().item()


def compiled(loss: Eager) -> Eager:
    """The eager loss as `torch.compile` makes it for this one shape."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # a pool of processes would sit beside the timing
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


def time_objective(name: str, inputs: Inputs, settings: Settings) -> dict[str, Any]:
    """Errors and times of one divergence, its eager form and that compiled, and the triad beside them."""
    objective = OBJECTIVES[name]
    truth, allowed = inputs.truth(objective.eager), ALLOWED[settings.dtype]
    contestants = {"kd_loss": inputs.ours(objective.options), "eager": inputs.eager(objective.eager)}
    if settings.compiled:
        contestants["torch.compile"] = inputs.eager(compiled(objective.eager))
    found = {who: errors(run(0), truth) for who, run in contestants.items()}
    wrong = [
        who for who, (loss, gradient) in found.items() if not (loss <= allowed[0] and gradient <= allowed[1])
    ]
    # Eager forms lose digits where kd_loss keeps them: shown, and timed all the same.
    if "kd_loss" in wrong:
        raise RuntimeError(f"kd_loss of {name} is wrong: errors {found['kd_loss']}")
    times = race(contestants, inputs, settings)
    return {"errors": found, "imprecise": wrong, "exps": objective.exps, "logs": objective.logs,
            "tensors": objective.tensors, **times}  # fmt: skip


def time_extra(name: str, inputs: Inputs, settings: Settings) -> dict[str, Any]:
    """Times of `kd_loss` with something on top, without it, and eager with its noise drawn before."""
    plain, extra = EXTRAS[name]
    objective = OBJECTIVES[plain]
    contestants = {
        "kd_loss": inputs.ours({**objective.options, **extra}),
        "without": inputs.ours(objective.options),
        "eager": inputs.eager(objective.eager, noise=SIGMA),
    }
    return race(contestants, inputs, settings)


def time_mixture(inputs: Inputs, settings: Settings) -> dict[str, Any]:
    """Three teachers, beside one of them."""
    teachers = [v for _, v in inputs.sets][:1] * 3

    def run(number: int) -> Any:
        z = inputs.sets[number % len(inputs.sets)][0]
        loss = kd.kd_loss(z, kd.Mixture(teachers))
        return loss, torch.autograd.grad(loss, z)[0]

    def eager(z: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        p = sum(F.softmax(t, -1) for t in teachers) / len(teachers)
        return F.kl_div(F.log_softmax(z, -1), p, reduction="batchmean")

    contestants = {
        "kd_loss": run,
        "without": inputs.ours(OBJECTIVES["forward_kl"].options),
        "eager": inputs.eager(eager),
    }
    return race(contestants, inputs, settings)


def race(contestants: dict[str, Callable[[int], Any]], inputs: Inputs, settings: Settings) -> dict[str, Any]:
    """Best and median times, interleaved with the triad."""
    triads = bench.triad(inputs.sets)
    neighbours = bench.Neighbours()
    timings = bench.race(
        [bench.Contestant(name, run) for name, run in contestants.items()] + triads,
        sets=len(inputs.sets),
        clock=bench.clock_for(torch.device(settings.device)),
        min_rounds=settings.rounds,
        min_seconds=0.5,
    )
    best = min(timings[c.name].best for c in triads)
    return {
        "best_ms": {name: timings[name].best * 1e3 for name in contestants} | {"triad": best * 1e3},
        "median_ms": {name: timings[name].median * 1e3 for name in contestants},
        "other_cpus": neighbours.cpus(),
    }


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run."""

    device: str
    dtype: str
    rows: int
    vocab: int
    threads: int
    rounds: int
    compiled: bool


def memory_process(send: Any, options: dict[str, Any], mixture: bool, settings: Settings) -> bench.Peak:
    """Peak memory of one step beyond the logits. Runs in a process of its own."""
    torch.set_num_threads(settings.threads)
    inputs, device = Inputs(settings, 1), torch.device(settings.device)
    if mixture:
        z, v = inputs.sets[0]
        teachers = [v, v.clone(), v.clone()]
        return bench.peak_growth(lambda: torch.autograd.grad(kd.kd_loss(z, kd.Mixture(teachers)), z), device)
    run = inputs.ours(options)
    return bench.peak_growth(lambda: run(0), device)


def _row(name: str, found: dict[str, Any], peak: float | None) -> list[str]:
    best = found["best_ms"]
    ours = best["kd_loss"]
    # Triad moves three tensors of this size; a divergence that reads labels too, four.
    share = best["triad"] / ours * found["tensors"] / 3
    shown = {who: f"{best[who]:.1f}" if who in best else "not measured" for who in ("eager", "torch.compile")}
    return [
        name, str(found["exps"]), str(found["logs"]), f"{ours:.1f}", f"{100 * share:.0f} %", shown["eager"],
        shown["torch.compile"], "not measured" if peak is None else f"{peak:.2f}",
        f"{found['errors']['kd_loss'][1]:.0e}", f"{found['errors']['eager'][1]:.0e}",
    ]  # fmt: skip


HEAD = [
    "divergence", "exp", "log", "kd_loss ms", "share of triad", "eager ms", "torch.compile ms",
    "peak memory", "gradient error", "eager's",
]  # fmt: skip
EXTRA_HEAD = ["on top", "kd_loss ms", "without ms", "ratio", "eager ms", "peak memory"]


def tables(document: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]], int]]:
    """Title, head, rows and left-aligned columns of each table."""
    peaks = document["peaks"]
    first = [_row(name, found, peaks.get(name)) for name, found in document["divergences"].items()]
    second = []
    for name, found in document["extras"].items():
        best, peak = found["best_ms"], peaks.get(name)
        second.append(
            [
                name, f"{best['kd_loss']:.1f}", f"{best['without']:.1f}",
                f"{best['kd_loss'] / best['without']:.2f}", f"{best['eager']:.1f}",
                "not measured" if peak is None else f"{peak:.2f}",
            ]
        )  # fmt: skip
    return [("Divergences", HEAD, first, 1), ("On top of one", EXTRA_HEAD, second, 1)]


def targets(document: dict[str, Any]) -> list[str]:
    """What was missed."""
    missed = []
    for name, found in document["divergences"].items():
        best = found["best_ms"]
        share = best["triad"] / best["kd_loss"] * found["tensors"] / 3
        if share < SHARE:
            missed.append(f"{name}: {100 * share:.0f} % of triad, {100 * SHARE:.0f} wanted")
        if best["kd_loss"] > best.get("torch.compile", math.inf):
            missed.append(f"{name}: slower than torch.compile")
    for name, found in document["extras"].items():
        best = found["best_ms"]
        if "noise" in name and best["kd_loss"] > NOISE * best["without"]:
            ratio = best["kd_loss"] / best["without"]
            missed.append(f"{name}: {ratio:.2f} times the call without, {NOISE} allowed")
        if best["kd_loss"] > best["eager"]:
            missed.append(f"{name}: slower than eager")
    for name, peak in document["peaks"].items():
        if peak is not None and peak > MEMORY:
            missed.append(f"{name}: {peak:.2f} gradient tensors at the peak, {MEMORY} allowed")
    return missed


def _machine(settings: dict[str, Any], environment: dict[str, Any]) -> str:
    if settings["device"] == "cpu":
        return f"{environment['cpu']}, {settings['threads']} threads"
    return str(environment["device"])


def notes(document: dict[str, Any]) -> list[str]:
    """How to read the tables."""
    settings, environment = document["settings"], document["environment"]
    busy = [x["other_cpus"] for x in (*document["divergences"].values(), *document["extras"].values())]
    lines = [
        f"({settings['rows']:,}, {settings['vocab']:,}) {settings['dtype']}, forward + backward, best times; "
        f"{_machine(settings, environment)}, torch {environment['torch']}; "
        f"kd_loss on backend='{document['backend']}'.",
        "exp and log: exponentials and logarithms of a class in the C++ library, in forward and backward "
        "together, expm1 and log1p among them.",
        "Share of triad: 2 reads + 1 write of the logits (with targets 3 reads) in that time, over the "
        "bandwidth of a + s·b in the same run.",
        "Peak memory: beyond the logits, over the whole step, in gradient tensors"
        + (
            f"; each thread of a CPU has some rows of scratch in it, {100 / settings['rows']:.1f} % each."
            if settings["device"] == "cpu"
            else "."
        ),
        "Gradient error: against fp64, relative to the row's largest entry.",
        "Eager's noise was drawn before the clock ran; noise has σ = "
        f"{SIGMA}; the mixture is of three teachers.",
    ]
    if max((x or 0.0 for x in busy), default=0.0) > BUSY:
        lines.append(f"The machine was busy: others used up to {max(x or 0.0 for x in busy):.1f} CPUs.")
    missed = targets(document)
    lines.append("Targets: " + ("all met." if not missed else "missed: " + "; ".join(missed) + "."))
    return lines


def markdown(document: dict[str, Any]) -> str:
    """The report."""
    parts = [f"# Divergences, noise, mixtures\n\n`{document['command']}`\n\n"]
    parts += [f"- {line}\n" for line in notes(document)]
    for title, head, rows, left in tables(document):
        parts.append(f"\n## {title}\n\n{bench.markdown_table(head, rows, left)}")
    return "".join(parts)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks divergences", description=__doc__)
    p.add_argument("--device", choices=SHAPES, default="cpu", help="default: %(default)s")
    p.add_argument("--dtype", choices=ALLOWED, default="float32", help="default: %(default)s")
    p.add_argument(
        "--shape", type=shape, metavar="ROWSxVOCAB", help="default: 64x128256 on a CPU, 1024x128256 on a GPU"
    )
    p.add_argument("--only", nargs="+", metavar="NAME", help="divergences and extras whose names begin so")
    p.add_argument("--rounds", type=int, default=20, help="at least; default %(default)s")
    p.add_argument("--no-compile", action="store_true", help="without torch.compile")
    p.add_argument("--json", type=Path, metavar="PATH", help="where to write; a .md is written beside it")
    p.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    options = parser().parse_args(arguments)
    rows, vocab = options.shape or SHAPES[options.device]
    threads, device = min(2, os.cpu_count() or 1), torch.device(options.device)
    settings = Settings(
        options.device, options.dtype, rows, vocab, threads, options.rounds, not options.no_compile
    )
    torch.set_num_threads(threads)
    wanted = tuple(options.only or ("",))
    chosen = [name for name in OBJECTIVES if name.startswith(wanted)]
    extras = [name for name in (*EXTRAS, "mixture of 3") if name.startswith(wanted)]
    tensor = roofline.tensor_bytes(rows, vocab, DTYPES[options.dtype])
    progress = bench.Progress()
    document: dict[str, Any] = {
        "schema": 1,
        "command": command_line("benchmarks", ["divergences", *(arguments or [])]),
        "finished": "",
        "kdkernels": kd.__version__,
        "environment": bench.environment(device, threads),
        "backend": kd.explain(*(torch.zeros(1, 2, device=device) for _ in range(2))).backend,
        "settings": asdict(settings),
        "divergences": {},
        "extras": {},
        "peaks": {},
    }
    with progress.phase("peak memory", len(chosen) + len(extras)):
        for name in (*chosen, *extras):
            progress.step(name)
            plain, extra = EXTRAS.get(name, (name if name in OBJECTIVES else "forward_kl", {}))
            call = {**OBJECTIVES[plain].options, **extra}
            peak = bench.run_isolated(
                memory_process, call, name.startswith("mixture"), settings, preload=("torch", __name__)
            )
            document["peaks"][name] = None if peak is None else peak.bytes / tensor
    sets = bench.input_sets(2 * tensor, roofline.last_level_cache_bytes(device), roofline.free_bytes(device))
    inputs = Inputs(settings, sets)
    with progress.phase("times", len(chosen) + len(extras)):
        for name in chosen:
            progress.step(name)
            document["divergences"][name] = time_objective(name, inputs, settings)
        for name in extras:
            progress.step(name)
            mixture = name.startswith("mixture")
            document["extras"][name] = (
                time_mixture(inputs, settings) if mixture else time_extra(name, inputs, settings)
            )
    document["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for line in notes(document):
        print(line)
    for title, head, body, left in tables(document):
        bench.print_table(title, head, body, left)
    other = options.shape or options.only or options.no_compile or options.dtype != "float32"
    whole = options.device == "cpu" and not other
    path = options.json or (RESULTS / "divergences-cpu.json" if whole else None)
    if path is not None:
        bench.write_json(path, document)
        path.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
        print(f"written: {path} and {path.with_suffix('.md')}")
    return 1 if options.check and targets(document) else 0
