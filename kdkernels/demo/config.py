"""The numbers of the demo, each with what it was chosen by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from .model import Shape


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        shape: Its size.
        steps: Optimizer steps.
        learning_rate: AdamW's, at its highest.
        warmup: Steps over which the rate rises from 0.
        decay: The last part of the steps, over which it falls back to 0.
        weight_decay: On matrices only.
        clip: The largest norm of the gradient.
    """

    shape: Shape
    steps: int
    learning_rate: float
    warmup: int = 20
    decay: float = 0.7
    weight_decay: float = 0.01
    clip: float = 1.0


@dataclass(frozen=True)
class Mix:
    """The distillation objective: soft_weight · T² · KL(p‖q) + hard_weight · cross-entropy."""

    # Seed 0 on the validation files, at a student's learning rate of 4e-3, bits per byte: 1.963 for these;
    # 1.970 for (1, 1, 0), 1.978 for (1, 0.7, 0.3), 1.988 for (2, 0.9, 0.1).
    temperature: float = 1.0
    soft_weight: float = 0.9
    hard_weight: float = 0.1


@dataclass(frozen=True)
class Head:
    """One size at which the loss alone is measured.

    Attributes:
        rows: N.
        vocab: V.
        student_width: Of the student's hidden states, where it is measured from those; 0 for logits.
        teacher_width: The same of the teacher's; both are 0 or neither.
        repeats: Timed calls; the table has the median.

    Raises:
        ValueError: One side has a width and the other hasn't.
    """

    rows: int
    vocab: int
    student_width: int = 0
    teacher_width: int = 0
    repeats: int = 15

    def __post_init__(self) -> None:
        if (self.student_width == 0) != (self.teacher_width == 0):
            raise ValueError(f"both widths must be 0 or neither, got {self.widths}")

    @property
    def widths(self) -> tuple[int, int]:
        """The student's and the teacher's."""
        return self.student_width, self.teacher_width

    @property
    def start(self) -> str:
        """What it is measured from, in words."""
        if not self.student_width:
            return "logits"
        return f"hidden states, {self.student_width} and {self.teacher_width} wide"

    @property
    def words(self) -> str:
        """The size as a message names it."""
        return f"V = {self.vocab:,} from {self.start}"


@dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
        vocab: Entries of the tokenizer that the models are trained with.
        context: Tokens of a window.
        windows: Windows of a step; a step has windows · context tokens.
        teacher: How the teacher is trained.
        student: How each student is trained, whatever its objective.
        seeds: Each gives every objective one student, with the same initial weights and batches.
        mix: The objective of the distilled students.
        heldout_windows: Windows of the held-out files that the table's figures are scored on.
        validation_windows: Windows of the validation files that the learning curves are drawn from.
        validate_every: Steps between two points of those curves.
        heads: The sizes at which the loss head is measured.
    """

    # Learning per second: more entries say more per token, fewer make more steps. At 16,384 a distilled step
    # takes twice as long, and the teacher is no better after the same time (1.90 bits per byte against 1.85
    # on the validation files).
    vocab: int = 8192
    context: int = 128
    windows: int = 8
    teacher: Recipe = field(default_factory=lambda: Recipe(Shape(4, 256, 4), steps=300, learning_rate=2e-3))
    # The rate that is best for hard labels, not for distillation: on the validation files 2.239, 2.125, 2.099
    # and 2.109 bits per byte at 2e-3, 4e-3, 8e-3 and 1.2e-2.
    student: Recipe = field(default_factory=lambda: Recipe(Shape(2, 128, 2), steps=100, learning_rate=8e-3))
    seeds: tuple[int, ...] = (0, 1, 2)
    mix: Mix = field(default_factory=Mix)
    heldout_windows: int = 384
    validation_windows: int = 32
    validate_every: int = 20
    # About 134 MB a tensor at the first two sizes and 263 at the third, and the eager loss makes several:
    # 8 GB of memory are enough. The products of the third take seconds, so there are fewer of them.
    heads: tuple[Head, ...] = (
        Head(1024, 32_768),
        Head(256, 128_256),
        Head(512, 128_256, 256, 384, repeats=3),
    )


# How long the steps of `Config` take on 2 CPU cores, and how much of that doesn't grow with the steps.
MINUTES = 7.0
FIXED_MINUTES = 2.5


def config_for(minutes: float = MINUTES, seeds: int = 3) -> Config:
    """The configuration that takes about `minutes` on 2 CPU cores: more steps, nothing else.

    Raises:
        ValueError: fewer minutes than the default or no number of them, or fewer than two seeds, which have
            no spread.
    """
    if not MINUTES <= minutes < math.inf:
        raise ValueError(f"--minutes must be at least {MINUTES:g}, got {minutes:g}")
    if seeds < 2:
        raise ValueError(
            f"--seeds must be at least 2, so that there is a spread to compare with, got {seeds}"
        )
    config = Config(seeds=tuple(range(seeds)))
    factor = (minutes - FIXED_MINUTES) / (MINUTES - FIXED_MINUTES)
    return replace(
        config,
        teacher=replace(config.teacher, steps=round(config.teacher.steps * factor)),
        student=replace(config.student, steps=round(config.student.steps * factor)),
    )
