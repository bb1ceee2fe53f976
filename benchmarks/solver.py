"""``python -m benchmarks solver``: how long `recipes.combine` takes, and whether descent finds the same.

10,000 rows of 1,000 classes and 20 specialists, whose predictions are the generalist's with noise of their
own: on sets of classes that are disjoint or overlap at random, with all specialists asked or those who know
the generalist's first class. On some of the rows L-BFGS of SciPy minimises the divergence itself, over the
logits of all classes in float64, begun at the generalist, which needs nothing of what `combine` makes use of.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from kdkernels import bench
from kdkernels.train.recipes import active_specialists
from kdkernels.train.recipes.specialist_solver import combination_gradient, combine_with_stats

RESULTS = Path(__file__).parent / "results"
ALLOWED_SECONDS, ALLOWED_DIFFERENCE = 5.0, 1e-6
# Of each how many classes a specialist has, whether they overlap, and whether all are asked.
CASES = {
    "disjoint, asked by the first class": (50, False, False),
    "disjoint, all asked": (50, False, True),
    "overlapping, asked by the first class": (300, True, False),
    "overlapping, all asked": (300, True, True),
}


def problem(
    rows: int, classes: int, specialists: int, size: int, overlapping: bool, everyone: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
    """What `combine` takes, float32."""
    g = torch.Generator().manual_seed(0)
    z = 2.0 * torch.randn(rows, classes, generator=g)
    order, found = torch.randperm(classes, generator=g), []
    for m in range(specialists):
        own = torch.randperm(classes, generator=g)[:size] if overlapping else order[m * size : (m + 1) * size]
        theirs = z + torch.randn(rows, classes, generator=g)
        rest = theirs.index_fill(1, own, -torch.inf).logsumexp(1, keepdim=True)
        rest += torch.randn(rows, 1, generator=g)
        found.append((own, torch.cat([theirs[:, own], rest], 1).softmax(-1)))
    active = active_specialists(z, [own for own, _ in found])
    return z.softmax(-1), found, torch.ones_like(active) if everyone else active


def descended(p: Tensor, given: list[tuple[Tensor, Tensor]], active: Tensor) -> Tensor:
    """The optimum of one row, by L-BFGS."""
    outside = [torch.ones(p.shape[1], dtype=torch.bool).index_fill_(0, own, False) for own, _ in given]

    def value(z: Any) -> tuple[float, Any]:
        x = torch.as_tensor(z)
        q = x.softmax(-1)
        loss = -(p[0] * x.log_softmax(-1)).sum()
        for m, (own, theirs) in enumerate(given):
            if active[0, m]:
                loss -= (theirs[0, :-1] * x.log_softmax(-1)[own]).sum() + theirs[0, -1] * q[
                    outside[m]
                ].sum().log()
        return float(loss), combination_gradient(q[None], p, given, active)[0].numpy()

    options = {"maxiter": 20_000, "maxfun": 40_000, "maxcor": 50, "ftol": 0.0, "gtol": 1e-11}
    found = minimize(value, p[0].log().numpy(), jac=True, method="L-BFGS-B", options=options)
    return torch.as_tensor(found.x).softmax(-1)


def measure(
    rows: int, classes: int, specialists: int, repeats: int, compared: int, case: tuple[int, bool, bool]
) -> dict[str, float]:
    """Seconds of `combine`, and how far from descent it is."""
    p, given, active = problem(rows, classes, specialists, *case)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        found = combine_with_stats(p, given, active)
        seconds.append(time.perf_counter() - begin)
    some = torch.linspace(0, rows - 1, compared).long().unique()
    difference = 0.0
    for row in some.tolist():
        one, exact = slice(row, row + 1), p[row : row + 1].double()
        theirs = [(own, s[one].double() / s[one].double().sum()) for own, s in given]
        other = descended(exact / exact.sum(), theirs, active[one])
        difference = max(difference, float((found.probabilities[row] - other).abs().max()))
    return {
        "seconds": min(seconds), "asked": float(active.sum(1).float().mean()),
        "iterations": float(found.iterations.float().mean()), "most_iterations": int(found.iterations.max()),
        "residual": float(found.residual.max()), "compared": len(some), "difference": difference,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    p = argparse.ArgumentParser(prog="python -m benchmarks solver", description=__doc__)
    p.add_argument("--rows", type=int, default=10_000, help="default: %(default)s")
    p.add_argument("--classes", type=int, default=1000, help="default: %(default)s")
    p.add_argument("--specialists", type=int, default=20, help="default: %(default)s")
    p.add_argument("--repeats", type=int, default=3, help="of which the fastest counts; default: %(default)s")
    p.add_argument("--compared", type=int, default=5, help="rows of each case; default: %(default)s")
    p.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    p.add_argument("--json", type=Path, default=RESULTS / "solver-cpu.json", metavar="PATH")
    p.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = p.parse_args(arguments)
    torch.set_num_threads(options.threads)
    neighbours, progress, found = bench.Neighbours(), bench.Progress(), {}
    sizes = options.rows, options.classes, options.specialists
    with progress.phase("cases", len(CASES)):
        for name, case in CASES.items():
            found[name] = measure(*sizes, options.repeats, options.compared, case)
            progress.step(name)
    slowest = max(each["seconds"] for each in found.values())
    furthest = max(each["difference"] for each in found.values())
    document = {
        "schema": 1, "environment": bench.environment(torch.device("cpu"), options.threads),
        "rows": options.rows, "classes": options.classes, "specialists": options.specialists,
        "cases": found, "other_cpus": neighbours.cpus(),
    }  # fmt: skip
    head = ["classes of specialists", "asked", "seconds", "iterations", "most", "residual", "to descent"]
    body = [
        [
            name, f"{f['asked']:.1f}", f"{f['seconds']:.2f}", f"{f['iterations']:.1f}",
            str(f["most_iterations"]), f"{f['residual']:.0e}", f"{f['difference']:.0e}",
        ]
        for name, f in found.items()
    ]  # fmt: skip
    bench.print_table("combine", head, body, 1)
    verdict = (
        f"{options.rows:,} rows × {options.classes:,} classes × {options.specialists} specialists on "
        f"{options.threads} thread(s): at most {slowest:.2f} s; {ALLOWED_SECONDS:g} allowed. At most "
        f"{furthest:.0e} from L-BFGS on {options.compared} rows of each; {ALLOWED_DIFFERENCE:g} allowed."
    )
    print(verdict)
    bench.write_json(options.json, document)
    title = f"# Generalist and specialists as one\n\n`python -m benchmarks solver`\n\n- {verdict}\n\n"
    options.json.with_suffix(".md").write_text(title + bench.markdown_table(head, body, 1), encoding="utf-8")
    missed = slowest > ALLOWED_SECONDS or furthest > ALLOWED_DIFFERENCE
    return 1 if options.check and missed else 0
