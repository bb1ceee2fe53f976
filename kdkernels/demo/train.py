"""Training and scoring of one model: AdamW, warm-up, clipping; deterministic given the seed; resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import corpus
from .config import Recipe
from .model import Transformer
from .objectives import StepLoss
from .parts import Key, Part, Parts

# Writing a teacher's weights and moments takes 0.1 to 0.3 s: at most 2 % of the time between two checkpoints.
SECONDS_BETWEEN_CHECKPOINTS = 15.0

# Windows scored at once: as large as a training batch, so that scoring needs no more memory than training.
WINDOWS_AT_ONCE = 8


@dataclass(frozen=True)
class Data:
    """What a model is trained and scored on.

    Attributes:
        windows: [n, context + 1] training windows.
        validation: [m, context + 1] windows behind the learning curve.
        heldout: [k, context + 1] windows behind the table.
        token_bytes: [V] bytes of text that each token stands for.
        size: Windows of a step.
    """

    windows: np.ndarray
    validation: np.ndarray
    heldout: np.ndarray
    token_bytes: np.ndarray
    size: int

    @property
    def vocab(self) -> int:
        """V."""
        return len(self.token_bytes)

    @property
    def context(self) -> int:
        """Predictions of a window."""
        return self.windows.shape[1] - 1

    def seen(self, seed: int, steps: int) -> np.ndarray:
        """All windows of `steps` steps, in their order."""
        return np.concatenate([corpus.batch(self.windows, self.size, seed, step) for step in range(steps)])


def bits_per_byte(nats: float, scored: np.ndarray, token_bytes: np.ndarray) -> float:
    """Total nats of the predictions in windows [n, context + 1], over ln 2 and their bytes of text."""
    return nats / math.log(2) / int(token_bytes[scored[:, 1:]].sum())


@torch.no_grad()
def score(model: nn.Module, scored: np.ndarray, device: torch.device) -> float:
    """Total nats of the predictions in windows [n, context + 1]: each token but the first of its window."""
    total = 0.0
    for start in range(0, len(scored), WINDOWS_AT_ONCE):
        ids = torch.from_numpy(scored[start : start + WINDOWS_AT_ONCE]).to(device, torch.int64)
        logits = model(ids[:, :-1]).flatten(0, 1)
        total += F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
    return total


def rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step: a line up over the warm-up, level, a line down over the last `decay`."""
    up = (step + 1) / recipe.warmup
    down = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.learning_rate * min(1.0, up, down)


class Run:
    """One model in training: its weights, its optimizer's moments and its curves, at some step."""

    def __init__(
        self, recipe: Recipe, seed: int, data: Data, prior: np.ndarray, device: torch.device
    ) -> None:
        self.recipe, self.seed, self.data, self.device = recipe, seed, data, device
        torch.manual_seed(seed)
        priors = torch.from_numpy(prior).float()
        self.model = Transformer(data.vocab, data.context, recipe.shape, priors).to(device)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.step = 0
        self.seconds = 0.0
        self.losses: list[Tensor] = []
        self.curve: list[tuple[int, float]] = []  # (step, bits per byte on the validation windows)

    def advance(self, loss: StepLoss, validate_every: int) -> None:
        """One step of training."""
        if self.step == 0:
            self._validate()
        started = time.perf_counter()
        batch = corpus.batch(self.data.windows, self.data.size, self.seed, self.step)
        ids = torch.from_numpy(batch).to(self.device, torch.int64)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.recipe, self.step)
        value = loss(self.model, ids[:, :-1], ids[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.losses.append(value.detach())
        self.step += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - started
        if self.step % validate_every == 0 or self.step == self.recipe.steps:
            self._validate()

    def _validate(self) -> None:
        nats = score(self.model, self.data.validation, self.device)
        self.curve.append((self.step, bits_per_byte(nats, self.data.validation, self.data.token_bytes)))

    def part(self, moments: bool) -> Part:
        """The weights and curves, and with `moments` what training needs to go on."""
        arrays = {f"weight/{name}": p.detach().cpu().numpy() for name, p in self.model.named_parameters()}
        arrays["losses"] = np.array([value.item() for value in self.losses])
        arrays["curve"] = np.array(self.curve, dtype=np.float64).reshape(-1, 2)
        if moments:
            for name, p in self.model.named_parameters():
                for moment, value in self.optimizer.state[p].items():
                    arrays[f"{moment}/{name}"] = value.cpu().numpy()
        return Part({"step": self.step, "seconds": self.seconds}, arrays)

    def restore(self, part: Part) -> None:
        """Go on from where the part was taken; from one without moments, only to predict."""
        self.step, self.seconds = part.facts["step"], part.facts["seconds"]
        self.losses = [torch.tensor(value) for value in part.arrays["losses"]]
        self.curve = [(int(step), float(value)) for step, value in part.arrays["curve"]]
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(torch.from_numpy(part.arrays[f"weight/{name}"]))
                for moment in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{moment}/{name}" in part.arrays:
                        value = torch.from_numpy(part.arrays[f"{moment}/{name}"])
                        self.optimizer.state[p][moment] = value.to(self.device)


def train(
    run: Run,
    loss: StepLoss,
    validate_every: int,
    parts: Parts,
    name: str,
    key: Key,
    on_step: Callable[[float], None],
) -> None:
    """Train to the recipe's end, from the last checkpoint where there is one.

    Args:
        run: A fresh run.
        loss: The objective.
        validate_every: Steps between two points of the learning curve.
        parts: Where checkpoints go.
        name: The model's name; its checkpoint is `name` + "-unfinished".
        key: What the model depends on.
        on_step: Called after each step with its loss.
    """
    checkpoint = f"{name}-unfinished"
    if (part := parts.load(checkpoint, key)) is not None:
        run.restore(part)
        for value in run.losses:
            on_step(value.item())
    written = time.perf_counter()
    while run.step < run.recipe.steps:
        run.advance(loss, validate_every)
        on_step(run.losses[-1].item())
        if time.perf_counter() - written > SECONDS_BETWEEN_CHECKPOINTS:
            parts.save(checkpoint, key, run.part(moments=True))
            written = time.perf_counter()
