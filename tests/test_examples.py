"""The examples, as they are, for a few steps."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "plain_loop": ["transformers"],
    "hf_trainer": ["transformers", "accelerate"],
    "cached_teacher": ["transformers", "accelerate"],
    "trl_gkd": ["trl"],
    "fsdp": ["transformers", "accelerate"],
    "vocab_parallel": ["transformers"],
}


# The commands of docs/data-parallel.md and docs/parallel.md run these two.
@pytest.mark.thorough(but=lambda name: name not in ("fsdp", "vocab_parallel"))
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    """From a folder of its own, on what is on this machine; it says what the loss is."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    root = str(EXAMPLES.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, str(path), "6"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert len(re.findall(r"loss'?:? '?\d+\.\d+", ran.stdout)) >= 2, ran.stdout


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS}
