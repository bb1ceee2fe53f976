"""A loss by its name: `module:function`, or `file.py:function`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class NoLoss(Exception):
    """What was named is no loss, or an option of it no option; the text says why."""


def load(named: str) -> Callable[..., Any]:
    """The loss that `module:function` or `file.py:function` names."""
    where, colon, what = named.rpartition(":")
    if not colon or not where or not what:
        raise NoLoss(f"LOSS must be module:function or file.py:function, got {named!r}")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else _from_path(where)
    except Exception as error:  # whatever the module raises while it is imported
        raise NoLoss(f"{where} can't be imported: {type(error).__name__}: {error}") from error
    try:
        loss = functools.reduce(getattr, what.split("."), module)
    except AttributeError:
        raise NoLoss(f"{where} has no {what}") from None
    if not callable(loss):
        raise NoLoss(f"{named} must be a function, got {type(loss).__name__}")
    return loss


def _from_path(name: str) -> Any:
    """A module, of the folder that the command runs in too."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for theirs
    spec.loader.exec_module(module)
    return module
