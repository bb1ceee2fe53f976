"""``python -m benchmarks hf``: both steps are the same loss, and a run says what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import torch

from benchmarks import hf


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "it.json"
    shape = ["--vocab", "300", "--rows", "2", "--length", "16", "--rounds", "2", "--threads", "1"]
    assert hf.main([*shape, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert {*document["seconds"]} == {*document["peak_mb"]} == {"by hand", "DistillMixin"}
    assert document["losses"]["by hand"] == pytest.approx(document["losses"]["DistillMixin"], rel=1e-4)
    assert "times as fast" in capsys.readouterr().out
    assert "| DistillMixin |" in out.with_suffix(".md").read_text()


def test_a_step_has_every_gradient() -> None:
    torch.manual_seed(0)
    step = hf.step_of("DistillMixin", 300, 2, 16)
    assert torch.isfinite(step()) and not step().requires_grad
