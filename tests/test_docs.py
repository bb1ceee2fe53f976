"""The documents beside the README: their snippets run, and every recipe has one."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import torch

from benchmarks import strategies
from kdkernels.train import recipes

DOCUMENT = (Path(__file__).parent.parent / "docs" / "strategies.md").read_text(encoding="utf-8")
FIRST, *SNIPPETS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)


@pytest.mark.parametrize("code", SNIPPETS, ids=[re.findall(r"recipes\.(\w+)", code)[0] for code in SNIPPETS])
def test_snippets_run(code: str) -> None:
    """Each after the first, which stands for the reader's models; the student has learnt something."""
    names: dict[str, Any] = {}
    exec(compile(FIRST, "strategies.md", "exec"), names)
    before = [p.clone() for p in names["student"].parameters()]
    exec(compile(code, "strategies.md", "exec"), names)
    changed = [not torch.equal(a, b) for a, b in zip(before, names["student"].parameters(), strict=True)]
    assert all(changed) == bool(re.search(r"\(\s*student\b", code))
    assert code.count("\n") <= 12


def test_every_recipe_has_a_snippet() -> None:
    functions = inspect.getmembers(recipes, inspect.isfunction)
    made = {name for name, f in functions if f.__annotations__.get("return") in ("Plan", recipes.Plan)}
    assert {"hinton", "tinybert"} <= made
    assert made <= set(re.findall(r"recipes\.(\w+)", DOCUMENT))


def test_every_command_names_claims() -> None:
    named = re.findall(r"`--only ([\w-]+)`", DOCUMENT)
    assert len(named) >= 16 and all(strategies.selected(name) for name in named)
