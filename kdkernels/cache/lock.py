"""One process at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import CacheError

fcntl: Any
try:
    import fcntl
except ModuleNotFoundError:  # not on Windows, where nothing stops a second writer
    fcntl = None


class Lock:
    """A file that this process alone holds, until `release` or its end.

    The file stays: were it removed, two processes could hold locks on two files of that name.

    Args:
        path: The file.
        busy: What to say where another process has it; None waits for it.

    Raises:
        CacheError: Another process has it, or the file can't be made.
    """

    def __init__(self, path: Path, busy: str | None) -> None:
        try:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            self._handle: int | None = os.open(path, flags, 0o666)
        except OSError as error:
            raise CacheError(f"{path} can't be opened for writing: {error}") from error
        try:
            if fcntl is not None:
                fcntl.flock(self._handle, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except OSError as error:
            self.release()
            raise CacheError(f"{path} is held: {busy} ({error})") from error

    def release(self) -> None:
        """Lets others have it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
