"""What the CUDA kernels are built from, for what, and where builds are kept.

A kernel is built from a text of a few lines, its unit, which includes csrc/cuda/kd_cuda.cu, or kd_sparse.cu
where the teacher is stored, and says what is wanted of it. NVRTC makes machine code of that for an
architecture that need not be here; the code is kept on the disk, under a name made of everything that it
depends on, and so is built once for all processes and runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from .. import tuning
from ..caller import warn_once
from ..tuning import CudaConfig

# Beside this package where it is installed; in a checkout beside the folder of the package.
_HERE = Path(__file__).parents[1] / "csrc"
SOURCES = _HERE if _HERE.is_dir() else _HERE.parents[1] / "csrc"
INCLUDE = '#include "kd_cuda.cu"\n'
STORED = '#include "kd_sparse.cu"\n'  # which includes the other

TYPES = {torch.float32: "kFloat", torch.bfloat16: "kBFloat16", torch.float16: "kHalf"}
SIZES = {"kFloat": 4, "kBFloat16": 2, "kHalf": 2}
# Names of divergence.h. alpha_beta has one for parameters above 0, and two for others.
DIVERGENCES = {
    "forward_kl": "ForwardKL",
    "soft_cross_entropy": "SoftCrossEntropy",
    "reverse_kl": "ReverseKL",
    "jsd": "JSD",
    "skew_kl": "SkewKL",
    "skew_reverse_kl": "SkewReverseKL",
    "tvd": "TVD",
    "squared_error": "SquaredError",
    "alpha_beta": "AlphaBeta",
    "logit_mse": "LogitMSE",
    "centered_logit_mse": "CenteredLogitMSE",
    "dkd": "DKD",
    "binary_kl": "BinaryKL",
}
# Those whose g is computed in a phase of its own, and those of many registers.
_POWERS = {"AlphaBeta", "AlphaBetaAny", "AlphaBetaLimit"}
OPEN = {"JSD", "SkewKL", "SkewReverseKL", "TVD", "SquaredError"} | _POWERS
HEAVY = {"DKD", "BinaryKL"} | _POWERS
NO_DIVERGENCE = "NoDivergence"  # of kd_cuda.cu: no soft term


def divergence_name(name: str, params: tuple[float, ...]) -> str:
    """The template of divergence.h that computes a divergence with these parameters."""
    if name != "alpha_beta":
        return DIVERGENCES[name]
    alpha, beta = params
    if alpha > 0 and beta > 0:
        return "AlphaBeta"
    return "AlphaBetaLimit" if alpha >= 0 and beta >= 0 and alpha + beta > 0 else "AlphaBetaAny"


@dataclass(frozen=True)
class Build:
    """What a row kernel is built for: the fields of `Config` in kd_cuda.cu, with the same defaults.

    Attributes:
        divergence: The template of divergence.h.
        threads: Of a block.
        blocks: That a multiprocessor has to have room for, and so how many registers a thread may have.
        stored: Whether it is the kernel of stored teachers.
    """

    divergence: str
    threads: int = 128
    blocks: int = 1
    type: str = "kBFloat16"
    cluster: int = 1
    shifted: bool = False
    mode: str = "kGradient"
    hard: str = "kNoHard"
    stats: bool = False
    z_capped: bool = False
    v_capped: bool = False
    z_noise: str = "kNoNoise"
    v_noise: str = "kNoNoise"
    z_per_row: bool = False
    v_per_row: bool = False
    stored: bool = False

    kernel: ClassVar[str] = "kd_rows"

    @property
    def kept(self) -> int:
        """Vectors that the kernel keeps beside those of both sides: `kMore` of kd_cuda.cu."""
        if self.stored or self.divergence not in OPEN or self.mode == "kLoss":
            return 0
        each = 1 if self.type == "kFloat" else 2  # of a vector's g
        return each if self.shifted else each - 1

    @property
    def weight(self) -> str:
        """Whether a class takes many registers: `light` or `heavy`."""
        noised = (self.z_noise, self.v_noise) != ("kNoNoise", "kNoNoise")
        heavy = self.divergence in HEAVY or self.hard == "kOwnHard" or self.stats
        return "heavy" if heavy or noised or self.z_capped or self.v_capped else "light"

    def fitted(self, width: int, shared: int) -> tuple[Build, CudaConfig | None]:
        """The build for rows of a width, and how these are shared out; None where they don't fit."""
        config = tuning.cuda(
            width, SIZES[self.type], shared, self.kept, self.shifted, self.weight, self.stored
        )
        if config is None:
            return self, None
        return replace(self, threads=config.threads, blocks=config.blocks, cluster=config.cluster), config

    def unit(self) -> str:
        """The text that is compiled."""
        lines = [f"  template <class R>\n  using Divergence = {self.divergence}<R>;"]
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default:
                kind = "bool" if isinstance(value, bool) else "int"
                name = "k" + "".join(word.capitalize() for word in field.name.split("_"))
                text = str(value).lower() if kind == "bool" else value
                lines.append(f"  static constexpr {kind} {name} = {text};")
        record, rows = ("KdStored", "stored_rows") if self.stored else ("KdRows", "rows")
        return (
            ("" if self.type == "kFloat" else "#define KD_OF_16_BITS\n")
            + (STORED if self.stored else INCLUDE)
            + "struct Config : Defaults {\n"
            + "\n".join(lines)
            + "\n};\n"
            + f"KD_KERNEL void KD_LAUNCH({self.threads}, {self.blocks}, {self.cluster}) "
            + f"kd_rows(KD_ARGUMENT {record} a) {{ {rows}<Config>(a); }}\n"
        )


@dataclass(frozen=True)
class TotalBuild:
    """The kernel that adds up the rows' figures."""

    kernel: ClassVar[str] = "kd_total"
    threads: ClassVar[int] = 1024
    shared: ClassVar[int] = 2 * 8 * threads  # two sums of each thread

    def unit(self) -> str:
        """The text that is compiled."""
        launch = f"KD_LAUNCH({self.threads}, 1, 1)"
        return f"{INCLUDE}KD_KERNEL void {launch} kd_total(KD_ARGUMENT KdTotals a) {{ total(a); }}\n"


@dataclass(frozen=True)
class ScaleBuild:
    """The kernel that multiplies a gradient by the upstream one."""

    type: str

    kernel: ClassVar[str] = "kd_scale"
    threads: ClassVar[int] = 256

    def unit(self) -> str:
        """The text that is compiled."""
        launch = f"KD_LAUNCH({self.threads}, 1, 1)"
        return (
            f"{INCLUDE}KD_KERNEL void {launch} kd_scale(KD_ARGUMENT KdScale a) {{ scale<{self.type}>(a); }}\n"
        )


AnyBuild = Build | TotalBuild | ScaleBuild

# Approximate divisions and roots of 2 ulp. -use_fast_math would take approximate logarithms, too.
OPTIONS: dict[str, Any] = {
    "std": "c++17",
    "ftz": True,
    "prec_div": False,
    "prec_sqrt": False,
    "fma": True,
    "device_as_default_execution_space": True,
}


_IMPORTING = threading.Lock()


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    with _IMPORTING:  # two threads that import cuda.core at once see half of it
        return _missing()


@cache
def _missing() -> str | None:
    install = "pip install 'kdkernels[cuda]'"
    try:
        from cuda.core import ObjectCode, Program, ProgramOptions  # noqa: F401
    except ModuleNotFoundError:
        return f"cuda.core, which compiles the kernels, is not installed: {install}"
    except Exception as error:  # an old one, or one whose libraries don't load
        return f"cuda.core, which compiles the kernels, can't be imported ({error}): {install}"
    try:
        nvrtc_version()
    except Exception as error:
        return f"NVRTC, CUDA's compiler, isn't found ({' '.join(str(error).split())[:200]}): {install}"
    return None


def version_of(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def nvrtc_version() -> tuple[int, int]:
    """Of the library that is loaded."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion: {status}")
    return major, minor


@cache
def _architectures() -> tuple[int, ...]:
    from cuda.bindings import nvrtc

    status, count = nvrtc.nvrtcGetNumSupportedArchs()
    if status == nvrtc.nvrtcResult.NVRTC_SUCCESS:
        status, found = nvrtc.nvrtcGetSupportedArchs()
    return tuple(found)[:count] if status == nvrtc.nvrtcResult.NVRTC_SUCCESS else ()


@cache
def architecture(major: int, minor: int) -> str | None:
    """What NVRTC builds for a GPU: its own architecture, or an earlier one of the same generation."""
    known = [arch for arch in _architectures() if arch // 10 == major and arch % 10 <= minor]
    return f"sm_{max(known)}" if known else None


def compile_unit(unit: str, arch: str) -> bytes:
    """Machine code of a unit, by NVRTC."""
    from cuda.core import Program, ProgramOptions

    folders = [str(SOURCES / "cuda"), str(SOURCES)]
    options = ProgramOptions(name="unit.cu", arch=arch, include_path=folders, **OPTIONS)
    return bytes(Program(unit, "c++", options).compile("cubin").code)


def folder() -> Path | None:
    """Where builds are kept; None where there is no home."""
    chosen = os.environ.get("KDKERNELS_CACHE")
    if chosen:
        return Path(chosen) / "cuda"
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "kdkernels" / "cuda"


@cache
def _sources() -> bytes:
    """A digest of all that a unit includes."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("cuda/*")]):
        digest.update(f"{path.relative_to(SOURCES).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


def key(unit: str, arch: str) -> str:
    """The name of a build: of what it is made of, for what, and with what."""
    from .. import __version__

    parts = (
        _sources().hex(),
        unit,
        arch,
        repr(sorted(OPTIONS.items())),
        repr(nvrtc_version()),
        # The version that NVRTC says has no patch level.
        repr([version_of(name) for name in ("cuda-core", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")]),
        __version__,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


@lru_cache(maxsize=1024)
def cubin(unit: str, arch: str) -> bytes:
    """Machine code of a unit, from the disk where it is there."""
    where = folder()
    if where is None:
        return compile_unit(unit, arch)
    path = where / f"{key(unit, arch)}.cubin"
    code = _read(path)
    try:
        if code is None:
            where.mkdir(parents=True, exist_ok=True)
            with _alone(path.with_suffix(".lock")):
                code = _read(path)  # somebody else's, who was faster
                if code is None:
                    code = compile_unit(unit, arch)
                    _write(path, code)
    except OSError as error:
        warn_once(
            "cuda cache",
            f"kdkernels can't keep its CUDA builds in {where} ({error}), so that every process compiles them "
            "again, about a second each; the environment variable KDKERNELS_CACHE names another folder",
        )
    return compile_unit(unit, arch) if code is None else code


_DIGEST = hashlib.sha256().digest_size


def _read(path: Path) -> bytes | None:
    """The code in a file, or None where there is none, or not all of it."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code, digest = content[:-_DIGEST], content[-_DIGEST:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    # The digest comes last, so that tools still read the file.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code + hashlib.sha256(code).digest())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a lock among the processes that build the same; where there are no locks each of them builds."""
    with path.open("wb") as file:
        with contextlib.suppress(ImportError, OSError):  # not POSIX; a network file system
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Whoever waits for it, or makes it anew, looks for what has been built once more.
            with contextlib.suppress(OSError):
                path.unlink()
