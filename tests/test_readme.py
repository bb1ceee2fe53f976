"""The README is what people copy from: its code runs, and what it calls the same is the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
V = 50
TABLE = re.findall(r"^\| (.*) \| (`.*`) \|$", README.split("## You have this")[1].split("\n## ")[0], re.M)


@pytest.fixture
def names() -> dict[str, Any]:
    """What the README's snippets speak of."""
    z, v = torch.randn(2, 6, V, requires_grad=True), torch.randn(2, 6, V)
    y = torch.randint(V, (2, 6))
    return {
        "kd": kd, "F": F, "z": z, "v": v, "y": y, "T": 2.0, "beta": 0.3, "s": 0.5,
        "student_logits": z, "teacher_logits": v, "input_ids": y,
        "count_over_all_of_them": 24, "completion_mask": torch.rand(2, 6) < 0.5,
    }  # fmt: skip


def test_the_table_was_found() -> None:
    assert len(TABLE) >= 8


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_snippets_run(names: dict[str, Any], code: str) -> None:
    exec(compile(code, "README.md", "exec"), names)
    assert names["z"].grad is not None


@pytest.mark.parametrize("code", [right for _, right in TABLE])
def test_what_the_table_says_to_write_runs(names: dict[str, Any], code: str) -> None:
    exec(compile(code.strip("`"), "README.md", "exec"), names)


def test_the_first_line_of_the_table_is_the_same_loss(names: dict[str, Any]) -> None:
    """`batchmean` divides by the first dimension alone, so that both sides are given rows."""
    names |= {"z": names["z"].flatten(0, 1), "v": names["v"].flatten(0, 1)}
    left, right = TABLE[0]
    ours, theirs = eval(right.strip("`"), names), eval(left.strip("`"), names)
    torch.testing.assert_close(ours, theirs)


def test_shifting_labels_is_slicing_logits(names: dict[str, Any]) -> None:
    """The table's second line: `kd.shift_labels` keeps every row that has a successor, and only those."""
    z, v, y = names["z"], names["v"], names["y"]
    ours = kd.kd_loss(z, v, kd.shift_labels(y), temperature=2.0, hard_weight=0.1)
    z, v, y = z[:, :-1].flatten(0, 1), v[:, :-1].flatten(0, 1), y[:, 1:].flatten()
    soft = F.kl_div(F.log_softmax(z / 2, -1), F.softmax(v / 2, -1), reduction="batchmean") * 4
    torch.testing.assert_close(ours, soft + 0.1 * F.cross_entropy(z, y))
