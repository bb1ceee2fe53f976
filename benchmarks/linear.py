"""``python -m benchmarks linear``: distillation from hidden states and heads, forward + backward.

Times beside the four matrix products alone (the best over chunk sizes, buffers made before), eager PyTorch,
liger-kernel's and TRL's chunked losses, interleaved in one process; all are right against fp64 before they
are timed. On a CPU twice: with the allocator as it comes, where memory that a call takes is new and cleared
page by page, and with its thresholds raised, where it is what the call before gave back. Peak memory for
budgets and numbers of rows, and errors beside eager's, each in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import DTYPES, shape
from benchmarks.logits_report import BUSY
from kdkernels import bench
from kdkernels.bench.report import command_line
from kdkernels.chunks import WIDENED, plan
from kdkernels.functional import job_of

RESULTS = Path(__file__).parent / "results"
# Ours: as it comes, and with memory for more or all.
BUDGETS: dict[str, dict[str, int | None]] = {
    "cpu": {"kd_loss": None, "kd_loss, 128 MiB": 128 << 20},
    "cuda": {"kd_loss": None, "kd_loss, 4 GiB": 4 << 30, "kd_loss, 8 GiB": 8 << 30},
}
# How many times the four products alone a loss may take.
ALLOWED_TIMES = {
    "cpu": {"kd_loss, forward_kl": 1.10, "kd_loss, jsd": 1.25},
    "cuda": {
        f"kd_loss, {size} GiB, {d}": t for size, t in ((4, 1.25), (8, 1.15)) for d in ("forward_kl", "jsd")
    },
}
ALLOWED_MEMORY = 1.10  # times the budget
ALLOWED_ERROR = 1.01  # times eager's
# Gradients that differ from fp64 by more than this, relative to their norm, are of another loss.
SAME = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192)
LOSS_SCALE = 2.0**16
AS_IT_COMES, WARM = "allocator as it comes", "thresholds raised"


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run."""

    device: str
    dtype: str
    rows: int
    vocab: int
    widths: tuple[int, int]
    threads: int
    rounds: int
    memory_budget: int | None = None


DEFAULTS = {
    "cpu": Settings("cpu", "float32", 512, 131_072, (256, 384), 2, 12),
    "cuda": Settings("cuda", "bfloat16", 8192, 151_936, (4096, 4096), 2, 20),
}
# Rows, and the memory budget at each.
MEMORY = {
    "cpu": ((512, 2048, 8192, 16384), (128 << 20, 512 << 20, None)),
    "cuda": ((512, 4096, 16384), (4 << 30, 8 << 30, None)),
}
# Rows and classes; enough rows that the sum over chunks is less than what chunks save.
ERRORS = {"cpu": (1024, 8192), "cuda": (16_384, 32_768)}


class Inputs:
    """Hidden states and heads of both sides: a teacher that is sure of some things, a student near it."""

    def __init__(self, settings: Settings) -> None:
        n, vocab, (student, teacher) = settings.rows, settings.vocab, settings.widths
        generator = torch.Generator(settings.device).manual_seed(n * vocab)

        def random(*size: int, std: float = 1.0) -> Tensor:
            x = std * torch.randn(*size, generator=generator, device=settings.device)
            return x.to(DTYPES[settings.dtype])

        self.x, self.weight = random(n, student), random(vocab, student, std=2.0 * student**-0.5)
        self.t_x, self.t_weight = random(n, teacher), random(vocab, teacher, std=2.5 * teacher**-0.5)
        self.labels = torch.zeros(n, dtype=torch.int64, device=settings.device)
        self.x.requires_grad_()
        self.weight.requires_grad_()

    def student(self) -> kd.Head:
        """As a source."""
        return kd.Head(self.x, self.weight)

    def teacher(self) -> kd.Head:
        """Likewise."""
        return kd.Head(self.t_x, self.t_weight)

    def truth(self, divergence: str, rows: int = 64) -> tuple[float, Tensor, Tensor]:
        """Loss and gradients in fp64, a few rows at a time, by autograd of the formula in log space."""
        n, total = len(self.x), 0.0
        dx = torch.empty(self.x.shape, dtype=torch.float64, device=self.x.device)
        weight, t_weight = self.weight.detach().double(), self.t_weight.double()
        dw = torch.zeros_like(weight)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            x = self.x[part].detach().double()
            z = (x @ weight.T).requires_grad_()
            loss = EAGER[divergence](z, self.t_x[part].double() @ t_weight.T) * len(x) / n
            (dz,) = torch.autograd.grad(loss, z)
            total += loss.item()
            dx[part] = dz @ weight
            dw.addmm_(dz.T, x)
        return total, dx, dw


def _forward_kl(z: Tensor, v: Tensor) -> Tensor:
    return F.kl_div(z.log_softmax(-1), v.log_softmax(-1), reduction="batchmean", log_target=True)


def _jsd(z: Tensor, v: Tensor) -> Tensor:
    lq, lp = z.log_softmax(-1), v.log_softmax(-1)
    q, p = lq.exp(), lp.exp()
    lm = (0.5 * (p + q)).log()
    return 0.5 * (p * (lp - lm) + q * (lq - lm)).sum(-1).mean()


EAGER = {"forward_kl": _forward_kl, "jsd": _jsd}
OURS: dict[str, Any] = {"forward_kl": "forward_kl", "jsd": kd.JSD(0.5)}
BETAS = {"forward_kl": 0.0, "jsd": 0.5}

# A loss of heads: inputs and divergence, to a scalar.
Loss = Callable[[Inputs, str], Tensor]


def ours(inputs: Inputs, divergence: str, memory_budget: int | None = None) -> Tensor:
    """One call."""
    return kd.kd_loss(
        inputs.student(), inputs.teacher(), divergence=OURS[divergence], memory_budget=memory_budget
    )


def eager(inputs: Inputs, divergence: str) -> Tensor:
    """Logits of the whole batch, the loss in fp32."""
    with torch.no_grad():
        v = F.linear(inputs.t_x, inputs.t_weight).float()
    return EAGER[divergence](F.linear(inputs.x, inputs.weight).float(), v)


def liger(inputs: Inputs, divergence: str, compiled: bool = True) -> Tensor:
    """`LigerFusedLinearJSDLoss`, with the soft term alone; compiled, as it is by default."""
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[divergence], compiled=compiled
    )
    return loss(inputs.x, inputs.weight, inputs.t_x, inputs.t_weight, inputs.labels)


def trl(inputs: Inputs, divergence: str) -> Tensor:
    """`_chunked_divergence_loss`, the loss of TRL's distillation trainer."""
    function = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    mask = torch.ones(1, len(inputs.x), device=inputs.x.device)
    return function(
        inputs.x[None], inputs.t_x[None], inputs.weight, inputs.t_weight, mask, BETAS[divergence]
    )[0]


PEERS: dict[str, tuple[str, Loss]] = {
    "liger-kernel": ("liger_kernel", liger),
    "liger-kernel, not compiled": ("liger_kernel", partial(liger, compiled=False)),
    "trl": ("trl", trl),
}


def contestants(device: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """The losses that can run here, and why others can't."""
    found: dict[str, Loss] = {n: partial(ours, memory_budget=size) for n, size in BUDGETS[device].items()}
    found["eager"] = eager
    missing = {}
    for name, (module, loss) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            missing[name] = "not installed"
        else:
            found[name] = loss
    return found, missing


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in ("liger-kernel", "trl", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def step(loss: Loss, inputs: Inputs, divergence: str) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward: the loss and both gradients."""
    value = loss(inputs, divergence)
    dx, dw = torch.autograd.grad(value, (inputs.x, inputs.weight))
    return value.detach(), dx, dw


def errors(got: tuple[Tensor, Tensor, Tensor], truth: tuple[float, Tensor, Tensor]) -> dict[str, float]:
    """Of the loss, relative to itself, and of both gradients, relative to their norms."""

    def off(x: Tensor, exact: Tensor) -> float:
        # In parts: the difference in fp64 of a large weight is larger than all else.
        parts = zip(x.split(4096), exact.split(4096), strict=True)
        return sum(float((a.double() - b).pow(2).sum()) for a, b in parts) ** 0.5 / float(exact.norm())

    loss = abs(got[0].item() - truth[0]) / abs(truth[0])
    return {"loss": loss, "hidden": off(got[1], truth[1]), "weight": off(got[2], truth[2])}


class Products:
    """The four matrix products of forward and backward and nothing else, in chunks, buffers made before."""

    def __init__(self, inputs: Inputs, chunk: int) -> None:
        self.inputs, self.chunk = inputs, chunk
        where = {"device": inputs.x.device, "dtype": inputs.x.dtype}
        self.z = torch.zeros(chunk, len(inputs.weight), **where)
        self.v = torch.zeros_like(self.z)
        self.dx = torch.zeros(inputs.x.shape, **where)
        wide = torch.float32 if inputs.x.is_cuda and chunk < len(inputs.x) else inputs.x.dtype
        self.dw = torch.zeros(inputs.weight.shape, device=inputs.x.device, dtype=wide)

    @torch.no_grad()
    def __call__(self, _: int) -> None:
        """All chunks. The gradient of the logits is whatever lies in their place."""
        i = self.inputs
        for begin in range(0, len(i.x), self.chunk):
            part = slice(begin, begin + self.chunk)
            x, z, v = i.x[part], self.z[: len(i.x[part])], self.v[: len(i.x[part])]
            torch.mm(x, i.weight.t(), out=z)
            torch.mm(i.t_x[part], i.t_weight.t(), out=v)
            torch.mm(z, i.weight, out=self.dx[part])
            options = {} if self.dw.dtype == z.dtype else {"out_dtype": self.dw.dtype}
            if begin == 0:
                torch.mm(z.t(), x, out=self.dw, **options)
            else:
                torch.addmm(self.dw, z.t(), x, out=self.dw, **options)


def time_process(send: Any, settings: Settings, raised: bool) -> dict[str, Any]:
    """Times of the products by chunk size, and of every loss that is right. Runs in a process of its own."""
    torch.set_num_threads(settings.threads)
    if raised and not bench.raise_malloc_thresholds():
        return {}
    inputs, device = Inputs(settings), torch.device(settings.device)
    losses, missing = contestants(settings.device)
    runs: dict[str, Callable[[int], object]] = {}
    chunks = [n for n in CHUNKS if n < settings.rows] + [settings.rows]
    for chunk in chunks[-3:]:
        runs[f"products, {chunk} rows"] = Products(inputs, chunk)
    found: dict[str, Any] = {"errors": {}, "missing": missing, "chunk": _chunk(inputs, settings)}
    for divergence in EAGER:
        truth = inputs.truth(divergence)
        for name, loss in losses.items():
            label = f"{name}, {divergence}"
            send(f"{label} against fp64")
            try:
                off = errors(step(loss, inputs, divergence), truth)
            except Exception as error:
                found["missing"][label] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
                continue
            found["errors"][label] = off
            if max(off.values()) > SAME[settings.dtype]:
                found["missing"][label] = f"another loss: errors {off}"
                continue
            runs[label] = lambda _, loss=loss, d=divergence: step(loss, inputs, d)
        del truth
    neighbours = bench.Neighbours()
    timings = bench.race(
        [bench.Contestant(name, run) for name, run in runs.items()],
        sets=1,
        clock=bench.clock_for(device),
        min_rounds=settings.rounds,
        max_rounds=settings.rounds,
        on_round=lambda number: send(f"round {number + 1} of {settings.rounds}"),
    )
    found["faults"] = {name: timings[name].median_faults for name in runs}
    found["best_ms"] = {name: 1e3 * timings[name].best for name in runs}
    found["median_ms"] = {name: 1e3 * timings[name].median for name in runs}
    found["other_cpus"] = neighbours.cpus()
    return found


def _chunk(inputs: Inputs, settings: Settings) -> dict[str, int]:
    """How `kd_loss` takes its rows."""
    job = job_of(inputs.student(), inputs.teacher(), memory_budget=settings.memory_budget)
    how = plan(job, (True, True, False), settings.rows, False)
    return {"rows": how.rows, "chunks": how.chunks, "bytes": how.bytes}


def memory_process(send: Any, settings: Settings) -> dict[str, Any]:
    """Peak memory of one step beyond inputs and gradients. Runs in a process of its own."""
    torch.set_num_threads(settings.threads)
    inputs, device = Inputs(settings), torch.device(settings.device)
    run = partial(ours, memory_budget=settings.memory_budget)
    gradients = sum(x.numel() * x.element_size() for x in (inputs.x, inputs.weight))
    how = _chunk(inputs, settings)
    found: dict[str, Any] = {
        "rows": settings.rows, "budget": settings.memory_budget, "planned": how["bytes"], "chunks": how
    }  # fmt: skip
    for call in (
        "first",
        "peak",
    ):  # the first call leaves threads behind, and what a library of products keeps
        peak = bench.peak_growth(lambda: step(run, inputs, "jsd"), device, lambda: None)
        found[call] = None if peak is None else peak.bytes - gradients
        found["method"] = None if peak is None else peak.method
    return found


def error_process(send: Any, settings: Settings) -> dict[str, Any]:
    """Errors of both gradients beside eager's, in one chunk and in eight. Runs in a process of its own."""
    torch.set_num_threads(settings.threads)
    inputs = Inputs(settings)
    truth = inputs.truth("forward_kl")
    scaled = settings.dtype == "float16"

    def off(loss: Loss) -> dict[str, float]:
        value = loss(inputs, "forward_kl")
        scale = torch.full_like(value, LOSS_SCALE if scaled else 1.0)
        gradients = torch.autograd.grad(value, (inputs.x, inputs.weight), scale)
        unscaled = [g.double() / (LOSS_SCALE if scaled else 1.0) for g in gradients]
        return errors((value.detach(), *unscaled), truth)

    job = job_of(inputs.student(), inputs.teacher())
    small = plan(job, (True, True, False), max(1, settings.rows // 8), False).bytes
    if inputs.x.dtype.itemsize < 4:  # the sum over chunks counts
        small += 4 * inputs.weight.numel() + WIDENED
    return {
        "eager": off(eager),
        "kd_loss": off(ours),
        "kd_loss, in chunks": off(partial(ours, memory_budget=small)),
        "chunks": plan(job._replace(memory_budget=small), (True, True, False), settings.rows, False).chunks,
    }


def products(times: dict[str, float]) -> tuple[str, float]:
    """The fastest chunking of the products, and its time."""
    return min(((n, t) for n, t in times.items() if n.startswith("products")), key=lambda item: item[1])


def _time_table(found: dict[str, Any]) -> list[list[str]]:
    best, median, faults = found["best_ms"], found["median_ms"], found["faults"]
    _, floor = products(best)
    rows = []
    for name in best:
        fused = best.get(f"kd_loss, {name.rsplit(', ', 1)[-1]}")
        off = found["errors"].get(name)
        rows.append(
            [
                name, f"{best[name]:,.0f}", f"{median[name]:,.0f}", f"{best[name] / floor:.2f}",
                "" if fused is None else f"{best[name] / fused:.2f}",
                "" if faults[name] is None else f"{faults[name]:,.0f}",
                "" if off is None else f"{off['hidden']:.0e}", "" if off is None else f"{off['weight']:.0e}",
            ]
        )  # fmt: skip
    return rows + [[name, f"not measured: {why}", *[""] * 6] for name, why in found["missing"].items()]


def tables(document: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]], int]]:
    """Title, head, rows and left-aligned columns of each table."""
    head = ["loss", "best ms", "median ms", "× products", "× kd_loss", "page faults", "error of dX", "of dW"]
    parts = [
        (f"Times, {how}", head, _time_table(found), 1) for how, found in document["times"].items() if found
    ]
    memory = [
        [
            f"{m['rows']:,}", "default" if m["budget"] is None else f"{m['budget'] / 2**20:,.0f}",
            f"{m['planned'] / 2**20:,.0f}", f"{m['chunks']['chunks']} × {m['chunks']['rows']:,}",
            *("not measured" if m[call] is None else f"{m[call] / 2**20:,.0f}" for call in ("peak", "first")),
        ]
        for m in document["memory"]
    ]  # fmt: skip
    head = ["rows", "budget, MiB", "planned, MiB", "chunks × rows", "peak, MiB", "of the first call"]
    parts.append(("Memory", head, memory, 0))
    wrong = [
        [
            dtype, who.replace("in chunks", f"{e['chunks']} chunks"),
            *(f"{e[who][part]:.2e}" for part in ("loss", "hidden", "weight")),
            *(f"{e[who][part] / e['eager'][part]:.3f}" for part in ("hidden", "weight")),
        ]
        for dtype, e in document["errors"].items()
        for who in ("eager", "kd_loss", "kd_loss, in chunks")
    ]  # fmt: skip
    head = ["dtype", "loss function", "error of the loss", "of dX", "of dW", "dX, × eager's", "dW, × eager's"]
    parts.append(("Errors", head, wrong, 2))
    return parts


def targets(document: dict[str, Any]) -> list[str]:
    """What was missed."""
    missed = []
    # The products' buffers are warm, so that a loss is held to them where its memory is.
    how = WARM if document["times"].get(WARM) else AS_IT_COMES
    if found := document["times"].get(how):
        best = found["best_ms"]
        for name, allowed in ALLOWED_TIMES[document["settings"]["device"]].items():
            if name not in best:
                missed.append(f"{name}, {how}: not measured")
            elif (ratio := best[name] / products(best)[1]) > allowed:
                missed.append(f"{name}, {how}: {ratio:.2f} times the products, {allowed} allowed")
    for m in document["memory"]:
        allowed = ALLOWED_MEMORY * (m["budget"] or m["planned"])
        if m["peak"] is not None and m["peak"] > allowed:
            missed.append(f"{m['rows']:,} rows: {m['peak']:,} bytes at the peak, {allowed:,.0f} allowed")
    for dtype, e in document["errors"].items():
        for who in ("kd_loss", "kd_loss, in chunks"):
            for part in ("hidden", "weight"):
                if e[who][part] > ALLOWED_ERROR * e["eager"][part] + 2**-23:
                    missed.append(
                        f"{dtype}: error of {part} {e[who][part]:.3g}, eager's {e['eager'][part]:.3g}"
                    )
    return missed


def notes(document: dict[str, Any]) -> list[str]:
    """How to read the tables."""
    s, environment, found = document["settings"], document["environment"], document["times"][AS_IT_COMES]
    d, t = s["widths"]
    where = environment["device"] if s["device"] == "cuda" else environment.get("cpu")
    operations = 2 * s["rows"] * s["vocab"] * (3 * d + t)
    name, floor = products(found["best_ms"])
    lines = [
        f"N = {s['rows']:,}, V = {s['vocab']:,}, student {d:,} and teacher {t:,} wide, {s['dtype']}; "
        f"{where}, {s['threads']} threads, torch {environment['torch']}"
        + "".join(f", {peer} {version}" for peer, version in document["versions"].items())
        + f"; rows on backend='{document['backend']}'.",
        f"Products: logits of both sides, dX and dW alone, {operations / 1e9:,.0f} GFLOP; fastest with "
        f"{name.removeprefix('products, ')} at a time, {operations / floor / 1e6:,.0f} GFLOP/s. kd_loss "
        f"takes {found['chunk']['chunks']} × {found['chunk']['rows']:,} rows.",
        "Every loss computes the same mean over rows at T = 1, without labels, and gradients of the "
        "student's hidden states and weight; errors are against fp64, relative to the norm.",
        "A size in a name is the memory_budget; eager and the peers have none.",
        "Memory: JSD, beyond inputs and gradients, those of hidden states and weight. The first call leaves "
        "threads behind, and what a library of products keeps for good.",
        "Errors: forward KL; float16 with a loss scale of 2^16, taken off again.",
    ]
    busy = max(found["other_cpus"] or 0.0 for found in document["times"].values() if found)
    if busy > BUSY:
        lines.append(f"The machine was busy: others used up to {busy:.1f} CPUs.")
    missed = targets(document)
    lines.append("Targets: " + ("all met." if not missed else "missed: " + "; ".join(missed) + "."))
    return lines


def markdown(document: dict[str, Any]) -> str:
    """The report."""
    parts = [f"# Heads\n\n`{document['command']}`\n\n", *(f"- {line}\n" for line in notes(document))]
    for title, head, rows, left in tables(document):
        parts.append(f"\n## {title}\n\n{bench.markdown_table(head, rows, left)}")
    return "".join(parts)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks linear", description=__doc__)
    p.add_argument("--device", choices=DEFAULTS, default="cpu", help="default: %(default)s")
    p.add_argument("--dtype", choices=SAME, help="default: float32 on a CPU, bfloat16 on a GPU")
    p.add_argument("--shape", type=shape, metavar="ROWSxVOCAB", help="default: 512x131072, or 8192x151936")
    p.add_argument(
        "--widths", type=int, nargs=2, metavar=("STUDENT", "TEACHER"), help="default: 256 384, or 4096 4096"
    )
    p.add_argument("--rounds", type=int, help="timed rounds; default 12, or 20")
    p.add_argument("--only", choices=("times", "memory", "errors"), help="one part; nothing is written")
    p.add_argument("--json", type=Path, metavar="PATH", help="where to write; a .md is written beside it")
    p.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return p


def settings_of(options: argparse.Namespace) -> Settings:
    """Of a command line."""
    settings = DEFAULTS[options.device]
    rows, vocab = options.shape or (settings.rows, settings.vocab)
    return replace(
        settings,
        rows=rows,
        vocab=vocab,
        dtype=options.dtype or settings.dtype,
        widths=tuple(options.widths or settings.widths),
        rounds=options.rounds or settings.rounds,
        threads=min(2, os.cpu_count() or 1),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    options = parser().parse_args(arguments)
    settings, device = settings_of(options), torch.device(options.device)
    rows, budgets = MEMORY[options.device]
    if options.shape:
        rows = (settings.rows,)
    progress = bench.Progress()
    document: dict[str, Any] = {
        "schema": 1,
        "command": command_line("benchmarks", ["linear", *(arguments or [])]),
        "finished": "",
        "kdkernels": kd.__version__,
        "versions": versions(),
        "environment": bench.environment(device, settings.threads),
        "backend": kd.explain(*(torch.zeros(1, 2, device=device) for _ in range(2))).backend,
        "settings": asdict(settings),
        "times": {},
        "memory": [],
        "errors": {},
    }

    def isolated(function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        return bench.run_isolated(function, *args, preload=("torch", __name__), **more)

    if options.only in (None, "memory"):
        with progress.phase("peak memory", len(rows) * len(budgets)):
            for budget in budgets:
                for n in rows:
                    progress.step(f"{n:,} rows, budget {budget and budget >> 20} MiB")
                    case = replace(settings, rows=n, memory_budget=budget)
                    document["memory"].append(isolated(memory_process, case))
    if options.only in (None, "errors"):
        with progress.phase("errors", len(SAME)):
            for dtype in SAME:
                progress.step(dtype)
                n, vocab = ERRORS[options.device]
                case = replace(settings, rows=min(n, rows[-1]), vocab=min(vocab, settings.vocab), dtype=dtype)
                document["errors"][dtype] = isolated(error_process, case)
    if options.only in (None, "times"):
        ways = {AS_IT_COMES: False} | ({WARM: True} if device.type == "cpu" else {})
        with progress.phase("times", len(ways)):
            for how, raised in ways.items():
                document["times"][how] = isolated(
                    time_process, settings, raised, on_message=lambda text: progress.step(text, 0)
                )
                progress.step(how)
    if options.only:
        print(document[options.only])
        return 0
    document["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for line in notes(document):
        print(line)
    for title, head, body, left in tables(document):
        bench.print_table(title, head, body, left)
    whole = not (options.shape or options.widths or options.dtype)
    path = options.json or (RESULTS / f"linear-{options.device}.json" if whole else None)
    if path is not None:
        bench.write_json(path, document)
        path.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
        print(f"written: {path} and {path.with_suffix('.md')}")
    return 1 if options.check and targets(document) else 0
