"""Builds the CPU library of kdkernels, where there is a compiler for it, and packs the CUDA sources.

Everything else about the package is in pyproject.toml. `csrc/cpu/kd_cpu.cpp` is compiled once per instruction
set and once more for the entry points that pick among them, and linked into one shared library with a plain C
interface, which ctypes loads: no torch or Python header is read, so one wheel serves every Python and every
torch. The library is optional: without a compiler the package installs all the same and runs on its reference
backend. The CUDA kernels are compiled where they run, so that their sources go into the package.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

SOURCE = Path("csrc/cpu/kd_cpu.cpp")
LIBRARY = "kdkernels/libkdkernels_cpu.so"
CUDA_SOURCES = ("csrc/*.h", "csrc/cuda/*")

# Never -ffast-math: it breaks infinities, and linking with it changes the rounding mode of every thread in
# the process.
FLAGS = shlex.split(
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti "
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd"
)
# One compilation of the source for each. The name is the C++ namespace of what it compiles.
X86_VARIANTS = {
    "avx512": shlex.split("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"),
    "avx2": shlex.split("-mavx2 -mfma -mf16c"),
}
# --as-needed: a C++ driver names libstdc++ and libm by itself; nothing calls them, so the library shall not
# ask for them.
LINK_FLAGS = ["-shared", "-Wl,--as-needed", "-Wl,-z,defs"]


def environment(name: str) -> list[str]:
    """The words of an environment variable that holds compiler or linker options."""
    return shlex.split(os.environ.get(name, ""))


class Compiler:
    """A C++ compiler: `$CXX` or `$CC` where one is set, else the first on the path that works."""

    def __init__(self) -> None:
        chosen = os.environ.get("CXX") or os.environ.get("CC")
        candidates = [chosen] if chosen else ["c++", "g++", "clang++", "cc"]
        failures = []
        for candidate in candidates:
            self.command = shlex.split(candidate)
            if shutil.which(self.command[0]) is None:
                failures.append(f"{candidate}: not found")
                continue
            # /dev/null as C++ tells a C driver that has no C++ behind it from one that has.
            done = self.run("-x", "c++", "-std=c++17", "-fsyntax-only", os.devnull)
            if done.returncode == 0:
                self.target = self.run("-dumpmachine").stdout.strip()
                return
            failures.append(f"{candidate}: {done.stderr.strip() or f'exit status {done.returncode}'}")
        raise CompileError("no C++ compiler works here: " + "; ".join(failures))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The finished process of the compiler with these arguments."""
        return subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)

    def must(self, *arguments: str) -> None:
        """Run the compiler, show the command as setuptools does, and raise if it fails."""
        print(shlex.join([*self.command, *arguments]), flush=True)
        done = self.run(*arguments)
        sys.stderr.write(done.stderr)
        if done.returncode != 0:
            raise CompileError(f"{self.command[0]} failed with exit status {done.returncode}:\n{done.stderr}")

    def accepts(self, flags: list[str]) -> bool:
        """Whether the compiler knows these flags."""
        return self.run(*flags, "-x", "c++", "-fsyntax-only", os.devnull).returncode == 0


class BuildLibrary(build_ext):
    """`build_ext` for a library that is no Python module: its name has no Python version in it."""

    def get_ext_filename(self, fullname: str) -> str:
        """The path of the library below the root of the package tree."""
        return LIBRARY

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: a library that ctypes loads has no PyInit."""
        return []

    def run(self) -> None:
        """Build, or warn and leave the library out."""
        try:
            self.compile_library(Path(self.build_lib) / LIBRARY)
        except (CompileError, OSError) as error:
            self.leave_out(str(error))
            return
        if self.inplace:
            self.copy_extensions_to_source()

    def leave_out(self, reason: str) -> None:
        """Warn, and remove what an older build left, which no longer belongs to this source."""
        stale = [Path(self.build_lib) / LIBRARY, *([Path(LIBRARY)] if self.inplace else [])]
        for path in stale:
            path.unlink(missing_ok=True)
        self.extensions = self.distribution.ext_modules = []
        self.warn(f"{reason}\nkdkernels installs without its CPU library and runs on the reference backend.")

    def compile_library(self, library: Path) -> None:
        """Compile the variants and the dispatcher side by side, and link them into `library`."""
        if not sys.platform.startswith("linux"):
            raise CompileError(f"the CPU library is built on Linux only so far, not on {sys.platform}")
        compiler = Compiler()
        flags = [*FLAGS, *environment("CFLAGS"), *environment("CXXFLAGS")]

        variants = {"baseline": flags}
        if compiler.target.startswith("x86_64"):
            for isa, isa_flags in X86_VARIANTS.items():
                if compiler.accepts([*flags, *isa_flags]):
                    variants[isa] = [*flags, *isa_flags]
                else:
                    self.warn(f"{compiler.command[0]} rejects {shlex.join(isa_flags)}: no {isa} variant")

        jobs = {isa: [f"-DKD_ISA={isa}", *isa_flags] for isa, isa_flags in variants.items()}
        built = [f"-DKD_HAVE_{isa.upper()}" for isa in variants if isa != "baseline"]
        jobs["dispatch"] = ["-DKD_DISPATCH", *built, *flags]

        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{name}.o") for name in jobs]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            compilations = [
                pool.submit(compiler.must, *job, "-c", str(SOURCE), "-o", path)
                for job, path in zip(jobs.values(), objects, strict=True)
            ]
        for compilation in compilations:
            compilation.result()

        library.parent.mkdir(parents=True, exist_ok=True)
        compiler.must(*flags, *LINK_FLAGS, *objects, *environment("LDFLAGS"), "-o", str(library))


class PackSources(build_py):
    """`build_py` that puts the CUDA sources into the package; a checkout has them beside it."""

    def run(self) -> None:
        """Copy them after the modules."""
        super().run()
        if self.editable_mode:
            return
        for path in (path for pattern in CUDA_SOURCES for path in Path().glob(pattern)):
            copy = Path(self.build_lib) / "kdkernels" / path
            self.mkpath(str(copy.parent))
            self.copy_file(str(path), str(copy))


class TagWheel(bdist_wheel):
    """Tags the wheel by what is in it: `py3-none-<platform>` with the library, `py3-none-any` without."""

    def run(self) -> None:
        """Build first, since only then it is known whether the wheel holds the library."""
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3: the library has a plain C interface."""
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("kdkernels.libkdkernels_cpu", sources=[str(SOURCE)], optional=True)],
    cmdclass={"build_py": PackSources, "build_ext": BuildLibrary, "bdist_wheel": TagWheel},
)
