"""``python -m benchmarks hf``: both steps are the same loss, and a run says what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import torch

from benchmarks import hf, hf_gpu


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


def test_training_runs_of_a_gpu_with_tiny_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "it.json"
    shape = ["--vocab", "300", "--rows", "2", "--length", "16", "--rounds", "2", "--threads", "1"]
    assert hf.main([*shape, "--quick", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert {*document["seconds"]} == {"by hand, 2 × 16", "DistillMixin, 2 × 16"}
    assert all(len(each) == 2 for each in document["seconds"].values())
    assert all(len(each) == hf_gpu.WARM_UP + 2 for each in document["losses"].values())
    assert "times as fast" in capsys.readouterr().out
    assert "| DistillMixin | 2 × 16 |" in out.with_suffix(".md").read_text()


def run(seconds: float, loss: float = 1.0, megabytes: float = 100.0, retries: int = 0) -> dict[str, Any]:
    """What a training run says."""
    return {
        "seconds": [seconds], "losses": [loss], "parameters": [10**9, 2 * 10**9], "peak_mb": megabytes,
        "step_mb": megabytes / 2, "retries": retries,
    }  # fmt: skip


def test_who_has_no_room_is_named_and_both_are_compared_on_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def isolated(function: Any, name: str, sizes: Any, vocab: int, rows: int, *rest: Any) -> Any:
        asked.append((name, rows))
        if name == "by hand":
            return None if rows == 4 else run(4.0, retries=3)
        return run(rows / 2, megabytes=25.0)

    monkeypatch.setattr(hf_gpu.bench, "run_isolated", isolated)
    out = tmp_path / "it.json"
    assert hf.main(["--quick", "--json", str(out)]) == 0
    assert asked == [("by hand", 4), ("DistillMixin", 4), ("by hand", 2), ("DistillMixin", 2)]
    said = out.with_suffix(".md").read_text()
    assert "- by hand runs out of memory at 4 × 128 tokens a step." in said
    assert "- by hand at 2 × 128 had so little room that memory was given back 3 times." in said
    assert "At 2 × 128 tokens a step DistillMixin is 4.00 times as fast, and takes 0.25 of the memory" in said
    assert "| DistillMixin | 4 × 128 |" in said and "| by hand      | 4 × 128 |" not in said


def test_other_losses_are_not_compared() -> None:
    runs = {("by hand", 2): run(4.0), ("DistillMixin", 2): run(1.0, loss=1.1)}
    assert hf_gpu.findings(runs, 16) == [f"{hf_gpu.DIFFER}: [1.0], [1.1]."]
