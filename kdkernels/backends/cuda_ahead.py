"""CUDA builds made before a call asks for them: on a machine without a GPU, or while nobody waits."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import torch

from .. import tuning
from ..divergences import TABLE
from . import cuda_build
from .cuda_build import DIVERGENCES, TYPES, AnyBuild, Build, ScaleBuild, TotalBuild

# alpha_beta has a template for each kind of parameters.
_TEMPLATES = {"alpha_beta": ("AlphaBeta", "AlphaBetaLimit", "AlphaBetaAny")}
_HARD = ("kNoHard", "kSharedHard", "kOwnHard")
_ARCHITECTURE = re.compile(r"sm_(\d+)(\d)")


class Made(NamedTuple):
    """A build that is there now.

    Attributes:
        build: What it is.
        arch: For what.
        seconds: What it took; next to nothing where it was there before.
    """

    build: AnyBuild
    arch: str
    seconds: float


def architecture_here() -> str | None:
    """What is built for this machine's GPU, where it has one that is new enough."""
    if not torch.cuda.is_available() or torch.version.hip is not None or cuda_build.missing() is not None:
        return None
    capability = torch.cuda.get_device_capability()
    return cuda_build.architecture(*capability) if capability >= (9, 0) else None


def builds(
    arch: str, vocab: int, dtype: torch.dtype, divergence: str, stored: bool = False
) -> list[AnyBuild]:
    """What calls of a divergence run for contiguous logits: with gradient, labels, T = 1, and without.

    Those of stored teachers, where it is that. Where the divergence takes none, there are none.

    Raises:
        ValueError: What there is no build for, with the reason.
    """
    found = _ARCHITECTURE.fullmatch(arch)
    if found is None or int(found[1]) < 9 or cuda_build.architecture(int(found[1]), int(found[2])) != arch:
        raise ValueError(f"no builds for {arch!r}: it must be sm_90 or later, and NVRTC must know it")
    if divergence not in DIVERGENCES:
        raise ValueError(f"no builds of {divergence!r}: it must be one of {', '.join(DIVERGENCES)}")
    shared = tuning.cuda_shared(int(found[1]))
    widest = tuning.cuda_widest(dtype.itemsize, shared, stored=stored)
    if not 0 < vocab <= widest:
        raise ValueError(f"no builds for {vocab:,} classes: it must be 1 to {widest:,} of this dtype")
    # Of float16 the gradient is computed in backward.
    modes = ("kLoss", "kScaledGradient" if dtype is torch.float16 else "kGradient")
    names = _TEMPLATES.get(divergence, (DIVERGENCES[divergence],))
    row = TABLE[divergence]
    if stored and (row.target or row.binary or row.normaliser != "softmax"):
        return []
    rows = [
        Build(name, type=TYPES[dtype], mode=mode, hard=hard, stored=stored).fitted(vocab, shared)[0]
        for name, mode, hard in itertools.product(names, modes, _HARD)
    ]
    return [*rows, TotalBuild(), ScaleBuild(TYPES[dtype])]


def make(wanted: list[tuple[AnyBuild, str]]) -> Iterator[Made]:
    """Makes builds, several at a time, and tells of each when it is there."""

    def one(build: AnyBuild, arch: str) -> Made:
        begin = time.perf_counter()
        cuda_build.cubin(build.unit(), arch)
        return Made(build, arch, time.perf_counter() - begin)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in as_completed([pool.submit(one, *each) for each in wanted]):
            yield done.result()
