"""CUDA kernels of `csrc/cuda`, compiled by g++ and run here, with `shim/device.h` as their device.h.

A unit is a few lines that include `kd_cuda.cu` and define kernels. Plain, it is a library, and pointers are
those of this process. With a sanitizer it is a program, since neither is at home in Python: its memory is
copied there and back, each piece alone, as large as it is and as far off 16 bytes as it lies here.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

TESTS = Path(__file__).parent
SHIM, CUDA = TESTS / "shim", TESTS.parent / "csrc" / "cuda"
# Where pytest keeps what lasts from run to run; `make clean` removes it.
CACHE = TESTS.parent / ".pytest_cache" / "d" / "cuda-shim"

# No -ffast-math: infinities and NaN are values here. Kernels read memory as whatever fits, which g++ may take
# for impossible, and nvcc doesn't; and a variable that nobody wrote is -1.7e38, not what was there before.
FLAGS = [
    "-std=c++20", "-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern", "-fvisibility=hidden",
    '-DKD_DEVICE="shim/device.h"', f"-I{TESTS}",
    "-iquote", str(CUDA),
]  # fmt: skip
SANITIZERS = {
    "": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
KERNEL = re.compile(r"\bKD_KERNEL\b[^;{]*?(\w+)\s*\(\s*KD_ARGUMENT\b")


class LaunchError(RuntimeError):
    """A launch that ended early, or what a sanitizer says of it."""


def run(command: Sequence[str | Path], text: str | None = None) -> str:
    """What a command prints, given a text; what it has to say where it fails is an error."""
    words = [str(word) for word in command]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return done.stdout


@functools.cache
def compiler() -> str:
    """Its version, so that another one builds anew."""
    return run(["g++", "--version"])


@functools.cache
def prefix(sanitize: str) -> list[str]:
    """What runs a program: Linux may put its memory where ThreadSanitizer can't have it, unless told."""
    fixed = ["setarch", platform.machine(), "-R"]
    if sanitize != "thread" or shutil.which("setarch") is None:
        return []
    return [] if subprocess.run([*fixed, "true"], capture_output=True, check=False).returncode else fixed


@functools.cache
def why_not(sanitize: str = "") -> str | None:
    """Why units can't be built and run here, with this sanitizer; None if they can."""
    if shutil.which("g++") is None:
        return "no g++ here"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "it"
        try:
            command = ["g++", *FLAGS, *SANITIZERS[sanitize], "-x", "c++", "-", "-o", program]
            run(command, "_Float16 one = 1;\nint main() { return one != 1; }\n")
            run([*prefix(sanitize), program])
        except RuntimeError as error:
            return f"g++ can't build what runs here, sanitizer {sanitize or 'none'}: {str(error)[:800]}"
    return None


def sources(text: str, folder: Path = CUDA) -> dict[Path, str]:
    """The files of ours that a text includes, and theirs."""
    found: dict[Path, str] = {}
    for name in INCLUDE.findall(text):
        for path in (folder / name, CUDA / name, TESTS / name):
            if path.is_file():
                found[path.resolve()] = inner = path.read_text()
                found.update(sources(inner, path.parent))
                break
    return found


def built(name: str, key: Sequence[str], command: Sequence[str | Path], text: str | None = None) -> Path:
    """What a command writes to the path after its `-o`, which is appended; once for every key and command.

    Processes that want the same wait for the first of them.
    """
    words = [compiler(), *map(str, command), text or "", *key]
    digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:20]
    path = CACHE / f"{digest}-{name}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = path.with_suffix(f"{path.suffix}.part")
            run([*command, "-o", part], text)
            part.replace(path)
    return path


def extents(memory: Iterable[Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of the memory that tensors have, once where it is the same."""
    spans = sorted(
        (x.data_ptr(), (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.itemsize)
        for x in memory
        if x.numel()
    )
    merged: list[tuple[int, int]] = []
    for start, size in spans:
        if merged and start < sum(merged[-1]):
            first = merged[-1][0]
            merged[-1] = (first, max(sum(merged[-1]), start + size) - first)
        else:
            merged.append((start, size))
    return merged


def mapped() -> list[tuple[int, int]]:
    """(start, end) of whatever this process may write."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        start, end = (int(x, 16) for x in span.split("-"))
        if "w" in rights:
            found.append((start, end))
    return found


class Unit:
    """A text that has kernels, or includes `kd_cuda.cu` that has, built when it is first run.

    `sanitize` is "thread" for races and missing barriers, "address" for memory and what C++ leaves undefined.
    `approximate` gives `exp2_fast` and `log2_fast` the errors that they may have on a device.
    """

    def __init__(self, text: str, *, sanitize: str = "", approximate: bool = False) -> None:
        self.text, self.sanitize, self.approximate = text, sanitize, approximate

    @functools.cached_property
    def path(self) -> Path:
        """The library, or the program."""
        ours = sources(f'{self.text}\n#include "shim/device.h"')
        kernels = [name for text in (self.text, *ours.values()) for name in KERNEL.findall(text)]
        text = "\n".join(
            ["#include KD_DEVICE", "#line 1", self.text, *(f"KD_REGISTER({k})" for k in kernels)]
        )
        unit, grid = [*SANITIZERS[self.sanitize]], [*SANITIZERS[self.sanitize]]
        if self.sanitize == "thread":
            grid = ["-DKD_TSAN"]  # it takes turns where ThreadSanitizer would see races
        if self.sanitize:
            # With all its checks a unit takes g++ 4 s to optimise, and 1 s as it is.
            level = "-O0" if self.sanitize == "address" else "-O1"
            optimise, link = [level, "-g", "-fno-omit-frame-pointer"], unit
            grid = [*grid, "-DKD_PROGRAM"]
        else:
            optimise, link = ["-O2", "-fPIC"], ["-shared"]
        if self.approximate:
            unit = [*unit, "-DKD_APPROXIMATE"]
        shim = [(SHIM / name).read_text() for name in ("grid.h", "grid.cpp")]
        command = ["g++", *FLAGS, *optimise, "-c"]
        with ThreadPoolExecutor(2) as pool:
            objects = [
                pool.submit(built, "grid.o", shim, [*command, *grid, SHIM / "grid.cpp"]),
                pool.submit(built, "unit.o", [*ours.values()], [*command, *unit, "-x", "c++", "-"], text),
            ]
            paths = [future.result() for future in objects]
        return built("unit" if self.sanitize else "unit.so", [], ["g++", *link, *paths])

    @functools.cached_property
    def library(self) -> ctypes.CDLL:
        """Loaded."""
        library = ctypes.CDLL(str(self.path))
        library.kd_launch.restype = ctypes.c_char_p
        library.kd_launch.argtypes = [
            ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_longlong, ctypes.c_int,
            ctypes.c_size_t, ctypes.c_int, ctypes.c_ulonglong,
        ]  # fmt: skip
        return library

    def launch(
        self,
        kernel: str,
        argument: bytes,
        *,
        blocks: int,
        threads: int,
        shared: int = 0,
        cluster: int = 1,
        seed: int = 0,
        memory: Iterable[Tensor] = (),
    ) -> None:
        """Run `kernel` with its one argument on `blocks` blocks of `threads`, with `shared` bytes each.

        A seed is an order in which threads take turns, see `shim/grid.cpp`. `memory` is all that the argument
        points into; only sanitizers ask, and what of the argument looks like an address there is one.

        Raises:
            LaunchError: it ended early: a deadlock, something that a GPU would not do, or a sanitizer.
            ValueError: for a sanitizer, the argument points to what is not in `memory`.
        """
        if self.sanitize:
            self._run(kernel, argument, (blocks, threads, shared, cluster, seed), extents(memory))
            return
        failure = self.library.kd_launch(
            kernel.encode(), argument, len(argument), blocks, threads, shared, cluster, seed
        )
        if failure is not None:
            raise LaunchError(failure.decode())

    def _run(
        self, kernel: str, argument: bytes, grid: tuple[int, ...], pieces: list[tuple[int, int]]
    ) -> None:
        """Launch in a program, and copy the memory there and back."""
        pointers, ours = [], mapped()
        for at in range(0, len(argument) - 7, 8):
            value = int.from_bytes(argument[at : at + 8], "little")
            found = [(at, i, value - p) for i, (p, n) in enumerate(pieces) if p <= value < p + n]
            if not found and any(start <= value < end for start, end in ours):
                raise ValueError(f"byte {at} of {kernel}'s argument points to memory that was not given")
            pointers += found
        numbers = [*grid, len(argument), len(pointers), len(pieces)]
        numbers += [word for pointer in pointers for word in pointer]
        numbers += [word for start, size in pieces for word in (size, start % 16)]
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder) / "before", Path(folder) / "after"
            with before.open("wb") as file:
                file.write(f"{kernel} {' '.join(map(str, numbers))}\n".encode())
                file.write(argument)
                for start, size in pieces:
                    file.write(ctypes.string_at(start, size))
            done = subprocess.run(
                [*prefix(self.sanitize), self.path, before, after],
                env={**os.environ, **OPTIONS},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise LaunchError(done.stderr or f"exit status {done.returncode}")
            result = after.read_bytes()
        for start, size in pieces:
            ctypes.memmove(start, result[:size], size)
            result = result[size:]
