"""Numbers of any width and sorted sets as bytes, rows at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import CacheError

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def packed_bytes(count: int, width: int) -> int:
    """How many bytes `count` numbers of `width` bits take."""
    return -(-count * width // 8)


def pack(values: Ints, width: int) -> Bytes:
    """Numbers `[n, count]` of up to 32 bits as bytes `[n, packed_bytes(count, width)]`, lowest bit first."""
    n, count = values.shape
    octets = np.ascontiguousarray(values.astype("<u4")).view(np.uint8).reshape(n, count, 4)
    bits = np.unpackbits(octets[..., : -(-width // 8)], axis=-1, bitorder="little")[..., :width]
    return np.packbits(bits.reshape(n, count * width), axis=-1, bitorder="little")


def unpack(octets: Bytes, count: int, width: int) -> Ints:
    """The numbers `[n, count]` that `pack` made the bytes of."""
    if width == 0:
        return np.zeros((len(octets), count), np.int64)
    at = np.arange(count, dtype=np.int64) * width
    first, shift = at >> 3, at & 7
    padded = np.pad(octets, ((0, 0), (0, 5)))
    values = padded[:, first].astype(np.int64)
    for n in range(1, (width + 6) // 8 + 1):
        values |= padded[:, first + n].astype(np.int64) << (8 * n)
    values >>= shift
    values &= (1 << width) - 1
    return values


class SortedSet:
    """`count` rising numbers from 0 to `largest` in a fixed number of bytes: Elias and Fano's code.

    The low bits of each are packed. Of the rest, number i with high part h sets bit h + i of a bitmap.
    0 may be there several times, at the beginning: it stands for nothing.
    """

    def __init__(self, count: int, largest: int) -> None:
        self.count, self.largest = count, largest
        self.low = max((largest // count).bit_length() - 1, 0)
        self.low_bytes = packed_bytes(count, self.low)
        self.high_bytes = packed_bytes(count + (largest >> self.low) + 1, 1)
        self.bytes = self.low_bytes + self.high_bytes

    def encode(self, values: Ints) -> Bytes:
        """Sorted `[n, count]` as bytes `[n, bytes]`."""
        n = len(values)
        bitmap = np.zeros((n, 8 * self.high_bytes), np.uint8)
        np.put_along_axis(bitmap, (values >> self.low) + np.arange(self.count), 1, axis=1)
        low = pack(values & ((1 << self.low) - 1), self.low) if self.low else np.zeros((n, 0), np.uint8)
        return np.concatenate([low, np.packbits(bitmap, axis=-1, bitorder="little")], axis=1)

    def decode(self, octets: Bytes) -> Ints:
        """The numbers `[n, count]`.

        Raises:
            CacheError: The bytes are not those of a sorted set.
        """
        bitmap = np.unpackbits(octets[:, self.low_bytes :], axis=-1, bitorder="little").view(bool)
        row, at = np.nonzero(bitmap)
        n = len(octets)
        if len(row) != n * self.count or not np.array_equal(row[:: self.count], np.arange(n)):
            raise CacheError("a bitmap of class ids has not as many bits as there are classes")
        if not np.array_equal(row[self.count - 1 :: self.count], np.arange(n)):
            raise CacheError("a bitmap of class ids has not as many bits as there are classes")
        values = (at.reshape(n, self.count) - np.arange(self.count)) << self.low
        values |= unpack(octets[:, : self.low_bytes], self.count, self.low)
        before, after = values[:, :-1], values[:, 1:]
        if not ((before < after) | (after == 0)).all() or not (values <= self.largest).all():
            raise CacheError("class ids do not rise, or are out of the vocabulary")
        return values
