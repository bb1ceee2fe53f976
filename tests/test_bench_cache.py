"""The cache's benchmark, end to end, on a vocabulary that takes no time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

from benchmarks import cache as benchmark


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "VOCAB", 300)
    monkeypatch.setattr(benchmark, "MANIFEST", replace(benchmark.MANIFEST, vocab_size=300))
    monkeypatch.setattr(benchmark, "LENGTH", 64)
    folder, path = tmp_path / "folder", tmp_path / "it.json"
    folder.mkdir()
    arguments = ["--tokens", "4096", "--steps", "1", "--reads", "8", "--rows", "64", "--seconds", "0.05"]
    assert benchmark.main([*arguments, "--threads", "1", "--folder", str(folder), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["tokens"] == 4096 and max(found["variation"]["largest"].values()) < 1e-3
    assert found["bytes_per_token"] < 240 and len(found["training"]) == 8
    assert "bytes a token" in path.with_suffix(".md").read_text()
    assert not [*folder.iterdir()]
    assert benchmark.missed(found) == (benchmark.worst_wait(found["training"]) > 0.05)


def test_a_disk_without_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--tokens", "1" + "0" * 15, "--folder", str(tmp_path)])
    assert "GB free: name another --folder" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
