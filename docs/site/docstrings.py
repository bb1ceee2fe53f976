"""Docstrings as the site shows them: formulas, gradients and sources set apart, and links of names."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import griffe

_spec = importlib.util.spec_from_file_location("names", Path(__file__).with_name("names.py"))
names = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(names)

# What opens a paragraph of its own in this package's docstrings, beside the sections that every tool knows.
LEAD = re.compile(r"^(Formulas?|Gradient[^:\n]*|Source|Numbers|Limits|Heads|Stored|Compiled):(?= )", re.M)


class Paragraphs(griffe.Extension):
    """Sets `Formula:` and its like apart, and links `kd.Name`."""

    def on_instance(self, *, node: Any, obj: griffe.Object, **_: Any) -> None:
        """Of each object, once its docstring is read."""
        if obj.docstring is None:
            return
        lines, led = [], False
        for line in obj.docstring.value.splitlines():
            if LEAD.match(line):
                lines.append("")
                led = True
            elif not line.strip() or re.match(r"\w+:$", line):
                led = False
            # A continued line is indented, which Markdown would take for code.
            lines.append(line.lstrip() if led else line)
        text = LEAD.sub(r"**\1:**", "\n".join(lines))
        obj.docstring.value = names.linked(text)
