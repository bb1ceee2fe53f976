"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer: its own build, the same tests."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from counted import source

ROOT = Path(__file__).parent.parent
SANITIZE = [
    "-fsanitize=address,undefined", "-fno-sanitize=float-divide-by-zero,vptr",
    "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer",
]  # fmt: skip
# What they look at: every option, the entry points, stored teachers. That a heap grows is how they work.
TESTS = [
    "tests/test_properties.py", "tests/test_entry_points.py", "tests/test_sparse.py", "tests/test_cpu.py"
]  # fmt: skip
CHOSEN = "(cpu or entry_points) and not heap and not thread"
# Of every instruction set that the processor has beside its own; a thorough run has more divergences.
PLAIN = f"{CHOSEN} and (not every_instruction_set or forward_kl)"


def runtime(name: str) -> str:
    """Where the compiler keeps a sanitizer's library, or what it says where it has none."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def missing() -> str | None:
    """Why it can't be done here."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        return "needs g++ on Linux"
    if not all(Path(runtime(name)).is_absolute() for name in ("libasan.so", "libubsan.so")):
        return "g++ has no sanitizers here"
    return None


REASON = missing()


def build(folder: Path, path: Path, optimise: str) -> Path:
    """The library of one variant, from this source."""
    spec = importlib.util.spec_from_file_location("build_of_the_library", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup: Any = importlib.util.module_from_spec(spec)
    argv, sys.argv = sys.argv, ["setup.py", "--version"]
    try:
        spec.loader.exec_module(setup)
    finally:
        sys.argv = argv
    flags = [optimise if flag == "-O3" else flag for flag in setup.FLAGS] + ["-g1", *SANITIZE]
    for name, define in (("baseline", "-DKD_ISA=baseline"), ("dispatch", "-DKD_DISPATCH")):
        command = ["g++", *flags, define, "-c", str(path), "-o", str(folder / f"{name}.o")]
        subprocess.run(command, check=True, capture_output=True)
    library = folder / "library.so"
    objects = [str(folder / f"{name}.o") for name in ("baseline", "dispatch")]
    subprocess.run(["g++", "-shared", *SANITIZE, *objects, "-o", str(library)], check=True)
    return library


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest with this library, in a process that has the sanitizers from its beginning."""
    environment = {
        **os.environ, "SANITIZED_LIBRARY": str(library), "OMP_NUM_THREADS": "1",
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so"))),
        # Python keeps what it has to its end.
        "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "sanitized", "-p", "no:xdist", "-x", "-q", "-s", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if REASON is not None:
        pytest.skip(REASON)
    return build(tmp_path_factory.mktemp("sanitized"), ROOT / "csrc" / "cpu" / "kd_cpu.cpp", "-O0")


def test_nothing_is_read_or_written_outside_and_nothing_is_undefined(
    library: Path, request: pytest.FixtureRequest
) -> None:
    more = ["-k", CHOSEN, "--thorough"] if request.config.getoption("--thorough") else ["-k", PLAIN]
    done = run(library, *TESTS, *more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100, done.stdout[-500:]
    assert "runtime error" not in done.stderr


def test_an_overrun_would_be_found(tmp_path: Path) -> None:
    """A gradient a class too wide, in a library of two divergences: a test of properties ends the process."""
    if REASON is not None:
        pytest.skip(REASON)
    copy = "memcpy(to, from, n * type_size(type));"
    planted = tmp_path / "kd_cpu.cpp"
    planted.write_text(source([(copy, copy.replace("n *", "(n + 1) *"))], ("forward_kl", "jsd")))
    library = build(tmp_path, planted, "-O0")
    done = run(library, "tests/test_properties.py", "-k", "neighbours and cpu")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
