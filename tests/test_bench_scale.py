"""The formulas of docs/scale.md: what they say by hand, that the document has their tables and runs.

That they say what is sent is counted in `parallel_processes.py` and `test_fsdp.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kdkernels.bench import scale

DOCUMENT = Path(__file__).parent.parent / "docs" / "scale.md"
SMALL = scale.Run(100, 1000, scale.Model(10_000, 8, kept=2_000), scale.Model(40_000, 16), heads=False)


def test_the_document_has_the_tables() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in zip(("sent", "kept", "ways"), scale.tables(), strict=True):
        assert f"<!-- {name} -->\n\n{table}\n\n" in text, "python -m kdkernels.bench.scale prints them"


def test_the_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    exec(compile(code, "scale.md", "exec"), {})
    assert "all_reduce" in capsys.readouterr().out


def test_by_hand() -> None:
    """A row's 2 + 4 + 2 numbers of 4 bytes, and a ring of four sends 2 · 3/4 of them."""
    (rows,) = scale.of_loss(replace(SMALL, tensor=4))
    assert (rows.calls, rows.given, rows.wire) == (3, 3200, 4800)
    assert scale.of_loss(SMALL) == []
    heads = scale.of_loss(replace(SMALL, tensor=4, heads=True, rows_at_once=64))
    # 64 rows in a part of 64 (a quarter is less than a tile), 36 in one.
    assert [(x.calls, x.given) for x in heads] == [(6, 3200), (1, 3200)]
    forward, backward, scattered, teacher = scale.of_weights(replace(SMALL, shards=2))
    assert (forward.wire, backward.wire, scattered.wire, teacher.wire) == (10_000, 8_000, 10_000, 40_000)
    (summed,) = scale.of_weights(replace(SMALL, data=2))
    assert summed.wire == 20_000
    kept = scale.memory(replace(SMALL, shards=2))
    assert (kept["student"], kept["teacher"], kept["optimizer"]) == (10_000, 40_000, 40_000)
    assert kept["loss"] == 100 * 1000 * 6
