"""Warnings that point at the caller's line, through however many of our own frames."""

from __future__ import annotations

import sys
import warnings

_OURS = (__name__.partition(".")[0], "torch")


def warn_once(key: str, message: str) -> None:
    """A UserWarning at the first line outside this package and torch, once per process and key."""
    if key in _warned:
        return
    _warned.add(key)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)


_warned: set[str] = set()
