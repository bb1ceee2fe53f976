"""``python -m benchmarks fsdp``: processes with parts of a teacher make the loss of one that has it whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from benchmarks import fsdp


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "it.json"
    shape = ["--layers", "2", "--width", "64", "--vocab", "300", "--rows", "1", "--length", "8"]
    assert fsdp.main([*shape, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert [len(each) for each in document["peak_mb"].values()] == [1, 2, 1, 2]
    wanted = document["losses"][f"{fsdp.RETURNS} whole"][0]
    assert document["losses"][f"{fsdp.RETURNS} in parts"] == [pytest.approx(wanted, rel=1e-5)] * 2
    assert "of the peak of one that has the whole teacher" in capsys.readouterr().out
    assert f"| {fsdp.RETURNS} | in parts  | 1" in out.with_suffix(".md").read_text()
