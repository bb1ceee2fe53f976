"""The names that the reference describes, and links to them."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache

# Page of the reference -> module whose `__all__` it describes.
PAGES = {
    "kdkernels": "kdkernels",
    "cache": "kdkernels.cache",
    "train": "kdkernels.train",
    "recipes": "kdkernels.train.recipes",
    "hf": "kdkernels.hf",
}
# Where mkdocstrings finds a module that has another name here.
FOUND = {"kdkernels.hf": "kdkernels.integrations.hf"}


@cache
def public() -> dict[str, list[str]]:
    """Of each page, the names that it describes: of a module all that it exports, other modules aside."""
    found = {}
    for page, path in PAGES.items():
        module = importlib.import_module(FOUND.get(path, path))
        exported = getattr(module, "__all__", None) or [
            name for name, f in inspect.getmembers(module, inspect.isfunction) if not name.startswith("_")
        ]
        found[page] = [name for name in exported if not inspect.ismodule(getattr(module, name))]
    return found


def anchor(page: str, name: str) -> str:
    """Where mkdocstrings finds a name, which is what links to it say."""
    path = PAGES[page]
    if path not in FOUND:
        return f"{path}.{name}"
    thing = getattr(importlib.import_module(FOUND[path]), name)
    return f"{thing.__module__}.{name}"


@cache
def _anchors() -> dict[str, str]:
    short = {"kdkernels": "kd.", "cache": "kd.cache.", "hf": "kd.hf.", "recipes": "recipes."}
    return {short.get(page, "") + n: anchor(page, n) for page, listed in public().items() for n in listed}


def linked(markdown: str) -> str:
    """`kd.Name` in code spans as links to the reference, in text, not in code blocks, headings or links."""

    def link(match: re.Match[str]) -> str:
        target = _anchors().get(match[1])
        return match[0] if target is None else f"[{match[0]}][{target}]"

    def of_line(line: str) -> str:
        if line.startswith("#"):
            return line
        return re.sub(r"(?<!\[)`((?:kd|recipes)(?:\.\w+)+)(?:\([^`]*\))?`(?!\])", link, line)

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(
        part if part.startswith("```") else "\n".join(map(of_line, part.split("\n"))) for part in parts
    )
