"""Unigram and bigram language models with absolute discounting: what a transformer has to beat.

Unigram: P(w)   = max(c(w) - d, 0) / n      + d · types / n         · 1 / V
Bigram:  P(w|u) = max(c(u, w) - d, 0) / c(u) + d · types(u) / c(u)  · P(w)

where types(u) counts the distinct successors of u, an unseen u leaves P(w), and d = n1 / (n1 + 2 n2) from the
numbers of n-grams seen once and twice (Ney, Essen and Kneser 1994). Both sum to one over the vocabulary.
"""

from __future__ import annotations

import numpy as np


def discount(counts: np.ndarray) -> float:
    """Ney's discount from the counts of the n-grams seen; 0.5 where none was seen once or none twice."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once and twice else 0.5


class Unigram:
    """P(w), fitted on the tokens `targets` over a vocabulary of `vocab` entries."""

    def __init__(self, targets: np.ndarray, vocab: int) -> None:
        counts = np.bincount(targets.reshape(-1), minlength=vocab).astype(np.float64)
        total, types = counts.sum(), (counts > 0).sum()
        d = discount(counts)
        self.probability = np.maximum(counts - d, 0) / total + d * types / total / vocab  # [V]

    def nats(self, targets: np.ndarray) -> float:
        """Total -log P of the targets."""
        return float(-np.log(self.probability[targets.reshape(-1)]).sum())


class Bigram:
    """P(w | u), fitted on the pairs (contexts, targets), backing off to the unigram of the same targets."""

    def __init__(self, contexts: np.ndarray, targets: np.ndarray, vocab: int) -> None:
        self.vocab = vocab
        self.unigram = Unigram(targets, vocab)
        pairs = contexts.reshape(-1).astype(np.int64) * vocab + targets.reshape(-1)
        self.pairs, counts = np.unique(pairs, return_counts=True)
        self.counts = counts.astype(np.float64)
        firsts = self.pairs // vocab
        self.totals = np.bincount(firsts, weights=self.counts, minlength=vocab)  # c(u), [V]
        self.types = np.bincount(firsts, minlength=vocab)  # types(u), [V]
        self.discount = discount(self.counts)

    def probability(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """P(target | context), elementwise over two arrays of ids."""
        pairs = contexts.astype(np.int64) * self.vocab + targets
        at = np.minimum(np.searchsorted(self.pairs, pairs), len(self.pairs) - 1)
        counts = np.where(self.pairs[at] == pairs, self.counts[at], 0.0)
        total = self.totals[contexts]
        safe = np.maximum(total, 1.0)
        seen = np.maximum(counts - self.discount, 0) / safe
        left = np.where(total > 0, self.discount * self.types[contexts] / safe, 1.0)
        return seen + left * self.unigram.probability[targets]

    def nats(self, contexts: np.ndarray, targets: np.ndarray) -> float:
        """Total -log P of the targets given their contexts."""
        return float(-np.log(self.probability(contexts.reshape(-1), targets.reshape(-1))).sum())
