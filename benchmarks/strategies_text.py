"""Fits of `python -m benchmarks strategies` on text: masked bytes of the sources of the standard library.

Files are split, not bytes: of every five, in order of their names, one is for test, one for validation.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from benchmarks import strategies_claims as plan
from benchmarks.strategies_fits import Lab, Metrics, adamw, carried_out, is_test, seeded
from kdkernels.train import Adaptor, Distiller, HardLabels, Objective, recipes

BYTES, MASK, UNKNOWN = 129, 128, ord("?")
# Short, for then a net that learns where to look does so in hundreds of steps.
LENGTH, MASKED, BATCH, HELD_BATCHES = 16, 3, 64, 32
TEACHER_STEPS, TEACHER_RATE = 2400, 3e-3
# Of so few classes they are smaller than hidden states.
LOGITS = Adaptor(heads=False)


def files() -> dict[str, list[Path]]:
    """Of each split.

    Raises:
        FileNotFoundError: This Python has no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(root.glob("*.py"))
    if len(found) < 50:
        raise FileNotFoundError(
            f"{root} holds {len(found)} .py files, and the text is the sources of Python's standard library: "
            "use a Python that has them"
        )
    parts: dict[str, list[Path]] = {"test": found[2::5], "validation": found[1::5]}
    parts["train"] = [path for number, path in enumerate(found) if number % 5 not in (1, 2)]
    return parts


@lru_cache(maxsize=3)
def text(part: str) -> Tensor:
    """All bytes of a split's files; what isn't ASCII is a question mark."""
    whole = bytearray(b"".join(path.read_bytes() for path in files()[part]))
    found = torch.frombuffer(whole, dtype=torch.uint8).long()
    return torch.where(found < MASK, found, UNKNOWN)


def masked(part: str, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of pieces of text, as many bytes of each masked."""
    given, generator, found = text(part), torch.Generator().manual_seed(seed), []
    for _ in range(count):
        begin = torch.randint(len(given) - LENGTH, (BATCH, 1), generator=generator)
        x = given[begin + torch.arange(LENGTH)]
        where = torch.rand(BATCH, LENGTH, generator=generator).argsort(1)[:, :MASKED]
        labels = torch.full_like(x, -100).scatter(1, where, x.gather(1, where))
        found.append({"input_ids": x.scatter(1, where, MASK), "labels": labels})
    return found


def bert(layers: int) -> nn.Module:
    """64 wide, 4 heads."""
    config = BertConfig(
        vocab_size=BYTES, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=LENGTH, type_vocab_size=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config)


@torch.no_grad()
def masked_accuracy(net: nn.Module, part: str) -> float:
    """Of masked bytes, the per cent that are predicted."""
    right = count = 0
    for batch in masked(part, HELD_BATCHES, seed=5):
        hidden = batch["labels"] != -100
        guess = net(input_ids=batch["input_ids"]).logits.argmax(-1)
        right, count = right + int((guess == batch["labels"])[hidden].sum()), count + int(hidden.sum())
    return 100.0 * right / count


def kept_teacher(
    lab: Lab, kind: str, net: Callable[[], nn.Module], batches: Callable[[int], Any]
) -> nn.Module:
    """One teacher for all seeds, trained on its labels; it is kept, and an interrupted training goes on."""

    def make() -> nn.Module:
        made, steps = seeded(1000, net), lab.steps(TEACHER_STEPS)
        schedule = partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=TEACHER_RATE, total_steps=steps, pct_start=0.1
        )
        distiller = Distiller(
            made, objective=Objective(hard=HardLabels()), optimizer=adamw(TEACHER_RATE), scheduler=schedule,
            adaptor=LOGITS, clip=1.0, folder=lab.folder / f"{kind}-teacher-{plan.VERSION}-{steps}",
        )  # fmt: skip
        distiller.resume()
        if distiller.progress.step < steps:
            distiller.fit(batches(steps), steps=steps, save_every=200, keep=1, progress=False)
        return made.eval()

    return lab.teacher(kind, 0, make)


def teacher_of(lab: Lab) -> nn.Module:
    """Four layers, of masked bytes."""
    return kept_teacher(lab, "text", lambda: bert(4), lambda steps: masked("train", steps, seed=6))


def language(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, intermediate: bool = True, **options: Any
) -> Metrics:  # fmt: skip
    """A student of two layers, by the triple loss or in TinyBERT's two stages."""
    teacher, student = teacher_of(lab), seeded(seed, lambda: bert(2))
    part = "test" if is_test(seed) else "validation"
    made = getattr(recipes, recipe)(student, teacher, optimizer=adamw(lr), adaptor=LOGITS, **options)
    if not intermediate:
        made.stages = made.stages[1:]
    loader = masked("train", steps, seed=1000 + seed)
    ended = carried_out(made, loader, steps)
    known = lab.teacher(f"text, {part} accuracy", 0, lambda: masked_accuracy(teacher, part))
    return {"accuracy": masked_accuracy(student, part), "teacher_accuracy": known, **ended}
