"""`kdkernels demo --cached`: what the students' sequences are to the teacher, stored once; then no teacher.

A step's windows are a function of (seed, step), so the sequences that the live students of all seeds see are
known ahead. Exactly these are cached, and the cached students see the same ones in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import bench
from ..cache import Manifest, TeacherCache
from ..sparse import Tail, TopK
from . import objectives
from .config import Mix
from .model import Transformer
from .objectives import StepLoss
from .train import WINDOWS_AT_ONCE, Data, Run

# What a kill loses: about 6 s of building on 2 CPU cores. An interruption from the keyboard loses nothing.
SHARD_BYTES = 4 << 20

# Timed steps of each objective.
SPEED_ROUNDS = 12


@dataclass(frozen=True)
class Stored:
    """How much of the teacher is kept of each position.

    Attributes:
        k: Most probable classes.
        draws: Classes drawn from it.
    """

    k: int = 64
    draws: int = 64


@dataclass(frozen=True)
class Arm:
    """One way of storing a teacher and of reading what was stored."""

    kind: str
    tail: Tail = "ghost"

    def label(self, stored: Stored) -> str:
        """What the table calls it."""
        return f"{self.tail} top-{stored.k}" if self.kind == "topk" else f"sampled {stored.draws}"


# The students of the table, in its order.
ARMS = {
    "ghost": Arm("topk", "ghost"),
    "zero": Arm("topk", "zero"),
    "renormalize": Arm("topk", "renormalize"),
    "sampled": Arm("sampled"),
}


def sequences(data: Data, seeds: Sequence[int], steps: int) -> np.ndarray:
    """What the students of all seeds see in `steps` steps: [n, context], each once, in its order."""
    seen = np.concatenate([data.seen(seed, steps) for seed in seeds])[:, :-1]
    _, first = np.unique(seen, axis=0, return_index=True)
    return seen[np.sort(first)]


def weights_hash(model: nn.Module) -> str:
    """What a trained model is, as the revision of a manifest."""
    whole = hashlib.sha256()
    for name, weight in model.named_parameters():
        whole.update(name.encode() + b"\0" + weight.detach().cpu().numpy().tobytes())
    return whole.hexdigest()[:32]


def manifests(
    stored: Stored, mix: Mix, teacher: Transformer, vocab: int, tokenizer: str
) -> dict[str, Manifest]:
    """What the cache of each kind is of.

    Args:
        stored: How much is kept.
        mix: Its temperature is one that the students ask for.
        teacher: The trained teacher.
        vocab: V.
        tokenizer: A hash of what made the token ids.
    """
    shape = f"{len(teacher.blocks)} x {teacher.embed.embedding_dim}"
    common: dict[str, Any] = {
        "teacher": f"kdkernels demo, {shape}",
        "vocab_size": vocab,
        "temperatures": (mix.temperature,),
        "dtype": "float32",
        "revision": weights_hash(teacher),
        "tokenizer": tokenizer,
    }
    return {
        "topk": Manifest(k=stored.k, **common),
        # No more different classes can be drawn than there are.
        "sampled": Manifest(k=min(stored.draws, vocab), kind="sampled", draws=stored.draws, **common),
    }


def folder_of(out: Path, manifest: Manifest) -> Path:
    """Where the cache of a manifest is: another teacher's or another k's is another folder."""
    return out / f"teacher-{manifest.kind}-{manifest.digest}"


@torch.no_grad()
def build(
    caches: Mapping[Path, Manifest],
    teacher: Transformer,
    rows: np.ndarray,
    device: torch.device,
    on_batch: Callable[[int, bool], None],
) -> None:
    """Ask the teacher about what is missing in any of the caches, once for all of them.

    Batches are the same wherever an earlier build ended, and so are the logits' bits.

    Args:
        caches: What is stored, by its folder.
        teacher: The trained teacher.
        rows: The sequences, [n, context], each once.
        device: Where the teacher is.
        on_batch: Called with the number of sequences that are done with, and whether the teacher ran.

    Raises:
        CacheError: A folder holds something else, is damaged, or can't be written.
    """
    with ExitStack() as open_:
        writers = [
            open_.enter_context(TeacherCache.create(folder, manifest, shard_bytes=SHARD_BYTES))
            for folder, manifest in caches.items()
        ]
        for start in range(0, len(rows), WINDOWS_AT_ONCE):
            batch = rows[start : start + WINDOWS_AT_ONCE]
            missing = [(writer, n) for n, ids in enumerate(batch) for writer in writers if ids not in writer]
            if missing:
                logits = teacher(torch.from_numpy(batch).to(device, torch.int64))
                for writer, n in missing:
                    writer.append_logits(batch[n], logits[n])
            on_batch(len(batch), bool(missing))


def mass(cache: TeacherCache, rows: np.ndarray) -> float:
    """The teacher's mass in the classes that are stored, at T = 1: the mean over all positions."""
    total = 0.0
    for start in range(0, len(rows), WINDOWS_AT_ONCE):
        found = cache.lookup_packed(rows[start : start + WINDOWS_AT_ONCE])
        assert isinstance(found, TopK) and found.lse is not None
        total += (found.log_probs - found.lse[1.0][:, None]).exp().sum().item()
    return total / rows.size


def step_loss(cache: TeacherCache, mix: Mix) -> StepLoss:
    """The loss of a training step whose teacher is looked up by the batch's ids."""
    loss = objectives.fused(mix)

    def step(model: Transformer, ids: Tensor, labels: Tensor) -> Tensor:
        teacher = cache.lookup_packed(ids.cpu()).to(ids.device)
        return loss(objectives.logits(model, ids), teacher, labels)

    return step


def speed_rounds(steps: int) -> int:
    """How many steps of each objective are timed, where the teacher is stored for `steps` of them."""
    return max(1, min(SPEED_ROUNDS, steps - 3))


def steps_per_second(
    losses: Mapping[str, StepLoss], fresh: Callable[[], Run], on_round: Callable[[int], None]
) -> dict[str, float]:
    """Training steps a second of each objective, by the median over steps of throwaway students.

    A step of each in turn, so that a slow spell of the machine falls on all: the students of the table were
    trained minutes apart, or in an earlier run.

    Args:
        losses: The objectives.
        fresh: Makes an untrained student of a seed whose teacher is stored.
        on_round: Called with the number of each finished round.
    """
    runs = {name: fresh() for name in losses}
    steps = next(iter(runs.values())).recipe.steps
    never = steps + 1

    def contestant(name: str) -> bench.Contestant:
        return bench.Contestant(name, lambda _: runs[name].advance(losses[name], never))

    for name, run in runs.items():
        run.advance(losses[name], never)  # the first one scores the validation windows, too
    rounds = speed_rounds(steps)
    timings = bench.race(
        [contestant(name) for name in losses],
        sets=1,
        # Of the host: looking up is a part of a step.
        clock=bench.clock_for(torch.device("cpu")),
        min_rounds=rounds,
        max_rounds=rounds,
        on_round=on_round,
    )
    return {name: 1 / timing.median for name, timing in timings.items()}
