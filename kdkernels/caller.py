"""Warnings that point at the caller's line, whether it calls or torch.compile traces."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

_OURS = (__name__.partition(".")[0], "torch")


_Function = TypeVar("_Function", bound=Callable[..., Any])


def while_tracing(function: _Function) -> _Function:
    """Has torch.compile call the function while it makes the graph, which then holds the result.

    That is `torch.compiler.assume_constant_result`, which would import the compiler with this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@while_tracing
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
