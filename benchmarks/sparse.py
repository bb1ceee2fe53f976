"""``python -m benchmarks sparse``: a stored teacher of k classes a row beside the whole, forward + backward.

`kd_loss` of `kd.TopK` is timed beside `kd_loss` of the logits that it is from, beside the same loss as its
users write it in eager PyTorch (the fastest of several spellings), and beside a pass that reads the student's
row and writes another, interleaved in one process, once it is right against fp64. Peak memory is taken in a
process of its own for each.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import DTYPES, shape
from benchmarks.logits_report import BUSY
from kdkernels import bench
from kdkernels.bench import roofline
from kdkernels.bench.report import command_line

RESULTS = Path(__file__).parent / "results"
SHAPES = {"cpu": (64, 128256), "cuda": (8192, 128256)}
CASES = (
    "forward_kl, ghost", "forward_kl, zero", "forward_kl, renormalize", "jsd(0.5), ghost",
    "T = 2 and labels", "ids in order", "sampled",
)  # fmt: skip
DENSE, EAGER, MEMORY = 1.3, 5.0, 0.01
# Errors of loss and gradient, relative to the loss and to the row's largest entry: in bfloat16 one rounding.
ALLOWED = {"float32": (5e-5, 2e-4), "bfloat16": (5e-5, 2**-8)}


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run."""

    device: str
    dtype: str
    rows: int
    vocab: int
    k: int
    threads: int
    rounds: int


@dataclass(frozen=True)
class Case:
    """A loss: the stored teacher and options of `kd_loss`, and how eager PyTorch may spell it."""

    teacher: Any
    options: dict[str, Any]
    labels: Tensor | None
    spellings: dict[str, Callable[[Tensor], Tensor]]
    truth: Callable[[Tensor], Tensor]  # of rows of logits in fp64: their loss


class Inputs:
    """Logits in several places in memory, so that no call finds its own in a cache, and what is stored."""

    def __init__(self, settings: Settings, sets: int) -> None:
        rows, vocab, where = settings.rows, settings.vocab, {"device": settings.device}
        generator = torch.Generator(settings.device).manual_seed(rows * vocab)
        teacher = 2.5 * torch.randn(rows, vocab, generator=generator, **where)
        student = 0.7 * teacher + torch.randn(rows, vocab, generator=generator, **where)
        self.labels = torch.randint(vocab, (rows,), generator=generator, **where)
        lp = teacher.to(DTYPES[settings.dtype]).float().log_softmax(-1)
        self.log_probs, self.ids = lp.topk(settings.k)
        self.lse = {T: (lp / T).logsumexp(-1) for T in (1.0, 2.0)}
        drawn = torch.multinomial(lp.exp(), settings.k, replacement=True, generator=generator)
        self.drawn = kd.Sampled(drawn, torch.full(drawn.shape, 1 / settings.k, **where))
        dtype = DTYPES[settings.dtype]
        student, teacher = student.to(dtype), teacher.to(dtype)
        self.sets = [(student.clone().requires_grad_(), teacher.clone()) for _ in range(sets)]

    def case(self, name: str) -> Case:
        """What a name stands for."""
        ids, log_probs, lse, labels = self.ids, self.log_probs, self.lse, self.labels
        tail = name.split(", ")[-1] if "forward" in name else "ghost"
        T, hard = (2.0, 0.1) if name.startswith("T = 2") else (1.0, 0.0)
        teacher: Any = kd.TopK(ids, log_probs, tail, lse)
        options: dict[str, Any] = {"temperature": T, **({"hard_weight": hard} if hard else {})}
        if name == "sampled":
            teacher, options["divergence"] = self.drawn, "soft_cross_entropy"
            ids, weights = teacher.ids, teacher.weights
            return Case(
                teacher, options, None,
                {"gather": lambda z: -(weights * z.float().log_softmax(-1).gather(-1, ids)).sum(-1).mean(),
                 "logsumexp": lambda z: -(weights * (_at(z, ids) - _lse(z))).sum(-1).mean()},
                lambda z: -(weights[: len(z)].double() * z.log_softmax(-1).gather(-1, ids[: len(z)])).sum(-1),
            )  # fmt: skip
        if name == "ids in order":
            ids, order = ids.sort(-1)
            log_probs = log_probs.gather(-1, order)
            teacher = kd.TopK(ids, log_probs, tail, lse, _ordered=True)
        jsd = name.startswith("jsd")
        if jsd:
            options["divergence"] = kd.JSD(0.5)

        def divergence(lq: Tensor, lp: Tensor) -> Tensor:
            if jsd:
                p, q = lp.exp(), lq.exp()
                lm = ((p + q) / 2).log()
                return (p * (lp - lm) + q * (lq - lm)).sum(-1) / 2
            return (lp.exp() * (lp - lq)).sum(-1)

        def stored(lq: Tensor, z: Tensor, rows: int) -> Tensor:
            """From log q of all that is stored, as papers have it, with 1 − mass for the tail."""
            lp = log_probs[:rows].to(lq.dtype) / T - lse[T][:rows, None].to(lq.dtype)
            if tail == "renormalize":
                loss = divergence(lq.log_softmax(-1), lp.log_softmax(-1))
            elif tail == "zero":
                loss = divergence(lq, lp)
            else:
                rest = [(1 - x.exp().sum(-1, keepdim=True)).clamp(min=1e-12).log() for x in (lq, lp)]
                loss = divergence(torch.cat([lq, rest[0]], -1), torch.cat([lp, rest[1]], -1))
            if hard:
                own = torch.nn.functional.cross_entropy(z, labels[:rows], reduction="none")
                return T * T * loss + hard * own
            return loss

        def gathered(z: Tensor) -> Tensor:
            x = z.float()
            return stored((x / T if T != 1 else x).log_softmax(-1).gather(-1, ids), x, len(z)).mean()

        def by_lse(z: Tensor) -> Tensor:
            x = z.float()
            return stored(_at(x, ids) / T - _lse(x / T if T != 1 else x), x, len(z)).mean()

        def truth(z: Tensor) -> Tensor:
            return stored((z / T).log_softmax(-1).gather(-1, ids[: len(z)]), z, len(z))

        return Case(
            teacher, options, labels if hard else None, {"gather": gathered, "logsumexp": by_lse}, truth
        )

    def step(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], Any]:
        """Forward and backward of a loss of student and teacher logits."""

        def run(number: int) -> tuple[Tensor, Tensor]:
            z, v = self.sets[number % len(self.sets)]
            value = loss(z, v)
            return value, torch.autograd.grad(value, z)[0]

        return run

    def step_of_student(self, loss: Callable[[Tensor], Tensor]) -> Callable[[int], Any]:
        """Of a loss that has its teacher."""
        return self.step(lambda z, _: loss(z))


def _at(z: Tensor, ids: Tensor) -> Tensor:
    return z.gather(-1, ids).float()


def _lse(z: Tensor) -> Tensor:
    return z.float().logsumexp(-1, keepdim=True)


def errors(got: tuple[Tensor, Tensor], case: Case, z: Tensor, rows: int = 16) -> tuple[float, float]:
    """Of some rows: of the loss, relative to itself; of the gradient, relative to a row's largest entry."""
    wide = z[:rows].detach().double().requires_grad_()
    each = case.truth(wide)
    (gradient,) = torch.autograd.grad(each.sum() / len(z), wide)
    part = kd.kd_loss(
        z[:rows].detach(), case.teacher[:rows], None if case.labels is None else case.labels[:rows],
        **case.options,
    )  # fmt: skip
    off = (got[1][:rows].double() - gradient).abs().amax(-1) / gradient.abs().amax(-1)
    return abs(part.item() - each.mean().item()) / abs(each.mean().item()), off.max().item()


def time_case(name: str, inputs: Inputs, settings: Settings) -> dict[str, Any]:
    """Errors and times of a case, of the whole teacher, of eager spellings, and of a read and a write."""
    case = inputs.case(name)
    labels, options = case.labels, case.options
    contestants = {
        "stored": inputs.step(lambda z, v: kd.kd_loss(z, case.teacher, labels, **options)),
        "dense": inputs.step(lambda z, v: kd.kd_loss(z, v, labels, **options)),
    } | {f"eager {name}": inputs.step_of_student(loss) for name, loss in case.spellings.items()}
    found = errors(contestants["stored"](0), case, inputs.sets[0][0])
    allowed = ALLOWED[settings.dtype]
    if not (found[0] <= allowed[0] and found[1] <= allowed[1]):
        raise RuntimeError(f"kd_loss of {name} is wrong: errors {found}")
    outs = [torch.empty_like(z) for z, _ in inputs.sets[:2]]

    def read_and_write(number: int) -> None:
        torch.mul(inputs.sets[number % len(inputs.sets)][0].detach(), 2.0, out=outs[number % len(outs)])

    neighbours = bench.Neighbours()
    timings = bench.race(
        [bench.Contestant(who, run) for who, run in contestants.items()]
        + [bench.Contestant("read and write", read_and_write)],
        sets=len(inputs.sets),
        clock=bench.clock_for(torch.device(settings.device)),
        min_rounds=settings.rounds,
        min_seconds=0.5,
    )
    return {
        "errors": found,
        "best_ms": {who: t.best * 1e3 for who, t in timings.items()},
        "median_ms": {who: t.median * 1e3 for who, t in timings.items()},
        "other_cpus": neighbours.cpus(),
    }


def memory_process(send: Any, name: str, settings: Settings) -> bench.Peak | None:
    """Peak memory of one step beyond what is there before it. Runs in a process of its own."""
    torch.set_num_threads(settings.threads)
    inputs = Inputs(settings, 1)
    case = inputs.case(name)
    run = inputs.step(lambda z, v: kd.kd_loss(z, case.teacher, case.labels, **case.options))
    # A few calls: the first ones of a thread leave memory with it.
    return bench.peak_growth(
        lambda: run(0), torch.device(settings.device), lambda: [run(0) for _ in range(3)]
    )


HEAD = ["loss", "stored ms", "whole teacher ms", "times as fast", "eager ms", "times as fast",
        "share of a read and a write", "beyond the gradient", "gradient error"]  # fmt: skip


def eager_best(best: dict[str, float]) -> float:
    """Of the fastest spelling."""
    return min(ms for who, ms in best.items() if who.startswith("eager"))


def table(document: dict[str, Any]) -> list[list[str]]:
    """The rows of the table."""
    rows = []
    for name, found in document["cases"].items():
        best, peak = found["best_ms"], document["peaks"].get(name)
        eager = eager_best(best)
        rows.append(
            [
                name, f"{best['stored']:.2f}", f"{best['dense']:.2f}",
                f"{best['dense'] / best['stored']:.2f}",
                f"{eager:.1f}", f"{eager / best['stored']:.1f}",
                f"{100 * best['read and write'] / best['stored']:.0f} %",
                "not measured" if peak is None else f"{100 * peak:.2f} %", f"{found['errors'][1]:.0e}",
            ]
        )  # fmt: skip
    return rows


def targets(document: dict[str, Any]) -> list[str]:
    """What was missed."""
    missed = []
    for name, found in document["cases"].items():
        best, peak = found["best_ms"], document["peaks"].get(name)
        if name != "sampled" and best["dense"] < DENSE * best["stored"]:
            missed.append(
                f"{name}: {best['dense'] / best['stored']:.2f} times as fast as the whole, {DENSE} wanted"
            )
        if eager_best(best) < EAGER * best["stored"]:
            missed.append(
                f"{name}: {eager_best(best) / best['stored']:.1f} times as fast as eager, {EAGER:g} wanted"
            )
        if peak is not None and peak > MEMORY:
            missed.append(f"{name}: {100 * peak:.1f} % of the gradient beyond it, {100 * MEMORY:g} % allowed")
    return missed


def notes(document: dict[str, Any]) -> list[str]:
    """How to read the table."""
    s, environment = document["settings"], document["environment"]
    machine = (
        f"{environment['cpu']}, {s['threads']} threads" if s["device"] == "cpu" else environment["device"]
    )
    busy = max((found["other_cpus"] or 0.0 for found in document["cases"].values()), default=0.0)
    lines = [
        f"({s['rows']:,}, {s['vocab']:,}) {s['dtype']}, k = {s['k']}, forward + backward, best times; "
        f"{machine}, "
        f"torch {environment['torch']}; kd_loss on backend='{document['backend']}'.",
        "Eager: the fastest of log_softmax and gather, or gather and logsumexp, autograd behind it.",
        "A read and a write: a product with a number from one tensor of the logits' size to another, in the "
        "same run: what a stored teacher costs at least.",
        "Beyond the gradient: peak memory of a step less the gradient of the logits, over that gradient.",
        "Gradient error: of 16 rows against fp64, relative to a row's largest entry.",
    ]
    if busy > BUSY:
        lines.append(f"The machine was busy: others used up to {busy:.1f} CPUs.")
    missed = targets(document)
    lines.append("Targets: " + ("all met." if not missed else "missed: " + "; ".join(missed) + "."))
    return lines


def markdown(document: dict[str, Any]) -> str:
    """The report."""
    said = "".join(f"- {line}\n" for line in notes(document))
    made = bench.markdown_table(HEAD, table(document), 1)
    return f"# Stored teachers\n\n`{document['command']}`\n\n{said}\n{made}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks sparse", description=__doc__)
    p.add_argument("--device", choices=SHAPES, default="cpu", help="default: %(default)s")
    p.add_argument("--dtype", choices=ALLOWED, default="float32", help="default: %(default)s")
    p.add_argument(
        "--shape", type=shape, metavar="ROWSxVOCAB", help="default: 64x128256 on a CPU, 8192x128256 on a GPU"
    )
    p.add_argument("-k", type=int, default=64, help="stored classes of a row; default %(default)s")
    p.add_argument("--only", nargs="+", metavar="NAME", help="cases whose names begin so")
    p.add_argument("--rounds", type=int, default=20, help="at least; default %(default)s")
    p.add_argument("--json", type=Path, metavar="PATH", help="where to write; a .md is written beside it")
    p.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    options = parser().parse_args(arguments)
    rows, vocab = options.shape or SHAPES[options.device]
    threads, device = min(2, os.cpu_count() or 1), torch.device(options.device)
    settings = Settings(options.device, options.dtype, rows, vocab, options.k, threads, options.rounds)
    torch.set_num_threads(threads)
    chosen = [name for name in CASES if name.startswith(tuple(options.only or ("",)))]
    tensor = roofline.tensor_bytes(rows, vocab, DTYPES[options.dtype])
    progress = bench.Progress()
    stored = kd.TopK(*(torch.zeros(1, 1, dtype=t, device=device) for t in (torch.int64, torch.float32)))
    document: dict[str, Any] = {
        "schema": 1,
        "command": command_line("benchmarks", ["sparse", *(arguments or [])]),
        "finished": "",
        "kdkernels": kd.__version__,
        "environment": bench.environment(device, threads),
        "backend": kd.explain(torch.zeros(1, 2, device=device), stored).backend,
        "settings": asdict(settings),
        "cases": {},
        "peaks": {},
    }
    with progress.phase("peak memory", len(chosen)):
        for name in chosen:
            progress.step(name)
            peak = bench.run_isolated(memory_process, name, settings, preload=("torch", __name__))
            document["peaks"][name] = None if peak is None else peak.bytes / tensor - 1
    sets = bench.input_sets(2 * tensor, roofline.last_level_cache_bytes(device), roofline.free_bytes(device))
    inputs = Inputs(settings, sets)
    with progress.phase("times", len(chosen)):
        for name in chosen:
            progress.step(name)
            document["cases"][name] = time_case(name, inputs, settings)
    document["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for line in notes(document):
        print(line)
    bench.print_table("Stored teachers", HEAD, table(document), 1)
    whole = not (options.shape or options.only) and options.k == 64 and options.dtype == "float32"
    path = options.json or (RESULTS / f"sparse-{options.device}.json" if whole else None)
    if path is not None:
        bench.write_json(path, document)
        path.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
        print(f"written: {path} and {path.with_suffix('.md')}")
    return 1 if options.check and targets(document) else 0
