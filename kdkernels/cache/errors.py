"""What goes wrong with a cache, by name."""

from __future__ import annotations


class CacheError(ValueError):
    """A cache, or what is put in it, is not what it has to be; the message names the file or the argument."""


class CacheMiss(KeyError, CacheError):
    """A sequence is not in the cache."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would quote it
