"""What a run says at its end: figures of the student before and after and of the teacher, curves, options."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..bench import environment, markdown_table
from ..bench.memory import resource
from ..files import replacing
from ..pictures import draw_curves
from . import models
from .config import Config
from .models import Sides
from .plan import Amount, in_bytes
from .state import State

NAME = "report.md"
_HEADER = ["held out", "loss", "KL to the teacher", "cross-entropy", "perplexity", "agreement"]


def summary(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """The table of figures, a line for each row."""
    if not after:
        return ["nothing was held out, so that nothing was measured"]
    rows = [["student before", *_row(before)], ["student after", *_row(after)]]
    if (ce := after.get("teacher_cross_entropy")) is not None:
        rows.append(["teacher", *_row({"kl": 0.0, "cross_entropy": ce, "agreement": 1.0})])
    return markdown_table(_HEADER, rows).splitlines()


def write(
    config: Config, sides: Sides, state: State, after: Mapping[str, float],
    histories: Mapping[str, Sequence[Mapping[str, Any]]], amount: Amount, device: torch.device,
) -> None:  # fmt: skip
    """Writes the report and its pictures."""
    out = Path(config.out)
    pictures = []
    for stage, rows in histories.items():
        name = "curves.png" if len(histories) == 1 else f"curves-{stage}.png"
        draw_curves(out / name, rows, ("epoch", "items_per_second"))
        if (out / name).is_file():
            pictures.append((stage, name))
    taught = config.cache or ", ".join(config.teacher)
    system = environment(device, torch.get_num_threads())
    shown = {k: system[k] for k in ("device", "cpu", "cpus", "threads", "python", "torch") if system.get(k)}
    lines = [
        f"# Distilled from {taught}",
        "",
        f"{type(sides.student).__name__}, {models.parameters(sides.student):,} parameters, after "
        f"{amount.steps:,} steps of {config.batch_size} sequences in {amount.processes} process"
        f"{'es' if amount.processes > 1 else ''}: [student](student).",
        "",
        *summary(state.before, after),
        "",
        "KL(p‖q) of the teacher's distribution p and the student's q at T = 1 and the cross-entropy of the "
        "next token are in nats a token, perplexity is its exponential, agreement is the share of positions "
        "with the same most probable token; loss is what was minimised, where it is of predictions alone."
        + _of_draws(sides),
        "",
        f"Training and its evaluations took {state.seconds:,.0f} s. {_peak(device)}",
        "",
        *(line for stage, name in pictures for line in (f"![Curves of {stage}]({name})", "")),
        "## Options",
        "",
        "```yaml",
        *config.to_yaml().splitlines(),
        "```",
        "",
        "## Environment",
        "",
        *(f"- {name}: {value}" for name, value in shown.items()),
    ]
    with replacing(out / NAME) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(figures: Mapping[str, float]) -> list[str]:
    def shown(name: str, digits: str) -> str:
        return format(figures[name], digits) if name in figures else "—"

    perplexity = f"{math.exp(min(figures['cross_entropy'], 700)):,.2f}" if "cross_entropy" in figures else "—"
    return [shown("loss", ".4f"), shown("kl", ".4f"), shown("cross_entropy", ".4f"), perplexity,
            shown("agreement", ".1%")]  # fmt: skip


def _of_draws(sides: Sides) -> str:
    if sides.cache is None or sides.cache.manifest.kind != "sampled":
        return ""
    manifest = sides.cache.manifest
    return (
        f" Of this teacher {manifest.draws} draws a position are known, at T = {manifest.temperatures[0]:g}: "
        "KL is that of its shares as drawn, which is more than 0 for the teacher itself."
    )


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        return f"Peak of memory: {in_bytes(torch.cuda.max_memory_allocated(device))} allocated by torch."
    if resource is None:
        return "This system doesn't say the peak of memory."
    unit = 1 if sys.platform == "darwin" else 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"Peak of memory: {in_bytes(size)} resident, Python and its libraries included."
