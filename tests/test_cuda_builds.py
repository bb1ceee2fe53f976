"""What NVRTC makes of the row kernel for GPUs that need not be here: registers, memory, and its main loops.

A build takes a second or more, and so there is one of each divergence in each mode, with options in turn.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kdkernels import tuning
from kdkernels.backends import cuda_build
from kdkernels.backends.cuda_build import DIVERGENCES, NO_DIVERGENCE, Build, ScaleBuild, TotalBuild
from kdkernels.tuning import CudaConfig


def tool() -> Path | None:
    """The disassembler, which Triton brings."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


pytestmark = [
    pytest.mark.skipif(cuda_build.missing() is not None, reason=str(cuda_build.missing())),
    pytest.mark.skipif(tool() is None, reason="no cuobjdump, which Triton for NVIDIA GPUs brings"),
]

ARCHITECTURES = ("sm_90", "sm_100")
TEMPLATES = (*dict.fromkeys(DIVERGENCES.values()), "AlphaBetaLimit", "AlphaBetaAny", NO_DIVERGENCE)
MODES = ("kGradient", "kLoss", "kScaledGradient")
TYPES = ("kBFloat16", "kHalf", "kFloat")
VOCABULARIES = (128_256, 32_000)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"hard": "kSharedHard"},
    {"hard": "kOwnHard", "stats": True, "z_capped": True, "v_capped": True},
    {"hard": "kOwnHard", "shifted": True},
)
# These take ten times as long to compile, and so are of few.
NOISE: dict[str, Any] = {"hard": "kSharedHard", "z_noise": "kMultiplicative", "v_noise": "kAdditive"}
NOISED = {"SoftCrossEntropy": "kLoss", "LogitMSE": "kGradient", NO_DIVERGENCE: "kScaledGradient"}
# Bytes of local memory where registers do not do: one build of all, whose classes at once want more than 96.
SPILLED = {("sm_90", "BinaryKL", "kNoHard"): 64}


def builds(arch: str, template: str) -> list[tuple[Build, CudaConfig]]:
    """Of every mode."""
    t, found = TEMPLATES.index(template), []
    for m, mode in enumerate(MODES):
        o = (t + 2 * m + ARCHITECTURES.index(arch)) % len(OPTIONS)
        options = NOISE if NOISED.get(template) == mode else OPTIONS[o]
        if template == NO_DIVERGENCE:
            options = {
                "hard": "kSharedHard",
                **{k: v for k, v in options.items() if k not in ("hard", "v_noise")},
            }
        kind = TYPES[(t + m + o) % 3]
        if (mode, kind) == ("kGradient", "kHalf"):  # float16 has its gradient in backward
            kind = TYPES[2 * (t % 2)]
        build = Build(template, type=kind, mode=mode, **options)
        fitted, config = build.fitted(VOCABULARIES[(t + m) % 2], tuning.CUDA_SHARED)
        assert config is not None
        found.append((fitted, config))
    return found


def test_the_builds_are_enough() -> None:
    """Each mode has each option, and each of these each type, on either architecture."""
    for arch in ARCHITECTURES:
        made = [build for template in TEMPLATES for build, _ in builds(arch, template)]
        kinds = {(b.mode, b.stats, b.shifted, b.hard != "kNoHard") for b in made if b.z_noise == "kNoNoise"}
        for mode in MODES:
            assert {kind[1:] for kind in kinds if kind[0] == mode} >= {
                (False, False, False), (False, False, True), (True, False, True), (False, True, True)
            }  # fmt: skip
            assert {b.type for b in made if b.mode == mode} == set(TYPES) - (
                {"kHalf"} if mode == "kGradient" else set()
            )
        assert {b.mode for b in made if b.z_noise != "kNoNoise"} == set(MODES)


class Usage(NamedTuple):
    """Of a thread, and of a block."""

    registers: int
    stack: int
    shared: int
    local: int


def asked(code: bytes, option: str, folder: Path) -> str:
    """What the disassembler says of a build."""
    path = folder / "build.cubin"
    path.write_bytes(code)
    done = subprocess.run([str(tool()), option, str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def usage(code: bytes, folder: Path) -> Usage:
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", asked(code, "-res-usage", folder))
    assert found is not None
    return Usage(*map(int, found.groups()))


def compiled(units: Sequence[str], arch: str) -> list[bytes]:
    """Machine code of some units, which are compiled side by side."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda unit: cuda_build.compile_unit(unit, arch), units))


# Closed forms, one with exponentials and one with logarithms between, powers, those that are not of two
# distributions, and noise; where registers do not do, too.
PLAIN = {
    ("sm_90", "ForwardKL"), ("sm_100", "SoftCrossEntropy"), ("sm_90", "JSD"), ("sm_100", "TVD"),
    ("sm_100", "AlphaBeta"), ("sm_90", "DKD"), ("sm_100", "CenteredLogitMSE"), ("sm_90", "BinaryKL"),
    ("sm_90", NO_DIVERGENCE),
}  # fmt: skip


@pytest.mark.thorough(but=lambda arch, template: (arch, template) in PLAIN)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_builds_have_what_they_need(arch: str, template: str, tmp_path: Path) -> None:
    """No memory in the place of registers, and room on a multiprocessor for as many blocks as they say."""
    made = builds(arch, template)
    for (build, config), code in zip(made, compiled([build.unit() for build, _ in made], arch), strict=True):
        known = SPILLED.get((arch, template, build.hard), 0)
        assert_fits(build, config, usage(code, tmp_path), known)


def assert_fits(build: Build, config: CudaConfig, found: Usage, spilled: int = 0) -> None:
    """What a build uses is what there is for it."""
    assert found.stack <= spilled and found.local == 0, (build, found)
    # A warp's registers are given out by 256.
    registers = -(-found.registers // 8) * 8
    assert registers * config.threads * config.blocks <= 65_536, (build, found)
    # Beside what the kernel asks for there is what the system takes, and nothing else.
    assert found.shared <= tuning.CUDA_RESERVED
    assert config.shared <= tuning.CUDA_SHARED
    assert config.blocks * (config.shared + 1024) <= tuning.CUDA_SHARED + 1024


# Of stored teachers: each divergence of distributions, with types, modes and options in turn.
LISTED = [
    name
    for name in TEMPLATES
    if name not in ("LogitMSE", "CenteredLogitMSE", "DKD", "BinaryKL", NO_DIVERGENCE)
]


def stored_build(arch: str, template: str) -> tuple[Build, CudaConfig]:
    """One of a template, which on the other architecture is another."""
    t, a = LISTED.index(template), ARCHITECTURES.index(arch)
    kind, options = TYPES[(t + a) % 3], dict(OPTIONS[(t + t // 4 + 2 * a) % 4])
    options.pop("v_capped", None)
    modes = ("kScaledGradient", "kLoss") if kind == "kHalf" else ("kGradient", "kGradient", "kLoss")
    build = Build(template, type=kind, mode=modes[t % len(modes)], stored=True, **options)
    fitted, config = build.fitted(VOCABULARIES[t % 2], tuning.CUDA_SHARED)
    assert config is not None
    return fitted, config


@pytest.mark.thorough(but=lambda arch: arch == "sm_90")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_builds_of_stored_teachers(arch: str, tmp_path: Path) -> None:
    """The same of these, whose rows take half of the memory."""
    made = [stored_build(arch, template) for template in LISTED]
    kinds = {(build.type, build.mode) for build, _ in made}
    assert {kind for kind, _ in kinds} == set(TYPES) and {mode for _, mode in kinds} == set(MODES)
    assert {(b.stats, b.shifted, b.hard != "kNoHard") for b, _ in made} == {
        (False, False, False), (False, False, True), (True, False, True), (False, True, True)
    }  # fmt: skip
    for (build, config), code in zip(made, compiled([build.unit() for build, _ in made], arch), strict=True):
        assert_fits(build, config, usage(code, tmp_path))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_small_kernels(arch: str, tmp_path: Path) -> None:
    """Those that add up and scale."""
    made = [TotalBuild(), *(ScaleBuild(name) for name in TYPES)]
    for build, code in zip(made, compiled([build.unit() for build in made], arch), strict=True):
        found = usage(code, tmp_path)
        assert found.stack == found.local == 0 and found.registers * build.threads <= 65_536


# The main loops

Line = tuple[int, str]  # an instruction and where it is


def instructions(listing: str) -> list[Line]:
    return [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)]


def target(text: str) -> int | None:
    """Where a branch goes."""
    found = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
    return None if found is None else int(found[1], 16)


def loops(code: Sequence[Line]) -> list[list[Line]]:
    """The bodies that a branch backwards ends, which have special functions and no such loop inside."""
    spans = [(to, at) for at, text in code if (to := target(text)) is not None and to < at]
    bodies = {span: [line for line in code if span[0] <= line[0] <= span[1]] for span in spans}
    busy = {span for span, body in bodies.items() if sum("MUFU" in text for _, text in body) >= 8}
    inner = [
        span for span in busy if not any(x != span and span[0] <= x[0] and x[1] <= span[1] for x in busy)
    ]
    return [bodies[span] for span in sorted(inner)]


def most(body: Sequence[Line], pattern: str) -> int:
    """How many instructions of a kind any way through a loop has at most."""
    places = {at: k for k, (at, _) in enumerate(body)}
    following = [0] * (len(body) + 1)
    for k in reversed(range(len(body))):
        at, text = body[k]
        to = target(text)
        ways = []
        if re.match(r"(BRA(\.\w+)*\s+`?\(?0x|EXIT)", text) is None:
            ways.append(following[k + 1])
        if to is not None and to > at and to in places:
            ways.append(following[places[to]])
        following[k] = (re.search(pattern, text) is not None) + max(ways, default=0)
    return following[0]


def test_ways_through_a_loop() -> None:
    """Of two branches one is taken."""
    body = [
        (0, "MUFU.EX2 R0, R1"), (16, "@P0 BRA 0x40"), (32, "STG.E.128 R0"), (48, "BRA 0x60"),
        (64, "STG.E.128 R0"), (80, "STG.E.128 R1"), (96, "@!P1 BRA 0x0"),
    ]  # fmt: skip
    assert most(body, "MUFU") == 1 and most(body, "STG") == 2
    assert loops([*(line for line in body for _ in range(8)), (112, "EXIT")])


# Special functions of each loop for a vector of 8 classes: exponentials and logarithms.
SPECIAL = {
    "ForwardKL": ((16, 0), (16, 0)),
    "TVD": ((16, 0), (16, 0), (8, 0)),
    "JSD": ((16, 0), (24, 8), (8, 0)),
}


@pytest.mark.thorough(but=lambda arch, template: arch == "sm_90" or template == "JSD")
@pytest.mark.parametrize("template", SPECIAL)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_main_loops(arch: str, template: str, tmp_path: Path) -> None:
    """A class is read once and written once, 6 bytes of bfloat16, 16 at a time; and its special functions.

    All phases read shared memory; the last one writes the gradient and copies the next row there. Each loop
    is there twice: for logits of any size, too.
    """
    build, _ = Build(template).fitted(128_256, tuning.CUDA_SHARED)
    code = instructions(asked(cuda_build.compile_unit(build.unit(), arch), "-sass", tmp_path))
    assert not any(re.search(r"\b(LDL|STL)\b", text) for _, text in code)
    found = loops(code)
    special = [(most(body, r"MUFU\.EX2"), most(body, r"MUFU\.LG2")) for body in found]
    assert special == [both for both in SPECIAL[template] for _ in range(2)]
    for body in found:
        assert not any(re.search(r"\b(LDL|STL)\b|MUFU\.(RCP|RSQ|TANH)", text) for _, text in body)
        assert most(body, r"LDS\.128") >= 2
    for body in found[:-2]:
        assert not any(re.search(r"\b(LDG|LDGSTS|STG|LD|ST)\b", text) for _, text in body)
        # In the second of three phases g is kept: two vectors of float32.
        assert most(body, r"STS\.128") == (2 if len(found) == 6 and body in found[2:4] else 0)
    for body in found[-2:]:
        assert most(body, r"LDGSTS\S*\.128") == 2 and most(body, r"STG\.E\.EF\.128") == 1
        # What isn't 16 bytes is of a row's first and last vector.
        widths = {re.sub(r"^@\S+\s+", "", text).split()[0] for _, text in body if re.search(r"LDG|STG", text)}
        assert {w for w in widths if not w.endswith(".128")} <= {"LDG.E.U16", "STG.E.U16"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_main_loops_of_stored_teachers(arch: str, tmp_path: Path) -> None:
    """A class is read once and written once, 4 bytes of bfloat16, with two exponentials in all.

    The first loop sums, the second writes the gradient and copies the next row; each is there twice, for
    logits of any size, too. Either reads a byte that says which of a vector's classes are stored.
    """
    build, config = Build("ForwardKL", stored=True).fitted(128_256, tuning.CUDA_SHARED)
    assert config is not None and (config.cluster, config.threads, config.blocks) == (2, 1024, 1)
    code = instructions(asked(cuda_build.compile_unit(build.unit(), arch), "-sass", tmp_path))
    assert not any(re.search(r"\b(LDL|STL)\b", text) for _, text in code)
    found = loops(code)
    assert [(most(body, r"MUFU\.EX2"), most(body, r"MUFU\.(?!EX2)")) for body in found] == [(8, 0)] * 4
    for body in found[:2]:
        assert most(body, r"LDS\.128") == most(body, r"LDS\.U8") == 1
        assert not any(re.search(r"\b(LDG|LDGSTS|STG|LD|ST|STS)\b", text) for _, text in body)
    for body in found[2:]:
        assert most(body, r"LDGSTS\S*\.128") == 1 and most(body, r"STG\.E\.EF\.128") == 1
        assert most(body, r"STS\.U8") == most(body, r"LDS\.U8") == 1
        widths = {re.sub(r"^@\S+\s+", "", text).split()[0] for _, text in body if re.search(r"LDG|STG", text)}
        assert {w for w in widths if not w.endswith(".128")} <= {"LDG.E.U16", "STG.E.U16"}
