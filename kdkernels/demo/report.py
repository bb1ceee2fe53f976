"""What the demo says at its end: the tables, the verdict, the reservations in words, and the curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bench import markdown_table
from . import cached_report
from .config import Head
from .head import IMPLEMENTATIONS
from .objectives import STUDENTS

# Fused and eager training do the same additions in another order; over the first steps nothing else differs.
EARLY_STEPS = 50
EARLY_TOLERANCE = 1e-3

# fp32 spellings of one loss over 128,256 classes differ by 1e-6 or so; beyond this they aren't one loss.
HEAD_TOLERANCE = 1e-4

BUSY_CPUS = 0.2

NAMES = {
    "hard": "student, hard labels only",
    "eager": "student, distilled, eager PyTorch",
    "kd_loss": "student, distilled, kd_loss",
    "heads": "student, distilled, kd_loss of heads",
}

# The objectives whose curves are compared with eager's, and what they are called there: kd_loss, for one.
FUSED = {objective: NAMES[objective].split(", ")[-1] for objective in STUDENTS if STUDENTS[objective].fused}

Figures = dict[str, Any]


def students(figures: Figures, objective: str) -> list[float]:
    """Held-out bits per byte of the students of one objective, a seed each."""
    return [student["bits_per_byte"] for student in figures["students"][objective]]


def size_of(head: dict[str, Any]) -> Head:
    """The size at which a head was measured: sizes are the same where these are equal."""
    return Head(head["rows"], head["vocab"], head["student_width"], head["teacher_width"])


def curve_differences(eager: Sequence[np.ndarray], fused: Sequence[np.ndarray]) -> dict[str, Any]:
    """The largest |eager - fused| of loss curves in nats, a pair a seed: in the first steps, and overall."""
    gaps = [np.abs(a - b) for a, b in zip(eager, fused, strict=True)]
    return {
        "early_steps": min(EARLY_STEPS, *(len(gap) for gap in gaps)),
        # np.max, since Python's max loses a NaN that doesn't come first.
        "early": float(np.max([gap[:EARLY_STEPS].max() for gap in gaps])),
        "overall": float(np.max([gap.max() for gap in gaps])),
    }


def verdict(figures: Figures) -> list[str]:
    """Why the run failed, a line for each condition that doesn't hold; empty where it succeeded."""
    failures = []
    teacher = figures["teacher"]["bits_per_byte"]
    for name in ("unigram", "bigram"):
        if not teacher < figures["baselines"][name]:
            failures.append(
                f"the teacher ({teacher:.3f} bits per byte) doesn't beat the {name} "
                f"({figures['baselines'][name]:.3f})"
            )
    hard = statistics.mean(students(figures, "hard"))
    if not teacher < hard:
        failures.append(
            f"the teacher ({teacher:.3f} bits per byte) doesn't beat the hard-label student ({hard:.3f})"
        )
    for objective in STUDENTS:
        if not np.isfinite(students(figures, objective)).all():
            failures.append(
                f"not measured: {NAMES[objective]}: a model diverged, its bits per byte are no number"
            )
    for objective, name in FUSED.items():
        difference = figures["curve_difference"][objective]
        if not difference["early"] <= EARLY_TOLERANCE:
            failures.append(
                f"the loss curves of {name} and eager differ by {difference['early']:.2g} nats in the first "
                f"{difference['early_steps']} steps, more than {EARLY_TOLERANCE:g}"
            )
        if difference["early_steps"] < EARLY_STEPS:
            failures.append(
                f"the loss curves of {name} and eager have {difference['early_steps']} steps, fewer than "
                f"{EARLY_STEPS}"
            )
    if "cached" in figures:
        failures += cached_report.failures(figures)
    return failures + _unmeasured(figures) + _disagreeing_heads(figures)


def _unmeasured(figures: Figures) -> list[str]:
    failures = []
    there = {(h["implementation"], size_of(h)) for h in figures["heads"]}
    for size in map(size_of, figures["config"]["heads"]):
        for implementation in IMPLEMENTATIONS:
            if (implementation, size) not in there:
                failures.append(f"not measured: {implementation} at {size.words}")
    for head in figures["heads"]:
        what = f"{head['implementation']} at {size_of(head).words}"
        if head.get("error"):
            failures.append(f"not measured: {what}: {head['error']}")
        elif head["peak_bytes"] is None:
            failures.append(f"not measured: peak memory of {what}: this system doesn't say")
    reasons = figures["backend"]["reasons"]
    # Where this version has a kernel for the device its absence fails; elsewhere a note says what ran.
    if figures["backend"]["name"] == "reference" and figures["environment"]["device"] == "cpu":
        failures.append(f"not measured: the fused kernel: kd_loss ran on 'reference' ({reasons['cpu']})")
    return failures


def _disagreeing_heads(figures: Figures) -> list[str]:
    failures = []
    measured = [head for head in figures["heads"] if not head.get("error")]
    truths = {size_of(h): h for h in measured if h["implementation"] == "eager"}
    for head in measured:
        truth = truths.get(size_of(head))
        for figure in ("loss", "gradient_norm"):
            if truth and not abs(head[figure] - truth[figure]) <= HEAD_TOLERANCE * abs(truth[figure]):
                failures.append(
                    f"{head['implementation']} and eager compute different losses at "
                    f"{size_of(head).words}: {figure} {head[figure]:.6g} and {truth[figure]:.6g}"
                )
    return failures


def distillation_in_words(figures: Figures) -> str:
    """Whether distillation beat hard labels at equal steps by more than the seeds' spread."""
    hard, distilled = students(figures, "hard"), students(figures, "kd_loss")
    gain = statistics.mean(hard) - statistics.mean(distilled)
    spread = max(max(hard) - min(hard), max(distilled) - min(distilled))
    figures_said = f"{gain:+.4f} bits per byte on average, spread over seeds {spread:.4f}"
    if max(distilled) < min(hard) and gain > spread:
        return f"Distillation beats hard labels at equal steps, beyond the seeds' spread ({figures_said})."
    if gain > 0:
        return f"Distillation does not beat hard labels beyond the seeds' spread ({figures_said})."
    return f"Distillation does not beat hard labels at equal steps: it is worse ({figures_said})."


def notes(figures: Figures) -> list[str]:
    """What a reader must know to read the tables rightly."""
    mix = figures["config"]["mix"]
    said = [
        distillation_in_words(figures),
        f"Distillation is {mix['soft_weight']:g} · KL(teacher‖student) + {mix['hard_weight']:g} · "
        f"cross-entropy at T = {mix['temperature']:g}; students of one seed share initial weights and data. "
        "A distilled step also runs the teacher, so equal steps are not equal time.",
        "kd_loss of heads is given both models' hidden states, weights and biases in the place of logits.",
        *(
            f"Largest difference between the eager and the {name} curves: {difference['early']:.2g} nats "
            f"over the first {difference['early_steps']} steps, {difference['overall']:.2g} overall."
            for name, difference in ((FUSED[o], d) for o, d in figures["curve_difference"].items())
        ),
        "All models are scored on the same predictions; the baselines are fitted on what the teacher saw.",
        "The loss head is inputs → loss → gradients of the student's inputs, fp32, median time; inputs are "
        "both sides' logits, or the hidden states and weights that they are made from; memory is the peak "
        "beyond the inputs; each row is from a process of its own.",
    ]
    if "cached" in figures:
        said += cached_report.notes(figures)
    backend = figures["backend"]
    if backend["name"] == "reference":
        why = "; ".join(f"{name}: {text}" for name, text in backend["reasons"].items() if text)
        said.append(f"kd_loss ran unfused, on its reference: no fused kernel runs here ({why}).")
    busy = [head["busy_neighbours"] or 0.0 for head in figures["heads"] if not head.get("error")]
    if busy and max(busy) > BUSY_CPUS:
        said.append(
            f"Other processes kept up to {max(busy):.1f} CPUs busy while the loss head was timed: "
            "its times are too high."
        )
    return said


def language_table(figures: Figures) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of language models."""
    header = ["model", "bits per byte, held out", "spread over seeds", "training tokens", "ms per step"]
    seen = f"{figures['teacher']['tokens']:,}"
    rows = [[name, f"{figures['baselines'][name]:.3f}", "", seen, ""] for name in ("unigram", "bigram")]
    teacher = figures["teacher"]
    rows.append(
        ["teacher", f"{teacher['bits_per_byte']:.3f}", "", seen, f"{1e3 * teacher['step_seconds']:.0f}"]
    )
    for objective in STUDENTS:
        scores = students(figures, objective)
        entries = figures["students"][objective]
        rows.append(
            [
                NAMES[objective],
                f"{statistics.mean(scores):.3f}",
                f"{min(scores):.3f} to {max(scores):.3f}",
                f"{entries[0]['tokens']:,}",
                f"{1e3 * statistics.median(e['step_seconds'] for e in entries):.0f}",
            ]
        )
    return header, rows


def head_table(figures: Figures) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of the loss head."""
    header = ["loss head", "from", "rows", "V", "ms per step", "× kd_loss", "peak MB"]
    fused = {
        size_of(h): h["seconds"]
        for h in figures["heads"]
        if h["implementation"] == "kd_loss" and not h.get("error")
    }
    rows = []
    for head in figures["heads"]:
        name = head["implementation"]
        if name == "kd_loss":
            name = f"kd_loss ({figures['backend']['name']})"
        size = size_of(head)
        first = [name, size.start, f"{size.rows:,}", f"{size.vocab:,}"]
        if head.get("error"):
            rows.append([*first, f"not measured: {head['error']}", "", ""])
            continue
        beside = fused.get(size)
        ratio = "" if beside is None else f"{head['seconds'] / beside:.1f}"
        memory = "not measured" if head["peak_bytes"] is None else f"{head['peak_bytes'] / 1e6:,.0f}"
        rows.append([*first, f"{1e3 * head['seconds']:.1f}", ratio, memory])
    return header, rows


def markdown(figures: Figures) -> str:
    """The whole report."""
    system, text = figures["environment"], figures["corpus"]
    failures = verdict(figures)
    lines = [
        "# A language model distilled on Python's standard library",
        "",
        f"{system['processor']}, {system['threads']} threads, device {system['device']}; "
        f"torch {system['torch']}, kdkernels {system['kdkernels']}, Python {system['python']}.",
        f"Text: {text['files']['train']} files to train on, {text['files']['heldout']} held out "
        f"({figures['scored_bytes']:,} of their {text['bytes']['heldout']:,} bytes scored); corpus hash "
        f"{text['sha256'][:16]}; byte-level BPE of {figures['vocab']:,} entries.",
        f"Trained and measured in {figures['seconds'] / 60:.1f} minutes.",
        "",
        markdown_table(*language_table(figures)),
        *([markdown_table(*cached_report.table(figures))] if "cached" in figures else []),
        markdown_table(*head_table(figures), left=2),
        *(f"- {note}" for note in notes(figures)),
        "",
        "**Failed.**" if failures else "**All conditions hold.**",
        *(f"- {failure}" for failure in failures),
    ]
    return "\n".join(lines) + "\n"


def plot(figures: Figures, path: Path) -> None:
    """Learning curves, the gaps between eager and fused, and the cost of the loss head, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {
        "hard": "#777777",
        "eager": "#d98200",
        "kd_loss": "#0060b0",
        "heads": "#a03080",
        "torch.compile": "#3f9b4f",
    }
    # The distilled students' curves are one: dashes of which each leaves the others' to be seen.
    styles: dict[str, Any] = {"hard": "-", "eager": "-", "kd_loss": (0, (4, 8)), "heads": (6, (4, 8))}
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    (learning, gap), (time, memory) = figure.subplots(2, 2)

    steps, bits = np.array(figures["curves"]["teacher"]).T
    learning.plot(steps, bits, color="black", linewidth=1.2, linestyle=(0, (1, 1)), label="teacher")
    for objective in STUDENTS:
        curves = np.array(figures["curves"][objective])  # [seeds, points, 2]
        steps, bits = curves[0, :, 0], curves[:, :, 1]
        learning.plot(
            steps,
            bits.mean(0),
            color=colours[objective],
            linestyle=styles[objective],
            label=NAMES[objective],
        )
        learning.fill_between(
            steps, bits.min(0), bits.max(0), color=colours[objective], alpha=0.15, linewidth=0
        )
    for name, value in figures["validation_baselines"].items():
        learning.axhline(value, color="black", linewidth=0.6, alpha=0.5)
        learning.annotate(
            name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9
        )
    learning.set(title="Learning (validation files)", xlabel="step", ylabel="bits per byte")
    learning.legend(frameon=False, handlelength=3.5)

    for objective, name in FUSED.items():
        for index, entry in enumerate(figures["curves"]["gap"][objective]):
            gap.semilogy(
                np.arange(1, len(entry) + 1),
                np.maximum(entry, 1e-9),
                color=colours[objective],
                linewidth=1,
                alpha=0.7,
                label=f"{name}, each seed" if index == 0 else None,
            )
    gap.plot(
        [1, EARLY_STEPS], [EARLY_TOLERANCE] * 2, color="#b00020", linewidth=1.5, label="allowed, first steps"
    )
    gap.set(
        title="|eager − fused| of the training loss",
        xlabel="step",
        ylabel="nats (equal losses drawn at 1e-9)",
    )
    gap.legend(frameon=False)

    sizes = list(dict.fromkeys(map(size_of, figures["heads"])))
    names = list(dict.fromkeys(h["implementation"] for h in figures["heads"]))
    labels = [f"{size.rows:,} × {size.vocab:,}\n" + size.start.replace(", ", ",\n") for size in sizes]
    for axes, what, scale, title in (
        (time, "seconds", 1e3, "Loss head: time (ms)"),
        (memory, "peak_bytes", 1e-6, "Loss head: peak memory beyond the inputs (MB)"),
    ):
        for index, name in enumerate(names):
            heads = {size_of(h): h for h in figures["heads"] if h["implementation"] == name}
            values = [scale * (heads[size].get(what) or 0.0) for size in sizes]
            at = np.arange(len(sizes)) + (index - (len(names) - 1) / 2) * 0.8 / len(names)
            bars = axes.bar(at, values, 0.75 / len(names), color=colours[name], label=name)
            axes.bar_label(bars, [f"{v:,.0f}" if v else "not measured" for v in values], fontsize=9)
        axes.set_xticks(range(len(sizes)), labels)
        axes.set(title=title, xlabel="rows × vocabulary, and what it starts from")
        axes.margins(y=0.12)
    memory.legend(frameon=False)
    for axes in (learning, gap, time, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")
