"""The Triton backend, for CUDA, ROCm and XPU devices.

Launches are in `triton_launch.py` and the kernels in `triton_kernels.py`, those of stored teachers in
`triton_sparse_launch.py` and `triton_sparse.py`, which are imported with Triton itself, when first needed.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ..divergences import BUILT_IN, TABLE
from ..spec import Call

PARAMS = 4  # of a divergence
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
    def _launch(self) -> Any:
        from . import triton_launch

        return triton_launch

    @cached_property
    def _launch_sparse(self) -> Any:
        from . import triton_sparse_launch

        return triton_sparse_launch

    def available(self, device: torch.device) -> str | None:
        """None on a GPU where Triton is installed, else why not."""
        if device.type not in DEVICES and not (device.type == "cpu" and interpreted()):
            return f"runs on {' and '.join(DEVICES)} tensors, these are on {device.type}"
        return self._missing

    def knows(self, divergence: str) -> str | None:
        """None, or why a registered one can't be compiled."""
        row = TABLE.get(divergence)
        if row is None or divergence in BUILT_IN:
            return None
        return _uncompilable(row.phi, row.g, len(row.params))

    def supports(self, call: Call) -> str | None:
        """None: all that the reference does."""
        return None

    def forward(
        self, call: Call, keep: str, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, the stats where the spec asks for them, and what is kept for backward.

        A gradient is written to `out` where that is given, contiguous; it may be the student's logits.
        """
        of = self._launch if call.sparse is None else self._launch_sparse
        return of.forward(call, keep, out)

    def gradient(
        self, upstream: Tensor, call: Call, state: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """The gradient alone, with the upstream factor applied before the one rounding."""
        of = self._launch if call.sparse is None else self._launch_sparse
        return of.gradient(upstream, call, state, out)

    def scale(self, gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
        """The gradient times the upstream one (0-d, or one per row); in place and times 1 it does nothing."""
        return self._launch.scale(gradient, upstream, in_place)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for something large."""
        return torch.empty(shape, dtype=dtype, device=device)


@cache
def _uncompilable(phi: Callable[..., Any], g: Callable[..., Any], params: int) -> str | None:
    if params > PARAMS:
        return f"takes divergences of up to {PARAMS} parameters, this one has {params}"
    for name, expression in (("phi", phi), ("g", g)):
        if not inspect.isfunction(expression) or expression.__name__ == "<lambda>" or expression.__closure__:
            return f"compiles plain functions, and {name} of this divergence is a lambda or a closure"
        try:
            source = ast.parse(textwrap.dedent(inspect.getsource(expression))).body
        except (OSError, TypeError, SyntaxError):
            source = []
        # A file that changed since gives the lines of something else.
        if not source or getattr(source[0], "name", None) != expression.__name__:
            return f"compiles from the source, and {name} of this divergence has none: define it in a file"
    return None


def interpreted() -> bool:
    """Whether Triton interprets the kernels, on CPU tensors: told so when they were imported, or now."""
    blocks = sys.modules.get(f"{__package__}.triton_blocks")
    if blocks is not None:
        return bool(blocks.INTERPRETED.value)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


BACKEND = TritonBackend()
