"""Files and folders that are on the disk whole or not at all."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a file or folder to write instead of `path`; in the end it takes that place.

    After an error, or where the process ends within, what was at `path` is still there. A folder can't be
    replaced in one go: between two renames what was there is in `path.old`, where `restore` finds it.
    """
    part, old = (path.with_name(path.name + end) for end in (".part", ".old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    restore(path)
    if part.is_dir():
        shutil.rmtree(part)
    yield part
    for written in [*part.iterdir(), part] if part.is_dir() else [part]:
        _sync(written)
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(part, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore(path: Path) -> None:
    """Puts a folder back that was left aside where a process ended in `replacing` it."""
    old = path.with_name(path.name + ".old")
    if old.is_dir() and not path.exists():
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(old, path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a column for every name that any row has."""
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*dict.fromkeys(name for row in rows for name in row)])
        writer.writeheader()
        writer.writerows(rows)


def _sync(path: Path) -> None:
    if os.name == "posix":  # elsewhere neither a folder nor a handle for reading can be
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
