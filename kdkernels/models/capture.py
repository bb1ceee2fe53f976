"""Outputs and inputs of modules by name, from hooks that have to fire."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .calls import unwrap

# What wrappers put into the names of the modules inside them; a wrapper of it all is taken off before.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Capture:
    """Within it, what named modules of a model return or are given in its forward passes.

    Args:
        model: The model, in wrappers or not.
        paths: Names as `named_modules` has them, without wrappers' parts. `*` and `?` stand for parts of one
            component: `encoder.layer.*` gives a list in the model's order. With `:input` at the end what the
            module is given first, else what it returns; of a tuple the first.
        label: What errors call the model.

    Raises:
        ValueError: A name that no module has.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], label: str = "model") -> None:
        self.label, self.found = label, {}  # type: str, dict[tuple[str, str], Tensor]
        modules = {_plain(name): module for name, module in unwrap(model).named_modules()}
        self.places = {path: self._places(path, modules) for path in dict.fromkeys(paths)}
        wanted = dict.fromkeys(place for places in self.places.values() for place in places)
        self.modules = {place: modules[place[0]] for place in wanted}
        self.hooks: list[Any] = []
        self.depth = 0

    def _places(self, path: str, modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
        pattern, _, what = path.partition(":")
        if what not in ("", "input", "output"):
            raise ValueError(f"a captured name ends with ':input', ':output' or nothing, got {path!r}")
        hits = [name for name in modules if _matches(name, pattern)]
        if not hits:
            near = difflib.get_close_matches(pattern, modules, n=3) or [*modules][1:6]
            raise ValueError(
                f"no module of the {self.label} is named {pattern!r}; there are {', '.join(near)}"
            )
        return [(name, what or "output") for name in hits]

    def _hook(self, place: tuple[str, str], module: nn.Module) -> Any:
        def keep(_: nn.Module, args: Any, more: dict[str, Any], result: Any) -> None:
            value = result if place[1] == "output" else args or list(more.values())
            while isinstance(value, (tuple, list)) and value:
                value = value[0]
            if isinstance(value, Mapping) and value:
                value = next(iter(value.values()))
            if isinstance(value, Tensor):
                self.found[place] = value

        return module.register_forward_hook(keep, with_kwargs=True)

    def take(self) -> dict[str, Any]:
        """What the last forward pass left, by path; of a module that ran twice, the last.

        Raises:
            RuntimeError: A module did not run, or had no tensor.
        """
        found, self.found = self.found, {}
        missing = [
            name for places in self.places.values() for name, what in places if (name, what) not in found
        ]
        if missing:
            raise RuntimeError(
                f"{', '.join(map(repr, missing))} of the {self.label} left no tensor in its forward pass: a "
                "module that isn't called (or was compiled before it was captured) has none; name one that is"
            )
        return {
            path: [found[place] for place in places] if _is_pattern(path) else found[places[0]]
            for path, places in self.places.items()
        }

    def __enter__(self) -> Capture:
        """Has hooks from the first of several."""
        if not self.depth:
            self.hooks = [self._hook(place, module) for place, module in self.modules.items()]
        self.depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if not self.depth:
            self.found = {}
            for hook in self.hooks:
                hook.remove()


def _plain(name: str) -> str:
    """A module's name without the parts that wrappers around parts of a model put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_pattern(path: str) -> bool:
    return any(c in path for c in "*?[")


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
