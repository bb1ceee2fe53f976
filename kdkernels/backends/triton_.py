"""The Triton backend, for CUDA, ROCm and XPU devices.

The kernels are in `triton_kernels.py`, which is imported with Triton itself, when first needed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..spec import Call

DEVICES = ("cuda", "xpu")  # ROCm's devices are called cuda, too


class TritonBackend:
    """Rows in Triton: gradient in forward, float32 or float64 arithmetic, any strides."""

    name = "triton"

    @cached_property
    def _missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; it comes with GPU builds of torch"
        return None

    @cached_property
    def _kernels(self) -> Any:
        from . import triton_kernels

        return triton_kernels

    def available(self, device: torch.device) -> str | None:
        """None on a GPU where Triton is installed, else why not."""
        if device.type not in DEVICES and not (device.type == "cpu" and interpreted()):
            return f"runs on {' and '.join(DEVICES)} tensors, these are on {device.type}"
        return self._missing

    def knows(self, divergence: str) -> str | None:
        """None: whatever the table of divergences has."""
        return None

    def supports(self, call: Call) -> str | None:
        """None, or what it doesn't do yet."""
        spec = call.spec
        if spec.student_noise or spec.teacher_noise:
            return "has no noise yet"
        if call.mixture is not None:
            return "has no mixtures yet"
        if spec.row.normaliser != "softmax" or spec.row.target:
            return f"has no {spec.divergence} yet"
        return None

    def forward(self, call: Call, keep: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, the stats where the spec asks for them, and what is kept for backward."""
        return self._kernels.forward(call, keep)

    def gradient(self, upstream: Tensor, call: Call, state: Tensor | None) -> Tensor:
        """The gradient alone, with the upstream factor applied before the one rounding."""
        return self._kernels.gradient(upstream, call, state)

    def scale(self, gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
        """The gradient times the upstream one (0-d, or one per row); in place and times 1 it does nothing."""
        return self._kernels.scale(gradient, upstream, in_place)


def interpreted() -> bool:
    """Whether Triton interprets the kernels, on CPU tensors: told so when they were imported, or now."""
    kernels = sys.modules.get(f"{__package__}.triton_kernels")
    if kernels is not None:
        return bool(kernels.INTERPRETED.value)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


BACKEND = TritonBackend()
