"""A teacher run over texts: batches of similar lengths, logits for some rows at a time, and going on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .errors import CacheError
from .folder import answers
from .rows import stride
from .texts import Count, Tokens
from .writer import CacheWriter

# Tokens that are sorted by length at a time: batches pad little, and little waits in memory.
_AHEAD = 1 << 20


@dataclass
class Built:
    """What a run has done.

    Attributes:
        sequences: That it added.
        tokens: Of those.
        known: Sequences that were there already, or twice in the files.
        seconds: That it took.
    """

    sequences: int = 0
    tokens: int = 0
    known: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def build(
    writer: CacheWriter,
    model: Any,
    sequences: Iterable[Tokens],
    count: Count,
    batch_tokens: int,
    tell: Callable[[Built, int], None],
) -> Built:
    """Appends what a model says to sequences that the cache doesn't have.

    Args:
        writer: Of the cache.
        model: A causal language model.
        sequences: Token ids.
        count: What reading them counts.
        batch_tokens: Of a batch at most, padding included; a longer sequence is a batch of its own.
        tell: Called after each batch with what is done and the bytes of the files that are.
    """
    done, started = Built(), time.perf_counter()
    for group in _groups(_new(writer, sequences, done), done):
        before, behind = count.bytes, sum(map(len, group))
        for batch in batches(group, batch_tokens):
            try:
                for tokens, made in zip(batch, answers(model, batch), strict=True):
                    done.sequences += writer.append_logits(tokens, made)
            except torch.OutOfMemoryError as error:
                raise CacheError(
                    f"--batch-tokens {batch_tokens} is more than the memory holds; what was done is "
                    f"kept, and the same command with fewer goes on: {str(error).splitlines()[0]}"
                ) from error
            done.tokens = writer.tokens
            done.seconds = time.perf_counter() - started
            behind -= sum(map(len, batch))
            # What was read of this group and is not done yet, by its share of all tokens.
            tell(done, int(before * (1 - behind / max(done.tokens + behind, 1))))
    done.seconds = time.perf_counter() - started
    tell(done, count.bytes)
    return done


def batches(group: Iterable[Tokens], batch_tokens: int) -> Iterator[list[Tokens]]:
    """Sequences of similar lengths together, the longest first: what is too large fails at once."""
    batch: list[Tokens] = []
    for tokens in sorted(group, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch


def bytes_per_token(writer: CacheWriter) -> float:
    """Of a row and its checksums."""
    return stride(writer.manifest) + 12 / 64


def _new(writer: CacheWriter, sequences: Iterable[Tokens], done: Built) -> Iterator[Tokens]:
    for tokens in sequences:
        if tokens in writer:
            done.known += 1
        else:
            yield tokens


def _groups(sequences: Iterable[Tokens], done: Built) -> Iterator[list[Tokens]]:
    iterator = iter(sequences)
    while first := list(itertools.islice(iterator, 1)):
        group, held = {tuple(first[0]): first[0]}, len(first[0])
        while held < _AHEAD and (more := next(iterator, None)) is not None:
            if tuple(more) in group:
                done.known += 1
            else:
                group[tuple(more)], held = more, held + len(more)
        yield list(group.values())
