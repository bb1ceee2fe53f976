"""Makes ``tests/data/cache-v1``, caches of format version 1, which every later release has to read.

    python tests/cache_v1.py

Once it is released it is not made again: what it holds is what people have on their disks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdkernels import Sampled, TopK
from kdkernels.cache import Manifest, TeacherCache

FOLDER = Path(__file__).parent / "data" / "cache-v1"
VOCAB, K, DRAWS, LENGTHS = 300, 8, 16, (5, 64, 90)
TOP_K = Manifest(
    "teacher", vocab_size=VOCAB, k=K, temperatures=(1, 2), dtype="float64", tokenizer="a", revision="b"
)
SAMPLED = Manifest("teacher", vocab_size=VOCAB, k=K, kind="sampled", temperatures=(1.5,), draws=DRAWS)


def sequences() -> list[tuple[Any, Any]]:
    """Token ids and logits; a legacy generator, whose numbers don't change with NumPy."""
    random = np.random.RandomState(1)
    return [(random.randint(0, VOCAB, n), 3 * random.randn(n, VOCAB)) for n in LENGTHS]


def log_softmax(x: Any) -> Any:
    """In double precision."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def counts(length: int) -> tuple[Any, Any]:
    """Ids, the last of them none, and how often each was drawn."""
    ids = np.arange(length)[:, None] + 37 * np.arange(K)
    number = np.array([1, 2, 3, 1, 1, 1, 7, 0])
    return np.where(number > 0, ids % VOCAB, -1), np.broadcast_to(number, ids.shape)


def make() -> None:
    """Both caches, anew."""
    with TeacherCache.create(FOLDER / "topk", TOP_K, shard_bytes=3000) as writer:
        for tokens, logits in sequences():
            lp = log_softmax(logits)
            ids = np.argsort(-lp, axis=1, kind="stable")[:, :K]
            half = np.log(np.exp(lp / 2).sum(1))
            kept = torch.from_numpy(np.take_along_axis(lp, ids, axis=1))
            teacher = TopK(torch.from_numpy(ids), kept, lse={2.0: torch.from_numpy(half)})
            writer.append(tokens, teacher)
    with TeacherCache.create(FOLDER / "sampled", SAMPLED) as writer:
        for tokens, _ in sequences()[:1]:
            ids, number = (torch.from_numpy(x.copy()) for x in counts(len(tokens)))
            writer.append(tokens, Sampled(ids, number / DRAWS, temperature=1.5))
    for lock in FOLDER.glob("*/*.lock"):
        lock.unlink()


if __name__ == "__main__":
    make()
