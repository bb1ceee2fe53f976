"""``python -m benchmarks trainer``: what a step of `Distiller` costs beside the same step written by hand.

Soft targets and labels on a model of one layer, so small that nothing is measured but Python: both take the
same batches in turn, a round of each after the other, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kdkernels as kd
from kdkernels import bench
from kdkernels.train import Distiller, HardLabels, Objective, SoftTargets

RESULTS = Path(__file__).parent / "results"
ALLOWED_US = 150
ROWS, FEATURES, CLASSES = 16, 20, 10
TEMPERATURE, SOFT, HARD = 4.0, 0.9, 0.1


class Batches:
    """The same batch many times."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.count, self.x = count, torch.randn(ROWS, FEATURES, generator=generator)
        self.y = torch.randint(0, CLASSES, (ROWS,), generator=generator)

    def __iter__(self) -> Iterator[Any]:
        return iter([(self.x, self.y)] * self.count)


def models() -> tuple[nn.Module, nn.Module]:
    """Student and teacher."""
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The cheapest optimizer there is."""
    return torch.optim.SGD(parameters, lr=0.1)


def by_hand(steps: int) -> float:
    """Seconds a step, with the look at the loss that a loop needs to stop at a NaN."""
    student, teacher = models()
    optimizer = sgd(student.parameters())
    begin = time.perf_counter()
    for x, y in Batches(steps):
        with torch.no_grad():
            v = teacher(x)
        loss = kd.kd_loss(student(x), v, y, temperature=TEMPERATURE, soft_weight=SOFT, hard_weight=HARD)
        if not loss.isfinite():
            raise ArithmeticError
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - begin) / steps


def by_distiller(steps: int) -> float:
    """Seconds a step, those around the first and the last included."""
    student, teacher = models()
    terms = {
        "soft": SoftTargets(temperature=TEMPERATURE, weight=SOFT),
        "hard": HardLabels(HARD),
    }
    distiller = Distiller(student, teacher, Objective(**terms), sgd)
    begin = time.perf_counter()
    distiller.fit(Batches(steps), steps=steps, progress=False)
    return (time.perf_counter() - begin) / steps


def measure(
    rounds: int, steps: int, on_round: Callable[[int], None] = lambda n: None
) -> dict[str, list[float]]:
    """Seconds a step of both, round by round."""
    for run in (by_hand, by_distiller):
        run(20)
    found: dict[str, list[float]] = {"by hand": [], "Distiller": []}
    for n in range(rounds):
        on_round(n)
        found["by hand"].append(by_hand(steps))
        found["Distiller"].append(by_distiller(steps))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    p = argparse.ArgumentParser(prog="python -m benchmarks trainer", description=__doc__)
    p.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    p.add_argument("--steps", type=int, default=1000, help="steps of a round; default: %(default)s")
    p.add_argument("--json", type=Path, default=RESULTS / "trainer-cpu.json", metavar="PATH")
    p.add_argument("--check", action="store_true", help="exit with 1 if the target is missed")
    options = p.parse_args(arguments)
    torch.set_num_threads(1)
    neighbours, progress = bench.Neighbours(), bench.Progress()
    with progress.phase("rounds", options.rounds):
        found = measure(options.rounds, options.steps, lambda n: progress.step(f"{n + 1}"))
    more = 1e6 * (min(found["Distiller"]) - min(found["by hand"]))
    document = {
        "schema": 1, "environment": bench.environment(torch.device("cpu"), 1), "steps": options.steps,
        "seconds": found, "more_us": more, "other_cpus": neighbours.cpus(),
    }  # fmt: skip
    rows = [[name, f"{1e6 * min(s):,.0f}", f"{1e6 * statistics.median(s):,.0f}"] for name, s in found.items()]
    head = ["a step", "best µs", "median µs"]
    bench.print_table("A step on a model of one layer", head, rows, 1)
    verdict = f"Distiller takes {more:,.0f} µs more; {ALLOWED_US} allowed."
    print(verdict)
    bench.write_json(options.json, document)
    title = f"# A step of the trainer\n\n`python -m benchmarks trainer`\n\n- {verdict}\n\n"
    options.json.with_suffix(".md").write_text(title + bench.markdown_table(head, rows, 1), encoding="utf-8")
    return 1 if options.check and more > ALLOWED_US else 0
