"""A file of a cache: some sequences, whole, as safetensors.

    rows      U8  [tokens, stride]   of each position the codec's bytes, then the token id, little-endian
    offsets   I64 [sequences + 1]    where each sequence begins in `rows`
    hashes    U8  [sequences, 16]    of each, `keys.hashes`
    prefixes  U8  [..., 8]           of the beginnings of each, `keys.beginnings`
    crc32     U32 [...]              of each 64 rows of each sequence, ceil(S / 64) of them
    checksum  U32 [1]                CRC-32 of the file's header, then offsets, hashes, prefixes and crc32

The header's metadata says the format, its version and the digest of the manifest. What a file says of itself
is believed after its checksum and its sizes agree; a row is believed after its CRC agrees.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bits import Bytes, Ints
from .errors import CacheError
from .keys import BLOCK, HASH_BYTES, PREFIX_BYTES, beginnings_of
from .manifest import FORMAT, VERSION, Manifest

SUFFIX = ".safetensors"
_INDEX = ("offsets", "hashes", "prefixes", "crc32")
_DTYPES = {
    "rows": ("U8", 1),
    "offsets": ("I64", 8),
    "hashes": ("U8", 1),
    "prefixes": ("U8", 1),
    "crc32": ("U32", 4),
    "checksum": ("U32", 4),
}
# Ours take some 700 bytes.
_LARGEST_HEADER = 1 << 16
# What is read at open. That of a shard of 32 MiB is some 100 KiB, and 5 MiB with sequences of one token.
_LARGEST_INDEX = 1 << 30


@dataclass(frozen=True)
class Entry:
    """A sequence on its way into a file."""

    rows: Bytes
    hash: bytes
    prefixes: Bytes


def write_shard(path: Path, manifest: Manifest, sequences: Sequence[Entry]) -> None:
    """Writes a file anew and flushes it to the disk; the name must not be taken."""
    save = safetensors().save
    offsets = np.cumsum([0, *(len(s.rows) for s in sequences)], dtype=np.int64)
    tensors = {
        "rows": np.concatenate([s.rows for s in sequences]),
        "offsets": offsets,
        "hashes": np.frombuffer(b"".join(s.hash for s in sequences), np.uint8).reshape(-1, HASH_BYTES),
        "prefixes": np.concatenate([s.prefixes for s in sequences]),
        "crc32": np.array([crc for s in sequences for crc in block_checksums(s.rows)], np.uint32),
        "checksum": np.zeros(1, np.uint32),
    }
    octets = bytearray(save(tensors, _metadata(manifest)))
    # It covers the header, so it can't be in there. Where it is in the file the header says.
    header, begin = _header(bytes(octets[:8]), bytes(octets[8 : 8 + _LARGEST_HEADER]), len(octets))
    checksum = zlib.crc32(octets[:begin])
    for name in _INDEX:
        checksum = zlib.crc32(tensors[name].tobytes(), checksum)
    at = begin + header["checksum"]["data_offsets"][0]
    octets[at : at + 4] = checksum.to_bytes(4, "little")
    with path.open("xb") as file:
        file.write(octets)
        file.flush()
        os.fsync(file.fileno())


def block_checksums(rows: Bytes) -> list[int]:
    """The CRC-32 of each 64 rows."""
    return [zlib.crc32(rows[n : n + BLOCK].tobytes()) for n in range(0, len(rows), BLOCK)]


class Shard:
    """The index of a file, in memory, and its rows, read when they are asked for.

    Nothing is kept open: a file may be on a disk that fails or be cut short by another process, and a mapping
    would turn that into the end of this one.

    Args:
        path: The file.
        manifest: Of the cache that it should belong to.
        stride: Bytes of a row.

    Raises:
        CacheError: It is not a whole, undamaged file of this cache; the message names it.
    """

    def __init__(self, path: Path, manifest: Manifest, stride: int) -> None:
        self.path, self.stride = path, stride
        try:
            self._open(manifest)
        except (OSError, ValueError, RecursionError) as error:
            raise CacheError(
                f"{path} is no shard of this cache, or is damaged: {str(error)[:500]}"
            ) from error

    def _open(self, manifest: Manifest) -> None:
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")
        with self.path.open("rb") as file:
            first = file.read(8)
            text = file.read(min(int.from_bytes(first, "little"), _LARGEST_HEADER))
            header, begin = _header(first, text, status.st_size)
            self._check_header(header, manifest)
            checksum, parts = zlib.crc32(first + text), {}
            for name in (*_INDEX, "checksum"):
                start, stop = header[name]["data_offsets"]
                file.seek(begin + start)
                octets = file.read(stop - start)
                if len(octets) != stop - start:
                    raise ValueError("it is cut short")
                parts[name] = octets
                if name != "checksum":
                    checksum = zlib.crc32(octets, checksum)
        if checksum != int.from_bytes(parts["checksum"], "little"):
            raise ValueError("the checksum of its index does not agree")
        self._rows_at = begin + header["rows"]["data_offsets"][0]
        self.offsets: Ints = np.frombuffer(parts["offsets"], "<i8").astype(np.int64)
        self.hashes: Bytes = np.frombuffer(parts["hashes"], np.uint8).reshape(-1, HASH_BYTES)
        self.prefixes: Bytes = np.frombuffer(parts["prefixes"], np.uint8).reshape(-1, PREFIX_BYTES)
        self._crc32: NDArray[np.uint32] = np.frombuffer(parts["crc32"], "<u4")
        lengths = self._checked_lengths(header["rows"]["shape"][0])
        self._first_block = np.cumsum([0, *-(-lengths // BLOCK)])
        self.first_prefix: Ints = np.cumsum([0, *beginnings_of(lengths)])
        if self._first_block[-1] != len(self._crc32) or self.first_prefix[-1] != len(self.prefixes):
            raise ValueError("its checksums or hashes are not as many as its rows ask for")

    def _check_header(self, header: dict[str, Any], manifest: Manifest) -> None:
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ValueError("it was not written by a teacher cache")
        for key, value in _metadata(manifest).items():
            if metadata.get(key) != value:
                raise ValueError(f"its {key} is {str(metadata.get(key))[:40]}, the cache's {value}")
        tails = {"rows": (self.stride,), "hashes": (HASH_BYTES,), "prefixes": (PREFIX_BYTES,)}
        for name, tensor in header.items():
            shape = tensor["shape"]
            if len(shape) != 1 + len(tails.get(name, ())) or tuple(shape[1:]) != tails.get(name, ()):
                raise ValueError(f"{name} is of shape {shape[:4]}")
        if header["checksum"]["shape"] != [1]:
            raise ValueError("checksum is not one number")
        index = sum(header[n]["data_offsets"][1] - header[n]["data_offsets"][0] for n in _INDEX)
        if index > _LARGEST_INDEX:
            raise ValueError(f"its index is larger than {_LARGEST_INDEX} bytes")

    def _checked_lengths(self, tokens: int) -> Ints:
        if len(self.offsets) != len(self.hashes) + 1:
            raise ValueError("its offsets and hashes are of different numbers of sequences")
        inside = (self.offsets >= 0) & (self.offsets <= tokens)
        if not inside.all() or self.offsets[0] != 0 or self.offsets[-1] != tokens:
            raise ValueError("its offsets are out of range")
        lengths = np.diff(self.offsets)
        if (lengths < 1).any():
            raise ValueError("its offsets do not increase")
        return lengths

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def tokens(self) -> int:
        """How many positions are in it."""
        return int(self.offsets[-1])

    def length(self, sequence: int) -> int:
        """Of a sequence, in tokens."""
        return int(self.offsets[sequence + 1] - self.offsets[sequence])

    def rows(self, sequence: int, begin: int = 0, end: int | None = None) -> Bytes:
        """The bytes of a sequence's positions `begin` to `end`, `[end - begin, stride]`.

        Raises:
            CacheError: They are not what was written, or can't be read.
        """
        length = self.length(sequence)
        end = length if end is None else end
        block, last = begin // BLOCK, -(-end // BLOCK)
        first, count = block * BLOCK, min(last * BLOCK, length) - block * BLOCK
        at = self._rows_at + (int(self.offsets[sequence]) + first) * self.stride
        try:
            with self.path.open("rb") as file:
                file.seek(at)
                octets = np.fromfile(file, np.uint8, count * self.stride)
        except OSError as error:
            raise CacheError(f"{self.path} can't be read: {error}") from error
        if len(octets) != count * self.stride:
            raise CacheError(f"{self.path} is cut short: it was longer when it was opened")
        rows = octets.reshape(count, self.stride)
        stored = self._crc32[self._first_block[sequence] + block :]
        for n, crc in enumerate(block_checksums(rows)):
            if crc != stored[n]:
                raise CacheError(
                    f"{self.path} is damaged: rows of sequence {sequence} are not what was written; take it "
                    "from a copy, or move it away and build again what it held"
                )
        return rows[begin - first : end - first]


def _header(first: bytes, text: bytes, size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file of ours, and where the data begin."""
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
        raise ValueError("it is not a safetensors file, or its header is too long")
    header = json.loads(text[:length].decode("utf-8"), parse_int=_int)
    if not isinstance(header, dict) or {*header} != {*_DTYPES, "__metadata__"}:
        raise ValueError(f"it holds other tensors than {', '.join(_DTYPES)}")
    begin = 8 + length
    ranges = []
    for name, (dtype, itemsize) in _DTYPES.items():
        tensor = header[name]
        if not isinstance(tensor, dict) or {*tensor} != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} is not described as a tensor")
        shape, offsets = tensor["shape"], tensor["data_offsets"]
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or len(numbers) > 4 or not all(_is_size(x) for x in numbers):
                raise ValueError(f"{name} has a shape or offsets that are no sizes")
        if tensor["dtype"] != dtype:
            raise ValueError(f"{name} is of {str(tensor['dtype'])[:20]}, not {dtype}")
        if len(offsets) != 2 or offsets[1] - offsets[0] != itemsize * math.prod(shape):
            raise ValueError(f"{name} is not as long as its shape")
        ranges.append(tuple(offsets))
    at = 0
    for start, stop in sorted(ranges):
        if start != at:
            raise ValueError("its tensors overlap, or leave a hole")
        at = stop
    if begin + at != size:
        raise ValueError(f"it is of {size} bytes, and its header says {begin + at}")
    return header, begin


def _int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("it has a number of more than 20 digits")
    return int(digits)


def _is_size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 62


def _metadata(manifest: Manifest) -> dict[str, str]:
    return {"format": FORMAT, "version": str(VERSION), "manifest": manifest.digest}


def safetensors() -> Any:
    """The package that writes shards, or how to get it."""
    try:
        from safetensors import numpy
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "safetensors":
            raise
        raise ModuleNotFoundError(
            "a teacher cache is written as safetensors, which is not installed: pip install "
            "'kdkernels[cache]'",
            name="safetensors",
        ) from error
    return numpy
