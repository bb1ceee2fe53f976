"""Which sequences of which shards a hash may mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .bits import Bytes, Ints
from .keys import hashes
from .shard import Shard

Keys = NDArray[np.uint64]


class Index:
    """The first 8 bytes of all hashes, sorted; some 16 bytes for each sequence and each of its beginnings.

    Of sequences that are in several parts the first counts.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._first = np.cumsum([0, *(len(s) for s in shards)])
        whole = np.concatenate([np.zeros((0, 16), np.uint8), *(s.hashes for s in shards)])
        first, second = _keys(whole[:, :8]), _keys(whole[:, 8:])
        order = np.lexsort((second, first))  # stable: of the same the first comes first
        again = (np.diff(first[order]) == 0) & (np.diff(second[order]) == 0)
        self._unique = np.sort(order[np.concatenate([[True], ~again])[: len(order)]])
        self._keys = _Sorted(first, np.arange(len(whole)))
        prefixes = np.concatenate([np.zeros((0, 8), np.uint8), *(s.prefixes for s in shards)])
        lengths = [np.diff(s.first_prefix) for s in shards]
        owners = np.repeat(np.arange(len(whole)), np.concatenate([np.zeros(0, np.int64), *lengths]))
        self._prefixes = _Sorted(_keys(prefixes), owners)

    def __len__(self) -> int:
        return len(self._unique)

    def entries(self) -> Iterator[tuple[Shard, int]]:
        """Every sequence, by shard and number."""
        for n in self._unique:
            yield self._at(int(n))

    def find(self, tokens: Ints, causal: bool) -> Iterator[tuple[Shard, int]]:
        """What may hold a sequence, the likeliest first: whoever reads it compares the tokens."""
        content, prefixes = hashes(tokens)
        for n in self._keys.find(content[:8]):
            shard, number = self._at(n)
            if shard.length(number) == len(tokens):
                yield shard, number
        if causal:
            for n in self._prefixes.find(prefixes[-1].tobytes()):
                shard, number = self._at(n)
                if shard.length(number) > len(tokens):
                    yield shard, number

    def _at(self, n: int) -> tuple[Shard, int]:
        shard = int(np.searchsorted(self._first, n, side="right")) - 1
        return self._shards[shard], n - int(self._first[shard])


class _Sorted:
    """A map from keys to numbers, several to a key, in two arrays."""

    def __init__(self, keys: Keys, values: Ints) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys, self._values = keys[order], values[order]

    def find(self, key: bytes) -> Iterator[int]:
        number = np.frombuffer(key, "<u8")
        begin, end = (int(np.searchsorted(self._keys, number, side=s)[0]) for s in ("left", "right"))
        for n in range(begin, end):
            yield int(self._values[n])


def _keys(octets: Bytes) -> Keys:
    return np.ascontiguousarray(octets).view("<u8")[:, 0].astype(np.uint64)
