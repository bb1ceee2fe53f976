"""Finished parts of a run on disk, so that an interrupted one goes on: whole or absent, and never stale.

A part is an .npz without pickle: arrays, facts (JSON), and the key it was made under. A key is everything the
part depends on, and is in the file's name, so a changed setting, corpus, version or source finds nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing

Key = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """What a part holds."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def digest(key: Key) -> str:
    """A name for a key: equal keys have equal names."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def hash_of_files(paths: Iterable[Path]) -> str:
    """One hash for the names and bytes of files, so that a part made by other code isn't reused."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def hash_of_array(array: np.ndarray) -> str:
    """One hash for the numbers of an array and its shape."""
    whole = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:16]


class Parts:
    """The parts in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, key: Key) -> Path:
        """Where the part is, or would be."""
        return self.folder / f"{name}-{digest(key)}.npz"

    def load(self, name: str, key: Key) -> Part | None:
        """The part, or None where it isn't there or can't be read."""
        try:
            with np.load(self.path(name, key), allow_pickle=False) as stored:
                arrays = {entry: stored[entry] for entry in stored.files}
            facts, made_under = json.loads(str(arrays.pop("facts"))), str(arrays.pop("key"))
        except Exception:  # Garbage may call itself encrypted, compressed or an .npy: each is another error.
            return None
        return Part(facts, arrays) if made_under == json.dumps(key, sort_keys=True) else None

    def save(self, name: str, key: Key, part: Part) -> None:
        """Write the part, whole or not at all."""
        stored: dict[str, Any] = {
            "facts": np.array(json.dumps(part.facts)),
            "key": np.array(json.dumps(key, sort_keys=True)),
            **part.arrays,
        }
        with replacing(self.path(name, key)) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **stored)

    def drop(self, name: str, key: Key) -> None:
        """Remove the part, if it is there."""
        self.path(name, key).unlink(missing_ok=True)
