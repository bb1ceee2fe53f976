"""``python -m benchmarks parallel``: a vocabulary that is shared out over processes.

Each of several gloo processes has its classes of the same rows. What they pass to collectives is counted,
forward and backward, for every divergence, beside what `kdkernels.bench.scale` says of it; every loss and
gradient is compared with that of whole rows in float64. Then forward and backward are timed, a thread for
each process, beside whole rows in one process with as many threads: fused, and on the reference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import kdkernels as kd
from kdkernels import bench
from kdkernels.bench import scale
from kdkernels.bench.traffic import counted

RESULTS = Path(__file__).parent / "results"
ALLOWED = 64  # bytes of a row and step, of logits without stats
DIVERGENCES: tuple[Any, ...] = (
    "forward_kl", "reverse_kl", "soft_cross_entropy", kd.JSD(), kd.SkewKL(), kd.SkewReverseKL(), "tvd",
    "squared_error", kd.AlphaBeta(0.2, 0.7), kd.DKD(), kd.LogitMSE(), kd.LogitMSE(centered=True),
)  # fmt: skip
TIMED = ("forward_kl", kd.JSD())
T, HARD = 2.0, 0.1


def data(rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels; the same in every process."""
    g = torch.Generator().manual_seed(0)
    z, v = (2 * torch.randn(rows, vocab, generator=g) for _ in range(2))
    return z, v, torch.randint(vocab, (rows,), generator=g)


def shard(x: Tensor) -> Tensor:
    """This process's classes."""
    return x.tensor_split(dist.get_world_size(), -1)[dist.get_rank()].contiguous()


def step(z: Tensor, v: Tensor, y: Tensor, divergence: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient."""
    leaf = z.detach().requires_grad_()
    loss = kd.kd_loss(leaf, v, y, divergence=divergence, temperature=T, hard_weight=HARD, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def best(call: Callable[[], Any], rounds: int, between: Callable[[], Any]) -> float:
    """Milliseconds of the fastest."""
    found = []
    for _ in range(rounds):
        between()
        begin = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begin))
    return min(found)


def process(rank: int, world: int, folder: str, rows: int, vocab: int, rounds: int) -> None:
    """What one process counts and times, as JSON in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    parallel, found = kd.VocabParallel(), {}
    z, v, y = data(64, 1024)
    step(shard(z), shard(v), y, "forward_kl", vocab_parallel=parallel)  # sizes are told of once
    for divergence in DIVERGENCES:
        with counted() as calls:
            loss, gradient = step(shard(z), shard(v), y, divergence, vocab_parallel=parallel)
        exact, expected = step(z.double(), v.double(), y, divergence, backend="reference")
        found[str(divergence)] = {
            "calls": [call._asdict() for call in calls],
            "bytes_a_row": sum(call.bytes for call in calls) / len(z),
            "formula": 4 * sum(scale.row_numbers(divergence, temperature=T, fused=True)),
            "loss_error": float((loss.double() - exact).abs() / exact.abs()),
            "gradient_error": float((gradient - shard(expected)).abs().max() / expected.abs().max()),
        }
    z, v, y = data(rows, vocab)
    mine, parallel, times = (shard(z), shard(v)), kd.VocabParallel(), {}
    for divergence in TIMED:
        once = partial(step, *mine, y, divergence, vocab_parallel=parallel)
        times[str(divergence)] = best(once, rounds, dist.barrier)
    Path(folder, f"{rank}.json").write_text(json.dumps({"counted": found, "times": times}))
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    p = argparse.ArgumentParser(prog="python -m benchmarks parallel", description=__doc__)
    p.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    p.add_argument("--rows", type=int, default=256, help="of what is timed; default: %(default)s")
    p.add_argument("--vocab", type=int, default=128_256, help="of what is timed; default: %(default)s")
    p.add_argument("--rounds", type=int, default=8, help="of which the fastest counts; default: %(default)s")
    p.add_argument("--json", type=Path, default=RESULTS / "parallel-cpu.json", metavar="PATH")
    p.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    o = p.parse_args(arguments)
    neighbours, progress = bench.Neighbours(), bench.Progress()
    with tempfile.TemporaryDirectory() as folder, progress.phase("processes", 2):
        mp.spawn(process, (o.processes, folder, o.rows, o.vocab, o.rounds), nprocs=o.processes)
        progress.step("counted and timed")
        each = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(o.processes)]
        torch.set_num_threads(o.processes)
        z, v, y = data(o.rows, o.vocab)
        times = {}
        for d in TIMED:
            whole = {
                name: best(lambda d=d, b=b: step(z, v, y, d, backend=b), o.rounds, lambda: None)
                for name, b in (("fused", None), ("reference", "reference"))
            }
            times[str(d)] = {"shards": max(one["times"][str(d)] for one in each), **whole}
        progress.step("whole rows")
    found = each[0]["counted"]
    most = max(x["bytes_a_row"] for one in each for x in one["counted"].values())
    predicted = all(x["bytes_a_row"] == x["formula"] for one in each for x in one["counted"].values())
    errors = [
        max(x[e] for one in each for x in one["counted"].values()) for e in ("loss_error", "gradient_error")
    ]
    document = {
        "schema": 1, "environment": bench.environment(torch.device("cpu"), 1), "processes": o.processes,
        "rows": o.rows, "vocab": o.vocab, "counted": [one["counted"] for one in each], "times_ms": times,
        "other_cpus": neighbours.cpus(),
    }  # fmt: skip
    head = ["divergence", "collectives", "bytes a row", "formula", "error of loss", "of gradient"]
    body = [
        [
            name, ", ".join(f"{x['kind']} {x['bytes'] // 64}" for x in f["calls"]), f"{f['bytes_a_row']:g}",
            str(f["formula"]), f"{f['loss_error']:.0e}", f"{f['gradient_error']:.0e}",
        ]
        for name, f in found.items()
    ]  # fmt: skip
    head_of_times = ["divergence", "shards, ms", "whole rows, fused", "whole rows, reference"]
    of_times = [
        [name, *(f"{x[k]:,.0f}" for k in ("shards", "fused", "reference"))] for name, x in times.items()
    ]
    bench.print_table("what a process hands in, of a row", head, body, 2)
    bench.print_table(f"({o.rows:,}, {o.vocab:,}), float32, forward and backward", head_of_times, of_times, 1)
    verdict = (
        f"{o.processes} processes, labels and T = {T:g}: at most {most:g} bytes a row and step, {ALLOWED} "
        f"allowed, {'as' if predicted else 'NOT as'} the formulas say; none in backward. Errors beside whole "
        f"rows in float64: at most {errors[0]:.0e} of the loss and {errors[1]:.0e} of the largest gradient."
    )
    print(verdict)
    bench.write_json(o.json, document)
    o.json.with_suffix(".md").write_text(
        f"# A vocabulary shared out over processes\n\n`python -m benchmarks parallel`\n\n- {verdict}\n\n"
        f"{bench.markdown_table(head, body, 2)}\n"
        f"({o.rows:,}, {o.vocab:,}), float32, forward and backward, the fastest of {o.rounds}; a thread for "
        "each process, and as many for whole rows in one.\n\n"
        f"{bench.markdown_table(head_of_times, of_times, 1)}",
        encoding="utf-8",
    )  # fmt: skip
    return int(o.check and not (most <= ALLOWED and predicted))
