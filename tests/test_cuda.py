"""The CUDA backend's Python, without a GPU: what is built, how it is kept, what is packed, what is refused.

That kernels compute what they should is tested where they run: on a GPU in every test that has a `backend`.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdkernels as kd
from kdkernels import cli, registry, tuning
from kdkernels.backends import cuda, cuda_build
from kdkernels.backends.cuda_build import Build, ScaleBuild, TotalBuild
from kdkernels.backends.cuda_driver import Driver
from kdkernels.divergences import BUILT_IN
from kdkernels.functional import checked_call, complete
from kdkernels.spec import Call

ROOT = Path(__file__).parent.parent
SHARED = tuning.CUDA_SHARED

needs_nvrtc = pytest.mark.skipif(cuda_build.missing() is not None, reason=str(cuda_build.missing()))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sources that are compiled in no time, in the place of the real ones."""
    folder = tmp_path / "csrc"
    (folder / "cuda").mkdir(parents=True)
    (folder / "shared.h").write_text("struct KdTotals { float* loss; };\n")
    (folder / "cuda" / "kd_cuda.cu").write_text(
        '#include "../shared.h"\n'
        '#define KD_KERNEL extern "C" __global__\n#define KD_ARGUMENT const __grid_constant__\n'
        "#define KD_LAUNCH(threads, blocks, cluster) __launch_bounds__(threads, blocks)\n"
        "__device__ void total(const KdTotals& a) { *a.loss = 1; }\n"
    )
    monkeypatch.setattr(cuda_build, "SOURCES", folder)
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    forget()
    yield folder
    forget()


def forget() -> None:
    """As a new process."""
    cuda_build.cubin.cache_clear()
    cuda_build._sources.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What has been compiled, in the order of time."""
    real, done = cuda_build.compile_unit, []

    def compile_unit(unit: str, arch: str) -> bytes:
        done.append((unit, arch))
        return real(unit, arch)

    monkeypatch.setattr(cuda_build, "compile_unit", compile_unit)
    return done


def call_of(student: Any, teacher: Any, labels: Tensor | None = None, **options: Any) -> Call:
    """A checked call, as backends get it."""
    stats = options.pop("stats", False)
    return checked_call(student, teacher, labels, complete(options), stats)


# Units


def test_a_unit_says_what_differs_from_the_defaults() -> None:
    """And nothing else, so that builds that are alike have one text."""
    begin, launch, end = re.split(r"KD_LAUNCH(\(.*?\))", Build("ForwardKL").unit())
    assert begin == (
        "#define KD_OF_16_BITS\n"
        '#include "kd_cuda.cu"\n'
        "struct Config : Defaults {\n"
        "  template <class R>\n  using Divergence = ForwardKL<R>;\n"
        "};\n"
        "KD_KERNEL void "
    )
    assert launch == "(128, 1, 1)"
    assert end == " kd_rows(KD_ARGUMENT KdRows a) { rows<Config>(a); }\n"
    # What only 16 bits are precise enough for is not in units of float32.
    assert Build("ForwardKL", type="kFloat").unit().startswith('#include "kd_cuda.cu"\n')
    unit = Build("JSD", 320, 3, cluster=8, shifted=True, z_noise="kAdditive", v_per_row=True).unit()
    assert re.findall(r"static constexpr (\w+) (\w+) = (\w+);", unit) == [
        ("int", "kCluster", "8"),
        ("bool", "kShifted", "true"),
        ("int", "kZNoise", "kAdditive"),
        ("bool", "kVPerRow", "true"),
    ]
    assert "using Divergence = JSD<R>;" in unit and "KD_LAUNCH(320, 3, 8)" in unit


def test_the_other_units() -> None:
    """One kernel each, of as many threads as launches have."""
    assert "KD_LAUNCH(1024, 1, 1) kd_total(KD_ARGUMENT KdTotals a) { total(a); }" in TotalBuild().unit()
    assert (
        "KD_LAUNCH(256, 1, 1) kd_scale(KD_ARGUMENT KdScale a) { scale<kHalf>(a); }"
        in ScaleBuild("kHalf").unit()
    )
    assert (TotalBuild.threads, ScaleBuild.threads) == (1024, 256)


def build_of(mode: str = "gradient", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Build:
    """What a call of 128,256 classes with these options would build."""
    z = torch.empty(1, 128_256, dtype=dtype)
    student, teacher = options.pop("student", None), options.pop("teacher", None)
    call = call_of(student or z, z if teacher is None else teacher, options.pop("labels", None), **options)
    build = cuda.build_of(mode, call.spec, dtype, False, cuda.uses_labels(call), call.sparse is not None)
    return build.fitted(128_256, SHARED)[0]


def test_what_a_call_builds() -> None:
    """Only what changes the code is in a build."""
    y = torch.zeros(1, dtype=torch.int64)
    plain = build_of()
    assert plain == Build("ForwardKL", threads=1024, blocks=1, cluster=4)
    assert build_of(temperature=3.0, mask=torch.ones(1, dtype=torch.bool), num_items=3) == plain
    assert build_of(labels=y, hard_weight=0.0) == plain  # for the mask alone
    assert build_of(labels=y, hard_weight=1.0).hard == "kSharedHard"
    assert build_of(labels=y, hard_weight=1.0, temperature=2.0).hard == "kOwnHard"
    assert build_of("loss").mode == "kLoss"
    assert build_of("scaled_gradient", torch.float16).type == "kHalf"
    assert build_of(dtype=torch.float32).cluster == 8
    assert (
        build_of(stats=True).stats
        and build_of(stats=True, labels=y, hard_weight=0.0, temperature=2.0).hard == "kOwnHard"
    )
    noise = kd.LogitNoise(0.1, "multiplicative", per="row", seed=1)
    noised = build_of(teacher_noise=noise, student_noise=kd.LogitNoise(0.1, seed=1))
    assert (noised.v_noise, noised.v_per_row) == ("kMultiplicative", True)
    assert (noised.z_noise, noised.z_per_row) == ("kAdditive", False)
    z = torch.empty(1, 128_256, dtype=torch.bfloat16)
    capped = build_of(student=kd.Logits(z, scale=2.0), teacher=kd.Logits(z, softcap=30.0))
    assert (capped.z_capped, capped.v_capped) == (False, True)
    # A stored teacher leaves room for rows of twice as many classes.
    stored = kd.TopK(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3), "renormalize")
    assert build_of(teacher=stored) == Build("ForwardKL", threads=1024, blocks=1, cluster=2, stored=True)
    assert not build_of(teacher=stored, labels=y, hard_weight=1.0, soft_weight=0.0).stored


def test_without_a_soft_term_the_teacher_is_not_built_in() -> None:
    """Neither its cap and noise, nor a second softmax of the student, which T would ask for."""
    y, z = torch.zeros(1, dtype=torch.int64), torch.empty(1, 128_256, dtype=torch.bfloat16)
    build = build_of(
        teacher=kd.Logits(z, softcap=30.0), labels=y, hard_weight=1.0, soft_weight=0.0, temperature=2.0,
        teacher_noise=kd.LogitNoise(0.1, seed=1), divergence=kd.JSD(0.5),
    )  # fmt: skip
    assert build == Build("NoDivergence", threads=1024, blocks=1, cluster=4, hard="kSharedHard")


# Records and names, against the C++ itself

SIDE_FIELDS = (
    "data stride[0] stride[1] stride[2] by.c by.k cap slope seed row_offset sigma probability".split()
)
ROWS_FIELDS = [
    *(f"{side}.{name}" for side in "zv" for name in SIDE_FIELDS),
    *"rows shape[0] shape[1] classes width part labels mask weights ignore_index targets target_type".split(),
    *(f"target_stride[{k}]" for k in range(4)),
    *"counted given number upstream upstream_stride gradient figures one.c one.k z_scale soft_gain".split(),
    *"hard_gain t_factor soft_weight hard_weight params[0] params[1] params[2] params[3]".split(),
]
TOTALS_FIELDS = "figures loss stats counted given number rows loss_mean stats_mean".split()
SCALE_FIELDS = "in out rows width type upstream upstream_stride in_place".split()
STORED_FIELDS = [*(f"rows.{name}" for name in ROWS_FIELDS), *"ids log_p rest extra k".split()]
RECORDS = (
    ("KdRows", cuda.ROWS, ROWS_FIELDS),
    ("KdStored", struct.Struct(cuda.ROWS.format + cuda.LISTS.format[1:]), STORED_FIELDS),
    ("KdTotals", cuda.TOTALS, TOTALS_FIELDS),
    ("KdScale", cuda.SCALE, SCALE_FIELDS),
)


def cpp(tmp_path: Path, body: str) -> str:
    """What a program prints which includes the kernels, for a processor; or it is compiled alone."""
    program = tmp_path / "program.cpp"
    program.write_text(
        f'#include "kd_sparse.cu"\n#include <cstdio>\n#include <cstddef>\nint main() {{\n{body}\n}}\n'
    )
    flags = [
        "-std=c++20",
        "-w",
        '-DKD_DEVICE="shim/device.h"',
        f"-I{ROOT / 'tests'}",
        f"-I{ROOT / 'csrc/cuda'}",
    ]
    run = [["g++", *flags, "-fsyntax-only", program]]
    if "printf" in body:
        grid = ROOT / "tests" / "shim" / "grid.cpp"
        run = [["g++", *flags, program, grid, "-o", tmp_path / "program"], [tmp_path / "program"]]
    for command in run:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return done.stdout


@needs_compiler
def test_records_are_those_of_the_kernels(tmp_path: Path) -> None:
    """Every field is packed where the kernel looks for it, as a number of its kind."""
    checks = []
    for name, record, names in RECORDS:
        codes = re.sub(r"(\d+)(\w)", lambda found: int(found[1]) * found[2], record.format.replace(" ", ""))[
            1:
        ]
        assert len(codes) == len(names), name
        checks.append(f'static_assert(sizeof({name}) == {record.size}, "size");')
        at = 0
        for code, field in zip(codes, names, strict=True):
            size = 4 if code == "f" else 8
            kind = {"f": "float", "d": "double"}.get(code)
            checks.append(f"static_assert(__builtin_offsetof({name}, {field}) == {at});")
            checks.append(f"static_assert(sizeof((({name}*)0)->{field}) == {size});")
            if kind is None:
                whole = f"__is_same(decltype((({name}*)0)->{field} + 0), float)"
                checks.append(f"static_assert(!{whole} && !{whole.replace('float', 'double')});")
            else:
                checks.append(f"static_assert(__is_same(decltype((({name}*)0)->{field} + 0), {kind}));")
            at += size
        assert at == record.size
    checks.append(f"static_assert(kFigures == {cuda.FIGURES});")
    for dtype, name in cuda_build.TYPES.items():
        checks.append(
            f"static_assert({name} == {cuda._NUMBERS[dtype]} && size_of({name}) == {dtype.itemsize});"
        )
    checks.append("static_assert(size_of(1) == 8);")
    cpp(tmp_path, "\n".join(checks))


@needs_compiler
def test_defaults_are_those_of_the_kernels(tmp_path: Path) -> None:
    """A field that a unit doesn't mention is what Python takes it for."""
    checks = []
    for field in fields(Build)[3:]:
        name = "k" + "".join(word.capitalize() for word in field.name.split("_"))
        value = str(field.default).lower() if isinstance(field.default, bool) else field.default
        checks.append(f"static_assert(Defaults::{name} == {value});")
    cpp(tmp_path, "\n".join(checks))


@needs_compiler
def test_divergences_are_those_of_the_header(tmp_path: Path) -> None:
    """The same template for the same name and parameters."""
    assert set(cuda_build.DIVERGENCES) == BUILT_IN
    parameters = [(a, b) for a in (-1.0, 0.0, 0.5, 2.0) for b in (-1.0, 0.0, 0.5, 2.0)]
    entries = " ".join(f"tell(number, {a}, {b});" for a, b in parameters)
    body = f"""
    auto tell = [](int number, double a, double b) {{
      const double p[4] = {{a, b}};
      const int found = with_parameters(number, p);
      #define X(n, name, text) if (n == found) std::printf("%s ", #name);
      KD_DIVERGENCES(X)
      #undef X
    }};
    #define X(n, name, text) {{ const int number = n; std::printf("\\n%s|", text); {entries} }}
    KD_DIVERGENCES(X)
    """
    lines = dict(line.split("|") for line in cpp(tmp_path, body).split("\n") if "|" in line)
    for name in BUILT_IN:
        assert lines[name].split() == [cuda_build.divergence_name(name, p) for p in parameters], name
    assert len(set(lines["alpha_beta"].split())) == 3


# How rows are shared out


# How builds may differ in what they need: what is kept, how rows lie, and registers.
HOW = list(itertools.product((0, 1, 2), (False, True), ("light", "heavy")))


@given(
    width=st.integers(1, 500_000),
    itemsize=st.sampled_from([2, 4]),
    shared=st.sampled_from([SHARED, tuning.cuda_shared(12), 48 << 10]),
    how=st.sampled_from([*HOW, *((0, shifted, kind, True) for _, shifted, kind in HOW[:4])]),
)
def test_no_configuration_asks_for_more_than_there_is(
    width: int, itemsize: int, shared: int, how: tuple[Any, ...]
) -> None:
    """Of threads, registers, shared memory and blocks of a cluster, and every class has a place."""
    kept, shifted, kind, *stored = how
    config = tuning.cuda(width, itemsize, shared, *how)
    assert (config is None) == (width > tuning.cuda_widest(itemsize, shared, *how))
    if config is None:
        return
    assert config.cluster in (1, 2, 4, 8, 16)
    assert config.threads % 32 == 0 and 32 <= config.threads <= tuning.CUDA_RESIDENT[kind]
    # Each multiprocessor of these has 1 KiB more than a block may ask for, which the system takes of one.
    registers = 64 if kind == "light" else 96
    assert config.blocks * config.threads * registers <= 65_536
    assert config.shared <= shared and config.blocks * (config.shared + 1024) <= shared + 1024
    # Wherever in 16 bytes a row begins.
    for off in range(16 // itemsize):
        assert -(-(off + width) * itemsize // 16) <= config.cluster * config.part
    # No fewer blocks would do, and no thread has nothing to do while others have a vector more.
    assert config.part * config.cluster < -(-width * itemsize // 16) + config.cluster + 1
    assert config.part > config.threads - 32
    # Both sides and what is kept, or one and a byte of each vector, beside the messages of 32 warps and of 2
    # rounds among 16 blocks at most.
    vectors = 2 * (config.part + 2 * shifted) + kept * config.part
    if stored:
        vectors = config.part + 2 * shifted + (config.part + 15) // 16
    assert 16 * vectors < config.shared <= 16 * (vectors + 1 + 3 * (1 + 32) + 2 * 3 * 16)


@pytest.mark.parametrize("shared", [SHARED, tuning.cuda_shared(12), 48 << 10])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_said_to_fit_fits_however_it_is_built(itemsize: int, shared: int) -> None:
    """`supports` asks before it is known what the call builds."""
    widest = tuning.cuda_widest(itemsize, shared)
    for width in range(widest - 600, widest + 1):
        assert all(tuning.cuda(width, itemsize, shared, *how) is not None for how in HOW)
    assert tuning.cuda(widest + 1, itemsize, shared) is None
    widest = tuning.cuda_widest(itemsize, shared, stored=True)
    for width in range(widest - 600, widest + 1):
        assert all(tuning.cuda(width, itemsize, shared, *how, stored=True) is not None for how in HOW[:4])
    assert tuning.cuda(widest + 1, itemsize, shared, stored=True) is None


def test_configurations_of_known_vocabularies() -> None:
    """As they are meant to be: one row is 4 blocks, each as large as a multiprocessor."""
    plain = tuning.cuda(128_256, 2, SHARED, 0, False, "light")
    assert plain == tuning.CudaConfig(4, 1024, 1, 4009, 16 * (1 + 3 * 33 + 6 * 4 + 2 * 4009))
    # Fewer threads where each takes more registers.
    heavy = tuning.cuda(128_256, 2, SHARED, 1, True, "heavy")
    assert heavy == tuning.CudaConfig(4, 576, 1, 4009, 16 * (1 + 3 * 19 + 6 * 4 + 2 * 4011 + 4009))
    assert getattr(tuning.cuda(32_000, 2, SHARED, 0, False, "light"), "cluster", None) == 1
    # Of a stored teacher's calls, 2.
    stored = tuning.cuda(128_256, 2, SHARED, 0, False, "light", stored=True)
    assert stored == tuning.CudaConfig(2, 1024, 1, 8017, 16 * (1 + 3 * 33 + 6 * 2 + 8017 + 502))
    short = tuning.cuda(1000, 2, SHARED, 0, False, "light")
    assert short is not None and (short.cluster, short.threads, short.blocks) == (1, 32, 32)
    assert tuning.cuda_widest(2, SHARED) > 262_144 > tuning.cuda_widest(4, SHARED) > 152_064


# What is refused


def reason(call: Call) -> str:
    """Why the backend can't run it, of which there is one."""
    why = cuda.BACKEND.supports(call)
    assert why is not None
    return why


def test_supports_says_what_it_does_not() -> None:
    """By name, with what would do."""
    z = torch.zeros(2, 8)
    assert cuda.BACKEND.supports(call_of(z, z)) is None
    assert reason(call_of(z, kd.Mixture([z, z]))) == "takes one teacher, not a kd.Mixture"
    double = z.double()
    assert reason(call_of(double, double)) == (
        "takes float32, bfloat16 and float16 logits, the student's are float64"
    )
    assert reason(call_of(z.bfloat16(), z)) == (
        "takes sides of one dtype, the student's is bfloat16 and the teacher's float32"
    )
    across = torch.zeros(8, 2).t()
    assert (
        reason(call_of(z, across)) == "takes rows whose classes lie side by side, the teacher's have stride 2"
    )
    assert (
        reason(call_of(across, z)) == "takes rows whose classes lie side by side, the student's have stride 2"
    )
    assert cuda.BACKEND.supports(call_of(torch.zeros(8, 1)[::2], torch.zeros(4, 1))) is None
    strided = torch.zeros(4, 16)[::2, :8]
    assert cuda.BACKEND.supports(call_of(z, strided)) is None
    stored = kd.TopK(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1))
    assert cuda.BACKEND.supports(call_of(z, stored)) is None
    assert cuda.BACKEND.supports(call_of(z.bfloat16(), stored)) is None
    assert reason(call_of(double, stored)) == (
        "takes float32, bfloat16 and float16 logits, the student's are float64"
    )
    assert reason(call_of(across, stored)) == (
        "takes rows whose classes lie side by side, the student's have stride 2"
    )


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4)])
def test_rows_that_do_not_fit_are_refused(dtype: torch.dtype, size: int) -> None:
    """It says how wide they may be, and that is so."""
    widest = tuning.cuda_widest(size, SHARED)
    fits, too_wide = (torch.zeros(1, dtype=dtype).expand(1, width) for width in (widest, widest + 1))
    fits, too_wide = (torch.empty(1, x.shape[1], dtype=dtype) for x in (fits, too_wide))
    assert cuda.BACKEND.supports(call_of(fits, fits)) is None
    name = str(dtype).removeprefix("torch.")
    assert reason(call_of(too_wide, too_wide)) == (
        f"keeps rows on the chip, {widest:,} classes of {name} at most, these have {widest + 1:,}"
    )


def test_heads_are_of_the_dtype_that_they_are_multiplied_in() -> None:
    """Their logits aren't there to be asked."""
    head = kd.Head(torch.zeros(2, 4), torch.zeros(8, 4))
    assert cuda.BACKEND.supports(call_of(head, head)) is None
    assert "sides of one dtype" in reason(call_of(head, torch.zeros(2, 8).bfloat16()))
    wide = kd.Head(torch.zeros(2, 1), torch.zeros(400_000, 1))
    assert "keeps rows on the chip" in reason(call_of(wide, wide))
    # Of a stored teacher there is no row.
    stored = kd.TopK(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1))
    assert cuda.BACKEND.supports(call_of(wide, stored)) is None


def test_only_what_the_header_has_is_known() -> None:
    """As the C++ library says it."""
    assert all(cuda.BACKEND.knows(name) is None for name in BUILT_IN)
    for name in ("AlphaBetaLimit", "hellinger"):
        assert cuda.BACKEND.knows(name) == f"has no C++ expression of the divergence {name!r}"


class _Gpu:
    """A machine with a GPU, as far as the backend asks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.version, "hip", None)
        self.driver, self.capability = Driver(), (9, 0)
        self.driver.__dict__.update(missing=None, version=(13, 0))
        patch.setattr(cuda, "DRIVER", self.driver)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: self.capability)
        patch.setattr(cuda_build, "missing", lambda: None)
        patch.setattr(cuda_build, "nvrtc_version", lambda: (13, 0))
        patch.setattr(cuda_build, "architecture", lambda major, minor: f"sm_{major}{minor}")

    def reason(self) -> str | None:
        """Of a backend that has never been asked."""
        return cuda.CudaBackend().available(torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> _Gpu:
    return _Gpu(monkeypatch)


def test_a_hopper_with_all_that_is_needed_is_available(gpu: _Gpu) -> None:
    """And it is asked once, as every call asks."""
    assert gpu.reason() is None
    backend = cuda.CudaBackend()
    assert backend.available(torch.device("cuda", 0)) is None
    gpu.capability = (8, 0)
    assert backend.available(torch.device("cuda", 0)) is None
    assert backend.available(torch.device("cuda", 1)) is not None


def test_other_devices(gpu: _Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its own words."""
    assert cuda.BACKEND.available(torch.device("cpu")) == "runs on cuda tensors, these are on cpu"
    gpu.capability = (8, 9)
    assert gpu.reason() == (
        "needs clusters of blocks, which GPUs have from compute capability 9.0 on, this one has 8.9"
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gpu.reason() == "runs on NVIDIA GPUs, this torch is for ROCm"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.reason() == "torch.cuda.is_available() is False"


def test_an_older_driver_or_compiler(gpu: _Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver runs builds of its own CUDA, whatever the minor version; a compiler knows older GPUs."""
    gpu.driver.__dict__["version"] = (12, 9)
    assert gpu.reason() == (
        "the driver, of CUDA 12.9, can't run what NVRTC 13.0 builds: install 'cuda-bindings==12.*' and the "
        "NVRTC of CUDA 12"
    )
    gpu.driver.__dict__["version"] = (14, 0)
    assert gpu.reason() is None
    gpu.driver.__dict__["missing"] = "the CUDA driver does not load: libcuda.so.1"
    assert gpu.reason() == "the CUDA driver does not load: libcuda.so.1"
    gpu.driver.__dict__["missing"] = None
    monkeypatch.setattr(cuda_build, "architecture", lambda major, minor: None)
    assert gpu.reason() == "NVRTC 13.0 doesn't build for compute capability 9.0: install a newer one"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_driver_that_is_not_there() -> None:
    """A reason, which is found out when somebody asks."""
    assert "the CUDA driver does not load" in str(Driver().missing)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What is installed is found out once."""
    cuda_build._missing.cache_clear()
    yield
    cuda_build._missing.cache_clear()


@pytest.mark.parametrize("name", ["cuda", "cuda.core"])
def test_a_package_that_is_not_there(name: str, asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason that says what to install."""
    for module in [module for module in sys.modules if module.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    assert cuda_build.missing() == (
        "cuda.core, which compiles the kernels, is not installed: pip install 'kdkernels[cuda]'"
    )


def test_a_package_that_is_too_old(asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 1.0 what is used was elsewhere."""
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.core", types.ModuleType("cuda.core"))
    why = str(cuda_build.missing())
    assert why.startswith("cuda.core, which compiles the kernels, can't be imported (cannot import name")
    assert why.endswith("pip install 'kdkernels[cuda]'")


def test_a_compiler_that_is_not_there(asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is installed, and the library that it loads isn't."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda.core is not installed")

    def nvrtc_version() -> tuple[int, int]:
        raise RuntimeError("libnvrtc.so.13:\n cannot open shared object file")

    monkeypatch.setattr(cuda_build, "nvrtc_version", nvrtc_version)
    assert cuda_build.missing() == (
        "NVRTC, CUDA's compiler, isn't found (libnvrtc.so.13: cannot open shared object file): "
        "pip install 'kdkernels[cuda]'"
    )


def test_importing_needs_and_loads_none_of_it() -> None:
    """Neither package nor driver: where they are broken the other backends run."""
    code = (
        "import sys\n"
        "sys.modules['cuda'] = None\n"  # whatever imports it fails
        "import torch, kdkernels as kd\n"
        "z = torch.randn(2, 5)\n"
        "print(kd.explain(z, z))\n"
        "assert not any(name.startswith('cuda.') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cuda" in done.stdout


def test_the_label_is_told() -> None:
    """By `explain`, by the registry, and nowhere where there is none."""
    assert registry.label("cpu") == "cpu"
    assert tuning.CUDA_LABEL is None or registry.label("cuda") == f"cuda ({tuning.CUDA_LABEL})"
    z = torch.zeros(2, 3)
    said = str(kd.explain(z, z)).splitlines()
    assert f"  {registry.label('cuda')}: runs on cuda tensors, these are on cpu" in said


def test_the_readme_says_no_more_than_is_known() -> None:
    """The label, where there is one, and how wide rows may be."""
    (row,) = (
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith('| `"cuda"` |')
    )
    label = tuning.CUDA_LABEL or "compiled, not yet run"
    assert (f"**{label}**" in row) == (tuning.CUDA_LABEL is not None)
    assert f"up to {tuning.cuda_widest(2, SHARED):,} classes" in row


def test_the_order_on_gpus() -> None:
    """`backend=None` takes the first of `tuning.GPU_ORDER` that can."""
    assert [name for name in registry.BACKENDS if name in tuning.GPU_ORDER] == list(tuning.GPU_ORDER)
    assert sorted(tuning.GPU_ORDER) == ["cuda", "triton"]
    # Until a GPU has run it.
    assert tuning.CUDA_LABEL is None or tuning.GPU_ORDER[0] == "triton"


# Builds and where they are kept


@needs_nvrtc
def test_a_build_is_made_once(sources: Path, compiled: list[Any], tmp_path: Path) -> None:
    """Then it is read, by every process."""
    unit = TotalBuild().unit()
    code = cuda_build.cubin(unit, "sm_90")
    assert code[:4] == b"\x7fELF" and b"kd_total" in code
    assert cuda_build.cubin(unit, "sm_90") is code and len(compiled) == 1
    forget()
    assert cuda_build.cubin(unit, "sm_90") == code and len(compiled) == 1
    (file,) = (tmp_path / "cache" / "cuda").iterdir()
    # A tool that wants ELF still reads it.
    assert file.suffix == ".cubin" and file.read_bytes()[: len(code)] == code


@needs_nvrtc
def test_a_build_depends_on_all_that_it_is_made_of(
    sources: Path, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these makes another one: text, architecture, sources, options, compiler, version."""
    unit = TotalBuild().unit()
    keys = {cuda_build.key(unit, "sm_90")}

    def another() -> None:
        forget()
        key = cuda_build.key(unit, "sm_90")
        assert key not in keys
        keys.add(key)

    keys.add(cuda_build.key(unit + "\n", "sm_90"))
    keys.add(cuda_build.key(unit, "sm_100"))
    assert len(keys) == 3
    with (sources / "shared.h").open("a") as file:
        file.write("// more\n")
    another()
    (sources / "cuda" / "new.h").write_text("")
    another()
    monkeypatch.setitem(cuda_build.OPTIONS, "ftz", False)
    another()
    monkeypatch.setattr(cuda_build, "nvrtc_version", lambda: (99, 0))
    another()
    monkeypatch.setattr(kd, "__version__", "99.0")
    another()
    monkeypatch.setattr(cuda_build, "version_of", lambda name: "99.1")
    another()


@needs_nvrtc
@pytest.mark.parametrize("damage", [b"", b"short", None, "flip"], ids=["empty", "short", "cut", "flipped"])
def test_a_damaged_build_is_made_again(
    damage: Any, sources: Path, compiled: list[Any], tmp_path: Path
) -> None:
    """A process that was killed, a disk that was full: what is not whole is not loaded."""
    unit = TotalBuild().unit()
    code = cuda_build.cubin(unit, "sm_90")
    (file,) = (tmp_path / "cache" / "cuda").iterdir()
    content = file.read_bytes()
    if damage is None:
        file.write_bytes(content[:-1])
    elif damage == "flip":
        file.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    else:
        file.write_bytes(damage)
    forget()
    assert cuda_build.cubin(unit, "sm_90") == code and len(compiled) == 2
    assert file.read_bytes() == content


@needs_nvrtc
def test_a_cache_that_cannot_be_written(
    sources: Path, compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once; builds are made all the same."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("kdkernels.caller._warned", set())
    with pytest.warns(UserWarning, match="KDKERNELS_CACHE names another folder") as said:
        for arch in ("sm_90", "sm_100"):
            assert cuda_build.cubin(TotalBuild().unit(), arch)[:4] == b"\x7fELF"
    assert len(said) == 1 and len(compiled) == 2


@needs_nvrtc
def test_a_source_that_does_not_compile_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    """The compiler's words, no build, and no lock."""
    with pytest.raises(Exception, match="nobody"):
        cuda_build.cubin("int nobody() { return nothing; }", "sm_90")
    assert list((tmp_path / "cache" / "cuda").iterdir()) == []


RANK = """
import sys, time
from pathlib import Path
from kdkernels.backends import cuda_build

cuda_build.SOURCES = Path(sys.argv[1])
real = cuda_build.compile_unit

def slowly(unit, arch):
    print("compiles", flush=True)
    time.sleep(1)  # so that the others come while it is at work
    return real(unit, arch)

cuda_build.compile_unit = slowly
print(len(cuda_build.cubin(cuda_build.TotalBuild().unit(), "sm_90")))
"""


@needs_nvrtc
def test_ranks_that_start_at_once_compile_once(sources: Path, tmp_path: Path) -> None:
    """The others wait and read."""
    command = [sys.executable, "-c", RANK, str(sources)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert sum("compiles" in words for words in said) == 1
    assert len({words[-1] for words in said}) == 1
    assert [path.suffix for path in (tmp_path / "cache" / "cuda").iterdir()] == [".cubin"]


@needs_nvrtc
def test_threads_that_start_at_once_compile_once(sources: Path, compiled: list[Any]) -> None:
    """As processes do."""
    unit, codes = TotalBuild().unit(), []
    threads = [
        threading.Thread(target=lambda: codes.append(cuda_build.cubin(unit, "sm_90"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1 and len(codes) == 4 and len(set(codes)) == 1


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """KDKERNELS_CACHE, or where the system keeps what can be made again."""
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path))
    assert cuda_build.folder() == tmp_path / "cuda"
    monkeypatch.delenv("KDKERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cuda_build.folder() == tmp_path / "xdg" / "kdkernels" / "cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cuda_build.folder() == tmp_path / "home" / ".cache" / "kdkernels" / "cuda"

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert cuda_build.folder() is None


@needs_nvrtc
def test_architectures_that_the_compiler_knows() -> None:
    """The GPU's own, or an earlier one of its generation, whose code it runs."""
    assert cuda_build.architecture(9, 0) == "sm_90"
    assert cuda_build.architecture(9, 9) == "sm_90"
    assert cuda_build.architecture(99, 0) is None


# The command line


def compile_lines(**more: Any) -> list[str]:
    options = {"archs": ["sm_90"], "vocabs": [128_256], "dtypes": ["bfloat16"], "divergences": ["jsd"]}
    return list(cli.compile_lines(**{**options, **more}))


@needs_nvrtc
def test_info_compiles_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls will ask for, several vocabularies at once, and each build once."""
    made: list[tuple[str, str]] = []
    monkeypatch.setattr(cuda_build, "cubin", lambda unit, arch: made.append((unit, arch)))
    lines = compile_lines(vocabs=[128_256, 128_000, 32_000], divergences=["jsd", "alpha_beta"])
    # Two of the vocabularies share theirs.
    expected = 2 * (1 + 3) * 2 * 3 + 2
    assert len(made) == len(set(made)) == expected
    assert lines[-2].startswith(f"{expected:>4}/{expected}  sm_90  ") and lines[-1].startswith("in ")
    z = torch.empty(1, 128_256, dtype=torch.bfloat16)
    call = call_of(
        z, z, torch.zeros(1, dtype=torch.int64), divergence=kd.JSD(0.3), hard_weight=0.1, temperature=2.0
    )
    for mode in ("gradient", "loss"):
        build = cuda.build_of(mode, call.spec, torch.bfloat16, False, labelled=True)
        assert (build.fitted(128_256, SHARED)[0].unit(), "sm_90") in made
    made.clear()
    compile_lines(divergences=["jsd", "logit_mse"], stored=True)
    # Logits are not compared with what is stored of a distribution.
    assert len(made) == 2 * 3 + 2
    stored = kd.TopK(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3))
    call = call_of(z, stored, divergence=kd.JSD(0.3))
    build = cuda.build_of("gradient", call.spec, torch.bfloat16, False, labelled=False, stored=True)
    assert (build.fitted(128_256, SHARED)[0].unit(), "sm_90") in made


@needs_nvrtc
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"archs": ["sm_80"]}, "no builds for 'sm_80': it must be sm_90 or later"),
        ({"archs": ["hopper"]}, "no builds for 'hopper': it must be sm_90 or later"),
        ({"vocabs": [500_000]}, "no builds for 500,000 classes: it must be 1 to 458,745"),
        ({"vocabs": [0]}, "no builds for 0 classes: it must be 1 to 458,745"),
        ({"dtypes": ["float64"]}, "--dtype must be one of bfloat16, float16, float32, got 'float64'"),
        ({"divergences": ["hellinger"]}, "no builds of 'hellinger': it must be one of forward_kl"),
    ],
    ids=str,
)
def test_builds_that_there_are_not(more: dict[str, Any], said: str) -> None:
    """Refused before anything is compiled."""
    with pytest.raises(ValueError, match=re.escape(said)):
        compile_lines(**more)


def test_compiling_ahead_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason, in one line."""
    monkeypatch.setattr(cuda_build, "missing", lambda: "NVRTC is on holiday")
    with pytest.raises(ValueError, match="NVRTC is on holiday"):
        compile_lines()
