"""``python -m benchmarks strategies``: every strategy of `kdkernels.train.recipes` beside its control.

Runs what `strategies_plan` has committed: tunes every arm over as many configurations on the validation
split, then trains it on ten other seeds and evaluates it on the test split; `strategies_stats` says of every
claim whether it reproduces. On real data that is here already: scikit-learn's digits and the sources of
Python's standard library. Every finished fit is kept under runs/strategies and not done again; processes
share them, as many as `--jobs`. `--quick` takes minutes: two seeds, a tenth of the steps, no tuning, so that
it says only whether all of it runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import kdkernels as kd
from benchmarks import (
    strategies_adversarial,
    strategies_derivatives,
    strategies_several,
    strategies_specialists,
    strategies_text,
)
from benchmarks import strategies_fits as fits
from benchmarks import strategies_plan as plan
from benchmarks import strategies_report as report
from kdkernels import bench
from kdkernels.bench.report import command_line

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/strategies")
FITS: dict[str, Any] = {
    "classify": fits.classify,
    "mythical": fits.mythical,
    "gradients": fits.gradients,
    "convolve": fits.convolve,
    "multilabel": fits.multilabel,
    "language": strategies_text.language,
    **strategies_several.FITS,
    **strategies_derivatives.FITS,
    **strategies_adversarial.FITS,
    **strategies_specialists.FITS,
}


@dataclass(frozen=True)
class Cell:
    """One fit: an arm of an experiment, in one of its configurations, with one seed."""

    experiment: str
    arm: str
    configuration: int
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """What the fit is given."""
        arm = plan.EXPERIMENTS[self.experiment].arms[self.arm]
        return {**arm.options, **arm.grid[self.configuration]}

    def path(self, folder: Path) -> Path:
        """Where it is kept."""
        return folder / self.experiment / self.arm / f"{self.configuration}-{self.seed}.json"

    def __str__(self) -> str:
        return f"{self.experiment} {self.arm} {self.configuration} seed {self.seed}"


class Runs:
    """The fits that are done, and the doing of others.

    Args:
        folder: Where each is kept, in a file of its own.
        share: The part of the planned steps that fits and teachers take.
    """

    def __init__(self, folder: Path, share: float = 1.0) -> None:
        self.folder, self.share, self.lab = folder, share, fits.Lab(folder, share)
        self.done: dict[Cell, dict[str, Any]] = {}

    def steps(self, cell: Cell) -> int:
        """Of a fit."""
        return max(1, round(plan.EXPERIMENTS[cell.experiment].steps * self.share))

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What was found, or None where it has to be done: it wasn't, or another plan's was."""
        if cell not in self.done:
            try:
                found = json.loads(cell.path(self.folder).read_text(encoding="utf-8"))
            except (FileNotFoundError, json.JSONDecodeError):
                return None
            if found.get("plan") != plan.fingerprint(cell.experiment, cell.options, self.steps(cell)):
                return None
            self.done[cell] = found
        return self.done[cell]

    def do(self, cell: Cell) -> dict[str, Any]:
        """One fit; its file is there whole or not at all."""
        steps, options = self.steps(cell), cell.options
        before, started = dict(self.lab.seconds), time.perf_counter()
        metrics = FITS[plan.EXPERIMENTS[cell.experiment].fit](self.lab, cell.seed, steps, **options)
        took = time.perf_counter() - started
        teachers = {
            kind: seconds - before.get(kind, 0.0)
            for kind, seconds in self.lab.seconds.items()
            if seconds != before.get(kind)
        }
        found = {
            **asdict(cell),
            "metrics": metrics,
            "seconds": took - sum(teachers.values()),
            "teachers": teachers,
            "steps": steps,
            "plan": plan.fingerprint(cell.experiment, options, steps),
        }
        bench.write_json(cell.path(self.folder), found)
        self.done[cell] = found
        return found

    def all(self, name: str, cells: Iterable[Cell], progress: bench.Progress, jobs: int = 1) -> None:
        """Those that aren't done, seed by seed, so that arms share teachers; each process has its own."""
        left = [cell for cell in dict.fromkeys(cells) if self.read(cell) is None]
        if not left:
            return
        with progress.phase(name, len(left)):
            for cell in self._each(sorted(left, key=lambda cell: cell.seed), jobs, progress):
                progress.step(str(cell))

    def _each(self, cells: Sequence[Cell], jobs: int, progress: bench.Progress) -> Iterator[Cell]:
        """Does them; gives each that is done."""
        if jobs == 1:
            for cell in cells:
                progress.step(str(cell), 0)
                self.do(cell)
                yield cell
            return
        parts: dict[tuple[int, str], list[Cell]] = {}
        for cell in cells:
            parts.setdefault((cell.seed, cell.experiment), []).append(cell)
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            futures = [pool.submit(_do, self.folder, self.share, part) for part in parts.values()]
            for future in as_completed(futures):
                yield from (cell for cell in future.result() if self.read(cell) is not None)


# Of this process, so that its teachers are made once.
_HERE: dict[tuple[Path, float], Runs] = {}


def _do(folder: Path, share: float, cells: Sequence[Cell]) -> Sequence[Cell]:
    """Some fits, in a process of their own."""
    torch.set_num_threads(1)
    runs = _HERE.setdefault((folder, share), Runs(folder, share))
    for cell in cells:
        runs.do(cell)
    return cells


def selected(only: str | None) -> dict[str, plan.Claim]:
    """Claims by their names, or those of experiments or strategies.

    Raises:
        ValueError: A name that nothing has.
    """
    if only is None:
        return dict(plan.CLAIMS)
    asked = [name.strip() for name in only.split(",") if name.strip()]
    found: dict[str, plan.Claim] = {}
    for name in asked:
        hits = {
            key: claim
            for key, claim in plan.CLAIMS.items()
            if name in (key, claim.experiment, plan.EXPERIMENTS[claim.experiment].strategy)
        }
        if not hits:
            known = [*plan.CLAIMS, *plan.EXPERIMENTS, *(e.strategy for e in plan.EXPERIMENTS.values())]
            raise ValueError(f"--only must name some of {', '.join(dict.fromkeys(known))}, got {name!r}")
        found.update(hits)
    return found


def arms_of(claims: Mapping[str, plan.Claim]) -> list[tuple[str, str]]:
    """All arms of the experiments that claims are about: those of no claim are for the figures."""
    names = dict.fromkeys(claim.experiment for claim in claims.values())
    return [(name, arm) for name in names for arm in plan.EXPERIMENTS[name].arms]


def tuning_cells(experiment: str, arm: str) -> list[Cell]:
    """None where there is nothing to choose."""
    size = plan.budget(plan.EXPERIMENTS[experiment])
    if size == 1:
        return []
    return [Cell(experiment, arm, n, seed) for n in range(size) for seed in plan.TUNING_SEEDS]


def scores(runs: Runs, experiment: str, arm: str) -> list[list[float]]:
    """What tuning goes by: for each configuration, of each tuning seed."""
    metric, found = plan.EXPERIMENTS[experiment].tuned_on, {}  # type: str, dict[int, list[float]]
    for cell in tuning_cells(experiment, arm):
        fit = runs.read(cell)
        assert fit is not None, cell
        found.setdefault(cell.configuration, []).append(fit["metrics"][metric])
    return list(found.values())


def chosen(runs: Runs, experiment: str, arm: str) -> int:
    """The configuration of an arm with the best mean on the tuning seeds; of equal ones the first."""
    found = scores(runs, experiment, arm)
    return max(range(len(found)), key=lambda n: fmean(found[n]), default=0)


def brief(fit: Mapping[str, Any]) -> dict[str, Any]:
    """Of a fit what figures are made of; the rest is in the plan."""
    return {name: fit[name] for name in ("experiment", "arm", "configuration", "seed", "metrics", "steps")}


def predicted(runs: Runs, arms: Sequence[tuple[str, str]]) -> float:
    """Seconds of the whole table, from the fits that are done, whatever their part of the steps."""
    total, teachers = 0.0, {}  # type: float, dict[str, list[float]]
    for experiment, arm in arms:
        done = [f for cell, f in runs.done.items() if (cell.experiment, cell.arm) == (experiment, arm)]
        if not done:
            continue
        each = fmean(found["seconds"] / found["steps"] for found in done)
        fits_of_arm = len(tuning_cells(experiment, arm)) + len(plan.TEST_SEEDS)
        total += each * plan.EXPERIMENTS[experiment].steps * fits_of_arm
        for found in done:
            for kind, seconds in found["teachers"].items():
                teachers.setdefault(kind, []).append(seconds / runs.share)
    seeds = len(plan.TUNING_SEEDS) + len(plan.TEST_SEEDS)
    # The text's teacher is one for all seeds.
    return total + sum(fmean(s) * (1 if kind.startswith("text") else seeds) for kind, s in teachers.items())


def run(
    claims: Mapping[str, plan.Claim], runs: Runs, quick: bool, progress: bench.Progress, jobs: int = 1
) -> dict[tuple[str, str], list[Cell]]:
    """Does what is left to do; gives the test cells of every arm."""
    arms = arms_of(claims)
    seeds = plan.QUICK_SEEDS if quick else plan.TEST_SEEDS
    tuning = {} if quick else {key: tuning_cells(*key) for key in arms}
    first = [cells[0] if (cells := tuning.get(key)) else Cell(*key, 0, seeds[0]) for key in arms]
    runs.all("one fit of every arm", first, progress)  # and with them the teachers that are kept
    minutes = predicted(runs, arms) / 60 / jobs
    progress.say(
        f"tuning and all seeds at full length: about {minutes:.0f} minutes in all, with this machine as it is"
    )
    runs.all("tuning", [cell for cells in tuning.values() for cell in cells], progress, jobs)
    best = {key: 0 if quick else chosen(runs, *key) for key in arms}
    found = {key: [Cell(*key, best[key], seed) for seed in seeds] for key in arms}
    runs.all("test", [cell for cells in found.values() for cell in cells], progress, jobs)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks strategies", description=__doc__)
    p.add_argument("--quick", action="store_true", help="minutes: two seeds, short fits, no tuning")
    p.add_argument("--only", metavar="NAME,...", help="claims, experiments or strategies; default: all")
    p.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where strategies.json, strategies.md and figures are written",
    )
    p.add_argument(
        "--runs", type=Path, default=RUNS, metavar="FOLDER", help="where fits are kept; default: %(default)s"
    )
    p.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes; default: %(default)s"
    )
    p.add_argument("--plan", action="store_true", help="print the plan as JSON, and do nothing")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    options = parser().parse_args(arguments)
    if options.plan:
        print(json.dumps(plan.document(), indent=1))
        return 0
    try:
        claims = selected(options.only)
    except ValueError as error:
        parser().error(str(error))
    # Nets are so small that a second thread waits more than it works, and sums would depend on their number.
    torch.set_num_threads(1)
    share = plan.QUICK_SHARE if options.quick else 1.0
    runs = Runs(options.runs / ("quick" if options.quick else "full"), share)
    progress, started = bench.Progress(), time.perf_counter()
    jobs = max(1, options.jobs)
    cells = run(claims, runs, options.quick, progress, jobs)
    document: dict[str, Any] = {
        "schema": 1,
        "command": command_line("benchmarks", ["strategies", *(arguments or [])]),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": time.perf_counter() - started,
        "predicted_seconds": predicted(runs, arms_of(claims)) / jobs,
        "jobs": jobs,
        "kdkernels": kd.__version__,
        "versions": {
            n: importlib.metadata.version(n) for n in ("scikit-learn", "transformers", "accelerate")
        },
        "environment": bench.environment(torch.device("cpu"), 1),
        "quick": options.quick,
        "plan": plan.document(),
        "chosen": {f"{e}/{a}": of_arm[0].configuration for (e, a), of_arm in cells.items()},
        "tuning": {} if options.quick else {f"{e}/{a}": scores(runs, e, a) for e, a in cells},
        "cells": [brief(runs.done[cell]) for of_arm in cells.values() for cell in of_arm],
        "claims": report.judged(
            claims, {key: [runs.done[c] for c in of_arm] for key, of_arm in cells.items()}
        ),
    }
    for line in report.notes(document):
        print(line)
    for title, head, body, left in report.tables(document):
        bench.print_table(title, head, body, left)
    whole = not (options.quick or options.only)
    folder = options.out or (RESULTS if whole else None)
    if folder is not None:
        bench.write_json(folder / "strategies.json", document)
        report.draw(document, folder / "strategies")
        (folder / "strategies.md").write_text(report.markdown(document), encoding="utf-8")
        print(f"written: {folder / 'strategies.json'}, .md and figures")
    return 0
