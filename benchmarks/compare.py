"""``python -m benchmarks compare``: everything beside everyone on this machine, in 15 minutes.

Language models end to end; then what ``kdkernels bench`` measures (logits, heads, stored teachers: a middle
size of each, and V, N, divergence, T and dtype around it) with liger-kernel, TRL, cut-cross-entropy and
quack-kernels beside eager PyTorch, `torch.compile` and `kd_loss`, in as many passes as there is time for: the
more, the less chance is in a ratio. ``--agree FOLDER`` compares the ratios with those of another run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import e2e
from benchmarks.e2e_peers import PEERS as MODEL_PEERS
from kdkernels.bench import e2e as models
from kdkernels.bench import isolated, measure, workloads
from kdkernels.bench.report import command_line
from kdkernels.bench_cli import cores, device_of, write

RESULTS = Path(__file__).parent / "results"
PEERS = "benchmarks.peers"
# How long, and for how many rounds, each size is timed at least in a pass.
SECONDS, ROUNDS = 1.0, 5
# Of the losses; one process for each size and pass, which on a GPU is slow to start.
PASSES = {"cpu": 6, "cuda": 2}
# No pass of the losses, after the second, ends later; charts and pages take seconds more.
MINUTES = 14.5
# How far a ratio of two runs on one quiet machine may be apart.
ALLOWED = 0.10
# Points beyond those around a centre: a vocabulary of models that people distil.
MORE = {"cpu": [measure.Point("logits", 64, 151_936)], "cuda": []}


def ratios(losses: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every contestant's time over that of `kd_loss`, by what it is of."""
    for point in losses["points"]:
        for entry in point["entries"]:
            if entry["time"] and entry["time"]["ratio"] and entry["family"] != measure.OURS:
                yield f"{measure.described(point)}, {entry['name']}", float(entry["time"]["ratio"])


def ceilings(losses: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The milliseconds of what those of a size are held to, memory or products alone, by the same names."""
    for point in losses["points"]:
        for entry in point["entries"]:
            if point["ceiling"] is not None:
                yield f"{measure.described(point)}, {entry['name']}", float(point["ceiling"]["best_ms"])


def model_ratios(document: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Likewise of the models."""
    for pair in document["pairs"]:
        for name, ratio in ((pair["time"] or {}).get("ratios") or {}).items():
            yield f"{pair['family']}, {name}", float(ratio)


def disagreements(one: dict[str, float], other: dict[str, float]) -> list[tuple[str, float, float, float]]:
    """What both have: its name, both ratios, and how far apart they are, the furthest first."""
    both = [(name, a, other[name]) for name, a in one.items() if name in other]
    apart = [(name, a, b, abs(a - b) / min(a, b)) for name, a, b in both]
    return sorted(apart, key=lambda each: -each[3])


def agreement(
    one: dict[str, float],
    other: dict[str, float],
    ceilings: tuple[dict[str, float], dict[str, float]] = ({}, {}),
) -> int:
    """Says how far two runs are apart; 1 where a ratio is further than is allowed, else 0.

    With the ceilings of both it also says where the machine itself was not the same: memory that others have
    more of in one of the runs slows down those who are bound by it, and nobody else.
    """
    found = disagreements(one, other)
    beyond = [each for each in found if each[3] > ALLOWED]
    machine = {name: apart for name, *_, apart in disagreements(*ceilings) if apart > ALLOWED}
    for name, a, b, apart in beyond:
        also = f"; the ceiling itself {100 * machine[name]:.0f} %" if name in machine else ""
        print(f"  {name}: {a:.3g} and {b:.3g}, {100 * apart:.0f} % apart{also}")
    if not found:
        print("the two runs have no ratio in common")
        return 1
    middle = found[len(found) // 2][3]
    print(
        f"{len(found)} ratios of both runs: {len(found) - len(beyond)} within {100 * ALLOWED:.0f} %, half of "
        f"them within {100 * middle:.1f} %, the furthest {100 * found[0][3]:.0f} % apart"
    )
    return int(bool(beyond))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--quick", action="store_true", help="the middle sizes and one pair of models: minutes")
    p.add_argument("--only", choices=("losses", "models"), help="one part")
    seconds, minutes = "of a size in a pass, at least", "no pass but the first two ends later"
    p.add_argument("--seconds", type=float, default=SECONDS, help=f"{seconds}: %(default)s")
    p.add_argument("--minutes", type=float, default=MINUTES, help=f"{minutes}: %(default)s")
    p.add_argument("--out", type=Path, help="default: benchmarks/results, or runs/compare for less than all")
    p.add_argument("--agree", type=Path, metavar="FOLDER", help="another run's --out: 1 where a ratio is off")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes, compares, and returns the exit status."""
    p = parser()
    options = p.parse_args(arguments)
    device = device_of(options.device)
    # Now: where this run writes, the other is gone in the end.
    other = earlier(options.agree, device) if options.agree else {}
    other_held = earlier(options.agree, device, ("ceilings",)) if options.agree else {}
    if options.agree and not other:
        p.error(f"--agree must be the --out of another run on this kind of device, got {options.agree}")
    started = time.perf_counter()
    whole = not (options.quick or options.only or options.seconds != SECONDS or options.minutes != MINUTES)
    out = options.out or (RESULTS if whole else Path("runs/compare"))
    found: dict[str, float] = {}
    held: dict[str, float] = {}
    passes = 1 if options.quick else PASSES[device]
    # As memory comes, most of what an eager loss costs on a CPU is page faults, a third more or less in
    # the next run. Where freed memory is kept nobody pays for them.
    settings = measure.Settings(
        cores(),
        rounds=max(20, passes * ROUNDS),
        seconds=passes * options.seconds,
        passes=passes,
        compiled=not options.quick,
        raised=device == "cpu",
        modules=(PEERS,),
    )
    of_models = [m for m in (*models.METHODS, *MODEL_PEERS) if m.why_not(device) is None]
    isolated.start([*measure.preload(settings), *models.preload(of_models, models.settings_for(device))])
    if options.only != "losses":
        folder = [] if out == RESULTS else ["--out", str(out)]
        e2e.main(["--device", device, *(["--quick"] if options.quick else []), *folder])
        found |= earlier(out, device, ("models",))
    if options.only != "models":
        names, plan = workloads.WORKLOADS, measure.centres if options.quick else measure.star
        points = [*plan(device, names), *([] if options.quick else MORE[device])]
        left = 60 * options.minutes - (time.perf_counter() - started)
        losses = measure.measure(points, replace(settings, most_seconds=round(left)))
        quick = ["--quick"] if options.quick else []
        losses["command"] = command_line("benchmarks", ["compare", *quick, "--device", device])
        write(losses, out / f"compare-{device}")
        found |= dict(ratios(losses))
        held = dict(ceilings(losses))
    print(f"all of it took {time.perf_counter() - started:.0f} s")
    return agreement(found, other, (held, other_held)) if options.agree else 0


def earlier(folder: Path, device: str, parts: Sequence[str] = ("losses", "models")) -> dict[str, float]:
    """The ratios that a run has written, or what else a part is of."""
    found: dict[str, float] = {}
    files = {
        "losses": (f"compare-{device}/bench.json", ratios),
        "ceilings": (f"compare-{device}/bench.json", ceilings),
        "models": (f"e2e-{device}.json", model_ratios),
    }
    for name, read in (files[part] for part in parts):
        if (folder / name).is_file():
            found |= dict(read(json.loads((folder / name).read_text(encoding="utf-8"))))
    return found
