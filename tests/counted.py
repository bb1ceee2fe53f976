"""What a loss costs in numbers that no clock is needed for: bytes of each tensor that are read and written,
passes over memory, launches, allocations, and looks at numbers that a GPU would be waited for.

`counted_library` is the C++ library, built so that it tells of each load and store, and `CountedUnit` kernels
of CUDA that are built so and run here; `counted_launches` asks Triton's interpreter, `Steps` what torch runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
import shutil
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cuda_shim import FLAGS, KERNEL, SHIM, Unit, built, run, sources
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kdkernels.backends import cpu

TESTS = Path(__file__).parent
ROOT = TESTS.parent
COUNTING = TESTS / "counting.c"

# Every load and store is a call of what ThreadSanitizer's library would have; `counting.c` has it.
# A copy is one, too, and no instruction that the compiler puts in its place.
INSTRUMENT = [
    "-fsanitize=thread", "-fno-builtin-memcpy", "-fno-builtin-memset", "-fno-tree-loop-distribute-patterns"
]  # fmt: skip
# Without these the source takes three times as long to compile.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd")
DOUBLES = "if (c->side[i].type == kDouble) return run<double>(*o, *c);"
# A store past the cache is no load or store to the compiler, and an ordinary one is.
STREAMING = "#define _mm_stream_si128 _mm_storeu_si128\n"


class Traffic(NamedTuple):
    """Bytes: what instructions load and store, and what of the loads a cache of 32 KiB doesn't hold."""

    loaded: float = 0
    stored: float = 0
    fetched: float = 0

    def per(self, size: float) -> Traffic:
        """In tensors of so many bytes."""
        return Traffic(*(x / size for x in self))


# The C++ library


@cache
def why_no_library() -> str | None:
    """Why it can't be built here so that it counts; None if it can."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        return "needs g++ on Linux"
    try:
        run(["g++", *INSTRUMENT, "-fsyntax-only", "-x", "c++", "-"], "int one = 1;\n")
    except RuntimeError as error:
        return f"g++ can't tell of loads and stores here: {str(error)[:400]}"
    return None


def flattened(path: Path) -> str:
    """A source with what it includes of ours in its place, once in each of its branches."""

    def included(match: re.Match[str]) -> str:
        inner = (path.parent / match[1]).resolve()
        guard = f"KD_ONCE_{re.sub(r'[^a-z]', '_', inner.name)}"
        return f"#ifndef {guard}\n#define {guard}\n{flattened(inner)}\n#endif"

    text = path.read_text().replace("#pragma once", "")
    return re.sub(r'^#include "(.+)"$', included, text, flags=re.M)


def source(changes: Sequence[tuple[str, str]] = (), divergences: Sequence[str] = DIVERGENCES) -> str:
    """The library's, of these divergences and float32, with changes."""
    text = flattened(ROOT / "csrc" / "cpu" / "kd_cpu.cpp")
    table = re.search(r"#define KD_DIVERGENCES\(X\).*?(?<!\\)\n", text, re.S)
    assert table is not None
    rows = [
        row for row in re.findall(r'X\(\d+, \w+, "[^"]+"\)', table[0]) if row.split('"')[1] in divergences
    ]
    assert len(rows) == len(divergences)
    text = text.replace(table[0], f"#define KD_DIVERGENCES(X) {' '.join(rows)}\n")  # in both branches
    include = "#include <immintrin.h>\n"
    for old, new in [(DOUBLES, ";"), (include, include + STREAMING), *changes]:
        assert text.count(old) == 1, (text.count(old), old)
        text = text.replace(old, new)
    return text


def build(text: str) -> Path:
    """The library of a source, with what counts; kept from run to run, as the units of CUDA are."""
    spec = importlib.util.spec_from_file_location("build_of_the_library", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup: Any = importlib.util.module_from_spec(spec)
    argv, sys.argv = sys.argv, ["setup.py", "-q", "--version"]
    try:
        with contextlib.redirect_stdout(None):
            spec.loader.exec_module(setup)
    finally:
        sys.argv = argv
    compile_it = ["g++", *setup.FLAGS, "-c", "-x", "c++", "-"]
    return counting(
        built("counted.o", [], [*compile_it, *INSTRUMENT, "-DKD_ISA=baseline"], text),
        built("dispatch.o", [], [*compile_it, "-DKD_DISPATCH"], text),
    )


def counting(*objects: Path) -> Path:
    """A library of objects that call what counts."""
    compile_it = ["g++", "-O2", "-fPIC", "-fvisibility=hidden", "-x", "c", "-c", COUNTING]
    counts = built("counting.o", [COUNTING.read_text()], compile_it)
    wrapped = ",".join(f"--wrap={name}" for name in ("malloc", "free", "memcpy", "memset"))
    return built("counted.so", [], ["g++", "-shared", f"-Wl,-z,defs,{wrapped}", *objects, counts])


class CountedUnit(Unit):
    """Kernels of CUDA whose loads and stores are counted."""

    @cached_property
    def path(self) -> Path:
        """The library."""
        ours = sources(f'{self.text}\n#include "shim/device.h"')
        kernels = [name for text in (self.text, *ours.values()) for name in KERNEL.findall(text)]
        text = "\n".join(["#include KD_DEVICE", self.text, *(f"KD_REGISTER({k})" for k in kernels)])
        shim = [(SHIM / name).read_text() for name in ("grid.h", "grid.cpp")]
        command = ["g++", *FLAGS, "-O2", "-fPIC", *INSTRUMENT, "-c"]
        return counting(
            built("grid.o", shim, [*command, SHIM / "grid.cpp"]),
            built("unit.o", [*ours.values()], [*command, "-x", "c++", "-"], text),
        )


@dataclass
class Library:
    """What was counted: traffic by the name of a tensor, and what the library allocated."""

    loaded: ctypes.CDLL
    NAMES = ("scratch", "student", "teacher", "gradient", "ids", "log_p")

    def __post_init__(self) -> None:
        self.loaded.kd_count_range.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]

    def begin(self) -> None:
        """Forgets all."""
        self.loaded.kd_count_from_here()

    def tell(self, name: str, tensor: Tensor | None) -> None:
        """What a tensor's memory is."""
        if tensor is not None:
            kind = self.NAMES.index(name)
            assert tensor.is_contiguous()
            assert self.loaded.kd_count_range(tensor.data_ptr(), tensor.nbytes, kind)

    def traffic(self, name: str) -> Traffic:
        """Of all that bears a name, since `begin`."""
        numbers = (ctypes.c_uint64 * 3)()
        self.loaded.kd_counted(self.NAMES.index(name), numbers)
        return Traffic(*numbers)

    @property
    def allocations(self) -> tuple[int, int]:
        """How many, and of how many bytes."""
        numbers = (ctypes.c_uint64 * 2)()
        self.loaded.kd_counted_allocations(numbers)
        return numbers[0], numbers[1]


@contextlib.contextmanager
def counted_library(path: Path) -> Iterator[Library]:
    """While it lasts, `backend="cpu"` is the library at a path, on one thread."""
    counts, threads, run_it = Library(ctypes.CDLL(str(path))), torch.get_num_threads(), cpu.CpuBackend._run

    def told(self: Any, mode: str, call: Any, **tensors: Any) -> None:
        counts.loaded.kd_count_other_tensors()
        counts.tell("student", call.student)
        for v in call.teachers:
            counts.tell("teacher", v)
        counts.tell("gradient", tensors.get("gradient"))
        if call.sparse is not None:
            counts.tell("ids", call.sparse.ids)
            counts.tell("log_p", call.sparse.log_p)
        run_it(self, mode, call, **tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(cpu.BACKEND), "_library", cpu._Library(path))
        patch.setitem(vars(cpu.BACKEND), "_packed", {})  # numbers of divergences are the library's
        patch.setattr(cpu.CpuBackend, "_run", told)
        torch.set_num_threads(1)
        try:
            counts.begin()
            yield counts
        finally:
            torch.set_num_threads(threads)


# Triton's interpreter


@dataclass
class Launches:
    """What was launched, in the order of time, and the traffic of each tensor by kernel and argument."""

    names: list[str] = field(default_factory=list)
    found: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    spans: list[tuple[int, int, Counter[str]]] = field(default_factory=list)

    def add(self, what: str, addresses: Any, mask: Any, size: int) -> None:
        """Takes in a load or a store; an argument in another's place has what that has, too."""
        at = addresses[mask] if mask is not None else addresses
        for begin, end, count in self.spans:
            count[what] += size * int(((at >= begin) & (at < end)).sum())

    def traffic(self, kernel: str, argument: str) -> Traffic:
        """Of an argument, in all launches of a kernel."""
        count = self.found.get((kernel, argument), Counter())
        return Traffic(count["loaded"], count["stored"])


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors of an argument, which may be several."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


@contextlib.contextmanager
def counted_launches() -> Iterator[Launches]:
    """Of what Triton's interpreter runs within."""
    import inspect

    from triton.runtime import interpreter

    launches = Launches()
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store

    def launching(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        launches.names.append(name)
        known = {key: value for key, value in kwargs.items() if key in inspect.getfullargspec(self.fn).args}
        given = inspect.getcallargs(self.fn, *args, **known)
        launches.spans = [
            (x.data_ptr(), x.data_ptr() + x.nbytes, launches.found.setdefault((name, argument), Counter()))
            for argument, value in given.items()
            for x in tensors_of(value)
        ]
        with _disable_current_modes():  # what the interpreter needs is none of ours
            launch(self, *args, **kwargs)
        launches.spans = []

    def loading(self: Any, ptrs: Any, mask: Any, *more: Any) -> Any:
        launches.add("loaded", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, *more)

    def storing(self: Any, ptrs: Any, value: Any, mask: Any, *more: Any) -> Any:
        launches.add("stored", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", launching)
        patch.setattr(builder, "create_masked_load", loading)
        patch.setattr(builder, "create_masked_store", storing)
        yield launches


# What torch runs

# Operators whose result, or its shape, is only known when the device has got there.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::equal",
    "aten::is_nonzero", "aten::repeat_interleave", "aten::bincount", "aten::_to_cpu",
}  # fmt: skip


class Steps(TorchDispatchMode):
    """Memory that operators make, how much of it there is at once, and what a GPU would be waited for.

    Attributes:
        made: Bytes of each piece of memory, in the order of time.
        waits: Operators that wait.
        peak: The most bytes there were at a time of what was made within.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self.waits: list[str] = []
        self.sent: list[str] = []
        self.live = self.peak = 0
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        chosen = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            x.dtype in (torch.bool, torch.uint8) for x in given[1:]
        )
        if name in WAITING or chosen:
            self.waits.append(name)
        if name.startswith("c10d::"):
            self.sent.append(name)
        there = {x.untyped_storage()._cdata for x in given}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in there:
                self._take(x.untyped_storage())
        return result

    def _take(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or size == 0:
            return

        def gone(_: Any) -> None:
            self.live -= size
            self._held.pop(key, None)

        self._held[key] = weakref.ref(storage, gone)
        self.made.append(size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def at_least(self, size: int) -> int:
        """Pieces of memory of at least so many bytes."""
        return sum(made >= size for made in self.made)
